"""The operations in plain PyTorch: the truth the fast ones are tested against, on any device, and differentiable.

16-bit inputs are computed in fp32 and rounded once. Attention is one `scaled_dot_product_attention` call per sequence
and group of heads, tiled over rows where a mask is needed, so that no `[T, T]` tensor exists at long T.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from lastrerank.config import ModelConfig
from lastrerank.ops import Prefixes, Weight

# Bound on one attention call's output and on one explicit mask, in elements. Large enough that calls are few.
_TILE_ELEMENTS = 1 << 22


class ReferenceOperations:
    """See `lastrerank.ops.Operations`."""

    rounding: str | None = None

    def prepare(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        return weight

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _rms_norm(x, weight, eps).to(x.dtype)

    def add_rms_norm(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + x if torch.is_grad_enabled() else residual.add_(x)
        return residual, self.rms_norm(residual, weight, eps)

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(weight, torch.Tensor):
            return weight.matmul(x, bias, out)
        if out is None:
            return F.linear(x, weight, bias)
        if torch.compiler.is_compiling():  # Dynamo breaks the graph at products with out=
            return out.copy_(F.linear(x, weight, bias))
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

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
        counts = [num_heads, num_kv_heads, num_kv_heads]
        heads = qkv.unflatten(1, (sum(counts), -1))

        def rotated(rows: slice) -> list[torch.Tensor]:
            c, s = cos[positions[rows]][:, None], sin[positions[rows]][:, None]  # [rows, 1, d/2]
            q, k, _ = heads[rows].split(counts, dim=1)
            return [_norm_rope(x, weight, c, s, eps) for x, weight in ((q, q_weight), (k, k_weight)) if x.shape[1]]

        if torch.is_grad_enabled():
            return torch.cat([*rotated(slice(None)), heads[:, num_heads + num_kv_heads :]], dim=1).view(qkv.shape)
        # By tiles of rows: the fp32 copies of a 16-bit buffer would be several times its size.
        tile = max(1, _TILE_ELEMENTS // qkv.shape[1])
        for start in range(0, len(qkv), tile):
            rows = slice(start, start + tile)
            heads[rows, : num_heads + num_kv_heads] = torch.cat(rotated(rows), dim=1)
        return qkv

    def refuses(self, config: ModelConfig) -> str | None:
        return None

    def attention_tiles(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
        prefixes: Prefixes | None,
    ) -> torch.Tensor | None:
        return None

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
        differentiable = torch.is_grad_enabled()
        if out is None and not differentiable:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sequences: list[torch.Tensor] = []
        starts = cu_seqlens.tolist()
        row_bounds = starts if rows is None else torch.searchsorted(rows, cu_seqlens.to(rows.dtype)).tolist()
        for s, length in enumerate(seqlens):
            keys, queries = slice(starts[s], starts[s + 1]), slice(row_bounds[s], row_bounds[s + 1])
            if queries.start == queries.stop:  # an empty sequence, or none of its rows is read
                continue
            own_k, own_v = k[keys], v[keys]
            first, shared = (0, 0) if prefixes is None else prefixes.host[s]
            if shared:
                own_k, own_v = (torch.cat([x[first : first + shared], own]) for x, own in ((k, own_k), (v, own_v)))
            if not shared and rows is None and (window is None or window >= length):
                parts, along = _causal(q[queries], own_k, own_v, scale), 1
            else:
                if rows is None:
                    positions, first_row = torch.arange(shared, shared + length, device=q.device), shared
                else:
                    positions, first_row = rows[queries] - starts[s] + shared, None
                parts, along = _masked(q[queries], own_k, own_v, positions, window, scale, first_row), 0
            if out is None:
                sequences.append(torch.cat([part for _, part in parts], dim=along))
            else:
                for where, part in parts:
                    out[queries][where] = part
        if out is None:
            return torch.cat(sequences) if sequences else torch.empty_like(q)
        return out

    def linear_swiglu(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        return self.swiglu(self.linear(x, weight))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)

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
        rows = torch.cat([doc_rows, query_rows])
        normed = _rms_norm(hidden[rows], norm_weight, eps)
        vectors = F.relu(normed @ w1.float().t()) @ w2.float().t()
        docs, queries = vectors[: len(doc_rows)], vectors[len(doc_rows) :]
        own = _cosine(docs, queries[doc_sequence])

        best = torch.full((len(queries),), -1.0, dtype=own.dtype, device=own.device)
        best = best.scatter_reduce(0, doc_sequence, own, "amax")
        weight = (1 + best) / 2
        fused = torch.zeros_like(queries).index_add_(0, sequence_request, queries * weight[:, None])
        # A mean, but cosine doesn't see its denominator. A request of one block is its own query, whatever its weight.
        blocks = torch.bincount(sequence_request, minlength=len(queries))
        alone = blocks[sequence_request] == 1
        fused = torch.where(alone[:, None], queries, fused[sequence_request])
        return docs, queries, _cosine(docs, fused[doc_sequence])

    def logit(
        self, hidden: torch.Tensor, norm_weight: torch.Tensor, vector: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return (_rms_norm(hidden, norm_weight, eps) * vector).sum(-1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In fp32, whatever x and weight are stored in."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise cosine in fp32, 0 for a zero vector, NaN (not 0) where a norm overflows."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(1e-16) + 0 * norms


def _norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """x `[T, H, d]`, cos and sin `[T, 1, d/2]`. Rotates the halves of a head against each other (NeoX)."""
    y = x.float() if weight is None else _rms_norm(x, weight, eps)
    first, second = y.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[T, H, d]` to `[Hkv, group, T, d]` views: the query heads of a KV head beside each other, keys not copied."""
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q = q.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
    k, v = (x.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    return q, k, v


Tiles = Iterator[tuple[tuple[slice, slice], torch.Tensor]]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Tiles:
    """Full causal attention of one sequence, as many KV heads at a time as the tile bound allows."""
    queries, keys, values = _grouped(q, k, v)
    group = q.shape[1] // k.shape[1]
    step = max(1, _TILE_ELEMENTS // max(1, q[:, :group].numel()))
    for h in range(0, k.shape[1], step):
        heads = slice(h, h + step)
        tile = F.scaled_dot_product_attention(queries[heads], keys[heads], values[heads], is_causal=True, scale=scale)
        yield (slice(None), slice(h * group, (h + step) * group)), tile.permute(2, 0, 1, 3).flatten(1, 2)


def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    window: int | None,
    scale: float,
    first_row: int | None,
) -> Tiles:
    """Queries at positions `rows` of one sequence, by tiles of rows, each against the keys its rows can see.

    first_row: rows are all positions from this one on, so a tile's key range is known without asking the device.
    """
    step = 256 if first_row is not None else max(1, _TILE_ELEMENTS // len(k))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        first, last = 0, len(k)
        if first_row is not None:
            first, last = 0 if window is None else max(0, first_row + start - window + 1), first_row + stop
        position = rows[start:stop, None]
        key = torch.arange(first, last, device=q.device)
        visible = key <= position
        if window is not None:
            visible &= position - key < window
        queries, keys, values = _grouped(q[start:stop], k[first:last], v[first:last])
        tile = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
        yield (slice(start, stop), slice(None)), tile.permute(2, 0, 1, 3).flatten(1, 2)
