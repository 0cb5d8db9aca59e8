"""The Triton operations with attention by the `flash-attn` library, whichever of its generations is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lastrerank.config import ModelConfig
from lastrerank.ops import Prefixes
from lastrerank.ops.triton import TritonOperations

# Modules that hold `flash_attn_varlen_func`, the newest generation first: 4, 3, 3 as a wheel of its own, 2.
_MODULES = ("flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface", "flash_attn")


class FlashAttnOperations(TritonOperations):
    """See `lastrerank.ops.Operations`. The last layer's few read rows go through our own kernel, and so do sequences
    that continue others: the library would need a copy of the keys before each of them.

    Raises:
        RuntimeError: no generation of the library can be imported; the message says why.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attend = _find()

    def attention_tiles(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        cu_seqlens: Tensor,
        seqlens: tuple[int, ...],
        prefixes: Prefixes | None,
    ) -> Tensor | None:
        # The library has its own, but for sequences that continue others.
        return None if prefixes is None else super().attention_tiles(config, dtype, cu_seqlens, seqlens, prefixes)

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
        if rows is not None or prefixes is not None:
            return super().attention(q, k, v, cu_seqlens, seqlens, window, scale, rows, out, prefixes, tiles)
        cu_seqlens = cu_seqlens.contiguous()
        # The library's window counts the tokens before the current one.
        local = {} if window is None else {"window_size": (window - 1, 0)}
        result = self._attend(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max(seqlens),
            max_seqlen_k=max(seqlens), softmax_scale=scale, causal=True, **local,
        )  # fmt: skip
        result = result[0] if isinstance(result, tuple) else result
        return result if out is None else out.copy_(result)


def _find() -> Callable[..., Any]:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError(f"flash-attn is not installed ({'; '.join(reasons)})")
