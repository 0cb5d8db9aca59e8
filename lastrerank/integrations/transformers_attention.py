"""Our attention as one of Transformers' own: causal, with windows, padding and packed sequences, without any mask
tensor.

Transformers describes a mask by functions of indices; those that we compute are known by name, anything else (chunks,
blocks of images, both directions, a mask that is already a tensor) is refused, and so are logit caps, attention sinks
and every argument that we don't know.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lastrerank import ops
from lastrerank.isolation import isolated
from lastrerank.ops.reference import ReferenceOperations

ATTENTION = "lastrerank"

# What Transformers hands down that doesn't change what is computed, or what the mask has been made of already.
_HARMLESS = (
    "position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch",
    "output_router_logits", "deterministic", "position_embeddings",
)  # fmt: skip
_HARMLESS_FOR_MASKS = (
    "q_length", "q_offset", "kv_offset", "cache_position", "allow_is_causal_skip", "allow_is_bidirectional_skip",
    "allow_torch_fix", "dtype", "config", "use_vmap", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Rows of `[B, T]` that are tokens, bool `[B, T]`, in reading order N; each one's position in its sequence, int64
    `[N]`; where sequences start, int32 `[S + 1]`, and their lengths."""

    there: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class _Mask:
    """Causal attention within a row's tokens (`padding` `[B, T]`), or its sequences (`packed`, a number each `[B, T]`),
    as far back as `window`."""

    padding: torch.Tensor | None
    packed: torch.Tensor | None
    window: int | None


def register_attention(backend: str = "auto") -> str:
    """Make our attention known to Transformers.

    Use: `model.set_attn_implementation(register_attention())`. Key-value caches that hold anything, dropout, and
    attention that isn't the plain causal one are refused. With grad enabled the reference operations serve, which are
    differentiable.

    Args:
        backend: "auto", or one of `lastrerank.ops.BACKENDS`. No model is known here whose shape "auto" could have the
            Triton kernels checked with, so that on a GPU it is plain PyTorch: "triton" asks for them.

    Returns:
        The name, "lastrerank".
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    @lru_cache
    def operations_for(device: torch.device, dtype: torch.dtype) -> ops.Operations:
        return ops.select(backend, device, dtype)[1]

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **other: Any,
    ) -> tuple[torch.Tensor, None]:
        """query `[B, Hq, T, d]`, key and value `[B, Hkv, T, d]` -> `[B, T, Hq, d]`."""
        for name, argument in other.items():
            if argument is not None and argument is not False and name not in _HARMLESS:
                raise ValueError(f"{type(module).__name__} asks for {name}, which isn't computed here")
        if key.shape[2] != query.shape[2]:
            raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys: key-value caches are not served")
        if value.shape != key.shape or query.shape[3] != key.shape[3]:
            raise ValueError(f"keys and values have shapes {tuple(key.shape)} and {tuple(value.shape)}: not served")
        if dropout or (is_causal if is_causal is not None else getattr(module, "is_causal", None)) is not True:
            raise ValueError(f"{type(module).__name__}: dropout and attention that isn't causal are not served")
        _check_formula(type(module))  # type: ignore[arg-type]
        _check_own_parameters(module)
        mask = _Mask(None, None, sliding_window) if attention_mask is None else attention_mask
        if not isinstance(mask, _Mask):
            raise ValueError(f"attention_mask is a {type(mask).__name__} made elsewhere: only our own masks are served")
        batch, _, length, head_dim = query.shape
        if mask.window != sliding_window and min(mask.window or length, sliding_window or length) < length:
            raise ValueError(f"the mask has a window of {mask.window}, {type(module).__name__} one of {sliding_window}")
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        operations = ReferenceOperations() if grad else operations_for(query.device, query.dtype)
        # [B * T, heads, d]; a batch of one is not copied by flatten, and its heads are then not beside each other.
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
        found = sequences((batch, length), query.device, mask.padding, mask.packed)
        there = None if mask.padding is None else found.there.flatten()
        if there is not None:
            q, k, v = q[there], k[there], v[there]

        with torch.set_grad_enabled(grad), isolated(query.device, inference=False):
            scale = head_dim**-0.5 if scaling is None else float(scaling)
            out = operations.attention(q, k, v, found.cu_seqlens, found.lengths, mask.window, scale)
        if there is not None:
            out = out.new_zeros(batch * length, *out.shape[1:]).index_put((there,), out)
        return out.unflatten(0, (batch, length)), None

    def mask(
        *sizes: Any,
        mask_function: Callable[..., Any],
        attention_mask: torch.Tensor | None = None,
        **other: Any,
    ) -> _Mask:
        """What the mask functions describe."""
        for name, argument in other.items():
            if argument is not None and name not in (*_HARMLESS_FOR_MASKS, "batch_size", "kv_length", "local_size"):
                raise ValueError(f"a mask with {name} is asked for, which lastrerank's attention doesn't know")
        window, packed, causal = None, None, False
        for kind, detail in _parts(mask_function):
            causal |= kind == "causal"
            window = detail if kind == "window" else window
            packed = detail if kind == "packed" else packed
        if not causal:
            raise ValueError("a mask that isn't causal is asked for, which lastrerank's attention doesn't compute")
        return _Mask(attention_mask, packed, window)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    return ATTENTION


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The mask functions that are all to hold, by name.

    Raises:
        ValueError: one that isn't known.
    """
    name = getattr(function, "__qualname__", repr(function))
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    inner = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if code else {}
    known = getattr(function, "__module__", None) == "transformers.masking_utils"
    if known and name == "causal_mask_function":
        yield "causal", None
    elif known and name == "and_masks.<locals>.and_mask":
        for part in inner["mask_functions"]:
            yield from _parts(part)
    elif known and name == "sliding_window_overlay.<locals>.inner_mask":
        yield "window", int(inner["sliding_window"])
    elif known and name == "packed_sequence_mask_function.<locals>.inner_mask":
        yield "packed", inner["packed_sequence_mask"]
    elif known and name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        yield from _parts(inner["mask_function"])  # a sequence's positions are those of its rows
    else:
        raise ValueError(f"a mask by {name} is asked for, which lastrerank's attention doesn't compute")


