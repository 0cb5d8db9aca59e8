"""Many callers, one model: requests are tokenised on threads of their own, packed by tokens, and answered apart.

One thread runs passes. A pass takes the next block of every waiting request in turn, oldest first, until the token
budget is full: a request of many blocks can't keep a small one waiting, and the oldest is always in. Tokenising is
shared in turn, too, by slices. What a request gets is what it would get alone. The queue is bounded in tokens; work for
a request that is cancelled or late stops at the next slice or layer; one that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from lastrerank.jobs import (
    Answer,
    BadRequestError,
    ClosedError,
    DeadlineError,
    Job,
    OverloadedError,
    Queue,
    Statistics,
    TooLargeError,
    TooLongError,
)
from lastrerank.prompt import EncodedBlock, PassRows
from lastrerank.request import Document, RerankRequest
from lastrerank.reranker import Reranker, ranked

__all__ = [
    "Answer", "BadRequestError", "ClosedError", "DeadlineError", "Engine", "OverloadedError", "Statistics",
    "TooLargeError", "TooLongError",
]  # fmt: skip

logger = logging.getLogger("lastrerank")

# Tokens of a pass on a CPU: passes gain little from size there, and everyone in one waits for all of it.
_CPU_BATCH_TOKENS = 2_048
_MOST_BATCH_TOKENS = 131_072
# Activations of a token, and the share of the free memory that a pass may take (see `lastrerank.model`).
_BYTES_PER_TOKEN, _MEMORY_SHARE = 12 * 1024, 0.5


class _DeviceLostError(RuntimeError):
    """The device computes nothing any more in this process."""


class _StoppedError(Exception):
    """Nobody waits for this pass any more."""


class Engine:
    """Serves one `Reranker` to many threads or tasks. Close it, or use it as a context manager. It belongs to the
    process that made it: a forked child makes its own, over the same `Reranker`.

    Args:
        reranker: scores; with `deterministic=True` every block is its own pass.
        max_batch_tokens: rows of a pass, in which what prompts share counts once (see `PassRows`); a longer block goes
            alone. Default: from the device's free memory.
        max_wait: seconds a pass waits for requests that are being tokenised when it starts.
        max_queue_tokens: bound of the queue, default 32 passes. One request is always taken by an empty queue; one of
            more than a quarter of the bound takes a quarter, and only one such waits at a time.
        max_request_tokens: of a request, default 16 times the queue's bound.
        tokenizer_threads: that encode requests.
    """

    def __init__(
        self,
        reranker: Reranker,
        *,
        max_batch_tokens: int | None = None,
        max_wait: float = 0.005,
        max_queue_tokens: int | None = None,
        max_request_tokens: int | None = None,
        tokenizer_threads: int = 2,
    ) -> None:
        counts = {"max_batch_tokens": max_batch_tokens, "max_queue_tokens": max_queue_tokens,
                  "max_request_tokens": max_request_tokens, "tokenizer_threads": tokenizer_threads}  # fmt: skip
        for name, value in counts.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
        if not (isinstance(max_wait, (int, float)) and math.isfinite(max_wait) and max_wait >= 0):
            raise ValueError(f"max_wait is {max_wait!r}, expected seconds, 0 or more")
        self.reranker = reranker
        self.max_batch_tokens = max_batch_tokens or _device_budget(reranker.device)
        self.max_queue_tokens = max_queue_tokens or 32 * self.max_batch_tokens
        self.max_request_tokens = max_request_tokens or 16 * self.max_queue_tokens
        self.max_wait = max_wait
        self.statistics = Statistics()
        self._process = os.getpid()
        self._condition = threading.Condition()
        self._queue = Queue(self.max_queue_tokens)
        self._closing = self._abandoned = False
        self._tokenizers = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="lastrerank-tokenise")
        self._thread = threading.Thread(target=self._run, name="lastrerank-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="lastrerank-deadlines", daemon=True).start()

    # What callers use

    def submit(
        self, request: RerankRequest | Mapping[str, Any], timeout: float | None = None, *, refuse_cut: bool = False
    ) -> Future[Answer]:
        """Queue a request; its `Answer` comes through the future, which may be cancelled at any time.

        timeout: seconds after which the future fails with `DeadlineError`. refuse_cut: a text over its cap fails the
        request with `TooLongError` instead of being cut.

        Raises:
            TypeError, ValueError: the request is bad; nothing is queued.
            TooLargeError: it has more tokens than a request may have.
            OverloadedError: the queue is full.
            ClosedError: the engine is closing, or belongs to another process.
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
        if os.getpid() != self._process:
            raise ClosedError("this Engine's threads are in the process that made it: make an Engine in this one")
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout >= 0):
            raise ValueError(f"timeout is {timeout!r}, expected seconds, 0 or more")
        deadline = None if timeout is None else time.monotonic() + timeout
        jobs: list[Job] = []
        for i, request in enumerate(requests):
            checked = RerankRequest.of(request, "request" if len(requests) == 1 else f"requests[{i}]")
            reserved = self.reranker.encoder.estimated_rows(checked)
            # The caller's list may change before it is tokenised.
            checked = replace(checked, documents=tuple(checked.documents))
            jobs.append(Job(checked, Future(), deadline, reserved, refuse_cut))
            jobs[-1].group = jobs[0]
        self._check_size(sum(job.reserved for job in jobs))
        with self._condition:
            if self._closing:
                raise ClosedError("the engine is closing")
            if not self._queue.has_room(jobs):
                self.statistics.refused += len(jobs)
                queued = f"{self._queue.tokens} tokens are queued, at most {self.max_queue_tokens} may be"
                raise OverloadedError(queued, self.retry_after())
            for job in jobs:
                self._queue.encoding.add(job)
                self._tokenizers.submit(self._encode, job)
            self._condition.notify_all()
        return [job.future for job in jobs]

    def rerank(
        self,
        request: RerankRequest | Mapping[str, Any] | str,
        documents: Sequence[Document] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> Answer:
        """Submit and wait: a request, or a query and documents with options as `Reranker.rerank` takes them. Raises
        what `submit` and the request itself raise."""
        return self.submit(_request(request, documents, options), timeout).result()

    async def arerank(
        self,
        request: RerankRequest | Mapping[str, Any] | str,
        documents: Sequence[Document] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> Answer:
        """Submit and await, as `rerank`; cancelling the task drops the request."""
        return await asyncio.wrap_future(self.submit(_request(request, documents, options), timeout))

    def retry_after(self) -> float:
        """Seconds until the tokens queued now should be through, at the speed seen so far; at least 1."""
        seen = self.statistics
        speed = seen.tokens / seen.busy_seconds if seen.busy_seconds else float("inf")
        return max(1.0, self._queue.tokens / speed)

    @property
    def queued_tokens(self) -> int:
        """Tokens of requests that are not answered, those being tokenised by estimate."""
        with self._condition:
            return self._queue.tokens

    @property
    def pending(self) -> int:
        """Requests that are not answered."""
        with self._condition:
            return len(self._queue.encoding) + len(self._queue.ready)

    @property
    def is_full(self) -> bool:
        """Whether a small request would be refused."""
        with self._condition:
            return self._queue.tokens > 0 and not self._queue.has_room([])

    @property
    def alive(self) -> bool:
        """Whether requests are taken and the thread that runs passes is there."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; answer those that are queued, within `timeout` seconds if given, and fail the others,
        or with drain=False all of them. Returns when done, with a timeout at most a second after it: a running pass
        stops at its next layer."""
        if os.getpid() != self._process:
            return
        end = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            if drain:
                left = None if end is None else end - time.monotonic()
                self._condition.wait_for(lambda: not self._queue.encoding, left)
        if drain:
            self._thread.join(None if end is None else max(0.0, end - time.monotonic()))
        self.abandon()
        # A layer of a very long block takes long; both threads end with the process whatever they are at.
        self._thread.join(None if timeout is None else 1.0)
        self._tokenizers.shutdown(wait=timeout is None, cancel_futures=True)

    def abandon(self) -> None:
        """Take no more requests and fail those that are not answered with `ClosedError`, now."""
        with self._condition:
            self._closing = True
            self._abandon(ClosedError("the engine was closed"))
            self._condition.notify_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Tokenising threads

    def _encode(self, job: Job) -> None:
        """A slice of the work, and back to the end of the line."""
        started = time.monotonic()
        error: Exception | None = None
        try:
            if job.is_late:
                raise DeadlineError("the deadline passed while the request was tokenised")
            if not job.future.cancelled() and not self._abandoned:
                job.steps = job.steps or self.reranker.encode_by_slices(job.request)
                try:
                    next(job.steps)
                except StopIteration as end:
                    job.encoded = self._checked(job, end.value)
                else:
                    job.tokenise_seconds += time.monotonic() - started
                    self._tokenizers.submit(self._encode, job)
                    return
        except (BadRequestError, DeadlineError) as problem:
            error = problem
        except (ValueError, TypeError) as problem:
            error = BadRequestError(str(problem))
        except BaseException as problem:  # a panic of the tokenizers library is no Exception
            error = RuntimeError(f"tokenising failed: {type(problem).__name__}: {problem}")
        job.steps = None
        with self._condition:
            if job not in self._queue.encoding:  # the engine was closed meanwhile
                return
            self._queue.encoding.remove(job)
            job.ready = time.monotonic()
            job.tokenise_seconds += job.ready - started
            if error is not None or job.encoded is None:
                self._finish(job, error=error)
            elif not job.encoded.blocks:
                self._finish(job, Answer([], job.encoded, job.tokenise_seconds, 0.0, 0.0))
            else:
                self._queue.ready.append(job)
            self._condition.notify_all()

    def _checked(self, job: Job, encoded: Any) -> Any:
        if job.refuse_cut and (encoded.query_cut or any(encoded.cut)):
            raise TooLongError("query" if encoded.query_cut else f"documents[{encoded.cut.index(True)}]")
        job.reserved = encoded.rows(self.max_batch_tokens)  # of passes of its own; others may stand between
        self._check_size(job.reserved)
        return encoded

    def _check_size(self, tokens: int) -> None:
        if tokens > self.max_request_tokens:
            raise TooLargeError(
                f"the request has about {tokens} tokens, at most {self.max_request_tokens} may be in one"
            )

    # The thread that watches deadlines: a pass may take longer than there is time

    def _watch(self) -> None:
        with self._condition:
            while self._thread.is_alive() and not self._abandoned:
                self._drop_late()
                jobs = (*self._queue.ready, *self._queue.encoding)
                nearest = min((job.deadline for job in jobs if job.deadline is not None), default=None)
                # With nothing to wait for, whoever comes next or closes the engine notifies. Python waits no centuries.
                left = 3600.0 if nearest is None else min(3600.0, max(0.0, nearest - time.monotonic()))
                self._condition.wait(left + 1e-3)

    def _drop_late(self) -> None:
        """Fail jobs whose time is up. Holds the condition."""
        for job in [job for job in (*self._queue.ready, *self._queue.encoding) if job.is_late]:
            self._queue.remove(job)
            self._finish(job, error=DeadlineError("the deadline passed before there was an answer"))

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
        jobs = [*self._queue.ready, *self._queue.encoding]
        self._queue.ready, self._queue.encoding = [], set()
        for job in jobs:
            self._finish(job, error=error)

    def _serve(self) -> None:
        queue = self._queue
        while True:
            with self._condition:
                self._condition.wait_for(lambda: queue.ready or (self._closing and not queue.encoding))
                if not queue.ready:
                    return
                self._condition.wait_for(
                    lambda: not queue.encoding or sum(job.reserved for job in queue.ready) >= self.max_batch_tokens,
                    self.max_wait,
                )
                self._drop_dead()
                batch = self._next_pass()
            if batch:
                self._pass(batch)

    def _drop_dead(self) -> None:
        """Remove cancelled and late jobs. Holds the condition."""
        self._drop_late()
        for job in [job for job in self._queue.ready if job.future.cancelled()]:
            self._queue.remove(job)
            self._finish(job)

    def _next_pass(self, without: Sequence[Job] = ()) -> list[tuple[Job, list[EncodedBlock]]]:
        """Holds the condition."""
        return self._queue.next_pass(1 if self.reranker.deterministic else self.max_batch_tokens, without)

    def _pass(self, batch: list[tuple[Job, list[EncodedBlock]]]) -> None:
        """Run a pass and finish the jobs it completes. One that doesn't fit in memory is split; one that fails is
        repeated job by job, so that who fails, fails alone. Between the layers of a block that is longer than a pass,
        passes of others are run."""
        started = time.monotonic()
        blocks = [block for _, own in batch for block in own]
        rows = PassRows().add(*blocks)
        is_long = rows > self.max_batch_tokens

        def on_layer(tokens: int) -> None:
            if self._abandoned or all(job.is_dead for job, _ in batch):
                raise _StoppedError
            if is_long:
                with self._condition:
                    self._drop_dead()
                    others = self._next_pass(without=[job for job, _ in batch])
                if others and PassRows().add(*(b for _, own in others for b in own)) <= self.max_batch_tokens:
                    self._pass(others)

        try:
            parts = self.reranker.read_rows(blocks, on_layer=on_layer)
            if self.reranker.device.type == "cuda":  # what went wrong on the device shows here, not in another pass
                torch.cuda.current_stream(self.reranker.device).synchronize()
        except _StoppedError:
            self.statistics.busy_seconds += time.monotonic() - started
            return  # the dead are dropped before the next pass
        except Exception as error:
            self._check_device(error)
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
                if half := [(job, own) for job, own in half if job in self._queue.ready]:
                    self._pass(half)
            return
        seconds = time.monotonic() - started
        for job, own in batch:
            job.hidden += parts[: len(own)]
            del parts[: len(own)]
            job.inference_seconds += seconds
        self.statistics.passes += 1
        self.statistics.blocks += len(blocks)
        self.statistics.tokens += rows
        self._answer([job for job, _ in batch if not job.left])
        self.statistics.busy_seconds += time.monotonic() - started

    def _check_device(self, error: Exception) -> None:
        """After a failure: a device that is lost fails every pass from now on, so the engine ends, and health says so.

        Raises:
            _DeviceLostError: it doesn't compute any more.
        """
        if not self.reranker.device_answers():
            raise _DeviceLostError(f"{self.reranker.device} doesn't compute any more after {error}") from error

    def _answer(self, jobs: list[Job]) -> None:
        """Score jobs whose blocks are all through."""
        for group in ([job] for job in jobs) if self.reranker.deterministic else ([jobs] if jobs else []):
            try:
                scored = self.reranker.score_read_rows(
                    [job.encoded for job in group if job.encoded is not None], [h for job in group for h in job.hidden]
                )
            except Exception as error:
                self._check_device(error)
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

    def _resolve(self, job: Job, answer: Answer | None = None, error: Exception | None = None) -> None:
        with self._condition:
            if job in self._queue.ready:  # else the engine was closed meanwhile
                self._queue.ready.remove(job)
                self._finish(job, answer, error)

    def _finish(self, job: Job, answer: Answer | None = None, error: Exception | None = None) -> None:
        """Resolve the future of a job that has left the queue. Holds the condition."""
        job.hidden.clear()
        if answer is not None and job.is_late:
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


def _request(
    request: RerankRequest | Mapping[str, Any] | str, documents: Sequence[Document] | None, options: dict[str, Any]
) -> RerankRequest | Mapping[str, Any]:
    if isinstance(request, str):
        if documents is None:
            raise TypeError("documents is missing: expected a request, or a query and documents")
        return RerankRequest(request, documents, **options)
    if documents is not None or options:
        raise TypeError("documents and options are given beside a request, expected them in it")
    return request


def _halves(batch: list[tuple[Job, list[EncodedBlock]]]) -> list[list[tuple[Job, list[EncodedBlock]]]] | None:
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
