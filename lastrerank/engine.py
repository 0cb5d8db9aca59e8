"""Many callers, one model: requests are tokenised on threads of their own, packed by tokens, and answered apart.

One thread runs passes. A pass takes the next block of every waiting request in turn, oldest first, until the token
budget is full: a request of many blocks can't keep a small one waiting, and the oldest is always in. What a request
gets is what it would get alone. The queue is bounded in tokens; a request that is cancelled or late is dropped before
the next pass; one that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lastrerank.prompt import EncodedBlock
from lastrerank.request import RerankRequest
from lastrerank.reranker import EncodedRequest, Reranker, ranked

logger = logging.getLogger("lastrerank")

# Tokens of a pass on a CPU: passes gain little from size there, and everyone in one waits for all of it.
_CPU_BATCH_TOKENS = 2_048
_MOST_BATCH_TOKENS = 131_072
# Jobs that are looked through for a pass.
_LOOK_AHEAD = 512
# Activations of a token, and the share of the free memory that a pass may take (see `lastrerank.model`).
_BYTES_PER_TOKEN, _MEMORY_SHARE = 12 * 1024, 0.5


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


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


class DeadlineError(TimeoutError):
    """The request's deadline passed before its scores were there."""


@dataclass(frozen=True)
class Answer:
    """results: as `Reranker.rerank` returns them. encoded: tokens, blocks and cuts. Seconds: tokenising, waiting for
    passes, and in passes."""

    results: list[dict[str, Any]]
    encoded: EncodedRequest
    tokenise_seconds: float
    queue_seconds: float
    inference_seconds: float


@dataclass(eq=False)
class _Job:
    request: RerankRequest
    future: Future[Answer]
    deadline: float | None
    reserved: int  # tokens held of the queue's bound
    refuse_cut: bool = False
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


