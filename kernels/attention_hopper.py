"""The same attention for Hopper's own machinery: warps with roles, in Gluon. `attention` takes it where it serves.

One warp fetches keys and values with the copy engine; two warpgroups compute, 64 rows of the tile each, and the softmax
of one runs under the products of the other. Tiles of 128 keys from the diagonal down. What is fetched is released as
soon as the product that reads it is done. Held until the softmax is, which hides it under that product, too, it starves
the copy engine: on an H100 460 TFLOP/s at 16,384 tokens instead of 636 (`bench/results/attention_gpu.json`, "held").

A program, its tile and its sequence are as in `attention`; so are masks, NaN beyond a sequence's end, and precision.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Rows of a tile in both warpgroups, keys of a tile, tiles in flight, registers of who computes and who fetches.
BLOCK_M, _BLOCK_N, _STAGES, _REGISTERS = 128, 128, 2, (240, 24)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _fetch(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, start, column, top_tile, tiles,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every tile of keys and values, from the last down, into the stage that both warpgroups have left."""
    BYTES: gl.constexpr = k_smem.numel // STAGES * 2
    for j in range(tiles):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        key = start + (top_tile - j) * BLOCK_N
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BYTES)
        tma.async_copy_global_to_shared(k_desc, [key, column], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES)
        tma.async_copy_global_to_shared(v_desc, [key, column], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _softmax(
    s, top, total, positions, first_key, scale_log2, window, BLOCK_N: gl.constexpr, S: gl.constexpr,
    MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr, MAYBE_NONE: gl.constexpr,
):  # fmt: skip
    """Probabilities `[64, BLOCK_N]` of raw logits, the rows' new maximum and sum, and what old sums shrink by."""
    if MASKED:
        keys = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S)), 0)
        visible = keys <= gl.expand_dims(positions, 1)
        if HAS_WINDOW:
            visible = visible & (gl.expand_dims(positions, 1) - keys < window)
        s = gl.where(visible, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, axis=1))
    safe = new_top * scale_log2
    if MAYBE_NONE:  # a row that has seen no key yet has -inf on both sides
        safe = gl.where(new_top == float("-inf"), 0.0, safe)
    shrink = gl.exp2(top * scale_log2 - safe)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(safe, 1))
    return p, new_top, total * shrink + gl.sum(p, axis=1), shrink


