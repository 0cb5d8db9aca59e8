"""A plain decoder out of a GGUF file (Llama architecture), as safetensors with its tokenizer beside it.

For pretrained weights that are at hand in no other form. The format is llama.cpp's; `gguf` reads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from lastrerank import saving

_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_ALONE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def decoder_from_gguf(path: str | Path, output: str | Path) -> Path:
    """Write the decoder in `path` to the folder `output`, weights dequantised to fp32.

    Raises:
        ValueError: the file holds another architecture, or another kind of tokenizer.
    """
    import gguf

    reader = gguf.GGUFReader(str(path))

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    architecture, kind = field("general.architecture"), (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if architecture != "llama" or kind != ("gpt2", "smollm"):
        raise ValueError(f"{path} holds a {architecture} with tokenizer {kind}, expected llama, ('gpt2', 'smollm')")
    scaled = [name for name in reader.fields if name.startswith("llama.rope.") and name not in (
        "llama.rope.freq_base", "llama.rope.dimension_count")]  # fmt: skip
    if scaled:
        raise ValueError(f"{path}: {scaled[0]} is {field(scaled[0])!r:.40}: only unscaled rotary embedding is known")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        known = layer[2] in _NAMES if layer else tensor.name.removesuffix(".weight") in _ALONE
        if not known:
            raise ValueError(f"{path}: {tensor.name} is a tensor that isn't known here")
        if layer is None:
            state[f"{_ALONE[tensor.name.removesuffix('.weight')]}.weight"] = weight
            continue
        if layer[2] in ("attn_q", "attn_k"):
            # llama.cpp turns neighbouring channels against each other, this architecture the halves of a head.
            count = heads if layer[2] == "attn_q" else kv_heads
            weight = weight.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        state[f"model.layers.{layer[1]}.{_NAMES[layer[2]]}.weight"] = weight
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32",
        "hidden_size": field("llama.embedding_length"), "num_hidden_layers": field("llama.block_count"),
        "intermediate_size": field("llama.feed_forward_length"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "rope_theta": float(field("llama.rope.freq_base")),
        "rms_norm_eps": round(float(field("llama.attention.layer_norm_rms_epsilon")), 9), "tie_word_embeddings": True,
        "max_position_embeddings": field("llama.context_length"), "vocab_size": len(field("tokenizer.ggml.tokens")),
    }  # fmt: skip
    limits = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": raw["max_position_embeddings"]}
    saving.save(output, raw, _tokenizer(field), limits, state)
    return Path(output)


def _tokenizer(field: Any) -> Tokenizer:
    """As the published `tokenizer.json` of SmolLM has it: single digits, then words as GPT-2 splits them."""
    vocabulary = {token: number for number, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's number of the type
    special = [token for token, kind in zip(vocabulary, field("tokenizer.ggml.token_type"), strict=True)
               if kind == control]  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