@lru_cache
def _check_formula(kind: type) -> None:
    """The module's own attention, which we stand in for, is the plain one: the same code as Llama's or, with a cap that
    we refuse, Gemma 2's.

    Raises:
        ValueError: it isn't, or isn't there to compare.
    """
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama

    formulas = {_formula(module.eager_attention_forward) for module in (modeling_llama, modeling_gemma2)}
    own = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
    if own is None or _formula(own) not in formulas:
        raise ValueError(f"{kind.__name__} has an attention of its own, which lastrerank's attention doesn't compute")


def _formula(function: Callable[..., Any]) -> str:
    """A function's code without annotations, docstring, and layout."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return repr(function)
    assert isinstance(tree, ast.FunctionDef)
    names = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)]
    body = [
        node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]  # fmt: skip
    return f"{names} {' '.join(ast.dump(node) for node in body)}"


def _check_own_parameters(module: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            raise ValueError(f"{type(module).__name__} has {name}, which lastrerank's attention doesn't compute with")


def restarts(positions: torch.Tensor | None) -> Any:
    """For each place of `[B, T]` the number of its sequence in the row, as Transformers counts them: a position that
    doesn't follow its neighbour begins one. None for None."""
    if positions is None:
        return None
    return (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)


def sequences(
    shape: Any, device: torch.device, padding: torch.Tensor | None = None, packed: torch.Tensor | None = None
) -> Sequences:
    """Where the sequences of `[B, T]` are.

    Args:
        padding: `[B, T]`, 0 where there is no token.
        packed: `[B, T]`, equal numbers for the tokens of a sequence; not together with padding.

    Raises:
        ValueError: the padding has another shape, an empty row, or a hole in a row; or both are given.
    """
    batch, length = shape
    there = torch.ones(batch, length, dtype=torch.bool, device=device)
    if padding is not None:
        if packed is not None:
            raise ValueError("attention_mask and packed sequences: expected one of them")
        if tuple(padding.shape) != (batch, length):
            raise ValueError(f"attention_mask has shape {tuple(padding.shape)}, expected {(batch, length)}")
        there = padding.to(device).bool()
        runs = (there[:, 1:] > there[:, :-1]).sum(1) + there[:, 0]  # of tokens, in each row
        if not bool(there.any(1).all()) or bool((runs > 1).any()):
            raise ValueError(
                "attention_mask has an empty row, or a row with a hole: expected padding at the ends only"
            )
    row = torch.arange(batch, device=device)[:, None].expand(batch, length)
    number = row if packed is None else row * (length + 1) + packed
    kept = number[there]
    begins = torch.ones_like(kept, dtype=torch.bool)
    begins[1:] = kept[1:] != kept[:-1]
    starts = begins.nonzero()[:, 0]
    cu_seqlens = torch.cat([starts, starts.new_tensor([len(kept)])])
    positions = torch.arange(len(kept), device=device) - starts[begins.cumsum(0) - 1]
    return Sequences(there, positions, cu_seqlens.int(), tuple(cu_seqlens.diff().tolist()))
