"""Checkpoints that lie: each field of the configuration changed to each of many odd values gives the same numbers as in
Transformers, or a refusal; damaged files are refused by name, before anything is built."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, Qwen3Model

from lastrerank import Reranker
from lastrerank.config import ModelConfig
from lastrerank.families.listwise import PROMPT as LISTWISE
from lastrerank.packing import pack
from lastrerank.prompt import PieceEncoder
from lastrerank.random_checkpoint import CONTROL_TOKENS, small_tokenizer, write_random_checkpoint
from lastrerank.request import RerankRequest

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 32, 64, 2**31, 2**63, 2**64 + 1, 10**400, 0.0, 0.5, 1.5, -0.0, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", "1", "true", "false", "silu", "gelu", "default",
    [], [1], {}, {"a": 1},
    [[[]]], {"rope_type": "yarn", "factor": 4.0}, {"rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 50.0},
    {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}, ["full_attention"] * 4,
    ["sliding_attention"] * 4, ["chunked_attention"] * 4, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes"},
]  # fmt: skip
FIELDS = [
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "is_causal", "layer_types",
    "max_position_embeddings", "max_window_layers", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "use_sliding_window", "vocab_size", "architectures", "dtype", "torch_dtype", "lastrerank",
    "use_cache", "initializer_range", "attention_dropout", "tie_word_embeddings", "bos_token_id", "pad_token_id",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
    "residual_multiplier", "mlp_bias", "use_bidirectional_attention", "partial_rotary_factor", "use_qk_norm",
    "per_layer_config", "pruned_heads", "something_new",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint with windows declared but not in use, its folder to change, and its state."""
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("world"), "tiny", tokenizer=small_tokenizer(), dtype=torch.float32,
        overrides={"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256},
                   "sliding_window": 40, "use_sliding_window": False, "max_window_layers": 2},
    )  # fmt: skip
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("layer_types", None)
    state = load_file(folder / "model.safetensors")
    decoder = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    return folder, raw, decoder


def theirs(raw, decoder, ids, tmp):
    """Hidden states by Transformers' own reading of the configuration, or None where it refuses it."""
    known = {k: v for k, v in raw.items() if k not in ("architectures", "lastrerank")}
    (tmp / "config.json").write_text(json.dumps(known))
    try:
        config = AutoConfig.from_pretrained(tmp)
        model = Qwen3Model(config).eval()
        model(input_ids=ids[:, :2], use_cache=False)
    except Exception:  # of any kind
        return None
    assert config.model_type == "qwen3"
    model.load_state_dict(decoder, strict=True)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).last_hidden_state


WITH_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "num_hidden_layers", "head_dim", "is_causal")


@pytest.mark.parametrize(
    ("field", "windowed"), [*((field, False) for field in FIELDS), *((field, True) for field in WITH_WINDOWS)]
)
def test_every_field_with_every_odd_value(world, field, windowed, tmp_path):
    folder, original, decoder = world
    base = {**original, "use_sliding_window": windowed}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    compared = 0
    for value in ODD:
        raw = {**base, field: value}
        (copy / "config.json").write_text(json.dumps(raw))
        started = time.perf_counter()
        try:
            reranker = Reranker.from_pretrained(copy, backend="reference")
        except ValueError as error:
            assert time.perf_counter() - started < 20
            assert field.split("_")[0] in str(error) or "shape" in str(error) or "tensors are" in str(error) or (
                "model_type" in str(error)) or "rope_theta" in str(error), f"{field} = {value!r}: {error}"  # fmt: skip
            continue
        request = RerankRequest.of({"query": "a query", "documents": ["some words of a document " * 6, "b"]})
        batch = pack(reranker.encode(request).blocks, torch.device("cpu"))
        with torch.inference_mode():
            ours = reranker.model.hidden_states(batch)
            ours = reranker.model.ops.rms_norm(ours, reranker.model.weights.norm, reranker.config.rms_norm_eps)
            expected = theirs(raw, decoder, batch.ids[None], tmp_path)
        if expected is None:
            continue
        compared += 1
        off = float((ours - expected[0][batch.read_rows]).abs().max())
        assert off <= 2e-4, f"{field} = {value!r}: {off} from Transformers"
    if field in ("use_cache", "initializer_range", "tie_word_embeddings", "head_dim", "max_window_layers"):
        assert compared >= 1


