"""SwiGLU's gate: `out = silu(gate) * up`, computed in fp32 and rounded once, or quantised a row.

    scale = max |out| / 448,  out / scale in float8 e4m3       (quantised form only, from the fp32 values)

gate_up `[T, 2F]` with gate in the first half, any row stride; out `[T, F]`; scale fp32 `[T, 1]`. Every element stands
alone, or with the rest of its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of one program: 8 elements a thread at 4 warps, so 16-byte loads in 16 bit.
_BLOCK = 1024


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, out_ptr, scale_ptr, gate_up_row_stride, out_row_stride, width,
    BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = columns < width
    source = gate_up_ptr + row * gate_up_row_stride + columns
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    if QUANTIZE:  # BLOCK covers the row
        scale = tl.maximum(tl.max(tl.abs(out), axis=0), 1e-30) / 448.0
        tl.store(scale_ptr + row, scale)
        out = out / scale
    tl.store(out_ptr + row * out_row_stride + columns, out.to(out_ptr.dtype.element_ty), mask)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`: `[T, 2F] -> [T, F]`.

    Raises:
        ValueError: gate_up is no matrix of even width, or its rows are not contiguous.
    """
    return _launch(gate_up, quantize=False)[0]


def quantized_swiglu(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as float8 e4m3 values `[T, F]` and fp32 scales `[T, 1]`.

    Raises:
        ValueError: gate_up is no matrix of even width, or its rows are not contiguous.
    """
    return _launch(gate_up, quantize=True)


def _launch(gate_up: torch.Tensor, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)} and strides {gate_up.stride()}: "
            "expected [T, 2F] with contiguous rows"
        )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn if quantize else gate_up.dtype, device=gate_up.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=gate_up.device) if quantize else out
    block = triton.next_power_of_2(width) if quantize else _BLOCK
    _swiglu_kernel[(rows, triton.cdiv(width, block))](
        gate_up, out, scale, gate_up.stride(0), out.stride(0), width, BLOCK=block, QUANTIZE=quantize, num_warps=4
    )
    return out, scale
