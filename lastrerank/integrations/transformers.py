"""For a model that Transformers has loaded: our forward in place of its own, or our attention in its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lastrerank import ops
from lastrerank.config import ModelConfig
from lastrerank.model import LastLayerProjections, LayerWeights, Model, ModelWeights
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.packing import PackedBatch
from lastrerank.reranker import current_device

ATTENTION = "lastrerank"


def accelerate(model: Any, backend: str = "auto") -> Any:
    """Give a loaded Qwen3 or Qwen2 decoder, or a model that holds one as `.model`, our forward. In place.

    Weights are shared: q, k, v and gate, up are laid side by side and the modules' parameters become views of them (the
    native backend alone keeps packed copies of the linears besides, so it is chosen by name only). Inference only: the
    output has no grad. `last_hidden_state` is 0 at padding; of `hidden_states` only the last exists, the others are
    None. `del decoder.forward` undoes it.

    Args:
        model: on one device, in one dtype, in eval mode.
        backend: "auto", or one of `lastrerank.ops.BACKENDS`.

    Returns:
        The same model.

    Raises:
        TypeError: no Qwen3 or Qwen2 decoder.
        ValueError: the configuration is not supported, or the model is in training mode.
        RuntimeError: the backend can't serve the model's device and dtype.
    """
    decoder: Any = model if hasattr(model, "embed_tokens") else getattr(model, "model", None)
    if getattr(getattr(decoder, "config", None), "model_type", None) not in ("qwen3", "qwen2"):
        raise TypeError(f"model is a {type(model).__name__}, expected a Qwen3 or Qwen2 decoder or a model around one")
    if decoder.training:
        raise ValueError("model is in training mode, expected model.eval() first: there is no grad")
    table = decoder.embed_tokens.weight
    # Caps belong to whoever makes prompts.
    caps = {"lastrerank": {"max_query_length": 1, "max_doc_length": 1}}
    config = ModelConfig.from_dict(decoder.config.to_dict() | caps)
    if backend == "auto" and table.device.type == "cpu":
        backend = "reference"
    _, operations = ops.select(backend, table.device, table.dtype)
    fast = Model(config, _shared_weights(decoder, config, operations), operations)

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
        unknown = [name for name, value in other.items() if value is not None and name not in _HARMLESS]
        if unknown:
            raise TypeError(f"an accelerated decoder doesn't know the argument {unknown[0]!r}")
        with torch.no_grad(), current_device(input_ids.device):
            last = _hidden_states(fast, input_ids, attention_mask, position_ids)
        every: Any = (*(None for _ in range(config.num_layers)), last) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=last, hidden_states=every)

    decoder.forward = forward
    return model


# What Transformers hands down that doesn't change what is computed here.
_HARMLESS = ("cache_position", "return_dict")


def _shared_weights(decoder: Any, config: ModelConfig, operations: ops.Operations) -> ModelWeights:
    """The decoder's parameters as our weights, in their own memory. The projector is not the decoder's: it is empty."""

    def packed(*linears: Any) -> torch.Tensor:
        whole = torch.cat([linear.weight.detach() for linear in linears])
        for linear, part in zip(linears, whole.split([len(x.weight) for x in linears]), strict=True):
            linear.weight.data = part
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
                qkv_bias=torch.cat([x.bias.detach() for x in projections]) if config.attention_bias else None,
                q_norm=attn.q_norm.weight.detach() if config.qk_norm else None,
                k_norm=attn.k_norm.weight.detach() if config.qk_norm else None,
                o=operations.prepare(attn.o_proj.weight.detach()),
                post_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=operations.prepare(packed(layer.mlp.gate_proj, layer.mlp.up_proj)),
                down=operations.prepare(layer.mlp.down_proj.weight.detach()),
            )
        )
    q_size, norm = config.num_heads * config.head_dim, decoder.norm.weight.detach()
    empty = norm.new_empty(0, config.hidden_size)
    return ModelWeights(
        decoder.embed_tokens.weight.detach(), tuple(layers),
        LastLayerProjections(operations.prepare(qkv[:q_size]), operations.prepare(qkv[q_size:])),
        norm, empty, empty.new_empty(0, 0),
    )  # fmt: skip


def _hidden_states(
    model: Model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """`[B, T]` ids, padded left or right, to hidden states `[B, T, D]` after the final norm."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    there, lengths = _valid(input_ids.shape, mask)
    positions = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])
    if position_ids is not None:
        given = position_ids.expand(input_ids.shape)[there]
        starts = torch.tensor([0, *lengths[:-1]], device=given.device).cumsum(0)
        shift = torch.repeat_interleave(given[starts], torch.tensor(lengths, device=given.device))
        if not torch.equal(given - shift, positions):
            raise ValueError("position_ids don't count up by one in every row, expected None or consecutive positions")
    total = len(positions)
    batch = PackedBatch(
        input_ids[there], positions, _cu_seqlens(lengths, input_ids.device), lengths,
        torch.arange(total, device=input_ids.device), max(lengths),
    )  # fmt: skip
    hidden = model.hidden_states(batch)
    out = hidden.new_zeros(*input_ids.shape, hidden.shape[1])
    out[there] = model.ops.rms_norm(hidden, model.weights.norm, model.config.rms_norm_eps)
    return out


