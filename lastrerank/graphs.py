"""CUDA graphs of small passes: one launch instead of some three hundred, which is what a short list's time goes to.

A pass is copied into the static buffers of the smallest bucket that holds it. Sequences beyond the pass's own are
empty, rows beyond its last token are whatever the bucket held before: no sequence owns them, so nothing reads them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from lastrerank.model import Model
from lastrerank.packing import PackedBatch

# Tokens of a pass: a bucket is at most 255 rows too large. Above the last a pass fills the device, and launches are
# hidden behind it.
BUCKETS = tuple(range(256, 4096 + 1, 256))
# A prompt has at least about 119 tokens and a document adds at least 15: what a bucket can hold of each.
_SEQUENCE_TOKENS, _DOCUMENT_TOKENS = 119, 15


def empty_bucket(tokens: int, device: torch.device) -> PackedBatch:
    """Static buffers for passes of at most `tokens` tokens, holding one sequence."""
    sequences, reads = tokens // _SEQUENCE_TOKENS + 1, tokens // _DOCUMENT_TOKENS + 1
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


def holds(bucket: PackedBatch, batch: PackedBatch) -> bool:
    """Whether the pass fits: its tokens, its sequences and its read rows. Sequences that continue others don't: their
    kernel is another one."""
    return (
        batch.prefixes is None
        and batch.num_tokens <= len(bucket.ids)
        and len(batch.cu_seqlens) <= len(bucket.cu_seqlens)
        and len(batch.read_rows) <= len(bucket.read_rows)
    )


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

    @torch.inference_mode()
    def __init__(self, model: Model, device: torch.device, buckets: tuple[int, ...] = BUCKETS) -> None:
        self._lock = threading.Lock()
        self._captured: list[_Captured] = []
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(device))
        pool = torch.cuda.graph_pool_handle()
        # One stream for every warm-up and capture: libraries keep a workspace for each they have seen.
        stream = torch.cuda.Stream(device)
        for tokens in reversed(buckets):  # the largest first: smaller ones then fit into its memory
            bucket = empty_bucket(tokens, device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                model.hidden_states(bucket)  # compiles kernels and sets libraries up, which a capture must not
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: what other threads do, an engine's among them, is no part of the capture.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                hidden = model.hidden_states(bucket)
            self._captured.insert(0, _Captured(bucket, graph, hidden))

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor | None:
        """As `Model.hidden_states`, or None if no bucket holds the pass."""
        for captured in self._captured:
            if holds(captured.bucket, batch):
                with self._lock:
                    # The lock orders threads on the host; the event orders their streams on the device.
                    stream = torch.cuda.current_stream(batch.ids.device)
                    stream.wait_event(self._done)
                    fill(captured.bucket, batch)
                    captured.graph.replay()
                    hidden = captured.hidden[: len(batch.read_rows)].clone()
                    self._done.record(stream)
                    return hidden
        return None