@gluon.jit
def _steps(
    begin, end, p, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, positions, top_tile,
    scale_log2, window, S: gl.constexpr, OUT: gl.constexpr, P: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr, MAYBE_NONE: gl.constexpr,
):  # fmt: skip
    """Tiles begin .. end - 1: logits of this one, and the product of the last one's probabilities and values."""
    nothing = gl.full([q.shape[0], BLOCK_N], 0.0, gl.float32, layout=S)
    for j in range(begin, end):
        stage = j % STAGES
        before = (j - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
        s_next = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((j - 1) // STAGES) & 1)
        acc_next = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_next,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        p_next, top, total, shrink = _softmax(
            s, top, total, positions, (top_tile - j) * BLOCK_N, scale_log2, window, BLOCK_N, S, MASKED, HAS_WINDOW,
            MAYBE_NONE,
        )  # fmt: skip
        p_next = p_next.to(k_smem.dtype)
        acc, p_next = warpgroup_mma_wait(0, deps=(acc_next, p_next))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
        p = gl.convert_layout(p_next, P)
    return p, acc, top, total


@gluon.jit
def _clear_behind(v, tail, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """Rows tail and later become zero: a neighbour's NaN times a probability of zero would be one."""
    PART: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, PART, layout=gl.SliceLayout(1, LAYOUT)), 1)
    for part in gl.static_range(BLOCK_N // PART):
        if (part + 1) * PART > tail:
            piece = v.slice(part * PART, PART)
            piece.store(gl.where(row < tail - part * PART, piece.load(LAYOUT), 0.0))


@gluon.jit
def _places(
    which: gl.constexpr, start, length, first_row, kv_head, row_stride, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where a warpgroup's rows of queries or output are `[ROWS, HEAD_DIM]`, in elements, and which are rows at all."""
    m = which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    row = first_row + m // GROUP
    valid = (row < length) & (m // GROUP < BLOCK_Q)
    place = (start + row).to(gl.int64) * row_stride + (kv_head * GROUP + m % GROUP) * HEAD_DIM
    return gl.expand_dims(place, 1) + gl.expand_dims(columns, 0), gl.expand_dims(valid, 1)


@gluon.jit
def _compute(
    which: gl.constexpr, q_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, v_clean, out_ptr,
    q_row_stride, out_row_stride, start, length, first_row, kv_head, top_tile, tiles, scale_log2, window,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """A warpgroup's ROWS rows of the tile, from queries to output."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    # Tiles of rows that no tile of keys is a multiple of can lie across two: then a row may see none of the first.
    ACROSS: gl.constexpr = BLOCK_N % BLOCK_Q != 0

    q = q_smem.index(which)
    places, valid = _places(
        which, start, length, first_row, kv_head, q_row_stride, GROUP, HEAD_DIM, BLOCK_Q, ROWS, LOAD
    )
    q.store(gl.load(q_ptr + places, valid, other=0.0))
    fence_async_shared()

    tail = length - top_tile * BLOCK_N
    if which == 0:  # noqa: SIM102 (known when it compiles: one of the two clears what lies behind the end)
        if tail < BLOCK_N:
            mbarrier.wait(v_full.index(0), 0)
            _clear_behind(v_smem.index(0), tail, HEAD_DIM, BLOCK_N)
            fence_async_shared()
            mbarrier.arrive(v_clean, count=1)

    last_row = gl.minimum(first_row + BLOCK_Q, length) - 1
    rows = first_row + (which * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))) // GROUP
    positions = gl.minimum(rows, last_row)  # of rows without work, too: they see something, and are not stored
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=S)
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout=OUT)

    mbarrier.wait(k_full.index(0), 0)
    s_next = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s_next,))
    mbarrier.arrive(k_empty.index(0), count=1)
    p, top, total, _ = _softmax(
        s, top, total, positions, top_tile * BLOCK_N, scale_log2, window, BLOCK_N, S, True, HAS_WINDOW, ACROSS
    )
    p = gl.convert_layout(p.to(k_smem.dtype), P)
    if tail < BLOCK_N:
        mbarrier.wait(v_clean, 0)

    # What some rows don't see, at the diagonal; what every row sees; what some don't, at the window's edge.
    seen = 1
    if ACROSS:
        seen = gl.minimum(gl.maximum(top_tile - (first_row + 1) // BLOCK_N + 1, 1), tiles)
        p, acc, top, total = _steps(
            1, seen, p, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, positions, top_tile,
            scale_log2, window, S, OUT, P, BLOCK_N, STAGES, True, HAS_WINDOW, True,
        )  # fmt: skip
    edge = tiles
    if HAS_WINDOW:
        first_of_all = (gl.maximum(0, last_row - window + 1) + BLOCK_N - 1) // BLOCK_N
        edge = gl.minimum(gl.maximum(top_tile - first_of_all + 1, seen), tiles)
    p, acc, top, total = _steps(
        seen, edge, p, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, positions, top_tile,
        scale_log2, window, S, OUT, P, BLOCK_N, STAGES, False, False, False,
    )  # fmt: skip
    if HAS_WINDOW:
        p, acc, top, total = _steps(
            edge, tiles, p, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, positions, top_tile,
            scale_log2, window, S, OUT, P, BLOCK_N, STAGES, True, True, False,
        )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    acc_next = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc_next,))
    result = acc * gl.expand_dims(gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT)), 1)

    places, valid = _places(
        which, start, length, first_row, kv_head, out_row_stride, GROUP, HEAD_DIM, BLOCK_Q, ROWS, OUT
    )
    gl.store(out_ptr + places, result.to(k_smem.dtype), valid)


@gluon.jit(do_not_specialize=["window"])
def _hopper_attention_kernel(
    q_ptr, k_desc, v_desc, out_ptr, tiles_ptr, cu_seqlens_ptr, prefixes_ptr, q_row_stride, out_row_stride, scale_log2,
    window, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_PREFIX: gl.constexpr,
    COMPUTE: gl.constexpr, FETCH: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_Q: gl.constexpr = 2 * ROWS // GROUP
    entry, kv_head = gl.program_id(0) // KV_HEADS, gl.program_id(0) % KV_HEADS
    sequence, tile = gl.load(tiles_ptr + 2 * entry), gl.load(tiles_ptr + 2 * entry + 1)
    if HAS_PREFIX:  # what continues another sequence is another kernel's
        tile = gl.where(gl.load(prefixes_ptr + 2 * sequence + 1) > 0, -1, tile)
    if tile >= 0:
        start = gl.load(cu_seqlens_ptr + sequence).to(gl.int32)
        length = gl.load(cu_seqlens_ptr + sequence + 1).to(gl.int32) - start
        first_row = tile * BLOCK_Q
        top_tile = (gl.minimum(first_row + BLOCK_Q, length) - 1) // BLOCK_N
        tiles = top_tile + 1
        if HAS_WINDOW:
            tiles -= gl.maximum(0, first_row - window + 1) // BLOCK_N
        dtype: gl.constexpr = k_desc.dtype
        q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], k_desc.layout)
        k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], v_desc.layout)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(v_clean, count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=2)
            mbarrier.init(v_empty.index(i), count=2)
        fence_async_shared()
        gl.warp_specialize([
            (_compute, (
                0, q_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, v_clean, out_ptr, q_row_stride,
                out_row_stride, start, length, first_row, kv_head, top_tile, tiles, scale_log2, window, GROUP,
                HEAD_DIM, BLOCK_Q, ROWS, BLOCK_N, STAGES, HAS_WINDOW,
            )),
            (_compute, (
                1, q_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, v_clean, out_ptr, q_row_stride,
                out_row_stride, start, length, first_row, kv_head, top_tile, tiles, scale_log2, window, GROUP,
                HEAD_DIM, BLOCK_Q, ROWS, BLOCK_N, STAGES, HAS_WINDOW,
            )),
            (_fetch, (
                k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, start, kv_head * HEAD_DIM, top_tile,
                tiles, BLOCK_N, STAGES,
            )),
        ], [4, 1], [COMPUTE, FETCH])  # fmt: skip


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether all are of one dtype that the matrix unit has, and keys and values such as the copy engine can fetch; a
    model's always are."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (k, v))
    return aligned and k.dtype in _DTYPES and all(x.dtype == k.dtype for x in (q, v, out))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, tiles: torch.Tensor,
    cu_seqlens: torch.Tensor, prefixes: torch.Tensor | None, window: int | None, scale_log2: float,
) -> None:  # fmt: skip
    """Of all rows of the sequences that continue none, into `out`, by a list of tiles of `BLOCK_M // group` rows; of
    tensors that it `serves`. Shapes are as in `attention.attention`, which has looked at them."""
    head_dim, kv_heads = q.shape[2], k.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([_BLOCK_N, head_dim], _DTYPES[k.dtype])
    k_desc, v_desc = (
        TensorDescriptor(x, [len(x), kv_heads * head_dim], [x.stride(0), 1], [_BLOCK_N, head_dim], layout)
        for x in (k, v)
    )
    _hopper_attention_kernel[(len(tiles) * kv_heads,)](
        q, k_desc, v_desc, out, tiles, cu_seqlens, cu_seqlens if prefixes is None else prefixes,
        q.stride(0), out.stride(0), scale_log2, window or 0,
        KV_HEADS=kv_heads, GROUP=q.shape[1] // kv_heads, HEAD_DIM=head_dim, ROWS=BLOCK_M // 2, BLOCK_N=_BLOCK_N,
        STAGES=_STAGES, HAS_WINDOW=window is not None, HAS_PREFIX=prefixes is not None,
        COMPUTE=_REGISTERS[0], FETCH=_REGISTERS[1], num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
