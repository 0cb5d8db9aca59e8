"""The waist: the operations a forward pass is made of, one signature each, as many implementations as machines.

Packed layout everywhere: rows are the tokens of all sequences laid end to end, `[T, ...]`. No padding, no mask tensor.
An implementation is any object with these methods (`Operations`); `select` finds one by name. All of them compute
statistics, softmax and accumulators in fp32 and round once, and pass the same tests against `reference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from lastrerank.config import ModelConfig

logger = logging.getLogger("lastrerank")


class OwnWeight(Protocol):
    """A weight `[out, in]` that multiplies itself, whatever its storage: packed, quantised."""

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`: `[T, in] -> [T, out]`."""

    def unpack(self) -> torch.Tensor:
        """The weight in floating point; of a quantised one what it has become, or ValueError."""


@runtime_checkable
class QuantisedWeight(OwnWeight, Protocol):
    """One that can be stored in int8: `scales` fp32 `[out]`, of the grids its outputs' weights are on."""

    scales: torch.Tensor


Weight = torch.Tensor | OwnWeight


@dataclass(frozen=True)
class Prefixes:
    """Which packed sequences continue others: a query of sequence s sees the rows `start .. start + length - 1` as if
    they stood before its own; length 0: it continues none.

    table: int32 `[S, 2]`, start and length of each. host: the same as Python integers.
    """

    table: torch.Tensor
    host: tuple[tuple[int, int], ...]


