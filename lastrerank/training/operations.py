"""The operations of a training pass on a GPU: row operations compiled, attention of all lists in one launch.

What `ReferenceOperations` launches one by one, with a look at the device for every layer, is what a step's time goes to
there. Products and attention are bf16 (under autocast), the residual stream and everything a sum runs over is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lastrerank.ops import Prefixes
from lastrerank.ops.reference import ReferenceOperations, _norm_rope, _rms_norm
from lastrerank.selfcheck import missing_for_triton

varlen_attn: Callable[..., Any] | None = None
with suppress(ImportError):  # before PyTorch 2.10; from 2.11 on it takes a window and a scale
    from torch.nn.attention.varlen import varlen_attn


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps).bfloat16()


def _add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return residual, _norm(residual, weight, eps)


class TrainingOperations(ReferenceOperations):
    """See `lastrerank.ops.Operations`. Without autograd, or outside autocast, the reference computes."""

    def __init__(self) -> None:
        compiled: Callable[..., Any] = lambda function: torch.compile(function, dynamic=True)  # noqa: E731
        self._norm, self._add_norm, self._rotate = map(compiled, (_norm, _add_norm, _norm_rope))
        self._gate = compiled(super().swiglu)

    @staticmethod
    def serve(device: torch.device, head_dim: int) -> bool:
        """Whether they are for a device and a width of heads: a GPU that multiplies bf16, a PyTorch that has attention
        of packed sequences, and what it compiles by."""
        able = varlen_attn is not None and "window_size" in signature(varlen_attn).parameters
        compiles = find_spec("triton") is not None and missing_for_triton() is None
        fits = head_dim % 8 == 0 and head_dim <= 256
        if not (device.type == "cuda" and able and compiles and fits):
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, weight, eps) if _in_training(x) else super().rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not _in_training(x):
            return super().add_rms_norm(residual, x, weight, eps)
        total, normed = self._add_norm(residual, x, weight, eps)
        return total, normed

    def qk_norm_rope(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
        positions: Tensor, num_heads: int, num_kv_heads: int, eps: float,
    ) -> Tensor:  # fmt: skip
        if not _in_training(qkv):
            return super().qk_norm_rope(
                qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, eps
            )
        heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
        counts = [(num_heads, q_weight), (num_kv_heads, k_weight)]
        weights = [weight.expand(count, -1) for count, weight in counts if count and weight is not None]
        weight = torch.cat(weights) if weights else None
        c, s = cos[positions][:, None], sin[positions][:, None]  # [T, 1, d/2]
        turned = num_heads + num_kv_heads
        rotated = self._rotate(heads[:, :turned], weight, c, s, eps)
        return torch.cat([rotated, heads[:, turned:]], dim=1).flatten(1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seqlens: tuple[int, ...], window: int | None,
        scale: float, rows: Tensor | None = None, out: Tensor | None = None, prefixes: Prefixes | None = None,
        tiles: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if prefixes is not None or not _in_training(q):
            return super().attention(q, k, v, cu_seqlens, seqlens, window, scale, rows, out, prefixes, tiles)
        if rows is not None:  # of the last layer: as many queries as keys is what there is a kernel for
            q = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        longest, left = max(seqlens), -1 if window is None else window - 1
        assert varlen_attn is not None
        attended: Tensor = varlen_attn(
            q.contiguous(), k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(left, 0)
        )
        return attended if rows is None else attended[rows]

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up) if _in_training(gate_up) else super().swiglu(gate_up)


def _in_training(x: Tensor) -> bool:
    return torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)
