"""For a model that Transformers has loaded: our forward in place of its own. (`transformers_attention`: our attention
in its own.) What is replaced is accounted for: a module, parameter, hook or argument that would change what the model
computes, and that our forward doesn't know, is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import update_wrapper
from typing import Any

import torch

from lastrerank import ops
from lastrerank.config import ModelConfig
from lastrerank.integrations.transformers_attention import register_attention, restarts, sequences
from lastrerank.isolation import isolated
from lastrerank.model import LastLayerProjections, LayerWeights, Model, ModelWeights
from lastrerank.packing import PackedBatch

__all__ = ["accelerate", "register_attention"]


def accelerate(model: Any, backend: str = "auto") -> Any:
    """Give a loaded Qwen3 or Qwen2 decoder, or a model that holds one as `.model`, our forward. In place.

    Weights are shared: q, k, v and gate, up are laid side by side and the modules' parameters become views of them (the
    native backend alone keeps packed copies of the linears besides, so it is chosen by name only). Inference only: the
    output has no grad. `last_hidden_state` is 0 at padding; of `hidden_states` only the last exists, the others are
    None. `del decoder.forward` undoes it, and comes before a copy. A row may hold several sequences by `position_ids`
    that start again, as in Transformers with `use_cache=False` (with a cache it takes them for one).

    Args:
        model: on one device, in one dtype, in eval mode, every module as Transformers makes it: adapters, quantised
            linears, subclasses, hooks and changed attributes are refused (merge LoRA weights first).
        backend: "auto", or one of `lastrerank.ops.BACKENDS`.

    Returns:
        The same model.

    Raises:
        TypeError: no Qwen3 or Qwen2 decoder, or one of its modules is not Transformers' own.
        ValueError: the configuration is not supported, a module computes something else than it says, or the model is
            in training mode.
        RuntimeError: the backend can't serve the model's device and dtype.
    """
    decoder: Any = model if hasattr(model, "embed_tokens") else getattr(model, "model", None)
    if getattr(getattr(decoder, "config", None), "model_type", None) not in ("qwen3", "qwen2"):
        raise TypeError(f"model is a {type(model).__name__}, expected a Qwen3 or Qwen2 decoder or a model around one")
    if decoder.training:
        raise ValueError("model is in training mode, expected model.eval() first: there is no grad")
    if getattr(vars(decoder).get("forward"), "is_lastrerank", False):
        del decoder.forward
    table = decoder.embed_tokens.weight
    # A head belongs to whoever holds the decoder.
    config = ModelConfig.from_dict(decoder.config.to_dict() | {"architectures": None})
    _account(decoder)
    if backend == "auto" and table.device.type == "cpu":
        backend = "reference"
    _, operations = ops.select(backend, table.device, table.dtype, config)
    fast = Model(config, _shared_weights(decoder, config, operations), operations)
    if not torch.equal(decoder.rotary_emb.inv_freq.float().cpu(), fast.frequencies.cpu()):
        raise ValueError("rotary_emb.inv_freq is not what the configuration's rope_theta gives")

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **other: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        refused = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
                   "output_attentions": other.pop("output_attentions", None)}  # fmt: skip
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is given, but an accelerated decoder only reads whole prompts")
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError("input_ids is missing or not [batch, length]")
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            raise TypeError(f"attention_mask is a {type(attention_mask).__name__}, expected a tensor [batch, length]")
        if _fingerprint(decoder, values=backend == "native") != before:
            raise ValueError("the decoder has changed since it was accelerated: accelerate it again")
        unknown = [name for name, value in other.items() if value is not None and name not in _HARMLESS]
        if unknown:
            raise TypeError(f"an accelerated decoder doesn't know the argument {unknown[0]!r}")
        with torch.no_grad(), isolated(input_ids.device, inference=False):
            last = _hidden_states(fast, input_ids, attention_mask, position_ids)
        every: Any = (*(None for _ in range(config.num_layers)), last) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=last, hidden_states=every)

    before = _fingerprint(decoder, values=backend == "native")
    decoder.forward = _Forward(forward)
    return model


class _Forward:
    """A function that stays with the decoder it is of: a copy of that one would compute by the first one's weights."""

    is_lastrerank = True

    def __init__(self, function: Any) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("an accelerated decoder isn't copied: del decoder.forward, copy, and accelerate both")

    def __reduce__(self) -> Any:
        raise TypeError("an accelerated decoder isn't pickled: del decoder.forward first")


