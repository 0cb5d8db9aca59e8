"""The operations on a GPU by the Triton kernels of `kernels/`; matrix products and gathers by PyTorch.

Each kernel is registered with PyTorch as `torch.ops.lastrerank.*`, so that `torch.compile` takes the forward as one
graph, profilers see names, and FLOP counters count the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lastrerank.config import ModelConfig
from lastrerank.kernels import attention as attention_kernel
from lastrerank.kernels import logit as logit_kernel
from lastrerank.kernels import qk_norm_rope as qk_norm_rope_kernel
from lastrerank.kernels import rms_norm as rms_norm_kernel
from lastrerank.kernels import score as score_kernel
from lastrerank.kernels import swiglu as swiglu_kernel
from lastrerank.ops import Prefixes, attention_flops
from lastrerank.ops.reference import ReferenceOperations


class TritonOperations(ReferenceOperations):
    """See `lastrerank.ops.Operations`. Grad must be disabled.

    Args:
        portable: without the attention kernel that some chips have of their own.
    """

    def __init__(self, portable: bool = False) -> None:
        self._portable = portable

    def refuses(self, config: ModelConfig) -> str | None:
        if config.head_dim not in attention_kernel.HEAD_DIMS:
            return f"the model's head_dim is {config.head_dim}, its kernels serve {attention_kernel.HEAD_DIMS}"
        group = config.num_heads // config.num_kv_heads
        if group > attention_kernel.MOST_GROUP:
            return f"the model has {group} query heads a key head, its kernels serve {attention_kernel.MOST_GROUP}"
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.lastrerank.rms_norm(x, weight, eps)

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual, torch.ops.lastrerank.add_rms_norm_(residual, x, weight, eps)

    def qk_norm_rope(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> Tensor:
        torch.ops.lastrerank.qk_norm_rope_(
            qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, eps
        )
        return qkv

    def attention_tiles(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        cu_seqlens: Tensor,
        seqlens: tuple[int, ...],
        prefixes: Prefixes | None,
    ) -> Tensor | None:
        table = None if prefixes is None else prefixes.table
        group = config.num_heads // config.num_kv_heads
        return torch.ops.lastrerank.attention_tiles(
            cu_seqlens, sum(seqlens), max(seqlens), group, config.head_dim, dtype, table
        )

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        seqlens: tuple[int, ...],
        window: int | None,
        scale: float,
        rows: Tensor | None = None,
        out: Tensor | None = None,
        prefixes: Prefixes | None = None,
        tiles: Tensor | None = None,
    ) -> Tensor:
        table = None if prefixes is None else prefixes.table
        arguments = (k, v, cu_seqlens, max(seqlens), window, scale)
        if out is None:
            return torch.ops.lastrerank.attention(q, *arguments, rows, table, tiles, self._portable)
        if out is q:
            torch.ops.lastrerank.attention_(q, *arguments, table, tiles, self._portable)
            return q
        return out.copy_(torch.ops.lastrerank.attention(q, *arguments, rows, table, tiles, self._portable))

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return torch.ops.lastrerank.swiglu(gate_up)

    def score(
        self,
        hidden: Tensor,
        doc_rows: Tensor,
        query_rows: Tensor,
        doc_sequence: Tensor,
        sequence_request: Tensor,
        norm_weight: Tensor,
        w1: Tensor,
        w2: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vectors, scores = torch.ops.lastrerank.score(
            hidden, doc_rows, query_rows, doc_sequence, sequence_request, norm_weight, w1, w2, eps
        )
        return vectors[: len(doc_rows)], vectors[len(doc_rows) :], scores

    def logit(self, hidden: Tensor, norm_weight: Tensor, vector: Tensor, eps: float) -> Tensor:
        return torch.ops.lastrerank.logit(hidden, norm_weight, vector, eps)


def _attention_over_queries(q: Tensor, *arguments: Any) -> None:
    *first, prefixes, tiles, portable = arguments
    attention_kernel.attention(q, *first, out=q, prefixes=prefixes, tiles=tiles, portable=portable)


def _attention(q: Tensor, *arguments: Any) -> Tensor:
    *first, prefixes, tiles, portable = arguments
    return attention_kernel.attention(q, *first, prefixes=prefixes, tiles=tiles, portable=portable)


def _fake_tiles(
    cu_seqlens: Tensor, tokens: int, max_seqlen: int, group: int, head_dim: int, dtype: torch.dtype,
    prefixes: Tensor | None,
) -> Tensor:  # fmt: skip
    block_q = attention_kernel.tile_rows(dtype, head_dim, group)
    most = attention_kernel.bound_of_tiles(tokens, cu_seqlens.shape[0] - 1, max_seqlen, block_q)
    return cu_seqlens.new_empty((most, 2), dtype=torch.int32)


def on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever the tensors' own is: there it must be that of the first."""

    @wraps(kernel)
    def launch(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext():
            return kernel(first, *others)

    return launch


# name, schema, implementation, shape of the result. A trailing underscore: the first argument is written.
_ATTENTION = "Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, SymInt? window, float scale"
_OPERATIONS = (
    ("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor",
     rms_norm_kernel.rms_norm, lambda x, weight, eps: x.new_empty(x.shape)),
    ("add_rms_norm_", "(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor",
     rms_norm_kernel.add_rms_norm, lambda residual, x, weight, eps: x.new_empty(x.shape)),
    ("qk_norm_rope_", "(Tensor(a!) qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor positions, "
     "int num_heads, int num_kv_heads, float eps) -> ()",
     qk_norm_rope_kernel.qk_norm_rope, lambda *arguments: None),
    ("attention", f"(Tensor q, {_ATTENTION}, Tensor? rows, Tensor? prefixes, Tensor? tiles, bool portable) -> Tensor",
     _attention, lambda q, *arguments: q.new_empty(q.shape)),
    ("attention_", f"(Tensor(a!) q, {_ATTENTION}, Tensor? prefixes, Tensor? tiles, bool portable) -> ()",
     _attention_over_queries, lambda *arguments: None),
    ("attention_tiles", "(Tensor cu_seqlens, SymInt tokens, SymInt max_seqlen, int group, int head_dim, "
     "ScalarType dtype, Tensor? prefixes) -> Tensor",
     attention_kernel.tiles, _fake_tiles),
    ("swiglu", "(Tensor gate_up) -> Tensor",
     swiglu_kernel.swiglu, lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)),
    ("score", "(Tensor hidden, Tensor doc_rows, Tensor query_rows, Tensor doc_sequence, Tensor sequence_request, "
     "Tensor norm_weight, Tensor w1, Tensor w2, float eps) -> (Tensor, Tensor)",
     score_kernel.score,
     lambda hidden, doc_rows, query_rows, doc_sequence, sequence_request, norm_weight, w1, w2, eps: (
         hidden.new_empty(doc_rows.shape[0] + query_rows.shape[0], w2.shape[0], dtype=torch.float32),
         hidden.new_empty(doc_rows.shape[0], dtype=torch.float32))),
    ("logit", "(Tensor hidden, Tensor norm_weight, Tensor vector, float eps) -> Tensor",
     logit_kernel.logit, lambda hidden, *arguments: hidden.new_empty(hidden.shape[0], dtype=torch.float32)),
)  # fmt: skip

for _name, _schema, _kernel, _fake in _OPERATIONS:
    torch.library.define(f"lastrerank::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"lastrerank::{_name}", ("cpu", "cuda"), on_its_device(_kernel))  # cpu: Triton's interpreter
    torch.library.register_fake(f"lastrerank::{_name}", _fake)


@register_flop_formula(torch.ops.lastrerank.attention, get_raw=True)
def _attention_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
    scale: float,
    rows: Tensor | None = None,
    prefixes: Tensor | None = None,
    tiles: Tensor | None = None,
    portable: bool = False,
    out_val: object = None,
) -> int:
    return attention_flops(cu_seqlens, window, q.shape[1], q.shape[2], rows, prefixes)


@register_flop_formula(torch.ops.lastrerank.attention_, get_raw=True)
def _attention_flops_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
    scale: float,
    prefixes: Tensor | None = None,
    tiles: Tensor | None = None,
    portable: bool = False,
    out_val: object = None,
) -> int:
    return attention_flops(cu_seqlens, window, q.shape[1], q.shape[2], None, prefixes)
