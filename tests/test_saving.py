"""Saves: what is loaded afterwards is what was saved, whole, whoever reads it and whenever it is interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lastrerank import Reranker, saving
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

DOCUMENTS = ["one document", "another", "a third one"]
SIZE = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}


def score(reranker):
    return [r["relevance_score"] for r in sorted(reranker.rerank("query", DOCUMENTS), key=lambda r: r["index"])]


def load(folder, **arguments):
    return Reranker.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("other"), "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, seed=5,
        overrides=SIZE | {"rope_theta": 10.0},
    )  # fmt: skip


def shard(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({n: state[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def exchange_unsupported(monkeypatch):
    monkeypatch.setattr(saving, "_exchange", lambda new, target: False)


@pytest.mark.parametrize("way", ["exchange", "file by file"])
@pytest.mark.parametrize("kind", ["shards", "int8", "python files", "adapter", "pytorch_model.bin"])
def test_nothing_of_an_earlier_save_is_left_that_would_win_or_mislead(small, other, tmp_path, monkeypatch, way, kind):
    target = tmp_path / "target"
    shutil.copytree(small, target)
    if kind == "shards":
        shard(target)
    elif kind == "int8":
        load(target, dtype="int8").save_pretrained(target)
    elif kind == "python files":
        raw = json.loads((target / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.X"}}
        (target / "config.json").write_text(json.dumps(raw))
        (target / "modeling.py").write_text("stale = True")
    elif kind == "adapter":
        (target / "adapter_config.json").write_text("{}")
        (target / "adapter_model.safetensors").write_bytes(b"")
    else:
        (target / "pytorch_model.bin").write_bytes(b"old")
    (target / "README.md").write_text("the user's own")
    (target / "logs").mkdir()
    (target / "logs" / "run.txt").write_text("too")
    if way != "exchange":
        exchange_unsupported(monkeypatch)
    saved = load(other)
    saved.save_pretrained(target)
    assert score(load(target)) == score(saved)
    left = {path.name for path in target.iterdir()}
    assert left == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md", "logs"}
    assert (target / "logs" / "run.txt").read_text() == "too"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]  # nothing beside it


def test_model_safetensors_goes_before_an_index_as_in_transformers(small, other, tmp_path):
    target = tmp_path / "both"
    shutil.copytree(small, target)
    shard(target)
    shutil.copy(other / "model.safetensors", target)
    theirs = AutoModel.from_pretrained(target).state_dict()["embed_tokens.weight"]
    assert torch.equal(theirs, load_file(other / "model.safetensors")["model.embed_tokens.weight"])
    assert torch.equal(load(target).model.weights.embedding, theirs)


def test_a_save_can_be_loaded_by_transformers(small, tmp_path):
    load(small).save_pretrained(tmp_path / "saved")
    theirs = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
    ours = load_file(small / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[f"model.{name}"])


def test_int8_is_refused_by_those_who_would_take_it_for_numbers(small, tmp_path):
    load(small, dtype="int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="quant_method"):
        AutoModel.from_pretrained(tmp_path / "int8")
    earlier = shutil.copytree(tmp_path / "int8", tmp_path / "earlier")  # a format that had no rotation
    raw = json.loads((earlier / "config.json").read_text())
    (earlier / "config.json").write_text(json.dumps(raw | {"quantization_config": {"format": "lastrerank-int8"}}))
    with pytest.raises(ValueError, match=r"'lastrerank-int8'.*this version does not support; load the unquantised"):
        load(earlier)
    again = load(tmp_path / "int8")  # in float32: the quantised weights
    again.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert score(load(tmp_path / "plain")) == score(again)


def test_rows_of_zeros_and_of_almost_nothing_are_loaded_again(small, tmp_path):
    """Their scale is a number that can be divided by."""
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    state[name][3], state[name][4], state[name][5] = 0.0, 1e-44, 3e-38
    save_file(state, folder / "model.safetensors")
    int8 = load(folder, dtype="int8")
    int8.save_pretrained(tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert bool((stored[f"{name}_scale"] >= torch.finfo(torch.float32).tiny).all())
    assert score(load(tmp_path / "int8", dtype="int8")) == score(int8)


def test_python_files_come_along_or_are_named_where_they_are(small, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    raw = json.loads((source / "config.json").read_text())
    names = {"AutoModel": "modeling.Reranker", "AutoConfig": "elsewhere/repo--configuration.Config"}
    (source / "config.json").write_text(json.dumps(raw | {"auto_map": names}))
    (source / "modeling.py").write_text("from .helper import x\nclass Reranker: pass\n")
    (source / "helper.py").write_text("x = 1\n")
    (source / "unrelated.py").write_text("raise SystemExit('never run')\n")
    load(source).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == names
    assert sorted(p.name for p in (tmp_path / "saved").glob("*.py")) == ["helper.py", "modeling.py"]

    (source / "helper.py").unlink()  # not all there: as from the Hub, where no code is fetched
    assert saving._auto_map(names, source, "owner/name") == (
        {"AutoModel": "owner/name--modeling.Reranker", "AutoConfig": names["AutoConfig"]}, [],
    )  # fmt: skip
    both = {"AutoTokenizer": ["tokenization.Slow", None]}
    assert saving._auto_map(both, source, "o/n") == ({"AutoTokenizer": ["o/n--tokenization.Slow", None]}, [])
    assert saving._auto_map(both, source, None) == ({}, [])
    load(source).save_pretrained(tmp_path / "local")
    local = json.loads((tmp_path / "local" / "config.json").read_text())
    assert local["auto_map"] == {"AutoConfig": names["AutoConfig"]}


def test_the_tokenizers_configuration_is_kept(small, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    limits = {"model_max_length": 4096, "chat_template": "{{ x }}", "pad_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(limits))
    load(source).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()).items() >= limits.items()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_gives(small, tmp_path, mask):
    before = os.umask(mask)
    try:
        load(small).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    for path in (tmp_path / "saved").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


@pytest.mark.parametrize("way", ["new", "over another"])
def test_a_full_disk_leaves_the_folder_as_it_was(small, other, tmp_path, monkeypatch, way):
    target = tmp_path / "target"
    if way != "new":
        shutil.copytree(small, target)
    before = score(load(small))

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = load(other)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved.save_pretrained(target)
    assert [p.name for p in tmp_path.iterdir()] == ([] if way == "new" else ["target"])
    if way != "new":
        assert score(load(target)) == before


def test_a_checkpoint_that_is_replaced_while_it_is_opened_is_no_mixture(small, other, tmp_path, monkeypatch):
    from lastrerank import checkpoint

    shutil.copytree(small, tmp_path / "model")
    original = checkpoint._read_small_files

    def replaced_behind(folder):
        found = original(folder)
        if folder == tmp_path / "model":
            load(other).save_pretrained(folder)
        return found

    monkeypatch.setattr(checkpoint, "_read_small_files", replaced_behind)
    with pytest.raises(ValueError, match="has changed while it was read"):
        load(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_save_has_the_scores_of_what_was_saved(small, tmp_path, dtype):
    """Norms and projectors that are computed with in float32 are no bf16 numbers, if the checkpoint's aren't."""
    from lastrerank import ops

    if ops.availability(torch.device("cpu"), torch.float32)["native"]:
        pytest.skip("native is not available")
    source = load(small, dtype="float32", backend="reference")
    for name, tensor in (("norm", source.model.weights.norm), ("w1", source.model.weights.readout.w1)):
        assert not torch.equal(tensor.bfloat16().float(), tensor), name
    loaded = load(small, dtype=dtype, backend="native")
    loaded.save_pretrained(tmp_path / "saved")
    assert score(load(tmp_path / "saved", dtype=dtype, backend="native")) == score(loaded)


def test_saving_through_a_link_writes_where_it_leads(small, other, tmp_path):
    shutil.copytree(small, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    load(other).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and score(load(tmp_path / "real")) == score(load(other))


def test_saving_over_the_checkpoint_that_is_served(small, tmp_path):
    """The file that is mapped is another afterwards, not the same one with other content."""
    shutil.copytree(small, tmp_path / "model")
    served = load(tmp_path / "model")
    before = score(served)
    load(tmp_path / "model", dtype="bfloat16", backend="reference").save_pretrained(tmp_path / "model")
    assert score(served) == before
    served.save_pretrained(tmp_path / "model")
    assert score(load(tmp_path / "model")) == before


@pytest.mark.parametrize("change", ["overwritten", "cut off"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_weights_that_are_overwritten_under_a_model_are_noticed(small, other, tmp_path, change, backend):
    from lastrerank import ops

    if ops.availability(torch.device("cpu"), torch.float32)[backend]:
        pytest.skip(f"{backend} is not available")
    shutil.copytree(small, tmp_path / "model")
    served = load(tmp_path / "model", backend=backend)
    path = tmp_path / "model" / "model.safetensors"
    with path.open("r+b") as file:
        if change == "cut off":
            file.truncate(1000)
        else:
            file.write((other / "model.safetensors").read_bytes())
    os.utime(path)
    with pytest.raises(RuntimeError, match=r"model\.safetensors was overwritten while its weights are in use"):
        score(served)
    with pytest.raises((RuntimeError, ValueError), match=r"overwritten|changed"):
        served.identity()


def test_an_overwritten_file_with_the_old_time_is_noticed_and_a_new_link_is_no_matter(small, other, tmp_path):
    shutil.copytree(small, tmp_path / "model")
    served, path = load(tmp_path / "model"), tmp_path / "model" / "model.safetensors"
    before, found = score(served), path.stat()
    os.link(path, tmp_path / "backup")
    path.chmod(0o600)
    assert score(served) == before
    with path.open("r+b") as file:
        file.write((other / "model.safetensors").read_bytes())
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(RuntimeError, match="was overwritten"):
        score(served)
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        served.identity()


def test_what_comes_into_a_folder_while_it_is_saved_stays(small, other, tmp_path):
    """Files and folders of others, written all the while: none is lost, nothing is left beside the folder."""
    import threading

    target, models, stop, made = tmp_path / "target", [load(small), load(other)], threading.Event(), []
    shutil.copytree(small, target)
    (target / "logs").mkdir()

    def write():
        while not stop.wait(0.002) and len(made) < 400:
            name = f"user{len(made)}"
            try:
                if len(made) % 7:
                    (target / name).write_text("mine")
                else:
                    (target / name).mkdir()
            except FileNotFoundError:  # between two folders of that name
                continue
            made.append(name)

    thread = threading.Thread(target=write)
    thread.start()
    for number in range(20):
        models[number % 2].save_pretrained(target)
    stop.set()
    thread.join()
    there = {path.name for path in target.iterdir()}
    assert {*made, "logs"} <= there and len(made) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_save_has_left_is_given_back(small, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(small, target)
    left = tmp_path / ".target.1-abcdef01.partial"
    shutil.copytree(small, left)
    another = tmp_path / ".target.v2.1-abcdef01.partial"  # of a folder whose name begins like this one's
    shutil.copytree(left, another)
    (another / "theirs.txt").write_text("theirs")
    (left / "runs").mkdir()
    (left / "notes.txt").write_text("mine")
    load(small).save_pretrained(target)
    assert (target / "runs").is_dir() and (target / "notes.txt").read_text() == "mine"
    os.utime(left, (0, 0))
    load(small).save_pretrained(target)
    assert not left.exists() and (another / "theirs.txt").exists() and not (target / "theirs.txt").exists()


def test_what_a_dtype_cannot_hold_is_not_saved(small, tmp_path):
    shutil.copytree(small, tmp_path / "large")
    state = load_file(tmp_path / "large" / "model.safetensors")
    table = state["model.embed_tokens.weight"].bfloat16()
    table[5, 6] = 1e5
    save_file(state | {"model.embed_tokens.weight": table}, tmp_path / "large" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has numbers that are too large for float16"):
        load(tmp_path / "large", backend="reference", dtype="float16").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saving_where_the_process_stands(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    load(".").save_pretrained(".")
    assert "config.json" in os.listdir(".") and os.getcwd() == str(tmp_path / "here")
