"""RMSNorm, plain or with the residual add fused into it, and on the way out, if wanted, quantisation of the rows.

    residual = residual + x                                    (in place, rounded to the residual's dtype)
    out = residual / sqrt(mean(residual^2) + eps) * weight     (statistics in fp32, rounded once)
    scale = max |out| / 448,  out / scale in float8 e4m3       (quantised forms only, from the fp32 values)

x, residual, out `[T, D]`, rows contiguous with any row stride; weight `[D]`; scale fp32 `[T, 1]`. One program takes a
few whole rows, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of a warp, 64 a thread: few enough to stay in registers. Up to this width warps don't share a row and needn't
# wait for each other over its sum: no barrier, a quarter fewer instructions for a row of 1024 than by four warps.
_WARP_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    x_row_stride,
    residual_row_stride,
    out_row_stride,
    num_rows,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]  # [ROWS, BLOCK]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + columns[None, :], mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        target = residual_ptr + rows[:, None] * residual_row_stride + columns[None, :]
        total = (x + tl.load(target, mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(target, total, mask)
        x = total.to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)  # [ROWS]
        weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(tl.float32)  # [BLOCK]
        x = x * inverse[:, None] * weight[None, :]
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30) / 448.0  # [ROWS]
        tl.store(scale_ptr + rows, scale, rows < num_rows)
        x = x / scale[:, None]
    tl.store(out_ptr + rows[:, None] * out_row_stride + columns[None, :], x.to(out_ptr.dtype.element_ty), mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`: `[T, D] -> [T, D]`.

    Raises:
        ValueError: shapes don't fit, or rows are not contiguous.
    """
    return _launch(x, None, weight, eps, quantize=False)[0]


def add_rms_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`residual += x` in place; returns its RMSNorm, all `[T, D]`.

    Raises:
        ValueError: shapes don't fit, or rows are not contiguous.
    """
    return _launch(x, residual, weight, eps, quantize=False)[0]


def quantized_rows(
    x: torch.Tensor, residual: torch.Tensor | None = None, weight: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 e4m3 values `[T, D]` and fp32 scales `[T, 1]` of x, or with a weight of `(add_)rms_norm` of it.

    Raises:
        ValueError: shapes don't fit, or rows are not contiguous.
    """
    return _launch(x, residual, weight, eps, quantize=True)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.ndim != 2 or (weight is not None and weight.shape != x.shape[1:]):
        found = None if weight is None else tuple(weight.shape)
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {found}: expected [T, D] and [D]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: its rows must be contiguous")
    weight = None if weight is None else weight.contiguous()
    num_rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn if quantize else x.dtype, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device) if quantize else out
    block = triton.next_power_of_2(width)
    rows = max(1, _WARP_ELEMENTS // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, x if residual is None else residual, x if weight is None else weight, out, scale,
        x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        num_rows, width, eps, HAS_RESIDUAL=residual is not None, HAS_NORM=weight is not None, QUANTIZE=quantize,
        ROWS=rows, BLOCK=block, num_warps=max(1, block // _WARP_ELEMENTS),
    )  # fmt: skip
    return out, scale