def test_windows_are_derived_as_transformers_does(world):
    raw = {**world[1], "use_sliding_window": True}
    for first in (0, 1, 2, 4, 28):
        config = ModelConfig.from_dict({**raw, "max_window_layers": first})
        assert config.layer_windows == tuple(40 if layer >= first else None for layer in range(4))
    without = {k: v for k, v in raw.items() if k not in ("max_window_layers", "sliding_window")}
    assert ModelConfig.from_dict({**without, "num_hidden_layers": 30}).layer_windows == (None,) * 28 + (4096,) * 2


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder, message):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        Reranker.from_pretrained(folder)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "deep", "binary", "empty", "endless"])
def test_files_that_are_none(copy, name, kind):
    path = copy / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes({"deep": b"[" * 200_000, "binary": bytes(range(256)) * 9, "empty": b""}[kind])
    if kind == "dangling link" and name == "tokenizer_config.json":
        return  # as if it weren't there
    refused(copy, name.replace(".", r"\."))


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")


Q, NORM, P2 = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight", "projector.2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({P2: torch.zeros(0, 64)}), r"projector\.2\.weight has shape \(0, 64\)"),
        (lambda s: s.update({P2: torch.tensor(1.0)}), r"projector\.2\.weight has shape \(\)"),
        (lambda s: s.update({"projector.0.weight": torch.zeros(64, 0)}), r"projector\.0\.weight has shape"),
        (lambda s: s.update({Q: (s[Q] * 9).to(torch.int8), f"{Q}_scale": torch.ones(len(s[Q]))}), "unknown"),
        (lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
        (lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(4, 4)}), "unknown"),
        (lambda s: s.update({Q: s[Q].to(torch.int64)}), "is stored as I64"),
        (lambda s: s.update({Q: s[Q] > 0}), "is stored as BOOL"),
        (lambda s: s.update({NORM: s[NORM].double() * 1e300}), "holds NaN or infinity"),
        (lambda s: s.update({Q.removeprefix("model."): s[Q] * 2}), "is there twice"),
        (lambda s: s.update({"linear1.weight": s["projector.0.weight"] * 2}), "is there twice"),
        (lambda s: s.update({"score.weight": torch.ones(1, 128)}), "unknown, the first: score.weight"),
        (lambda s: s.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 128)}), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a function's is another in each process
)
def test_tensors_that_are_not_what_they_say(copy, change, message):
    rewrite(copy, change)
    refused(copy, message)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": 5}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}}, {"weight_map": {"a": []}},
     {"weight_map": {"a": "../model.safetensors"}}, {"weight_map": {"a": "config.json"}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_an_index_that_is_none(copy, index, beside):
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    if not beside:
        (copy / "model.safetensors").unlink()
    refused(copy, r"index\.json: weight_map")


def test_an_index_and_its_files_say_the_same(copy):
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({n: state[n] for n in own}, copy / file)
    right = {n: file for file, own in files.items() for n in own}

    def write(where):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    write(right)
    Reranker.from_pretrained(copy)
    write({**right, names[0]: "b.safetensors"})
    refused(copy, f"holds {names[0]}, which model.safetensors.index.json has in b.safetensors")
    write({n: f for n, f in right.items() if n != names[0]})
    refused(copy, f"holds {names[0]}, which model.safetensors.index.json has in None")
    write({**right, "model.layers.9.x": "a.safetensors"})
    refused(copy, r"model\.layers\.9\.x is listed")
    write(right)
    save_file({n: state[n] for n in (*files["b.safetensors"], names[0])}, copy / "b.safetensors")
    refused(copy, f"{names[0]} is in a.safetensors and in b.safetensors")


def test_an_adapter_over_other_weights_is_not_taken_for_the_model(copy):
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    refused(copy, r"adapter_config\.json is there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"]["vocab"].update(zz=10**6), "token 'zz' has id 1000000"),
        (lambda raw: raw["model"].update(dropout=0.1), r"dropout is 0\.1"),
        (lambda raw: raw["added_tokens"][0].update(rstrip=True), r"rstrip of '.*' is true"),
        (lambda raw: raw.update(post_processor={
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}),
         "post_processor adds tokens"),
        (lambda raw: raw.update(model={"type": "Unknown"}), "not a tokenizer"),
        (lambda raw: raw["model"].update(merges=[["q", "nothing of the kind"]]), "not a tokenizer"),
    ],
    ids=["id beyond the table", "dropout", "a token that eats blanks", "tokens around texts", "model", "merges"],
)  # fmt: skip
def test_tokenizers_that_would_give_other_ids(copy, change, message):
    path = copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    refused(copy, message)


