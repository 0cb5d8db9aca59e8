"""Checks of the operations' arguments for kernels that take pointers: what doesn't belong together raises here."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from lastrerank.ops import Prefixes


def _require(fits: bool, expected: str, **found: Tensor | None) -> None:
    if not fits:
        shapes = ", ".join(f"{name} {None if x is None else tuple(x.shape)}" for name, x in found.items())
        raise ValueError(f"shapes are {shapes}: expected {expected}")


def check_linear(x: Tensor, out_features: int, in_features: int, bias: Tensor | None, out: Tensor | None) -> None:
    """Raises: ValueError."""
    _require(x.ndim == 2 and x.shape[1] == in_features, f"x [T, {in_features}]", x=x)
    _require(bias is None or bias.shape == (out_features,), f"bias [{out_features}]", bias=bias)
    _require(out is None or out.shape == (len(x), out_features), f"out [{len(x)}, {out_features}]", out=out)


def check_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Raises: ValueError."""
    fits = x.ndim == 2 and weight.shape == x.shape[1:] and (residual is None or residual.shape == x.shape)
    _require(fits, "x and residual [T, D], weight [D]", x=x, residual=residual, weight=weight)


def check_swiglu(gate_up: Tensor) -> None:
    """Raises: ValueError."""
    _require(gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0, "gate_up [T, 2F]", gate_up=gate_up)


def check_qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> int:
    """The head width.

    Raises:
        ValueError: shapes don't fit, or a position is beyond the table.
    """
    total = num_heads + 2 * num_kv_heads
    if min(num_heads, num_kv_heads) < 0 or total < 1:
        raise ValueError(f"num_heads is {num_heads}, num_kv_heads {num_kv_heads}: expected heads of one kind at least")
    fits = qkv.ndim == 2 and qkv.shape[1] % total == 0 and qkv.shape[1] // total % 2 == 0
    _require(fits, f"qkv [T, {total} heads of an even width]", qkv=qkv)
    dim = qkv.shape[1] // total
    for weight in (q_weight, k_weight):
        _require(weight is None or weight.shape == (dim,), f"[{dim}]", q_weight=q_weight, k_weight=k_weight)
    fits = cos.ndim == 2 and cos.shape[1] == dim // 2 and sin.shape == cos.shape
    _require(fits and cos.is_contiguous() and sin.is_contiguous(), f"contiguous [P, {dim // 2}]", cos=cos, sin=sin)
    _require(positions.shape == qkv.shape[:1], "positions [T]", positions=positions, qkv=qkv)
    if len(positions) and not (int(positions.min()) >= 0 and int(positions.max()) < len(cos)):
        raise ValueError(
            f"positions are {int(positions.min())} to {int(positions.max())}: cos and sin have rows 0 to {len(cos) - 1}"
        )
    return dim


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqlens: tuple[int, ...],
    window: int | None,
    rows: Tensor | None,
    out: Tensor | None,
    prefixes: Prefixes | None = None,
) -> list[int]:
    """The starts of the sequences and the end; rows beyond it belong to none (static buckets have such).

    Raises:
        ValueError: shapes don't fit, sequences are not those of the rows, or rows to read are not theirs.
    """
    fits = q.ndim == k.ndim == 3 and v.shape == k.shape and q.shape[2] == k.shape[2] and q.shape[2] > 0
    fits = fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0 and q.shape[1] > 0
    _require(fits, "q [T, Hq, d], k and v [T, Hkv, d], Hq a multiple of Hkv", q=q, k=k, v=v)
    _require(out is None or out.shape == q.shape, "out as q", out=out, q=q)
    starts: list[int] = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] > len(k) or lengths != tuple(seqlens) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens is {starts!s:.80}, seqlens {seqlens!s:.80}: not the sequences of {len(k)} rows")
    for start, length in () if prefixes is None else prefixes.host:
        if start < 0 or length < 0 or start + length > len(k):
            raise ValueError(f"prefixes has rows {start} to {start + length}: there are {len(k)}")
    if prefixes is not None and len(prefixes.host) != len(lengths):
        raise ValueError(f"prefixes has {len(prefixes.host)} sequences, cu_seqlens {len(lengths)}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected None or at least 1")
    if rows is None:
        _require(len(q) == len(k), "as many queries as keys, or rows", q=q, k=k)
    else:
        _require(rows.shape == q.shape[:1], "rows [R], q [R, Hq, d]", rows=rows, q=q)
        inside = len(rows) == 0 or (int(rows[0]) >= 0 and int(rows[-1]) < len(k) and bool((rows.diff() >= 0).all()))
        if not inside:
            raise ValueError(f"rows is {rows.tolist()!s:.80}, expected ascending rows of {len(k)}")
    return starts


def check_logit(hidden: Tensor, norm_weight: Tensor, vector: Tensor) -> None:
    """Raises: ValueError."""
    fits = hidden.ndim == 2 and norm_weight.shape == vector.shape == hidden.shape[1:]
    _require(fits, "hidden [R, D], norm_weight and vector [D]", hidden=hidden, norm_weight=norm_weight, vector=vector)


def check_weight(weight: Tensor, scales: Tensor | None = None) -> None:
    """Raises: ValueError, TypeError."""
    _require(weight.ndim == 2 and weight.numel() > 0, "a weight [out, in]", weight=weight)
    _require(scales is None or scales.shape == weight.shape[:1], "scales [out]", weight=weight, scales=scales)
    if not weight.is_floating_point():
        raise TypeError(f"weight is of {weight.dtype}, expected floating point")
