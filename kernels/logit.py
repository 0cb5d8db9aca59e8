"""The readout by one row of a head, in one launch: final RMSNorm of each row and its product with a vector, in fp32.

    x = hidden[r] / rms(hidden[r]) * norm_weight,   logit_r = x . vector

hidden `[R, D]`, any row stride; norm_weight `[D]`, vector fp32 `[D]`. One program a row: neighbours can't change it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _logit_kernel(
    x_ptr, norm_weight_ptr, vector_ptr, out_ptr, x_row_stride, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = d < width
        x = tl.load(x_ptr + row * x_row_stride + d, inside, other=0.0).to(tl.float32)
        squares += x * x
        weight = tl.load(norm_weight_ptr + d, inside, other=0.0).to(tl.float32)
        products += x * weight * tl.load(vector_ptr + d, inside, other=0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(out_ptr + row, tl.sum(products, axis=0) * scale)


def logit(hidden: torch.Tensor, norm_weight: torch.Tensor, vector: torch.Tensor, eps: float) -> torch.Tensor:
    """See `lastrerank.ops.Operations.logit`.

    Raises:
        ValueError: shapes don't fit, rows are not contiguous, or the vector is not fp32.
    """
    if hidden.ndim != 2 or norm_weight.shape != hidden.shape[1:] or vector.shape != hidden.shape[1:]:
        raise ValueError(
            f"hidden, norm_weight and vector have shapes {tuple(hidden.shape)}, {tuple(norm_weight.shape)} and "
            f"{tuple(vector.shape)}: expected [R, D], [D] and [D]"
        )
    if vector.dtype != torch.float32 or (hidden.shape[1] > 1 and hidden.stride(1) != 1):
        raise ValueError(f"vector is {vector.dtype}, hidden has strides {hidden.stride()}: expected fp32, whole rows")
    norm_weight, vector = norm_weight.contiguous(), vector.contiguous()  # the kernel knows no stride of them
    out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if len(hidden):
        _logit_kernel[(len(hidden),)](
            hidden, norm_weight, vector, out, hidden.stride(0), hidden.shape[1], eps, BLOCK=_BLOCK, num_warps=4
        )
    return out