class Engine:
    """Serves one `Reranker` to many threads or tasks. Close it, or use it as a context manager.

    Args:
        reranker: scores; with `deterministic=True` every block is its own pass.
        max_batch_tokens: of a pass; a longer block goes alone. Default: from the device's free memory.
        max_wait: seconds a pass waits for requests that are being tokenised when it starts.
        max_queue_tokens: bound of the queue, default 32 passes. One request is always taken by an empty queue.
        tokenizer_threads: that encode requests.
    """

    def __init__(
        self,
        reranker: Reranker,
        *,
        max_batch_tokens: int | None = None,
        max_wait: float = 0.005,
        max_queue_tokens: int | None = None,
        tokenizer_threads: int = 2,
    ) -> None:
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_queue_tokens", max_queue_tokens),
                            ("tokenizer_threads", tokenizer_threads)):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.reranker = reranker
        self.max_batch_tokens = max_batch_tokens or _device_budget(reranker.device)
        self.max_queue_tokens = max_queue_tokens or 32 * self.max_batch_tokens
        self.max_wait = max_wait
        self.statistics = Statistics()
        self._condition = threading.Condition()
        self._jobs: list[_Job] = []  # tokenised, oldest first
        self._encoding = self._queued_tokens = 0
        self._closing = self._abandoned = False
        self._tokenizers = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="lastrerank-tokenise")
        self._thread = threading.Thread(target=self._run, name="lastrerank-engine", daemon=True)
        self._thread.start()

    # What callers use

    def submit(
        self, request: RerankRequest | Mapping[str, Any], timeout: float | None = None, *, refuse_cut: bool = False
    ) -> Future[Answer]:
        """Queue a request; its `Answer` comes through the future, which may be cancelled at any time.

        timeout: seconds after which the future fails with `DeadlineError`. refuse_cut: a text over its cap fails the
        request with `TooLongError` instead of being cut.

        Raises:
            TypeError, ValueError: the request is bad; nothing is queued.
            OverloadedError: the queue is full.
            ClosedError: the engine is closing.
        """
        return self.submit_many([request], timeout, refuse_cut=refuse_cut)[0]

    def submit_many(
        self,
        requests: Sequence[RerankRequest | Mapping[str, Any]],
        timeout: float | None = None,
        *,
        refuse_cut: bool = False,
    ) -> list[Future[Answer]]:
        """Queue all of them or none; as `submit`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        jobs = []
        for request in requests:
            checked = RerankRequest.of(request)
            caps = self.reranker.check_caps(checked)
            # The caller's list may change before it is tokenised.
            checked = replace(checked, documents=tuple(checked.documents))
            jobs.append(_Job(checked, Future(), deadline, _estimated_tokens(checked, *caps), refuse_cut))
        estimate = sum(job.reserved for job in jobs)
        with self._condition:
            if self._closing:
                raise ClosedError("the engine is closing")
            if self._queued_tokens and self._queued_tokens + estimate > self.max_queue_tokens:
                self.statistics.refused += len(jobs)
                queued = f"{self._queued_tokens} tokens are queued, at most {self.max_queue_tokens} may be"
                raise OverloadedError(queued, self.retry_after())
            for job in jobs:
                self._tokenizers.submit(self._encode, job)
                self._queued_tokens += job.reserved
                self._encoding += 1
        return [job.future for job in jobs]

    def rerank(self, request: RerankRequest | Mapping[str, Any], timeout: float | None = None) -> Answer:
        """Submit and wait. Raises what `submit` and the request itself raise."""
        return self.submit(request, timeout).result()

    async def arerank(self, request: RerankRequest | Mapping[str, Any], timeout: float | None = None) -> Answer:
        """Submit and await; cancelling the task drops the request."""
        return await asyncio.wrap_future(self.submit(request, timeout))

    def retry_after(self) -> float:
        """Seconds until the tokens queued now should be through, at the speed seen so far; at least 1."""
        seen = self.statistics
        speed = seen.tokens / seen.busy_seconds if seen.busy_seconds else float("inf")
        return max(1.0, self._queued_tokens / speed)

    @property
    def queued_tokens(self) -> int:
        """Tokens of requests that are not answered, those being tokenised by estimate."""
        return self._queued_tokens

    @property
    def pending(self) -> int:
        """Requests that are not answered."""
        return self._encoding + len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether requests are taken and the thread that runs passes is there."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: bool = True) -> None:
        """Take no more requests; answer those that are queued, or with drain=False fail them. Returns when done."""
        with self._condition:
            self._closing = True
            if not drain:
                self._abandon(ClosedError("the engine was closed"))
            self._condition.notify_all()
        self._tokenizers.shutdown(wait=True)
        with self._condition:
            self._condition.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Tokenising threads

    def _encode(self, job: _Job) -> None:
        started = time.monotonic()
        error: Exception | None = None
        try:
            if not job.future.cancelled():
                encoded = self.reranker.encode(job.request)
                if job.refuse_cut and (encoded.query_cut or any(encoded.cut)):
                    raise TooLongError("query" if encoded.query_cut else f"documents[{encoded.cut.index(True)}]")
                job.encoded = encoded
        except BadRequestError as problem:
            error = problem
        except (ValueError, TypeError) as problem:
            error = BadRequestError(str(problem))
        except BaseException as problem:  # a panic of the tokenizers library is no Exception
            error = RuntimeError(f"tokenising failed: {type(problem).__name__}: {problem}")
        with self._condition:
            self._encoding -= 1
            job.ready = time.monotonic()
            job.tokenise_seconds = job.ready - started
            if job.encoded is not None:
                self._queued_tokens += job.encoded.num_tokens - job.reserved
                job.reserved = job.encoded.num_tokens
            if self._abandoned and error is None:
                error = ClosedError("the engine was closed")
            if error is not None or job.encoded is None:
                self._finish(job, error=error)
            elif not job.encoded.blocks:
                self._finish(job, Answer([], job.encoded, job.tokenise_seconds, 0.0, 0.0))
            else:
                self._jobs.append(job)
            self._condition.notify_all()

    # The thread that runs passes

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a fault of this file: nobody may wait for ever
            logger.exception("the engine has stopped")
            with self._condition:
                self._closing = True
                self._abandon(ClosedError(f"the engine has stopped: {type(error).__name__}: {error}"))

    def _abandon(self, error: Exception) -> None:
        """Fail everything that is queued and will be. Holds the condition."""
        self._abandoned = True
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            self._finish(job, error=error)

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or (self._closing and not self._encoding))
                if not self._jobs:
                    return
                self._condition.wait_for(
                    lambda: not self._encoding or sum(job.reserved for job in self._jobs) >= self.max_batch_tokens,
                    self.max_wait,
                )
                self._drop_dead()
                batch = self._next_pass()
            if batch:
                self._pass(batch)

    def _drop_dead(self) -> None:
        """Remove cancelled and late jobs. Holds the condition."""
        now = time.monotonic()
        for job in list(self._jobs):
            if job.future.cancelled():
                self._jobs.remove(job)
                self._finish(job)
            elif job.deadline is not None and now > job.deadline:
                self._jobs.remove(job)
                self._finish(job, error=DeadlineError("the deadline passed while the request was queued"))

    def _next_pass(self) -> list[tuple[_Job, list[EncodedBlock]]]:
        """Blocks for a pass, a block of each job in turn. The jobs stay queued. Holds the condition."""
        if not self._jobs:
            return []
        limit = 1 if self.reranker.deterministic else self.max_batch_tokens
        chosen: dict[int, list[EncodedBlock]] = {}
        tokens, turn = 0, 0
        while True:
            offered = [(n, job.left[turn]) for n, job in enumerate(self._jobs[:_LOOK_AHEAD]) if len(job.left) > turn]
            fitting = 0
            for n, block in offered:
                if chosen and tokens + len(block.ids) > limit:
                    continue
                if len(chosen.get(n, ())) == turn:  # an earlier block of this job didn't fit: its order is kept
                    chosen.setdefault(n, []).append(block)
                    tokens += len(block.ids)
                    fitting += 1
            if not fitting:
                break
            turn += 1
        batch = [(self._jobs[n], blocks) for n, blocks in chosen.items()]
        # Who was served goes behind those who were not, so that a pass too small for all is shared in turn.
        served = [job for job, _ in batch]
        self._jobs = [job for job in self._jobs if job not in served] + served
        return batch

    def _pass(self, batch: list[tuple[_Job, list[EncodedBlock]]]) -> None:
        """Run a pass and finish the jobs it completes. One that doesn't fit in memory is split; one that fails is
        repeated job by job, so that who fails, fails alone."""
        started = time.monotonic()
        blocks = [block for _, own in batch for block in own]
        try:
            parts = self.reranker.read_rows(blocks)
            if self.reranker.device.type == "cuda":  # what went wrong on the device shows here, not in another pass
                torch.cuda.synchronize(self.reranker.device)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the failed pass's tensors
            halves = _halves(batch)
            if halves is None:
                self._resolve(batch[0][0], error=error)
                return
            if _out_of_memory(error) and self.reranker.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning("a pass of %d blocks failed (%s): split", len(blocks), type(error).__name__)
            self.statistics.splits += 1
            for half in halves:
                if half := [(job, own) for job, own in half if job in self._jobs]:
                    self._pass(half)
            return
        seconds = time.monotonic() - started
        for job, own in batch:
            job.hidden += parts[: len(own)]
            del parts[: len(own)]
            job.inference_seconds += seconds
        self.statistics.passes += 1
        self.statistics.blocks += len(blocks)
        self.statistics.tokens += sum(len(block.ids) for block in blocks)
        self._answer([job for job, _ in batch if not job.left])
        self.statistics.busy_seconds += time.monotonic() - started

    def _answer(self, jobs: list[_Job]) -> None:
        """Score jobs whose blocks are all through."""
        for group in ([job] for job in jobs) if self.reranker.deterministic else ([jobs] if jobs else []):
            try:
                scored = self.reranker.score_read_rows(
                    [job.encoded for job in group if job.encoded is not None], [h for job in group for h in job.hidden]
                )
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                if len(group) == 1:
                    self._resolve(group[0], error=error)
                else:
                    for job in group:
                        self._answer([job])
                continue
            for job, own in zip(group, scored, strict=True):
                assert job.encoded is not None
                waited = max(0.0, time.monotonic() - job.ready - job.inference_seconds)
                try:
                    results = ranked(job.request, own)
                except Exception as error:
                    self._resolve(job, error=error)
                    continue
                self._resolve(
                    job, Answer(results, job.encoded, job.tokenise_seconds, waited, job.inference_seconds)
                )

    def _resolve(self, job: _Job, answer: Answer | None = None, error: Exception | None = None) -> None:
        with self._condition:
            if job in self._jobs:  # else the engine was closed meanwhile
                self._jobs.remove(job)
                self._finish(job, answer, error)

    def _finish(self, job: _Job, answer: Answer | None = None, error: Exception | None = None) -> None:
        """Give the job's tokens back and resolve its future. Holds the condition."""
        self._queued_tokens -= job.reserved
        job.hidden.clear()
        late = job.deadline is not None and answer is not None and time.monotonic() > job.deadline
        if late:
            answer, error = None, DeadlineError("the deadline passed while the request was scored")
        if not job.future.set_running_or_notify_cancel():
            self.statistics.dropped += 1
        elif error is not None:
            self.statistics.failed += 1
            job.future.set_exception(error)
        else:
            assert answer is not None
            self.statistics.answered += 1
            job.future.set_result(answer)


def _estimated_tokens(request: RerankRequest, query_cap: int, doc_cap: int) -> int:
    """Prompt tokens before they are counted: four characters a token, cut texts at their caps."""
    count = len(request.documents)
    fixed = 150 + 2 * min(len(request.query) // 4, query_cap) + min(len(request.instruction or "") // 4, query_cap)
    texts = sum(15 + min(len(text) // 4, doc_cap) for text in request.texts)
    return request.orders * (fixed * -(-count // request.block_size) + texts)


def _halves(batch: list[tuple[_Job, list[EncodedBlock]]]) -> list[list[tuple[_Job, list[EncodedBlock]]]] | None:
    """A failed pass in two: by jobs, or the blocks of its only job. None if it is a single block."""
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    job, blocks = batch[0]
    if len(blocks) == 1:
        return None
    return [[(job, blocks[: len(blocks) // 2])], [(job, blocks[len(blocks) // 2 :])]]


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)


def _device_budget(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    return max(4096, min(_MOST_BATCH_TOKENS, int(free * _MEMORY_SHARE) // _BYTES_PER_TOKEN))
