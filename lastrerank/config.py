"""What a checkpoint's `config.json` says, checked once and frozen.

Source of the fields: the published configurations of jina-reranker-v3 and v3.5 (Qwen3 decoders), in the spellings
of Transformers 4 (`rope_theta`, `torch_dtype`) and Transformers 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Caps in tokens (query, document) of the two published generations; neither configuration states them.
V3_CAPS = (512, 2048)
V35_CAPS = (1024, 8192)

# Transformers writes this when a tokenizer has no limit of its own.
_NO_LIMIT = 10**18


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a last-token reranker. Nothing in the code assumes one size.

    `layer_windows[i]` is None for full causal attention in layer i, else the number of tokens a query sees,
    itself included. `max_context` is in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    layer_windows: tuple[int | None, ...]
    attention_bias: bool
    qk_norm: bool
    max_context: int
    max_query_length: int
    max_doc_length: int
    template: str
    dtype: str

    @property
    def qkv_size(self) -> int:
        """Width of the packed projection: (num_heads + 2 num_kv_heads) * head_dim."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], model_max_length: int | None = None) -> ModelConfig:
        """Read a published configuration.

        Args:
            raw: the parsed `config.json`.
            model_max_length: tokens, from `tokenizer_config.json`; None or absurdly large means "not stated".

        Raises:
            ValueError: a field is missing, malformed, or names something this package does not compute.
        """
        model_type = raw.get("model_type")
        if model_type not in ("qwen3", "qwen2"):
            raise ValueError(f"config.json: model_type is {model_type!r}, expected 'qwen3' or 'qwen2'")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act is {raw['hidden_act']!r}, expected 'silu'")

        hidden_size = _positive(raw, "hidden_size")
        num_layers = _positive(raw, "num_hidden_layers")
        num_heads = _positive(raw, "num_attention_heads")
        num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = _positive(raw, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim is {head_dim}, rotary embedding needs an even number")

        positions = _positive(raw, "max_position_embeddings")
        max_context = positions
        if model_max_length is not None and 0 < model_max_length < _NO_LIMIT:
            max_context = int(model_max_length)

        own = raw.get("lastrerank") or {}
        windowed = bool(raw.get("use_sliding_window"))
        default_caps = V35_CAPS if windowed else V3_CAPS
        max_query_length = _positive(own, "max_query_length", default_caps[0])
        max_doc_length = _positive(own, "max_doc_length", default_caps[1])
        for name, cap in (("max_query_length", max_query_length), ("max_doc_length", max_doc_length)):
            if cap > max_context // 4:
                raise ValueError(
                    f"config.json: {name} {cap} is more than a quarter of the context ({max_context} tokens); "
                    f'a checkpoint with a small context declares its own caps: "lastrerank": {{"{name}": ...}}'
                )

        return cls(
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(raw),
            layer_windows=_layer_windows(raw, num_layers, windowed),
            # Qwen2 always has a bias on q, k, v and never QK-norm; Qwen3 the other way round unless it says so.
            attention_bias=bool(raw.get("attention_bias", model_type == "qwen2")),
            qk_norm=bool(raw.get("use_qk_norm", model_type == "qwen3")),
            max_context=max_context,
            max_query_length=max_query_length,
            max_doc_length=max_doc_length,
            template=str(own.get("template", "transformers")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        )


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name, default)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config.json: {name} is {value!r}, expected a positive integer")
    return value


def _rope_theta(raw: Mapping[str, Any]) -> float:
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for source in (rope, scaling):
        kind = source.get("rope_type", source.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: rope scaling {kind!r} is not supported, only unscaled rotary embedding is")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"config.json: rope_theta is {theta!r}, expected a positive number")
    return float(theta)


def _layer_windows(raw: Mapping[str, Any], num_layers: int, windowed: bool) -> tuple[int | None, ...]:
    """`layer_types` is read, never derived: the paper and the published configuration disagree on the pattern."""
    types = raw.get("layer_types")
    if types is None or not windowed:
        return (None,) * num_layers
    if len(types) != num_layers:
        raise ValueError(f"config.json: layer_types has {len(types)} entries for {num_layers} layers")
    window = raw.get("sliding_window")
    windows: list[int | None] = []
    for layer, kind in enumerate(types):
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
                raise ValueError(f"config.json: sliding_window is {window!r}, but layer_types[{layer}] needs one")
            windows.append(window)
        else:
            raise ValueError(
                f"config.json: layer_types[{layer}] is {kind!r}, expected 'full_attention' or 'sliding_attention'"
            )
    return tuple(windows)
