"""CUDA graphs of small passes: one launch instead of some three hundred, which is what a short list's time goes to.

A pass is copied into the static buffers of the smallest bucket that holds it. Sequences beyond the pass's own are
empty, rows beyond its last token are whatever the bucket held before: no sequence owns them, so nothing reads them.
A bucket is captured when the first pass needs it, so that a pass of a size is always the same computation. That waits
for the device, computes the pass once more and empties PyTorch's cache of free memory, once a bucket.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch

from lastrerank.model import Model
from lastrerank.packing import PackedBatch

logger = logging.getLogger("lastrerank")

# One capture at a time in a process: each begins by waiting for the device, which would end another.
_capturing = threading.Lock()

# Tokens of a pass: a bucket is at most 255 rows too large. Above the last a pass fills the device, and launches are
# hidden behind it.
BUCKETS = tuple(range(256, 4096 + 1, 256))
# A prompt has at least about 119 tokens and a document adds at least 15: what a bucket can hold of each.
_SEQUENCE_TOKENS, _DOCUMENT_TOKENS = 119, 15


def empty_bucket(tokens: int, device: torch.device) -> PackedBatch:
    """Static buffers for passes of at most `tokens` tokens, holding one sequence."""
    sequences, reads = _room(tokens)
    cu_seqlens = torch.full((sequences + 1,), tokens, dtype=torch.int32, device=device)
    cu_seqlens[0] = 0
    return PackedBatch(
        ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.arange(tokens, device=device),
        cu_seqlens=cu_seqlens,
        seqlens=(tokens,) + (0,) * (sequences - 1),  # a bound: a graph can't know the lengths
        read_rows=torch.full((reads,), tokens - 1, device=device),
        max_positions=tokens,
    )


def _room(tokens: int) -> tuple[int, int]:
    """Sequences and read rows of a bucket."""
    return tokens // _SEQUENCE_TOKENS + 1, tokens // _DOCUMENT_TOKENS + 1


def bucket_of(batch: PackedBatch, buckets: tuple[int, ...] = BUCKETS) -> int | None:
    """Tokens of the smallest bucket that holds a pass: its tokens, its sequences and its read rows. None holds one with
    sequences that continue others: their kernel is another one."""
    if batch.prefixes is not None:
        return None
    for tokens in buckets:
        sequences, reads = _room(tokens)
        if batch.num_tokens <= tokens and len(batch.seqlens) <= sequences and len(batch.read_rows) <= reads:
            return tokens
    return None


def fill(bucket: PackedBatch, batch: PackedBatch) -> None:
    """Copy a pass that fits into the bucket's buffers."""
    tokens = batch.num_tokens
    bucket.ids[:tokens] = batch.ids
    bucket.positions[:tokens] = batch.positions
    bucket.cu_seqlens[: len(batch.cu_seqlens)] = batch.cu_seqlens
    bucket.cu_seqlens[len(batch.cu_seqlens) :] = tokens
    bucket.read_rows[: len(batch.read_rows)] = batch.read_rows
    bucket.read_rows[len(batch.read_rows) :] = len(bucket.ids) - 1


@dataclass(frozen=True)
class _Captured:
    bucket: PackedBatch
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor


class GraphedModel:
    """Captured passes of a model on a CUDA device. May be used from several threads.

    Memory, beyond the model's: the activations of the largest bucket once, because the graphs share one pool and are
    replayed one at a time. By count, not measured: 4,096 tokens at 12 KiB each, the MLP's chunk buffers and a library
    workspace are about 150 MiB at 0.6B in bf16.

    Args:
        model: its operations must launch the same kernels for every pass of a shape, without reading the device.
        device: where its weights are.
        buckets: tokens of each, ascending.
    """

    def __init__(self, model: Model, device: torch.device, buckets: tuple[int, ...] = BUCKETS) -> None:
        self._model, self._device, self.buckets = model, device, buckets
        self._lock = threading.Lock()
        self._captured: dict[int, _Captured] = {}
        self.failed: dict[int, Exception] = {}  # buckets that can't be captured, and why
        # Of captures alone. A library keeps a workspace for each stream it has seen: this one's is made within a
        # capture, so it belongs to the graphs' pool and nobody else is given it, whoever has the library drop it.
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    @property
    def captured(self) -> tuple[int, ...]:
        """Tokens of the buckets that are."""
        return tuple(sorted(self._captured))

    def capture(self) -> None:
        """All buckets, before passes need them. One that can't be captured, for a lack of memory or whatever a driver
        says, is in `failed`, with a warning."""
        with self._lock:
            for tokens in reversed(self.buckets):
                self._bucket(tokens)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor | None:
        """As `Model.hidden_states`, or None if no bucket holds the pass or it can't be captured."""
        tokens = bucket_of(batch, self.buckets)
        if tokens is None:
            return None
        with self._lock:
            captured = self._bucket(tokens)
            if captured is None:
                return None
            # The lock orders threads on the host; the event orders their streams on the device.
            stream = torch.cuda.current_stream(self._device)
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            fill(captured.bucket, batch)
            captured.graph.replay()
            hidden = captured.hidden[: len(batch.read_rows)].clone()
            self._done.record(stream)
            return hidden

    def _bucket(self, tokens: int) -> _Captured | None:
        """One, captured if it isn't; None once that has failed: such passes then launch their kernels one by one. Holds
        the lock."""
        # The largest first: the others then fit into its memory.
        for wanted in (self.buckets[-1], tokens):
            if wanted not in self._captured and wanted not in self.failed:
                try:
                    self._captured[wanted] = self._capture(wanted)
                except Exception as error:  # the ordinary pass may do without what it lacked
                    error.__traceback__ = error.__context__ = error.__cause__ = None  # they hold the pass's tensors
                    self.failed[wanted] = error
                    logger.warning("lists of %d tokens will take longer: no CUDA graph (%s)", wanted, error)
        return self._captured.get(tokens)

    @torch.inference_mode()
    def _capture(self, tokens: int) -> _Captured:
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        bucket, stream = empty_bucket(tokens, self._device), self._stream
        current = torch.cuda.current_stream(self._device)
        self._model.hidden_states(bucket)  # compiles kernels and sets libraries up, which a capture must not
        graph = torch.cuda.CUDAGraph()
        # Thread-local: what other threads do, an engine's among them, is no part of the capture. A capture that fails
        # may leave the thread on its stream: the outer one puts it back.
        options: dict[str, Any] = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
        with _capturing, torch.cuda.stream(current), torch.cuda.graph(graph, **options):
            hidden = self._model.hidden_states(bucket)
        return _Captured(bucket, graph, hidden)
