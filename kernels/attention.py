"""Causal grouped-query attention over packed sequences of any length, in the flash form: no `[T, T]` tensor.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j    over j <= i of i's sequence, with a window i - j < window

A sequence may continue another one: its rows see that one's rows first (unmasked but for a window), then their own, in
one running softmax. q `[T, Hq, d]`, k and v `[T, Hkv, d]`, any row stride, heads contiguous; with `rows`, q is
`[R, Hq, d]`: the queries at these rows only. A tile holds BLOCK_Q positions times all query heads of one KV head, so
keys and values are read once for the group. Logits, softmax and accumulator in fp32 (exp2, with log2(e) folded into the
scale), probabilities rounded to v's dtype. A program belongs to one sequence, and its tiles depend on model constants
and on whether a sequence of the pass continues another one: neighbours can't change a result otherwise. Output may be
written over q.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (BLOCK_M = positions * group, BLOCK_N = keys, warps, stages), each the largest that spills nothing on its chip by
# `python -m bench.compile_kernels`. Hopper and data-centre Blackwell feed their matrix units from shared memory;
# elsewhere operands live in registers, so key tiles are half as tall. fp32 has no exact matrix unit.
_HEAD_DIMS = (64, 128)
_FP32_TILE = (32, 32, 8, 1)
_TILES = {"sm_90": (128, 64, 8, 3), "sm_100": (128, 64, 8, 2), "hip": (128, 64, 8, 2), "other": (128, 32, 8, 3)}
# Where the kernel of sequences that continue others needs another one.
_CONTINUED_TILES = {"sm_100": (128, 64, 8, 3)}


@triton.jit
def _tiles(
    acc, top, total, q, k_ptr, v_ptr, k_row_stride, v_row_stride, positions, begin, end, length, scale_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """Keys begin .. end - 1 (a whole number of tiles from begin) into the running softmax."""
    columns = tl.arange(0, HEAD_DIM)  # [HEAD_DIM]
    row = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_tile = k_ptr + row.to(tl.int64)[:, None] * k_row_stride + columns[None, :]  # [BLOCK_N, HEAD_DIM]
    v_tile = v_ptr + row.to(tl.int64)[:, None] * v_row_stride + columns[None, :]
    for start in range(begin, end, BLOCK_N):
        keys = start + row
        k = tl.load(k_tile + tl.cast(start, tl.int64) * k_row_stride, (keys < length)[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            # Of what is continued every key is seen, and none beyond its end.
            visible = (keys < length)[None, :] if BEFORE else keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible = visible & (positions[:, None] - keys[None, :] < window)
            logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))  # [BLOCK_M], raw logits
        # A row that has seen no key yet has -inf on both sides.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top) * scale_log2
        p = tl.exp2(logits * scale_log2 - safe[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(top * scale_log2 - safe)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_tile + tl.cast(start, tl.int64) * v_row_stride, (keys < length)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["window"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, row_bounds_ptr, rows_ptr, prefixes_ptr,
    q_row_stride, k_row_stride, v_row_stride, out_row_stride, scale_log2, window,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last positions see the most keys: heavy tiles first
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    q_start = tl.load(row_bounds_ptr + sequence).to(tl.int64)
    count = (tl.load(row_bounds_ptr + sequence + 1) - q_start).to(tl.int32)
    if tile * BLOCK_Q < count:
        m = tl.arange(0, BLOCK_M)  # [BLOCK_M]: position-major, the group's heads beside each other
        row = tile * BLOCK_Q + m // GROUP
        valid = (row < count) & (m // GROUP < BLOCK_Q)
        q_row = q_start + row
        positions = (tl.load(rows_ptr + q_row, valid, other=0) - start).to(tl.int32) if HAS_ROWS else row
        highest = tl.max(tl.where(valid, positions, 0), axis=0)
        lowest = tl.min(tl.where(valid, positions, length), axis=0)
        columns = tl.arange(0, HEAD_DIM)
        head = kv_head * GROUP + m % GROUP
        inner = head[:, None] * HEAD_DIM + columns[None, :]
        q = tl.load(q_ptr + q_row[:, None] * q_row_stride + inner, valid[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]
        k_ptr += kv_head * HEAD_DIM
        v_ptr += kv_head * HEAD_DIM

        acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if HAS_PREFIX:
            before_start = tl.load(prefixes_ptr + 2 * sequence).to(tl.int64)
            before = tl.load(prefixes_ptr + 2 * sequence + 1)
            first = 0
            if HAS_WINDOW:
                first = tl.minimum(tl.maximum(0, before + lowest - window + 1) // BLOCK_N * BLOCK_N, before)
            # One masked loop: another for whole tiles would spill on sm_80.
            acc, top, total = _tiles(
                acc, top, total, q, k_ptr + before_start * k_row_stride, v_ptr + before_start * v_row_stride,
                k_row_stride, v_row_stride, positions + before, first, before, before, scale_log2, window,
                HEAD_DIM, BLOCK_N, True, HAS_WINDOW, True,
            )  # fmt: skip
        k_ptr += start * k_row_stride
        v_ptr += start * v_row_stride
        # Three ranges of whole tiles: the window's edge (masked), what every row sees, and the diagonal (masked).
        edge = 0
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(0, lowest - window + 1) // BLOCK_N * BLOCK_N
            edge = tl.minimum(tl.cdiv(tl.maximum(0, highest - window + 1), BLOCK_N) * BLOCK_N, highest + 1)
        full = tl.maximum(edge, (lowest + 1) // BLOCK_N * BLOCK_N)
        if HAS_WINDOW:
            acc, top, total = _tiles(
                acc, top, total, q, k_ptr, v_ptr, k_row_stride, v_row_stride, positions, begin, edge, length,
                scale_log2, window, HEAD_DIM, BLOCK_N, True, HAS_WINDOW,
            )  # fmt: skip
            # The edge range ends on a tile boundary unless it reached the diagonal's end.
            edge = tl.cdiv(edge, BLOCK_N) * BLOCK_N
            full = tl.maximum(edge, full)
        acc, top, total = _tiles(
            acc, top, total, q, k_ptr, v_ptr, k_row_stride, v_row_stride, positions, edge, full, length,
            scale_log2, window, HEAD_DIM, BLOCK_N, False, HAS_WINDOW,
        )  # fmt: skip
        acc, top, total = _tiles(
            acc, top, total, q, k_ptr, v_ptr, k_row_stride, v_row_stride, positions, full, highest + 1, length,
            scale_log2, window, HEAD_DIM, BLOCK_N, True, HAS_WINDOW,
        )  # fmt: skip
        result = acc / total[:, None]
        target = out_ptr + q_row[:, None] * out_row_stride + inner
        tl.store(target, result.to(out_ptr.dtype.element_ty), valid[:, None])


def _tile(dtype: torch.dtype, continued: bool) -> tuple[int, int, int, int]:
    """The tile for this process's GPU: by chip and dtype only, so that a result never depends on its company."""
    if dtype == torch.float32:
        return _FP32_TILE
    if triton.knobs.runtime.interpret:
        return _TILES["other"]
    target = triton.runtime.driver.active.get_current_target()
    chip = "hip" if target.backend == "hip" else f"sm_{target.arch}"
    own = _TILES.get(chip, _TILES["other"])
    return _CONTINUED_TILES.get(chip, own) if continued else own


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    window: int | None,
    scale: float,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    prefixes: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `lastrerank.ops.Operations.attention`; max_seqlen bounds the sequences' own lengths, prefixes is int32
    `[S, 2]`.

    Raises:
        ValueError: a head width or layout that the kernel doesn't serve.
    """
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and k.shape[1] > 0
    if not fits or q.shape[1] % k.shape[1] or len(q) != len(k if rows is None else rows):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, and rows "
            f"{None if rows is None else tuple(rows.shape)}"
        )
    if out is not None and (out.shape != q.shape or out.stride(2) != 1):
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}, expected q's shape")
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    if head_dim not in _HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, expected one of {_HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != head_dim):
            raise ValueError(f"{name} has strides {x.stride()}: the heads of a row must be contiguous")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    block_m, block_n, warps, stages = _tile(q.dtype, prefixes is not None)
    # The kernel knows no stride of what has one dimension.
    cu_seqlens, rows = cu_seqlens.contiguous(), None if rows is None else rows.contiguous()
    if prefixes is not None and prefixes.shape != (len(cu_seqlens) - 1, 2):
        raise ValueError(f"prefixes has shape {tuple(prefixes.shape)}, expected [{len(cu_seqlens) - 1}, 2]")
    table = cu_seqlens if prefixes is None else prefixes.contiguous()
    bounds = cu_seqlens if rows is None else torch.searchsorted(rows, cu_seqlens.to(rows.dtype))
    most = max_seqlen if rows is None else min(max_seqlen, len(rows))
    grid = (triton.cdiv(most, block_m // group), k.shape[1], len(cu_seqlens) - 1)
    _attention_kernel[grid](
        q, k, v, out, cu_seqlens, bounds, cu_seqlens if rows is None else rows, table,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), scale * 1.4426950408889634, window or 0,
        HEAD_DIM=head_dim, GROUP=group, BLOCK_M=block_m, BLOCK_N=block_n, HAS_ROWS=rows is not None,
        HAS_WINDOW=window is not None, HAS_PREFIX=prefixes is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
