"""SwiGLU's gate: `out = silu(gate) * up`, computed in fp32 and rounded once.

gate_up `[T, 2F]` with gate in the first half, any row stride; out `[T, F]`. Every element stands alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of one program: 8 elements a thread at 4 warps, so 16-byte loads in 16 bit.
_BLOCK = 1024


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, gate_up_row_stride, out_row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = columns < width
    source = gate_up_ptr + row * gate_up_row_stride + columns
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * out_row_stride + columns, out.to(out_ptr.dtype.element_ty), mask)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`: `[T, 2F] -> [T, F]`.

    Raises:
        ValueError: gate_up is no matrix of even width, or its rows are not contiguous.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)} and strides {gate_up.stride()}: "
            "expected [T, 2F] with contiguous rows"
        )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, _BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=_BLOCK, num_warps=4
    )
    return out