def test_added_tokens_that_the_tokenizer_does_not_have(copy):
    limits = {"model_max_length": 4096, "added_tokens_decoder": {"7": {"content": "<|new|>"}}}
    (copy / "tokenizer_config.json").write_text(json.dumps(limits))
    refused(copy, "added_tokens_decoder has '<|new|>' as 7, tokenizer.json as None".replace("|", r"\|"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is true"),
        ({"additional_special_tokens": ["<|new|>"]}, r"additional_special_tokens has '<\|new\|>', which"),
        ({"extra_special_tokens": {"image": "<|new|>"}}, r"extra_special_tokens has '<\|new\|>', which tokenizer.json"),
        ({"add_prefix_space": True}, "add_prefix_space is true, but tokenizer.json puts no space"),
        ({"split_special_tokens": False, "additional_special_tokens": ["<|im_end|>"], "add_prefix_space": False}, None),
    ],
)  # fmt: skip
def test_what_makes_other_ids_in_transformers_is_refused(copy, change, message):
    (copy / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4096} | change))
    if message is None:
        Reranker.from_pretrained(copy)
    else:
        refused(copy, message)


@pytest.mark.parametrize("way", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_eats_what_stands_beside_it_in_the_configuration_alone(copy, way):
    number = str(json.loads((copy / "tokenizer.json").read_text())["added_tokens"][0]["id"])
    content = json.loads((copy / "tokenizer.json").read_text())["added_tokens"][0]["content"]
    added = {"model_max_length": 4096, "added_tokens_decoder": {number: {"content": content, way: True}}}
    (copy / "tokenizer_config.json").write_text(json.dumps(added))
    refused(copy, f"{way} of .* is true")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_whose_texts_differ_behind_a_control_token(scheme):
    """Metaspace that marks the first word alone, as newer files of Llama have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator([*LISTWISE.texts()] * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    if scheme == "always":
        PieceEncoder(tokenizer, LISTWISE.texts())
        return
    with pytest.raises(ValueError, match="a text behind a control token has other ids than by itself"):
        PieceEncoder(tokenizer, LISTWISE.texts())


def test_a_name_that_is_empty_is_not_the_current_folder(copy, monkeypatch):
    monkeypatch.chdir(copy)
    with pytest.raises(ValueError, match="id_or_path is ''"):
        Reranker.from_pretrained("")


@pytest.mark.parametrize("value", ["8192", [], {}, True, 0, -1, float("nan"), 1.5], ids=str)
def test_a_length_that_is_none(copy, value):
    (copy / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
    refused(copy, "model_max_length")


def test_lengths_that_mean_no_limit(copy):
    for value in (10**30, float("inf"), 4096.0, None):
        (copy / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
        assert Reranker.from_pretrained(copy).config.max_context == 4096


def test_a_folder_that_changes_while_it_is_read(copy, monkeypatch):
    from lastrerank import checkpoint as module

    real = module._load

    def slow(*arguments):
        loaded = real(*arguments)
        (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
        return loaded

    monkeypatch.setattr(module, "_load", slow)
    refused(copy, r"config\.json has changed while it was read")


def test_numbers_beyond_float16_are_not_made_infinite(copy):
    rewrite(copy, lambda s: s[NORM].fill_(1e5))
    with pytest.raises(ValueError, match="holds NaN or infinity in float16; use another dtype"):
        Reranker.from_pretrained(copy, dtype="float16", backend="reference")