# What Transformers hands down that doesn't change what is computed here.
_HARMLESS = ("cache_position", "return_dict", "num_items_in_batch")
# Where the classes of a decoder as Transformers makes it, and what they call, come from.
_ORIGINS = ("transformers.", "torch.")
# Attributes that may differ: they are for training.
_FREE = ("training", "gradient_checkpointing")


def _account(decoder: Any) -> None:
    """Every module, parameter and buffer is as a new model of the same configuration has it.

    Raises:
        TypeError, ValueError: one isn't; the message names it.
    """
    if type(decoder).__module__ not in (f"transformers.models.{x}.modeling_{x}" for x in ("qwen2", "qwen3")):
        raise TypeError(f"the decoder is a {type(decoder).__module__}.{type(decoder).__name__}, not Transformers' own")
    modeling = sys.modules[type(decoder).__module__]
    for function in ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward"):
        if not _origin(getattr(modeling, function, None)).startswith("transformers."):
            raise TypeError(f"{modeling.__name__}.{function} has been replaced by something that we don't compute")
    for hooks in _global_hooks():
        for hook in hooks.values():
            raise TypeError(f"there is a hook for all modules ({hook!r:.80}): it may change anything")
    with torch.device("meta"):
        twin = type(decoder)(decoder.config)
    expected, found = (dict(x.named_modules(remove_duplicate=False)) for x in (twin, decoder))
    for name in sorted(found.keys() ^ expected.keys()):
        known = "missing from the decoder" if name in expected else "no module that we compute"
        raise TypeError(f"{name} is {known}")
    for name, module in found.items():
        where, own = name or "the decoder", expected[name]
        if type(module) is not type(own) or not type(module).__module__.startswith(_ORIGINS):
            raise TypeError(f"{where} is a {type(module).__module__}.{type(module).__name__}: it may compute anything")
        if "forward" in vars(module) or not _origin(type(module).forward).startswith(_ORIGINS):
            raise TypeError(f"{where}.forward has been replaced by something that we don't compute")
        for attribute, value in vars(module).items():
            own_value = vars(own).get(attribute)
            if attribute in module._modules or (
                callable(value) and not attribute.startswith("_") and value is not own_value
            ):
                raise TypeError(f"{where}.{attribute} has been set to {value!r:.80}, which we don't compute with")
        for hook in _hooks(module):
            raise TypeError(f"{where} has a hook ({getattr(hook, '__qualname__', hook)!s:.80}): it may change anything")
        for attribute, value in _simple(module).items():
            expects = _simple(own).get(attribute, "nothing")
            if attribute not in _FREE and value != expects:
                raise ValueError(f"{where}.{attribute} is {value!r:.80}, but {expects!r:.80} by the configuration")
        for kind in ("_parameters", "_buffers"):
            _account_tensors(where, kind[1:-1], getattr(module, kind), getattr(own, kind))
    dtypes = {(parameter.dtype, parameter.device) for parameter in decoder.parameters()}
    if len(dtypes) > 1:
        raise ValueError(f"parameters are of {len(dtypes)} dtypes or devices, expected one: {sorted(map(str, dtypes))}")


def _fingerprint(decoder: Any, values: bool) -> tuple[Any, ...]:
    """What makes a decoder the one that was accounted for, quickly: modules, hooks, attributes, where parameters lie,
    and with `values` how often they were written to (packed copies don't follow)."""
    parts: list[Any] = [len(hooks) for hooks in _global_hooks()]
    for module in decoder.modules():
        shadowed = [name for name in vars(module) if callable(vars(module)[name]) and not name.startswith("_")]
        parts.append((id(module), type(module), sum(1 for _ in _hooks(module)), _simple(module) | {"training": None},
                      shadowed if module is not decoder else None))  # fmt: skip
        for parameter in module._parameters.values():
            if parameter is not None:
                parts.append((parameter.data_ptr(), parameter.dtype, parameter._version if values else 0))
        for buffer in module._buffers.values():  # of which our own tables were made
            if buffer is not None:
                parts.append((buffer.data_ptr(), buffer.dtype, 0 if buffer.is_inference() else buffer._version))
    return tuple(parts)


