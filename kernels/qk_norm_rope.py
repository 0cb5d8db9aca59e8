"""RMSNorm of every query and key head, then NeoX rotary embedding, in place on the packed projection; one launch.

    y = x / sqrt(mean(x^2) + eps) * weight                        (per head; left out without a weight)
    out[:d/2] = y[:d/2] cos - y[d/2:] sin,  out[d/2:] = y[d/2:] cos + y[:d/2] sin     (fp32, rounded once)

qkv `[T, (Hq + 2 Hkv) d]`, any row stride; values are not touched. cos and sin fp32 `[P, d/2]`; positions `[T]`. One
program takes one row and a few heads of one kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of one program, 8 a thread: 8 heads of 128 (16 query and 8 key heads are three whole programs), 16 of 64.
_ELEMENTS = 1024


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    row_stride,
    num_heads,
    num_kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # the power of two at or above HEAD_DIM / 2
    HEADS: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # [HEADS]
    columns = tl.arange(0, HALF)  # [HALF]
    inside = columns < HEAD_DIM // 2
    mask = (heads < num_heads + num_kv_heads)[:, None] & inside[None, :]  # [HEADS, HALF]
    first_ptr = qkv_ptr + row * row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    second_ptr = first_ptr + HEAD_DIM // 2
    first = tl.load(first_ptr, mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask, other=0.0).to(tl.float32)

    is_query = (heads < num_heads)[:, None]  # [HEADS, 1]
    mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / HEAD_DIM
    inverse = tl.rsqrt(mean + eps)[:, None]
    scale = tl.where(is_query, inverse if NORM_Q else 1.0, inverse if NORM_K else 1.0)
    weight_first = tl.full((HEADS, HALF), 1.0, tl.float32)
    weight_second = tl.full((HEADS, HALF), 1.0, tl.float32)
    if NORM_Q:
        low = tl.load(q_weight_ptr + columns, inside, other=0.0).to(tl.float32)[None, :]
        high = tl.load(q_weight_ptr + HEAD_DIM // 2 + columns, inside, other=0.0).to(tl.float32)[None, :]
        weight_first = tl.where(is_query, low, weight_first)
        weight_second = tl.where(is_query, high, weight_second)
    if NORM_K:
        low = tl.load(k_weight_ptr + columns, inside, other=0.0).to(tl.float32)[None, :]
        high = tl.load(k_weight_ptr + HEAD_DIM // 2 + columns, inside, other=0.0).to(tl.float32)[None, :]
        weight_first = tl.where(is_query, weight_first, low)
        weight_second = tl.where(is_query, weight_second, high)
    first = first * scale * weight_first
    second = second * scale * weight_second

    position = tl.load(positions_ptr + row)
    cos = tl.load(cos_ptr + position * (HEAD_DIM // 2) + columns, inside, other=0.0)[None, :]  # [1, HALF]
    sin = tl.load(sin_ptr + position * (HEAD_DIM // 2) + columns, inside, other=0.0)[None, :]
    dtype = qkv_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos - second * sin).to(dtype), mask)
    tl.store(second_ptr, (second * cos + first * sin).to(dtype), mask)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> None:
    """Norm and rotate in place. Either count may be 0, weights may be None.

    Raises:
        ValueError: shapes don't fit, or rows are not contiguous.
    """
    total = num_heads + 2 * num_kv_heads
    head_dim = qkv.shape[1] // total
    if head_dim * total != qkv.shape[1] or head_dim % 2 or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)} and strides {qkv.stride()}: expected contiguous rows of "
            f"{num_heads} + 2 * {num_kv_heads} heads of an even width"
        )
    if cos.shape[1] != head_dim // 2 or sin.shape != cos.shape or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected [P, {head_dim // 2}]")
    if positions.shape != qkv.shape[:1]:
        raise ValueError(f"positions has shape {tuple(positions.shape)}, expected [{qkv.shape[0]}]")
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"a norm's weight has shape {tuple(weight.shape)}, expected [{head_dim}]")
    # The kernel knows no stride of what has one dimension.
    q_weight, k_weight = (None if weight is None else weight.contiguous() for weight in (q_weight, k_weight))
    positions = positions.contiguous()
    half = triton.next_power_of_2(head_dim // 2)
    heads = max(1, _ELEMENTS // (2 * half))
    grid = (qkv.shape[0], triton.cdiv(num_heads + num_kv_heads, heads))
    _qk_norm_rope_kernel[grid](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos, sin, positions,
        qkv.stride(0), num_heads, num_kv_heads, eps, HEAD_DIM=head_dim, HALF=half, HEADS=heads,
        NORM_Q=q_weight is not None, NORM_K=k_weight is not None, num_warps=4,
    )  # fmt: skip