def register_attention(backend: str = "auto") -> str:
    """Make our attention known to Transformers, causal, with windows and padding, without any mask tensor.

    Use: `model.set_attn_implementation(register_attention())`. Key-value caches and dropout are refused. With grad
    enabled the reference operations serve, which are differentiable.

    Args:
        backend: "auto", or one of `lastrerank.ops.BACKENDS`.

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
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **other: Any,
    ) -> tuple[torch.Tensor, None]:
        """query `[B, Hq, T, d]`, key and value `[B, Hkv, T, d]` -> `[B, T, Hq, d]`."""
        if key.shape[2] != query.shape[2]:
            raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys: key-value caches are not served")
        if dropout or not getattr(module, "is_causal", True):
            raise ValueError("dropout and attention that isn't causal are not served")
        batch, _, length, head_dim = query.shape
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        operations = ReferenceOperations() if grad else operations_for(query.device, query.dtype)
        # [B * T, heads, d]; a batch of one is not copied by flatten, and its heads are then not beside each other.
        q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query, key, value))
        there, lengths = None, (length,) * batch
        if attention_mask is not None:
            there, lengths = _valid((batch, length), attention_mask)
            there = there.flatten()
            q, k, v = q[there], k[there], v[there]
        cu_seqlens = _cu_seqlens(lengths, query.device)
        with torch.set_grad_enabled(grad), current_device(query.device):
            scale = head_dim**-0.5 if scaling is None else scaling
            out = operations.attention(q, k, v, cu_seqlens, lengths, sliding_window, scale)
        if there is not None:
            out = out.new_zeros(batch * length, *out.shape[1:]).index_put((there,), out)
        return out.unflatten(0, (batch, length)), None

    def mask(*shape: Any, attention_mask: torch.Tensor | None = None, **other: Any) -> torch.Tensor | None:
        """The padding as it is, `[B, T]`."""
        return attention_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    return ATTENTION


def _valid(shape: tuple[int, ...], attention_mask: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Where tokens are, bool `[B, T]`, and each row's number of them.

    Raises:
        ValueError: the mask has another shape, an empty row, or a hole in a row.
    """
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(shape)}")
    there = attention_mask.bool()
    lengths = tuple(there.sum(1).tolist())
    runs = (there[:, 1:] > there[:, :-1]).sum(1) + there[:, 0]  # of tokens, in each row
    if 0 in lengths or bool((runs > 1).any()):
        raise ValueError("attention_mask has an empty row, or a row with a hole: expected padding at the ends only")
    return there, lengths


def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
