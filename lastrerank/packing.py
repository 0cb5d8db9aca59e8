"""Prompts to one packed batch: rows of all sequences laid end to end, no padding, no mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lastrerank.ops import Prefixes
from lastrerank.prompt import EncodedBlock, Prefix


@dataclass(frozen=True)
class PackedBatch:
    """Everything one pass over the decoder needs. T rows (tokens), S sequences, R rows that are read.

    ids: int64 `[T]`. positions: int64 `[T]`, from 0 in each sequence, or from where the one that it continues ends.
    cu_seqlens: int32 `[S + 1]`, sequence s is rows `cu_seqlens[s]` to `cu_seqlens[s + 1]`. seqlens: the same as Python
    integers, for backends that loop on the host. read_rows: int64 `[R]`, ascending. max_positions: bound of the
    positions. prefixes: which sequences continue which; None where none does.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: tuple[int, ...]
    read_rows: torch.Tensor
    max_positions: int
    prefixes: Prefixes | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.seqlens)


@dataclass(frozen=True)
class ReadoutMaps:
    """Where scores come from in the read rows `[R, D]` of S sequences that belong to G requests.

    doc_rows: int64 `[N]` and query_rows: int64 `[S]` index the read rows. doc_sequence: int64 `[N]`, the sequence of
    each document. sequence_request: int64 `[S]`, the request of each sequence; a request's blocks are fused.
    """

    doc_rows: torch.Tensor
    query_rows: torch.Tensor
    doc_sequence: torch.Tensor
    sequence_request: torch.Tensor


def pack(blocks: Sequence[EncodedBlock], device: torch.device) -> PackedBatch:
    """Lay blocks end to end on `device`. Per block, its N documents' rows and then its query's, if there is one, are
    read. What several of them share is a sequence of its own, before the first that continues it."""
    users = Counter(block.prefix for block in blocks)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    continued: list[tuple[int, int]] = []  # of each sequence, start and length of what it continues
    read: list[np.ndarray] = []
    starts: dict[Prefix, int] = {}
    total = 0

    def lay(own: np.ndarray, start: int, shared: int) -> None:
        nonlocal total
        ids.append(own)
        positions.append(np.arange(shared, shared + len(own)))
        continued.append((start, shared))
        total += len(own)

    for block in blocks:
        prefix = block.prefix if users[block.prefix] > 1 else None
        if prefix is not None and prefix not in starts:
            starts[prefix] = total
            lay(prefix.ids, 0, 0)
        shared = 0 if prefix is None else len(prefix.ids)
        read.append(block.read_rows - shared + total)
        lay(block.ids if prefix is None else block.own_ids, 0 if prefix is None else starts[prefix], shared)
    lengths = [len(own) for own in ids]

    return PackedBatch(
        ids=_put(np.concatenate(ids).astype(np.int64), device),
        positions=_put(np.concatenate(positions), device),
        cu_seqlens=_put(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device),
        seqlens=tuple(lengths),
        read_rows=_put(np.concatenate(read), device),
        max_positions=max(map(len, blocks)),
        prefixes=Prefixes(_put(np.array(continued, np.int32), device), tuple(continued)) if starts else None,
    )


def readout_maps(doc_counts: Sequence[int], sequence_request: Sequence[int], device: torch.device) -> ReadoutMaps:
    """The readout of sequences with `doc_counts[s]` documents each, rows as `pack` orders them."""
    counts = np.asarray(doc_counts, np.int64)
    sequence = np.repeat(np.arange(len(counts)), counts)
    query_rows = np.cumsum(counts + 1) - 1

    return ReadoutMaps(
        doc_rows=_put(np.arange(len(sequence)) + sequence, device),
        query_rows=_put(query_rows, device),
        doc_sequence=_put(sequence, device),
        sequence_request=_put(np.asarray(sequence_request, np.int64), device),
    )


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """To the device without waiting for it: a pass is usually running there."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
