"""LoRA adapters in PEFT's format: merged while loading, written by training, refused where they ask for more."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lastrerank import Reranker
from lastrerank.adapters import CONFIG, WEIGHTS, write_adapter
from lastrerank.checkpoint import open_checkpoint
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint
from lastrerank.training.data import ListRow, TrainingData
from lastrerank.training.trainer import Trainer, TrainingConfig

DOCUMENTS = ["a passage", "another passage about ranking", "expert", ""]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    return write_random_checkpoint(
        tmp_path_factory.mktemp("base"), "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, overrides=overrides
    )


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter with updates of two ranks and a projector of its own, and the base with both merged by hand."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator) * 0.1  # noqa: E731
    state = load_file(base / "model.safetensors")
    updates = {f"{n}.weight": (draw(state[f"{n}.weight"].shape[0], 4), draw(4, state[f"{n}.weight"].shape[1]))
               for n in (Q, DOWN)}  # fmt: skip
    projector = {"projector.2.weight": draw(*state["projector.2.weight"].shape)}
    folder = tmp_path / "adapter"
    write_adapter(folder, str(base), updates, projector, 4, 8.0)
    for name, (b, a) in updates.items():
        state[name] = state[name] + 2.0 * b @ a
    return folder, state | projector


def scores(folder, **options):
    found = Reranker.from_pretrained(folder, backend="reference", **options).rerank("expert", DOCUMENTS)
    return [r["relevance_score"] for r in sorted(found, key=lambda r: r["index"])]


def merged(base, state, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def change(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


def rename(folder, old, new, tensor=None):
    tensors = load_file(folder / WEIGHTS)
    found = tensors.pop(old)
    save_file(tensors | {new: found if tensor is None else tensor}, str(folder / WEIGHTS))


def test_an_adapter_is_merged_while_it_loads(base, adapter, tmp_path):
    folder, state = adapter
    expected = scores(merged(base, state, tmp_path))
    assert scores(folder) == pytest.approx(expected, abs=1e-6)
    assert max(abs(a - b) for a, b in zip(expected, scores(base), strict=True)) > 1e-3
    reranker = Reranker.from_pretrained(folder)
    assert reranker.checkpoint.name == "adapter"
    assert reranker.identity()["digest"] != Reranker.from_pretrained(base).identity()["digest"]
    reranker.save_pretrained(tmp_path / "saved")  # the two together, as one checkpoint
    assert scores(tmp_path / "saved") == pytest.approx(expected, abs=1e-5)


def test_scales_by_pattern_and_rank_stabilised(base, adapter, tmp_path):
    folder, state = adapter
    original = load_file(base / "model.safetensors")
    change(folder, use_rslora=True, alpha_pattern={"q_proj": 2.0})
    for module, before, now in ((Q, 2.0, 2.0 / 2.0), (DOWN, 2.0, 8.0 / 2.0)):
        name = f"{module}.weight"
        state[name] = original[name] + (state[name] - original[name]) * now / before
    assert scores(folder) == pytest.approx(scores(merged(base, state, tmp_path)), abs=1e-6)


@pytest.mark.parametrize(
    "fields, said",
    [({"use_dora": True}, "use_dora is True"), ({"bias": "all"}, "bias is 'all'"), ({"peft_type": "IA3"}, "peft_type"),
     ({"something_new": 1}, "something_new is 1, a field that isn't known"), ({"r": 0}, "r is 0"),
     ({"init_lora_weights": "pissa"}, "changes the base's weights"), ({"r": 8}, "has rank 4"),
     ({"base_model_name_or_path": None}, "base_model_name_or_path is None"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
     ({"use_rslora": 1}, "use_rslora is 1"), ({"target_modules": ["q_proj"]}, "none of target_modules"),
     ({"layers_to_transform": [0]}, "none of layers_to_transform"), ({"revision": 3}, "revision is 3"),
     ({"rank_pattern": {"(a+)+b": 4}}, "expected a module's name"),
     ({"alpha_pattern": {"q_proj": "x"}}, "q_proj is 'x'"),
     ({"alpha_pattern": [1]}, "expected an object"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
     ({"base_model_name_or_path": "/nowhere"}, "/nowhere")],
)  # fmt: skip
def test_what_asks_for_more_is_refused_by_name(adapter, fields, said):
    change(adapter[0], **fields)
    with pytest.raises(ValueError, match=said):
        Reranker.from_pretrained(adapter[0])


A = f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize(
    "new, tensor, said",
    [("base_model.model.model.embed_tokens.lora_embedding_A", None, "no update that is known"),
     (f"base_model.model.{Q}.lora_magnitude_vector", None, "no update that is known"),
     ("base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight", None, r"expected A \[r, in\]"),
     (A, torch.zeros(4, 7), r"updates .*q_proj.weight as \(256, 7\)"), (A, torch.full((4, 128), torch.nan), "NaN"),
     (A, torch.zeros(3, 128), "expected A"), (A, torch.zeros(4, 128, dtype=torch.int8), "torch.int8, expected numbers"),
     (f"base_model.model.{Q}.lora_A.other.weight", None, "no update that is known")],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(adapter, new, tensor, said):
    rename(adapter[0], A, new, tensor)
    with pytest.raises(ValueError, match=said):
        Reranker.from_pretrained(adapter[0])


def test_other_replacements_and_int8_bases_are_refused(base, adapter, tmp_path):
    folder, _ = adapter
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}, str(folder / WEIGHTS))
    with pytest.raises(ValueError, match=r"replaces model\.embed_tokens\.weight"):
        Reranker.from_pretrained(folder)
    save_file(tensors, str(folder / WEIGHTS))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ValueError, match="missing, damaged or incomplete"):
        Reranker.from_pretrained(folder)
    save_file(tensors, str(folder / WEIGHTS))
    Reranker.from_pretrained(base, dtype="int8", backend="native").save_pretrained(tmp_path / "int8")
    change(folder, base_model_name_or_path=str(tmp_path / "int8"))
    with pytest.raises(ValueError, match="its weights are int8"):
        Reranker.from_pretrained(folder)


def test_what_is_there_twice_or_no_file_is_refused(base, adapter):
    folder, _ = adapter
    tensors = load_file(folder / WEIGHTS)
    for name, said in ((A.replace(".weight", ".default.weight"), "there twice"),
                       (f"base_model.model.{Q}.weight", "replaced and updated")):  # fmt: skip
        save_file(tensors | {name: torch.zeros(4, 128)}, str(folder / WEIGHTS))
        with pytest.raises(ValueError, match=said):
            Reranker.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(ValueError, match="no regular file"):
        Reranker.from_pretrained(folder)


def test_a_pickle_is_of_the_adapter_and_a_base_has_none_beside_it(base, adapter, tmp_path):
    folder, _ = adapter
    again = pickle.loads(pickle.dumps(Reranker.from_pretrained(folder, backend="reference")))
    assert again.rerank("expert", DOCUMENTS) == Reranker.from_pretrained(folder, backend="reference").rerank(
        "expert", DOCUMENTS
    )
    both = tmp_path / "both"
    shutil.copytree(base, both)
    (both / CONFIG).write_text((folder / CONFIG).read_text())
    change(folder, base_model_name_or_path=str(both))
    with pytest.raises(ValueError, match="beside a checkpoint"):
        Reranker.from_pretrained(folder)


def test_an_adapter_is_trained_over_a_whole_model_only(base, adapter):
    config = TrainingConfig(lora_rank=2)
    with pytest.raises(ValueError, match=r"an adapter over another model; start from what .lastrerank convert"):
        Trainer(open_checkpoint(adapter[0]), TrainingData(["a", "b"], [ListRow("a", 0, (), None, "all")]), config)


def test_training_writes_an_adapter_that_is_what_it_trained(base, tmp_path):
    texts = ["expert passage", "ranking query", "a question", "an intent"]
    rows = [ListRow(text.split()[0], i, tuple(j for j in range(4) if j != i), None, "all")
            for i, text in enumerate(texts)]  # fmt: skip
    config = TrainingConfig(steps=3, lists_per_step=2, hard=2, easy=0, lora_rank=4, dual=0.0, similar=0.0, average=0.9)
    trainer = Trainer(open_checkpoint(base), TrainingData(texts, rows), config)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        Trainer(open_checkpoint(base), TrainingData(texts, rows), TrainingConfig()).save_adapter(tmp_path / "none")
    with (tmp_path / "log").open("w") as log:
        trainer.train(log)
    trainer.save_checkpoint(tmp_path / "last", torch.float32)
    trainer.save_adapter(tmp_path / "adapter")
    assert scores(tmp_path / "adapter") == pytest.approx(scores(tmp_path / "last"), abs=1e-6)
    assert scores(tmp_path / "adapter") != pytest.approx(scores(base), abs=1e-6)
