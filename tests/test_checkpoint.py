"""Every spelling of a checkpoint that is published, and every way one can be broken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lastrerank import Reranker
from lastrerank.checkpoint import BUNDLED, open_checkpoint, resolve
from lastrerank.config import ModelConfig
from lastrerank.lists import list_caps
from lastrerank.random_checkpoint import SHAPES, small_tokenizer, write_random_checkpoint

DOCUMENTS = ["one document", "another", "a third one"]


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small checkpoint to break, and a way to change its parts."""

    class Copy:
        folder = tmp_path / "copy"

        def config(self, **changes):
            raw = json.loads((self.folder / "config.json").read_text())
            for key, value in changes.items():
                raw.pop(key, None) if value is None else raw.update({key: value})
            (self.folder / "config.json").write_text(json.dumps(raw))

        def tensors(self, change):
            state = load_file(self.folder / "model.safetensors")
            change(state)
            save_file({n: t.contiguous() for n, t in state.items()}, self.folder / "model.safetensors",
                      metadata={"format": "pt"})  # fmt: skip

        def load(self):
            return Reranker.from_pretrained(self.folder)

    shutil.copytree(small, Copy.folder)
    return Copy()


def score(reranker):
    return [r["relevance_score"] for r in reranker.rerank("query", DOCUMENTS)]


def rename(state, old, new):
    state[new] = state.pop(old)


def drop_prefix(state):
    for name in list(state):
        if name.startswith("model."):
            rename(state, name, name.removeprefix("model."))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: (rename(s, "projector.0.weight", "projector.linear1.weight"),
                   rename(s, "projector.2.weight", "projector.linear2.weight")),
        lambda s: (rename(s, "projector.0.weight", "linear1.weight"),
                   rename(s, "projector.2.weight", "linear2.weight")),
        lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}),
        drop_prefix,
    ],
    ids=["projector.linear", "linear", "lm_head", "no prefix"],
)  # fmt: skip
def test_spellings_of_tensors(small_reranker, copy, change):
    copy.tensors(change)
    assert score(copy.load()) == score(small_reranker)


def test_spellings_of_the_configuration(small_reranker, copy):
    copy.config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    copy.config(dtype=None, torch_dtype="float32")
    assert score(copy.load()) == score(small_reranker)


def test_sharded(small_reranker, copy):
    state = load_file(copy.folder / "model.safetensors")
    (copy.folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({n: state[n] for n in members}, copy.folder / file)
    index = {"weight_map": {n: file for file, members in files.items() for n in members}}
    (copy.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert score(copy.load()) == score(small_reranker)
    (copy.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors, listed in .* is missing"):
        copy.load()


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(NAME), f"1 tensors are missing, the first: {NAME}"),
        (lambda s: s.update({"model.layers.9.x": torch.ones(2)}), "1 tensors are unknown, the first: model.layers.9.x"),
        (lambda s: s.update({NAME: s[NAME].t()}), rf"{NAME} has shape \(320, 128\), expected \(128, 320\)"),
        (lambda s: s[NAME].__setitem__((3, 4), float("nan")), f"{NAME} holds NaN or infinity"),
        (lambda s: s[NAME].__setitem__((3, 4), float("inf")), f"{NAME} holds NaN or infinity"),
        (lambda s: s.update({NAME: s[NAME].to(torch.int8)}),
         f"{NAME} is stored as I8, expected F64 or F32 or F16 or BF16: quantised weights need"),
        (lambda s: (s.pop("projector.0.weight"), s.pop("projector.2.weight")), "no projector: expected"),
        (lambda s: s.update({"projector.2.weight": torch.ones(64, 32)}), "projector.2.weight has shape"),
    ],
    ids=["missing", "unknown", "shape", "nan", "inf", "dtype", "no projector", "projector shape"],
)
def test_broken_tensors_are_named(copy, change, message):
    copy.tensors(change)
    with pytest.raises(ValueError, match=message):
        copy.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "a classifier"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope scaling 'llama3'"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"use_sliding_window": True, "layer_types": ["chunked"] * 4}, r"layer_types\[0\] is 'chunked'"),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, "sliding_window is None"),
        ({"lastrerank": {}}, "max_doc_length 2048 is more than a quarter of the context"),
        ({"lastrerank": {"template": "x", "max_doc_length": 256, "max_query_length": 64}}, "template is 'x'"),
    ],
)
def test_unsupported_configurations_are_refused(copy, changes, message):
    copy.config(**changes)
    with pytest.raises(ValueError, match=message):
        copy.load()


def test_damaged_files_are_named(copy):
    path = copy.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or incomplete"):
        copy.load()
    path.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        copy.load()
    (copy.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        copy.load()
    (copy.folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        copy.load()


def test_unknown_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder, and no Hub id"):
        Reranker.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        Reranker.from_pretrained(tmp_path)


def test_hub_ids_resolve_without_remote_code(small, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("owner/model", "abc").folder == small
    assert asked["name"] == "owner/model" and asked["revision"] == "abc"
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in asked["patterns"])

    for local in (small, BUNDLED):
        with pytest.raises(ValueError, match=f"revision is 'abc': {local} is .* has revisions"):
            Reranker.from_pretrained(local, revision="abc")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="the Hub did not serve it: no network"):
        open_checkpoint("owner/model")


def test_layer_types_are_read_not_derived():
    raw = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 100, "rope_theta": 1e6,
           "max_position_embeddings": 131072, "sliding_window": 7,
           "layer_types": ["full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
    assert ModelConfig.from_dict({**raw, "use_sliding_window": True}).layer_windows == (None, 7, None)
    assert ModelConfig.from_dict({**raw, "use_sliding_window": False}).layer_windows == (None, None, None)
    without = {k: v for k, v in raw.items() if k != "layer_types"}
    assert ModelConfig.from_dict({**without, "use_sliding_window": True}).layer_windows == (None, None, None)
    caps = ModelConfig.from_dict({**raw, "use_sliding_window": True})
    assert list_caps(caps) == (1024, 8192)
    caps = ModelConfig.from_dict(raw, model_max_length=10**30)
    assert (*list_caps(caps), caps.max_context) == (512, 2048, 131072)


def test_shapes_are_the_published_ones():
    v3 = SHAPES["jina-reranker-v3"]
    sizes = [v3[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "head_dim")]
    assert sizes == [1024, 28, 3072, 128]
    with pytest.raises(ValueError, match="shape is 'huge'"):
        write_random_checkpoint("/nowhere", "huge")


def test_random_checkpoints_say_so_and_repeat(tmp_path):
    a = write_random_checkpoint(tmp_path / "a", "tiny-v3.5", tokenizer=small_tokenizer(), seed=3)
    b = write_random_checkpoint(tmp_path / "b", "tiny-v3.5", tokenizer=small_tokenizer(), seed=3)
    assert json.loads((a / "config.json").read_text())["lastrerank"]["random"] is True
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["jina-reranker-v3", "Qwen3-Reranker-0.6B", "zerank-1-small"])
def test_short_names_of_public_checkpoints(name, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append(repository)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=f"/{name}'"):
        resolve(name)
    assert asked[0].endswith(f"/{name}") and asked[0].count("/") == 1
    with pytest.raises(ValueError, match="nor one of the short names lastrerank-43m, jina"):
        resolve("no-such-model")
