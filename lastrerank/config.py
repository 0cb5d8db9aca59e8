"""What a checkpoint's `config.json` says, checked once and frozen.

Source of the fields: the published configurations of jina-reranker-v3 and v3.5, Qwen3-Reranker and mxbai-rerank-v2
(Qwen3 and Qwen2 decoders) and SmolLM2 (Llama), in the spellings of Transformers 4 (`rope_theta`, `torch_dtype`) and
Transformers 5 (`rope_parameters`, `dtype`). What is absent is derived as Transformers derives it. Every field is read,
known to change no number, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Transformers writes this when a tokenizer has no limit of its own.
_NO_LIMIT = 10**18
# Sizes are indices of a 32-bit integer somewhere; a decoder of more layers than this does not exist.
_LARGEST, _MOST_LAYERS = 2**31 - 1, 4096

# Fields that are read.
_READ = frozenset({
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
    "attention_bias", "use_qk_norm", "tie_word_embeddings", "id2label", "quantization_config", "lastrerank", "dtype",
    "torch_dtype",
})  # fmt: skip
# Fields under which the computation is ours only if they have this value; null is as absent.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "is_causal": True, "mlp_bias": False, "use_mrope": False, "partial_rotary_factor": 1.0,
    "pruned_heads": {}, "add_cross_attention": False, "is_encoder_decoder": False, "pretraining_tp": 1,
    "rope_interleaved": False,
}  # fmt: skip
# Fields that change no hidden state of one causal pass without dropout: names, training, generation, output heads.
_HARMLESS = frozenset({
    "transformers_version", "auto_map", "name_or_path", "_name_or_path", "tokenizer_class",
    "tie_encoder_decoder", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "cls_token_id", "mask_token_id", "decoder_start_token_id", "initializer_range", "attention_dropout",
    "classifier_dropout", "output_hidden_states", "output_attentions", "_output_attentions", "return_dict",
    "use_return_dict", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "is_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "gradient_checkpointing", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "_experts_implementation",
    "_experts_implementation_internal", "_commit_hash", "keys_to_ignore_at_inference", "unsloth_version",
    "unsloth_fixed", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "prefix", "is_llama_config",
    "transformers.js_config",
})  # fmt: skip
# What may stand in our own object: caps, the family (earlier: a template of the listwise one), and that the weights are
# random.
_OWN = frozenset({"max_query_length", "max_doc_length", "family", "template", "random"})
MODEL_TYPES = ("qwen3", "qwen2", "llama")
# Architectures of a decoder, by how their names end, and the one whose head is a classification's. Another may compute
# something else from the same tensors.
_CLASSIFIER = "ForSequenceClassification"
_ARCHITECTURES = ("ForCausalLM", "Model", _CLASSIFIER)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a reranker's decoder. Nothing in the code assumes one size.

    `layer_windows[i]` is None for full causal attention in layer i, else the number of tokens a query sees,
    itself included. attention_bias: q, k and v have one; output_bias: the output projection, too. quantised: the
    linears are stored as this package's int8. `max_context` and `max_positions` are in tokens: what the tokenizer's
    configuration says, and the decoder's. Caps are the checkpoint's own, or None. windowed: whether windows are on,
    in whichever layers. tied: the head is the embedding. classifier: the head is a classification's, whose labels are
    `labels`.
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
    output_bias: bool
    qk_norm: bool
    quantised: bool
    max_context: int
    max_positions: int
    max_query_length: int | None
    max_doc_length: int | None
    windowed: bool
    tied: bool
    classifier: bool
    labels: tuple[str, ...]

    @property
    def qkv_size(self) -> int:
        """Width of the packed projection: (num_heads + 2 num_kv_heads) * head_dim."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], model_max_length: object = None) -> ModelConfig:
        """Read a published configuration.

        Args:
            raw: the parsed `config.json`.
            model_max_length: tokens, from `tokenizer_config.json`; None or absurdly large means "not stated".

        Raises:
            ValueError: a field is missing, malformed, unknown, or asks for something this package does not compute;
                the message names it and its value.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise _bad("model_type", model_type, f"one of {MODEL_TYPES}")
        own = raw.get("lastrerank")
        own = {} if own is None else own
        if not isinstance(own, Mapping):
            raise _bad("lastrerank", own, "an object")
        _check_known(raw, own)

        num_layers = _integer(raw, "num_hidden_layers", most=_MOST_LAYERS)
        hidden_size, num_heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
        # Absent and null differ in Transformers: absent is its class's default.
        absent = "num_key_value_heads" not in raw and model_type != "llama"
        num_kv_heads = 32 if absent else _integer(raw, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        if raw.get("head_dim") is None and model_type != "qwen3" and hidden_size % num_heads:
            raise ValueError(
                f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, "
                "and head_dim isn't given"
            )
        head_dim = _integer(raw, "head_dim", 128 if model_type == "qwen3" else max(1, hidden_size // num_heads))
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim is {head_dim}, rotary embedding needs an even number")

        max_positions = _integer(raw, "max_position_embeddings")
        limit = _context_limit(model_max_length)
        windowed = _boolean(raw, "use_sliding_window", False)
        if windowed and model_type == "llama":
            raise _bad("use_sliding_window", windowed, "false: no Llama decoder has windows")
        caps = [
            None if own.get(name) is None else _integer(own, name, of="lastrerank.")
            for name in ("max_query_length", "max_doc_length")
        ]
        _boolean(own, "random", False, of="lastrerank.")

        # Qwen2 has a bias on q, k, v, whatever its configuration says; Qwen3 and Llama have one on all four projections
        # or on none. QK-norm is Qwen3's alone.
        bias = _boolean(raw, "attention_bias", model_type == "qwen2")
        if model_type == "qwen2" and not bias:
            raise _bad("attention_bias", bias, "true: a Qwen2 decoder has biases")
        qk_norm = _boolean(raw, "use_qk_norm", model_type == "qwen3")
        if qk_norm != (model_type == "qwen3"):
            raise _bad("use_qk_norm", qk_norm, f"{not qk_norm}: it is so in every {model_type} decoder")
        return cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(raw, "rms_norm_eps", 0.0, 1.0, 1e-6),
            rope_theta=_rope_theta(raw),
            layer_windows=_layer_windows(raw, num_layers, windowed),
            attention_bias=bias,
            output_bias=bias and model_type != "qwen2",
            qk_norm=qk_norm,
            quantised=_quantised(raw),
            max_context=max_positions if limit is None else limit,
            max_positions=max_positions,
            max_query_length=caps[0],
            max_doc_length=caps[1],
            windowed=windowed,
            tied=raw.get("tie_word_embeddings") is True,
            classifier=any(name.endswith(_CLASSIFIER) for name in raw.get("architectures") or ()),
            labels=_labels(raw.get("id2label")),
        )


# Inputs of a weight that are rotated together (`lastrerank.rotation`), at most.
MOST_ROTATED = 64
# The largest magnitude of a quantised weight: 7 bits, as the native kernels want it (csrc/kernels.cpp).
INT8_MAX = 64

# As `save_pretrained` marks int8 weights, so that no other program takes them for numbers: Transformers refuses a
# configuration without `quant_method` (one that it doesn't know it skips, and loads the integers).
QUANTIZATION = {"format": "lastrerank-int8", "rotation": "hadamard", "block": MOST_ROTATED}


def _bad(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"config.json: {name} is {value!r:.80}, expected {expected}")


def _check_known(raw: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in raw.items():
        if name in _FIXED:
            wanted = _FIXED[name]
            absent = value is None and name != "is_causal"  # there, null is false to Transformers
            if not absent and (value != wanted or isinstance(value, bool) != isinstance(wanted, bool)):
                raise _bad(name, value, f"{wanted!r}: nothing else is computed here")
        elif name not in _READ and name not in _HARMLESS and value is not None:
            raise ValueError(
                f"config.json: {name} is {value!r:.80}, a field that lastrerank doesn't know: it may change what the "
                "model computes; remove it if it doesn't"
            )
    for name, value in own.items():
        if name not in _OWN:
            raise _bad(f"lastrerank.{name}", value, f"one of {sorted(_OWN)} as names in 'lastrerank'")
    architectures = raw.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise _bad("architectures", architectures, "a list of names")
    known = [f"{str(raw.get('model_type')).capitalize()}{end}" for end in _ARCHITECTURES] + ["JinaForRanking"]
    if not set(architectures or ()) <= set(known):
        raise _bad("architectures", architectures, f"of {known}: another may compute something else")
    for name in ("dtype", "torch_dtype"):
        if raw.get(name) not in (None, "auto", *_DTYPES, *(f"torch.{dtype}" for dtype in _DTYPES)):
            raise _bad(name, raw[name], f"one of {_DTYPES}")


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None, most: int = _LARGEST, of: str = "") -> int:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise _bad(of + name, value, f"a positive integer up to {most}")
    return value


def _boolean(raw: Mapping[str, Any], name: str, default: bool, of: str = "") -> bool:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _bad(of + name, value, "true or false")
    return value


def _number(raw: Mapping[str, Any], name: str, least: float, most: float, default: object = None) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:  # NaN is neither
        raise _bad(name, value, f"a number between {least:g} and {most:g}")
    return float(value)


def _context_limit(value: object) -> int | None:
    """`model_max_length` of `tokenizer_config.json`, or None where it says nothing."""
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not (
        isinstance(value, float) and (math.isnan(value) or (math.isfinite(value) and value != int(value)))
    )
    if not number or value < 1:  # type: ignore[operator]
        raise ValueError(
            f"tokenizer_config.json: model_max_length is {value!r:.80}, expected a positive number of tokens"
        )
    return None if value >= _NO_LIMIT else min(int(value), _LARGEST)  # type: ignore[operator, call-overload]


def _rope_theta(raw: Mapping[str, Any]) -> float:
    for name in ("rope_parameters", "rope_scaling"):
        source = raw.get(name)
        if source is None:
            continue
        if not isinstance(source, Mapping):
            raise _bad(name, source, "an object")
        kind = source.get("rope_type", source.get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"config.json: {name} asks for rope scaling {kind!r:.80}, which is not supported: only unscaled rotary "
                "embedding is"
            )
        for key, value in source.items():
            if key not in ("rope_type", "type", "rope_theta") and value is not None and (
                key != "partial_rotary_factor" or value != 1.0 or isinstance(value, bool)
            ):
                raise _bad(f"{name}.{key}", value, "no such parameter of unscaled rotary embedding")
    # Transformers reads rope_scaling in place of rope_parameters, and the number beside them where theirs is missing.
    inner = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    name = "rope_theta"
    return _number({name: inner.get(name, raw.get(name))}, name, 1.0, 1e18)


def _labels(id2label: object) -> tuple[str, ...]:
    """Of a classification, in the order of their numbers; none where they make no sense."""
    if not isinstance(id2label, Mapping) or set(map(str, id2label)) != set(map(str, range(len(id2label)))):
        return ()
    by_number = {str(number): label for number, label in id2label.items()}
    return tuple(str(by_number[str(number)]) for number in range(len(by_number)))


def _layer_windows(raw: Mapping[str, Any], num_layers: int, windowed: bool) -> tuple[int | None, ...]:
    """Read, not derived, where `layer_types` is there: the paper and the published configuration disagree on the
    pattern. Files from before that field mean the layers from `max_window_layers` on, as Transformers derives it."""
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            found = f"has {len(types)} entries" if isinstance(types, list) else f"is {types!r:.80}"
            raise ValueError(f"config.json: layer_types {found} for {num_layers} layers")
        for layer, kind in enumerate(types):
            if kind not in ("full_attention", "sliding_attention"):
                raise _bad(f"layer_types[{layer}]", kind, "'full_attention' or 'sliding_attention'")
    first = raw.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise _bad("max_window_layers", first, "a number of layers")
    window = raw.get("sliding_window", 4096 if types is None else None)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or not 0 < window <= _LARGEST):
        raise _bad("sliding_window", window, f"a positive integer up to {_LARGEST}")
    if not windowed or (types is None and window is None):
        return (None,) * num_layers
    local = [kind == "sliding_attention" for kind in types] if types else [i >= first for i in range(num_layers)]
    if window is None and any(local):
        raise ValueError(f"config.json: sliding_window is None, but layer_types[{local.index(True)}] needs one")
    return tuple(window if is_local else None for is_local in local)


def _quantised(raw: Mapping[str, Any]) -> bool:
    value = raw.get("quantization_config")
    if value is not None and value != QUANTIZATION:
        method = value.get("quant_method", value) if isinstance(value, Mapping) else value
        raise ValueError(
            f"config.json: quantization_config asks for {method!r:.80}, which this version does not support; load the "
            "unquantised checkpoint, with dtype='int8' or 'float8' if it is to be small"
        )
    return value is not None
