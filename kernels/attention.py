"""Causal grouped-query attention over packed sequences of any length, in the flash form: no `[T, T]` tensor.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j    over j <= i of i's sequence, with a window i - j < window

A sequence may continue another one: its rows see that one's rows first (unmasked but for a window), then their own, in
one running softmax. q `[T, Hq, d]`, k and v `[T, Hkv, d]`, any row stride, heads contiguous; with `rows`, q is
`[R, Hq, d]`: the queries at these rows only. A tile holds BLOCK_Q positions times all query heads of one KV head, so
keys and values are read once for the group. Logits, softmax and accumulator in fp32 (exp2, with log2(e) folded into the
scale), probabilities rounded to v's dtype. Output may be written over q.

A program belongs to one sequence, and its tiles depend on model constants alone: neighbours can't change a result. Nor
do they choose its kernel, where a chip has one of its own (`attention_hopper`): that one takes 16-bit numbers whose
rows are aligned, as a model's are, and of a pass the sequences that continue none. Whether the copy engine fetches
whole tiles for the kernel here depends on alignment and the number of rows; what is fetched, so the result, does not.

Work is a list of (sequence, tile of its rows), heaviest first over all sequences (`tiles_of`), a program for each and
KV head, heads fastest: the last programs to start are the shortest, and none is without work but those a static bound
adds.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# (BLOCK_M = positions * group, BLOCK_N = keys of a tile, warps, stages, tiles of a step: two where the matrix unit
# works beside the others), each the largest that spills nothing on its chip by `python -m bench.compile_kernels`.
# Hopper and data-centre Blackwell feed their matrix units from shared memory; elsewhere operands live in registers, so
# key tiles are half as tall. fp32 has no exact matrix unit.
HEAD_DIMS = (64, 128)
_FP32_TILE = (32, 32, 8, 1, 1)
TILES = {
    "sm_90": (128, 64, 8, 2, 2), "sm_100": (128, 64, 8, 2, 2), "sm_103": (128, 64, 8, 2, 2),
    "hip": (128, 64, 8, 2, 1), "other": (128, 32, 8, 3, 1), "other 64": (128, 64, 8, 2, 1),
}  # fmt: skip
# Of the few rows that the last layer reads: small, so that they are spread over the whole chip.
_ROWS_TILE = (16, 32, 8, 3, 1)
# Query heads of a KV head: a tile holds one position's at least.
MOST_GROUP = _ROWS_TILE[0]
# By chip, a kernel of its own. It is written in what Triton has since 3.6 and calls experimental: 3.5 imports it, and
# fails to compile it.
OWN: dict[str, ModuleType] = {}
try:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        raise ImportError(f"Triton is {triton.__version__}, expected 3.6 or newer")
    from lastrerank.kernels import attention_hopper

    OWN["sm_90"] = attention_hopper
except (ImportError, AttributeError) as error:
    logging.getLogger("lastrerank").info("Hopper GPUs go without their own attention kernel: %s", error)
# Chips whose copy engine fetches whole tiles (TMA). sm_120 has one, and compiled with it keeps 8 bytes on the stack.
_COPY_ENGINE = ("sm_90", "sm_100", "sm_103")


@triton.jit
def _whole_tile(tile, desc, first_row, column, start, row_stride, TMA: tl.constexpr):
    """`[BLOCK_N, HEAD_DIM]` from key `start` of a sequence on, all of it inside; tile: pointers to that of key 0."""
    if TMA:
        return desc.load([first_row + start, column])
    return tl.load(tile + tl.cast(start, tl.int64) * row_stride)


@triton.jit
def _seen_by_all(
    acc, top, total, q, k_ptr, v_ptr, k_desc, v_desc, first_row, column, k_row_stride, v_row_stride, begin, end,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end - 1, a whole number of steps, nothing masked, into the running softmax.

    The two tiles of a step share one maximum: the exponentials of the second run under the product of the first.
    """
    columns = tl.arange(0, HEAD_DIM)  # [HEAD_DIM]
    row = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_tile = k_ptr + row.to(tl.int64)[:, None] * k_row_stride + columns[None, :]  # [BLOCK_N, HEAD_DIM]
    v_tile = v_ptr + row.to(tl.int64)[:, None] * v_row_stride + columns[None, :]
    STEP: tl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
    for start in range(begin, end, STEP):
        k0 = _whole_tile(k_tile, k_desc, first_row, column, start, k_row_stride, TMA)
        logits0 = tl.dot(q, tl.trans(k0), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        new_top = tl.maximum(top, tl.max(logits0, axis=1))  # [BLOCK_M], raw logits
        if PAIRED:
            k1 = _whole_tile(k_tile, k_desc, first_row, column, start + BLOCK_N, k_row_stride, TMA)
            logits1 = tl.dot(q, tl.trans(k1), input_precision="ieee")
            new_top = tl.maximum(new_top, tl.max(logits1, axis=1))
        safe = new_top * scale_log2
        shrink = tl.exp2(top * scale_log2 - safe)
        p0 = tl.exp2(logits0 * scale_log2 - safe[:, None])
        v0 = _whole_tile(v_tile, v_desc, first_row, column, start, v_row_stride, TMA)
        acc = tl.dot(p0.to(v0.dtype), v0, acc * shrink[:, None], input_precision="ieee")  # [BLOCK_M, HEAD_DIM]
        total = total * shrink + tl.sum(p0, axis=1)
        if PAIRED:
            p1 = tl.exp2(logits1 * scale_log2 - safe[:, None])
            v1 = _whole_tile(v_tile, v_desc, first_row, column, start + BLOCK_N, v_row_stride, TMA)
            acc = tl.dot(p1.to(v1.dtype), v1, acc, input_precision="ieee")
            total += tl.sum(p1, axis=1)
        top = new_top
    return acc, top, total


@triton.jit
def _seen_by_some(
    acc, top, total, q, k_ptr, v_ptr, k_row_stride, v_row_stride, positions, begin, end, length, scale_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, BEFORE: tl.constexpr = False,
):  # fmt: skip
    """Keys begin .. end - 1, tiles from begin on, masked, into the running softmax; k_ptr and v_ptr at key 0."""
    columns = tl.arange(0, HEAD_DIM)  # [HEAD_DIM]
    row = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_tile = k_ptr + row.to(tl.int64)[:, None] * k_row_stride + columns[None, :]  # [BLOCK_N, HEAD_DIM]
    v_tile = v_ptr + row.to(tl.int64)[:, None] * v_row_stride + columns[None, :]
    for start in range(begin, end, BLOCK_N):
        keys = start + row
        # Zeros behind the sequence's end: a neighbour's NaN times a probability of zero would be one.
        k = tl.load(k_tile + tl.cast(start, tl.int64) * k_row_stride, (keys < length)[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
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
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, tiles_ptr, cu_seqlens_ptr, row_bounds_ptr, rows_ptr, prefixes_ptr,
    q_row_stride, k_row_stride, v_row_stride, out_row_stride, scale_log2, window,
    HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_PREFIX: tl.constexpr, OTHERS_DONE: tl.constexpr,
    PAIRED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    entry, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    sequence, tile = tl.load(tiles_ptr + 2 * entry), tl.load(tiles_ptr + 2 * entry + 1)
    if OTHERS_DONE:  # what continues nothing was another kernel's
        tile = tl.where(tl.load(prefixes_ptr + 2 * sequence + 1) > 0, tile, -1)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    q_start = tl.load(row_bounds_ptr + sequence).to(tl.int64)
    count = (tl.load(row_bounds_ptr + sequence + 1) - q_start).to(tl.int32)
    if tile >= 0:
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
        column = kv_head * HEAD_DIM
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
            acc, top, total = _seen_by_some(
                acc, top, total, q, k_ptr + before_start * k_row_stride + column,
                v_ptr + before_start * v_row_stride + column, k_row_stride, v_row_stride, positions + before, first,
                before, before, scale_log2, window, HEAD_DIM, BLOCK_N, HAS_WINDOW, True,
            )  # fmt: skip
        own_k = k_ptr + start * k_row_stride + column
        own_v = v_ptr + start * v_row_stride + column
        # Three ranges: the window's edge, what every row sees (whole steps), and the rest with the diagonal.
        edge = 0
        if HAS_WINDOW:
            begin = tl.maximum(0, lowest - window + 1) // BLOCK_N * BLOCK_N
            edge = tl.cdiv(tl.maximum(0, highest - window + 1), BLOCK_N) * BLOCK_N
            acc, top, total = _seen_by_some(
                acc, top, total, q, own_k, own_v, k_row_stride, v_row_stride, positions, begin,
                tl.minimum(edge, highest + 1), length, scale_log2, window, HEAD_DIM, BLOCK_N, HAS_WINDOW,
            )  # fmt: skip
        STEP: tl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
        full = edge + tl.maximum(0, lowest + 1 - edge) // STEP * STEP
        acc, top, total = _seen_by_all(
            acc, top, total, q, own_k, own_v, k_desc, v_desc, start.to(tl.int32), column, k_row_stride, v_row_stride,
            edge, full, scale_log2, HEAD_DIM, BLOCK_N, PAIRED, TMA,
        )  # fmt: skip
        acc, top, total = _seen_by_some(
            acc, top, total, q, own_k, own_v, k_row_stride, v_row_stride, positions, full, highest + 1, length,
            scale_log2, window, HEAD_DIM, BLOCK_N, HAS_WINDOW,
        )  # fmt: skip
        result = acc * (1.0 / total)[:, None]
        target = out_ptr + q_row[:, None] * out_row_stride + inner
        tl.store(target, result.to(out_ptr.dtype.element_ty), valid[:, None])


def tile_of(dtype: torch.dtype, head_dim: int, rows: bool) -> tuple[int, int, int, int, int]:
    """The tile for this process's GPU: by chip, dtype, width and kind: no result depends on its company."""
    if dtype == torch.float32:
        return _FP32_TILE
    if rows:
        return _ROWS_TILE
    return TILES.get(chip(), TILES["other 64" if head_dim == 64 else "other"])


def chip() -> str:
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return "hip" if target.backend == "hip" else f"sm_{target.arch}"


def _descriptor(x: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """x `[T, H, d]` as the copy engine of Hopper and later wants it: tiles `[block_n, d]`; None where it can't."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0
    if not aligned or x.dtype == torch.float32 or len(x) < block_n or chip() not in _COPY_ENGINE:
        return None
    width = x.shape[1] * x.shape[2]
    return TensorDescriptor(x, [len(x), width], [x.stride(0), 1], [block_n, x.shape[2]])


def tile_rows(dtype: torch.dtype, head_dim: int, group: int) -> int:
    """Rows of one tile of a pass over all rows, whose queries are those of `group` heads."""
    return tile_of(dtype, head_dim, False)[0] // group


def tiles_of(bounds: torch.Tensor, most: int, block_q: int, prefixes: torch.Tensor | None = None) -> torch.Tensor:
    """(sequence, tile) of every tile of block_q rows, heaviest first; int32 `[most, 2]`, beyond them tile -1.

    On the device and without looking at it, so that a CUDA graph can hold it: a replay's sequences have their own.

    Args:
        bounds: integer `[S + 1]`, the first row of each sequence and the end.
        most: a bound of their number, such as `bound_of_tiles` gives.
        prefixes: int32 `[S, 2]`; the rows of a sequence that continues another one see that one's, too.
    """
    counts = (bounds.diff() + (block_q - 1)) // block_q  # [S]
    ends = counts.cumsum(0)
    place = torch.arange(most, device=bounds.device)
    found = torch.searchsorted(ends, place, right=True)
    sequence = found.clamp(max=len(counts) - 1)
    tile = place - (ends - counts)[sequence]
    seen = tile * block_q if prefixes is None else tile * block_q + prefixes[sequence, 1]
    inside = found < len(counts)
    order = torch.where(inside, seen, -1).argsort(descending=True)
    return torch.stack([sequence, torch.where(inside, tile, -1)], 1)[order].int()


def bound_of_tiles(rows: int, sequences: int, longest: int, block_q: int) -> int:
    """At most so many tiles has a pass of so many rows: one that isn't full a sequence."""
    return min(rows // block_q + sequences, sequences * -(-longest // block_q))


def tiles(
    cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int, group: int, head_dim: int, dtype: torch.dtype,
    prefixes: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `attention` of all rows takes as `tiles`: of T tokens, max_seqlen at most in a sequence, query heads of a KV
    head, their width and dtype. int32 `[N, 2]`."""
    block_q = tile_rows(dtype, head_dim, group)
    most = bound_of_tiles(tokens, len(cu_seqlens) - 1, max_seqlen, block_q)
    return tiles_of(cu_seqlens, most, block_q, prefixes)


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
    tiles: torch.Tensor | None = None,
    portable: bool = False,
) -> torch.Tensor:
    """See `lastrerank.ops.Operations.attention`; max_seqlen bounds the sequences' own lengths, prefixes is int32
    `[S, 2]`, tiles are those of the function of that name (not with rows, which have their own). portable: by the
    kernel here, whatever the chip has of its own.

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
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, expected one of {HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != head_dim):
            raise ValueError(f"{name} has strides {x.stride()}: the heads of a row must be contiguous")
    if {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}, expected one")
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if len(q) == 0:
        return out
    block_m, block_n, warps, stages, step = tile_of(q.dtype, head_dim, rows is not None)
    if group > MOST_GROUP:
        raise ValueError(f"q has {group} heads for each of k's, expected at most {MOST_GROUP}")
    # The kernel knows no stride of what has one dimension.
    cu_seqlens, rows = cu_seqlens.contiguous(), None if rows is None else rows.contiguous()
    if prefixes is not None and prefixes.shape != (len(cu_seqlens) - 1, 2):
        raise ValueError(f"prefixes has shape {tuple(prefixes.shape)}, expected [{len(cu_seqlens) - 1}, 2]")
    prefixes = None if prefixes is None else prefixes.contiguous()
    table = cu_seqlens if prefixes is None else prefixes
    bounds = cu_seqlens if rows is None else torch.searchsorted(rows, cu_seqlens.to(rows.dtype))
    most = bound_of_tiles(len(q), len(cu_seqlens) - 1, max_seqlen, block_m // group)
    if tiles is not None and (rows is not None or tiles.shape != (most, 2)):
        raise ValueError(f"tiles has shape {tuple(tiles.shape)}, expected [{most}, 2], and none with rows")
    if tiles is None:
        tiles = tiles_of(bounds, most, block_m // group, prefixes)
    own = OWN.get(chip()) if rows is None and not portable else None
    if own is not None and (block_m != own.BLOCK_M or not own.serves(q, k, v, out)):
        own = None
    if own is not None:
        own.attention(q, k, v, out, tiles, cu_seqlens, prefixes, window, scale * 1.4426950408889634)
        if prefixes is None:
            return out
    descriptors = (None, None) if rows is not None else (_descriptor(k, block_n), _descriptor(v, block_n))
    _attention_kernel[(len(tiles) * k.shape[1],)](
        q, k, v, *descriptors, out, tiles, cu_seqlens, bounds, cu_seqlens if rows is None else rows, table,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), scale * 1.4426950408889634, window or 0,
        HEAD_DIM=head_dim, KV_HEADS=k.shape[1], GROUP=group, BLOCK_M=block_m, BLOCK_N=block_n,
        HAS_ROWS=rows is not None, HAS_WINDOW=window is not None, HAS_PREFIX=prefixes is not None,
        OTHERS_DONE=own is not None, PAIRED=step == 2, TMA=None not in descriptors, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
