"""The Triton operations with attention by the `flash-attn` library, whichever of its generations is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lastrerank.ops import Prefixes
from lastrerank.ops.triton import TritonOperations

# Modules that hold `flash_attn_varlen_func`, the newest generation first: 4, 3, 2.
_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")


class FlashAttnOperations(TritonOperations):
    """See `lastrerank.ops.Operations`. The last layer's few read rows go through our own kernel.

    Raises:
        RuntimeError: no generation of the library can be imported; the message says why.
    """

    def __init__(self) -> None:
        self._attend = _find()

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
    ) -> Tensor:
        if rows is not None:
            return super().attention(q, k, v, cu_seqlens, seqlens, window, scale, rows, out, prefixes)
        cu_seqlens = cu_seqlens.contiguous()
        cu_seqlens_k, longest = cu_seqlens, max(seqlens)
        if prefixes is not None:
            # The library aligns the causal mask to the last key, so that what stands before a sequence is seen whole.
            k, v, cu_seqlens_k, longest = _with_prefixes(k, v, seqlens, prefixes)
        # The library's window counts the tokens before the current one.
        local = {} if window is None else {"window_size": (window - 1, 0)}
        result = self._attend(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max(seqlens),
            max_seqlen_k=longest, softmax_scale=scale, causal=True, **local,
        )  # fmt: skip
        result = result[0] if isinstance(result, tuple) else result
        return result if out is None else out.copy_(result)


def _with_prefixes(
    k: Tensor, v: Tensor, seqlens: tuple[int, ...], prefixes: Prefixes
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Copies of keys and values in which every sequence has what it continues before it, their starts, and the
    longest."""
    parts, lengths, start = [], [], 0
    for length, (first, shared) in zip(seqlens, prefixes.host, strict=True):
        parts += [np.arange(first, first + shared), np.arange(start, start + length)]
        lengths.append(shared + length)
        start += length
    index = torch.from_numpy(np.concatenate(parts)).to(k.device)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(k.device)
    return k[index], v[index], starts, max(lengths)


def _find() -> Callable[..., Any]:
    reasons = []
    for name in _MODULES:
        try:
            return importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError(f"flash-attn is not installed ({'; '.join(reasons)})")
