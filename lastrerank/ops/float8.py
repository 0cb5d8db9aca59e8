"""Linears in float8 e4m3 between bf16 activations, on GPUs that multiply it (compute capability 8.9 and newer).

A scale for each row of activations and each output of a weight. The norms and SwiGLU quantise their rows on the way
out; attention's output is quantised by a pass of its own. Off by default: scores differ from bf16's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lastrerank.kernels.rms_norm import quantized_rows
from lastrerank.kernels.swiglu import quantized_swiglu
from lastrerank.ops import Weight
from lastrerank.ops.triton import TritonOperations, on_its_device

_rows, _gate = on_its_device(quantized_rows), on_its_device(quantized_swiglu)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Float8Rows:
    """`values * scale`: float8 `[T, K]`, fp32 `[T, 1]`."""

    values: Tensor
    scale: Tensor


class Float8Weight:
    """A weight `[out, in]` as float8 with a scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(f"float8 linears need widths in multiples of 16, here is one of {tuple(weight.shape)}")
        weight = weight.float()
        self.scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / _LARGEST  # [out, 1]
        self.values = (weight / self.scale).to(torch.float8_e4m3fn)

    # Sums in the matrix unit's own precision add nothing to an error that is the quantisation's (3.74 % of a random
    # product either way, on an H200), and take up to a fifth less time: `bench/results/float8_h200.json`.
    def matmul(self, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        rows = x if isinstance(x, Float8Rows) else Float8Rows(*_rows(x))
        into = out if out is not None and out.is_contiguous() else None  # else it is copied there
        result = torch._scaled_mm(
            rows.values, self.values.t(), scale_a=rows.scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16,
            out=into, use_fast_accum=True,
        )  # fmt: skip
        if bias is not None:
            result += bias
        return result if out is None or out is into else out.copy_(result)

    def unpack(self) -> Tensor:
        raise ValueError("the weights are quantised to float8: what they were is not there any more")


class Float8Operations(TritonOperations):
    """See `lastrerank.ops.Operations`. What feeds a linear is a `Float8Rows`."""

    def prepare(self, weight: Tensor, scales: Tensor | None = None) -> Weight:
        return Float8Weight(weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        return Float8Rows(*_rows(x, None, weight, eps))

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Any]:
        return residual, Float8Rows(*_rows(x, residual, weight, eps))

    def swiglu(self, gate_up: Tensor) -> Any:
        return Float8Rows(*_gate(gate_up))