def _global_hooks() -> tuple[Any, Any]:
    from torch.nn.modules import module

    return module._global_forward_pre_hooks, module._global_forward_hooks


def _account_tensors(where: str, kind: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in found.keys() | expected.keys():
        tensor, own = found.get(name), expected.get(name)
        if tensor is None and own is None:
            continue
        plain = isinstance(tensor, torch.Tensor) and type(tensor.data) is torch.Tensor
        if name not in expected or own is None or not plain or tensor.shape != own.shape:  # type: ignore[union-attr]
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None
            raise TypeError(
                f"{where} has a {kind} {name!r} of {type(tensor).__name__} {shape} that we don't compute with"
            )


def _origin(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


def _hooks(module: Any) -> Iterator[Any]:
    """Hooks of a forward, but for those by which Transformers collects outputs."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            if not _origin(hook).startswith("transformers.utils."):
                yield hook


def _simple(module: Any) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or isinstance(value, (bool, int, float, str, tuple)))
    }  # fmt: skip


def _shared_weights(decoder: Any, config: ModelConfig, operations: ops.Operations) -> ModelWeights:
    """The decoder's parameters as our weights, in their own memory."""

    def packed(*linears: Any, name: str = "weight") -> torch.Tensor:
        parameters = [getattr(linear, name) for linear in linears]
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
            parameter.data = part
        return whole

    layers = []
    for index, layer in enumerate(decoder.layers):
        attn, last = layer.self_attn, index == config.num_layers - 1
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        qkv = packed(*projections)
        layers.append(
            LayerWeights(
                input_norm=layer.input_layernorm.weight.detach(),
                qkv=None if last else operations.prepare(qkv),
                qkv_bias=packed(*projections, name="bias") if config.attention_bias else None,
                q_norm=attn.q_norm.weight.detach() if config.qk_norm else None,
                k_norm=attn.k_norm.weight.detach() if config.qk_norm else None,
                o=operations.prepare(attn.o_proj.weight.detach()),
                o_bias=attn.o_proj.bias.detach() if config.output_bias else None,
                post_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=operations.prepare(packed(layer.mlp.gate_proj, layer.mlp.up_proj)),
                down=operations.prepare(layer.mlp.down_proj.weight.detach()),
            )
        )
    q_size, norm = config.num_heads * config.head_dim, decoder.norm.weight.detach()
    return ModelWeights(
        decoder.embed_tokens.weight.detach(), tuple(layers),
        LastLayerProjections(operations.prepare(qkv[:q_size]), operations.prepare(qkv[q_size:])),
        norm,
    )  # fmt: skip


def _hidden_states(
    model: Model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """`[B, T]` ids, padded left or right or in sequences end to end, to hidden states `[B, T, D]` after the final
    norm."""
    if position_ids is not None and position_ids.shape not in (input_ids.shape, (1, input_ids.shape[1])):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {tuple(input_ids.shape)}")
    positions = None if position_ids is None else position_ids.expand(input_ids.shape)
    if attention_mask is None:
        found = sequences(input_ids.shape, input_ids.device, packed=restarts(positions))
    else:
        found = sequences(input_ids.shape, input_ids.device, padding=attention_mask)
        steps = None if positions is None else positions.diff(dim=1)[found.there[:, 1:] & found.there[:, :-1]]
        if steps is not None and bool((steps != 1).any()):
            raise ValueError("position_ids don't count up by one in every row, though attention_mask says one sequence")
    ids = input_ids[found.there]
    batch = PackedBatch(
        ids, found.positions, found.cu_seqlens, found.lengths,
        torch.arange(len(ids), device=ids.device), max(found.lengths),
    )  # fmt: skip
    hidden = model.hidden_states(batch)
    out = hidden.new_zeros(*input_ids.shape, hidden.shape[1])
    out[found.there] = model.ops.rms_norm(hidden, model.weights.norm, model.config.rms_norm_eps)
    return out
