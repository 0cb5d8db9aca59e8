"""What the engine keeps of a request, and the queue: who is let in, who is in the next pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from lastrerank.prompt import EncodedBlock, EncodedRequest, PassRows
from lastrerank.request import RerankRequest, RerankResult
from lastrerank.texts import Steps

# Jobs that are looked through for a pass.
_LOOK_AHEAD = 512
# A request of more than this share of the queue's bound is large: it takes this share of it, and waits alone of its
# kind.
LARGE_SHARE = 4
# A job's turn ends when it has this share of a pass, if what its blocks share isn't longer.
TURN_SHARE = 4


class OverloadedError(RuntimeError):
    """The queue is full. retry_after: seconds after which there should be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadRequestError(ValueError):
    """The request can't be served, which only tokenising it has shown."""


class TooLongError(BadRequestError):
    """A text is over its cap and was not to be cut. where: which."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} is longer than its cap and was not to be cut")
        self.where = where


class TooLargeError(BadRequestError):
    """The request has more tokens than one may have."""


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


class DeadlineError(TimeoutError):
    """The request's deadline passed before its scores were there."""


@dataclass(frozen=True)
class Answer:
    """results: as `Reranker.rerank` returns them. encoded: tokens, blocks and cuts. Seconds: tokenising, waiting for
    passes, and in passes."""

    results: list[RerankResult]
    encoded: EncodedRequest
    tokenise_seconds: float
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class Job:
    """A request on its way."""

    request: RerankRequest
    future: Future[Answer]
    deadline: float | None
    reserved: int  # tokens it is counted with, by estimate until it is tokenised
    refuse_cut: bool = False
    group: Job | None = None  # the first of those that came in one call, which count as one request
    steps: Steps[EncodedRequest] | None = None
    encoded: EncodedRequest | None = None
    ready: float = 0.0
    tokenise_seconds: float = 0.0
    inference_seconds: float = 0.0
    hidden: list[torch.Tensor] = field(default_factory=list)

    @property
    def left(self) -> tuple[EncodedBlock, ...]:
        """Blocks that have not been through a pass."""
        assert self.encoded is not None
        return self.encoded.blocks[len(self.hidden) :]

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def is_dead(self) -> bool:
        """Nobody waits for it any more."""
        return self.future.cancelled() or self.is_late


@dataclass
class Statistics:
    """Counts since the engine was made."""

    passes: int = 0
    tokens: int = 0
    blocks: int = 0
    busy_seconds: float = 0.0
    answered: int = 0
    failed: int = 0
    refused: int = 0
    dropped: int = 0
    splits: int = 0


class Queue:
    """Requests that are not answered: those being tokenised, and `ready` ones, oldest first. Not thread-safe.

    Its bound is in tokens. A large request (more than a quarter of the bound) takes a quarter of it, whatever its size,
    and only one waits at a time: it can't fill the door for the small ones.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.ready: list[Job] = []
        self.encoding: set[Job] = set()

    @property
    def tokens(self) -> int:
        """Of everything that is not answered."""
        return sum(job.reserved for job in (*self.ready, *self.encoding))

    def has_room(self, jobs: Sequence[Job]) -> bool:
        """Whether these may be let in, all of them; an empty queue takes anything."""
        share = self.max_tokens // LARGE_SHARE
        if not self.ready and not self.encoding:
            return True
        requests: dict[int, int] = {}
        for job in (*self.ready, *self.encoding, *jobs):
            requests[id(job.group or job)] = requests.get(id(job.group or job), 0) + job.reserved
        one_large = sum(tokens > share for tokens in requests.values()) <= 1
        return one_large and sum(min(tokens, share) for tokens in requests.values()) <= self.max_tokens

    def remove(self, job: Job) -> None:
        """Of a job that is there."""
        if job in self.encoding:
            self.encoding.remove(job)
        else:
            self.ready.remove(job)

    def next_pass(self, most_tokens: int, without: Sequence[Job] = ()) -> list[tuple[Job, list[EncodedBlock]]]:
        """Blocks for a pass of at most `most_tokens` rows where it can be (see `PassRows`): a turn of each ready job
        after another. A turn is a block, and the next ones that share its beginning, up to a quarter of the pass or as
        many rows again as they share: by single blocks, a pass would compute many beginnings for one block each. The
        jobs stay ready; who is served goes behind those who are not, so that a pass too small for all is shared in
        turn."""
        chosen: dict[int, list[EncodedBlock]] = {}
        rows = PassRows()
        there = {n: job.left for n, job in enumerate(self.ready[:_LOOK_AHEAD]) if job not in without}
        while there:
            for n, left in list(there.items()):
                own, started = chosen.get(n, []), rows.total
                while len(own) < len(left):
                    block = left[len(own)]
                    if rows.total > started:
                        if block.prefix is None or block.prefix is not own[-1].prefix:
                            break
                        if rows.total - started >= max(most_tokens // TURN_SHARE, 2 * len(block.prefix.ids)):
                            break
                    if not rows.fits(block, most_tokens):
                        break
                    rows.add(block)
                    own.append(block)
                    chosen[n] = own
                if len(own) == len(left) or rows.total == started:  # done, or doesn't fit: its order is kept
                    del there[n]
        batch = [(self.ready[n], blocks) for n, blocks in chosen.items()]
        served = [job for job, _ in batch]
        self.ready = [job for job in self.ready if job not in served] + served
        return batch