class Operations(Protocol):
    """T rows, D hidden width, d head width, Hq query heads, Hkv key/value heads, F intermediate width.

    In `select`, dtype is what is multiplied; `residual_dtype` says in what the activations between operations are.
    Norms and SwiGLU feed `linear` alone: an implementation may return them as rows that only its own `linear`
    understands, quantised on the way out.
    With grad disabled, `add_rms_norm`, `qk_norm_rope` and `out=` write in place. With grad enabled nothing is written
    in place and everything is differentiable (reference only).
    """

    # How numbers are rounded, where that is not the same wherever this backend runs in this dtype.
    rounding: str | None

    def refuses(self, config: ModelConfig) -> str | None:
        """Why a model of this shape can't be computed; None if it can."""

    def prepare(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        """A stored weight `[out, in]`, on its device, as `linear` wants it; called once a weight at load.

        scales: fp32 `[out]`, of a weight that was stored in int8: rotated (`lastrerank.rotation`), it is on their grid.
        """

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Row gather: ids int64 `[T]`, table `[V, D]` -> `[T, D]`, a new tensor."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`: `[T, D] -> [T, D]`."""

    def add_rms_norm(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual += x`; returns (residual, rms_norm(residual)). The sum is rounded to the residual's dtype first."""

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x @ weight.T + bias`: `[T, in] -> [T, out]`, into `out` if given (grad disabled, any row stride)."""

    def qk_norm_rope(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> torch.Tensor:
        """RMSNorm over each query and key head (if weights are given), then NeoX rotary embedding.

        qkv `[T, (num_heads + 2 num_kv_heads) * d]`, values untouched; either count may be 0. cos, sin fp32 `[P, d/2]`
        with a row per position; positions int64 `[T]`. Returns qkv, changed in place with grad disabled.
        """

    def attention_tiles(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
        prefixes: Prefixes | None,
    ) -> torch.Tensor | None:
        """The work of `attention` over all rows of these sequences in the order of its launch, once for all layers of a
        pass: int32 `[N, 2]`, or None from an implementation that has no such list. config: of the model; dtype: of the
        queries; the rest as in `attention`."""

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
        window: int | None,
        scale: float,
        rows: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        prefixes: Prefixes | None = None,
        tiles: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal grouped-query attention within each sequence and what it continues.

        q `[T, Hq, d]`, k and v `[T, Hkv, d]`, any row stride. Key j is visible to query i of its sequence when
        `j <= i` and, with a window, `i - j < window`; both count from the beginning of what the sequence continues.
        cu_seqlens int32 `[S + 1]`, seqlens the lengths on the host. With rows (int64 `[R]`, ascending): q is
        `[R, Hq, d]`, the queries at these rows only. out may be q itself. tiles: what `attention_tiles` gave for the
        same sequences; else found anew. Returns `[T or R, Hq, d]`.
        """

    def linear_swiglu(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`swiglu(linear(x, weight))`, bit for bit: `[T, in] -> [T, F]`, weight `[2F, in]`."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`: `[T, 2F] -> [T, F]`, gate in the first half."""

    def score(
        self,
        hidden: torch.Tensor,
        doc_rows: torch.Tensor,
        query_rows: torch.Tensor,
        doc_sequence: torch.Tensor,
        sequence_request: torch.Tensor,
        norm_weight: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last-token readout: gather, final RMSNorm, projector `relu(x w1.T) w2.T`, fusion of blocks, cosine.

        hidden `[R, D]` before the final norm; rows and maps as in `packing.ReadoutMaps` (N documents, S sequences).
        A sequence's weight is `max_i (1 + cos(q, d_i)) / 2` over its own documents; a request's query is the weighted
        mean of its sequences' query vectors; every document is scored against its request's query.
        Returns document vectors fp32 `[N, P]`, query vectors fp32 `[S, P]` (not fused), scores fp32 `[N]`.
        Source: arXiv 2509.25085, and the published `rerank` for the fusion.
        """

    def logit(
        self, hidden: torch.Tensor, norm_weight: torch.Tensor, vector: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Readout by one row of a head: final RMSNorm of hidden `[R, D]`, product with vector fp32 `[D]`, in fp32
        throughout. Returns fp32 `[R]`."""


def attention_flops(
    cu_seqlens: torch.Tensor,
    window: int | None,
    num_heads: int,
    head_dim: int,
    rows: torch.Tensor | None = None,
    prefixes: torch.Tensor | None = None,
) -> int:
    """Floating-point operations of causal attention: two products for each visible pair of tokens and head.

    Args:
        cu_seqlens: integer `[S + 1]`, starts of the packed sequences and the end.
        rows: integer `[R]`, the rows attention is computed for; default: all.
        prefixes: `Prefixes.table`.
    """
    if rows is None:
        rows = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    rows = rows.to(cu_seqlens.dtype)
    sequence = (torch.searchsorted(cu_seqlens, rows, right=True) - 1).clamp(max=len(cu_seqlens) - 2)
    visible = rows - cu_seqlens[sequence] + 1
    if prefixes is not None:
        visible = visible + prefixes[sequence, 1]
    pairs = int((visible if window is None else visible.clamp(max=window)).sum())
    return 4 * num_heads * head_dim * pairs


def _native(device: torch.device, dtype: torch.dtype) -> Operations:
    if device.type != "cpu":
        raise RuntimeError(f"it runs on the CPU, not on {device.type}")
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise RuntimeError(f"it computes in float32, bfloat16 and int8, not in {_short(dtype)}")
    from lastrerank.ops.native import NativeOperations

    return NativeOperations(dtype)


def _reference(device: torch.device, dtype: torch.dtype) -> Operations:
    if dtype in (torch.int8, torch.float8_e4m3fn):
        raise RuntimeError(f"it has no {_short(dtype)} linears")
    from lastrerank.ops.reference import ReferenceOperations

    return ReferenceOperations()


def _require_gpu(device: torch.device) -> None:
    """Raises: RuntimeError where our kernels of a GPU don't run."""
    if device.type != "cuda":
        raise RuntimeError(f"it runs on a CUDA device, not on {device.type}")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError("it needs an NVIDIA GPU of compute capability 8.0 or newer")


def _triton(device: torch.device, dtype: torch.dtype, portable: bool = False) -> Operations:
    _require_gpu(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        raise RuntimeError(f"it computes in float32, bfloat16, float16 and float8, not in {_short(dtype)}")
    try:
        from lastrerank.ops.float8 import Float8Operations
        from lastrerank.ops.triton import TritonOperations
    except ImportError as error:
        raise RuntimeError(_not_importable(error)) from error
    if dtype != torch.float8_e4m3fn:
        return TritonOperations(portable)
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        raise RuntimeError("float8 needs an NVIDIA GPU of compute capability 8.9 or newer")
    return Float8Operations(portable)


def _triton_portable(device: torch.device, dtype: torch.dtype) -> Operations:
    found = _triton(device, dtype, portable=True)
    from lastrerank.kernels.attention import OWN

    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or f"sm_{major}{minor}" not in OWN:
        raise RuntimeError("this GPU has no attention kernel of its own to do without: 'triton' is portable here")
    if dtype == torch.float32:
        raise RuntimeError("no GPU has an attention kernel of its own for float32: 'triton' is portable there")
    return found


def _flash_attn(device: torch.device, dtype: torch.dtype) -> Operations:
    _require_gpu(device)
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"it computes in bfloat16 and float16, not in {_short(dtype)}")
    try:
        from lastrerank.ops.flash_attn import FlashAttnOperations
    except ImportError as error:
        raise RuntimeError(_not_importable(error)) from error
    return FlashAttnOperations()


def _not_importable(error: ImportError) -> str:
    if (error.name or "").startswith("triton"):
        return f"Triton is not installed ({error})"
    return f"its kernels are not installed ({error}): in a checkout, pip install --editable ."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# In order of preference. A factory raises RuntimeError saying what is missing.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype], Operations]] = {
    "native": _native,
    "triton": _triton,
    "triton-portable": _triton_portable,
    "reference": _reference,
    "flash-attn": _flash_attn,
}


# Taken by "auto" only after a check (`lastrerank.selfcheck`).
CHECKED = ("triton", "triton-portable")

# By kind of device: what computes faster than all others, and in which dtypes.
_FASTEST: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "cpu": ("native", (torch.float32, torch.bfloat16)),
    "cuda": ("triton", (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)),
}


def residual_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """In what the backend called `name` keeps activations, norms and readouts when asked for `dtype`."""
    if name == "native":
        return torch.float32
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def select(
    name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None = None
) -> tuple[str, Operations]:
    """The operations called `name` for a device and dtype, or with "auto" the first that serves them. Compiled kernels
    of a GPU are taken by "auto" only once `lastrerank.selfcheck` has found them right for a model of this shape.

    Args:
        config: of the model they are for.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name can't serve; the message says what is missing.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
        try:
            return name, _made(name, device, dtype, config)
        except RuntimeError as reason:
            raise RuntimeError(f"backend {name!r}: {reason}") from reason
    reasons: dict[str, RuntimeError] = {}
    for candidate in BACKENDS:
        try:
            found = _made(candidate, device, dtype, config)
            if candidate == "triton-portable" and not isinstance(reasons.get("triton"), _WrongError):
                raise RuntimeError("nothing wrong is known of 'triton'")
            if candidate in CHECKED:
                _require_check(candidate, device, dtype, config)
            faster, served = _FASTEST.get(device.type, ("", ()))
            if faster in reasons and dtype in served:
                what = "plain PyTorch" if candidate == "reference" else candidate
                _warn_once(f"slower than it need be: {what} computes, since {faster}: {reasons[faster]}")
            return candidate, found
        except RuntimeError as reason:
            reasons[candidate] = reason
            logger.info("backend %s: %s", candidate, reason)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend serves {dtype} on {device}: {listed}")


def _made(name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None) -> Operations:
    found = BACKENDS[name](device, dtype)
    reason = None if config is None else found.refuses(config)
    if reason is not None:
        raise RuntimeError(reason)
    return found


class _WrongError(RuntimeError):
    """A check found something that lasts, not a lack of memory or of time."""


def _require_check(name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig | None) -> None:
    """Raises: RuntimeError where the backend isn't known to be right here."""
    from lastrerank import selfcheck

    if config is None:
        raise RuntimeError("no model is known whose shape it could be checked with")
    if selfcheck.is_off():
        raise RuntimeError(f"its check is switched off ({selfcheck.SWITCH})")
    verdict = selfcheck.verdict(name, config, device, dtype)
    if not verdict.ok:
        raise (_WrongError if verdict.lasting else RuntimeError)(f"it failed its check: {verdict.reason}")


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def availability(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, None if it serves `device` and `dtype`, else the reason it can't."""
    reasons: dict[str, str | None] = {}
    for name, factory in BACKENDS.items():
        try:
            factory(device, dtype)
            reasons[name] = None
        except RuntimeError as reason:
            reasons[name] = str(reason)
    return reasons
