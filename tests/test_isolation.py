"""Scores depend on inputs alone: not on what else the process has set, nor on whether it was forked, pickled or
copied."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import torch

from lastrerank import Reranker
from lastrerank.isolation import isolated

QUERY, DOCUMENTS = "how do I print", ["Press Ctrl+P to print.", "Cells hold numbers.", "漢字の文書 " * 40, ""]


def scores(reranker, **options):
    found = reranker.rerank(QUERY, DOCUMENTS, return_embeddings=True, **options)
    return [(r["index"], r["relevance_score"], r["embedding"].tobytes()) for r in found]


@contextlib.contextmanager
def put(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


def states():
    """Every state of the process that PyTorch's own operations would follow."""
    yield "float64", lambda: put(torch.set_default_dtype, torch.float64, torch.float32)
    yield "bfloat16", lambda: put(torch.set_default_dtype, torch.bfloat16, torch.float32)
    yield "default device", lambda: torch.device("meta")
    yield "autocast", lambda: torch.autocast("cpu", torch.bfloat16)
    yield "no grad", torch.no_grad
    yield "grad", torch.enable_grad
    yield "inference mode", torch.inference_mode
    yield "deterministic", lambda: put(torch.use_deterministic_algorithms, True, False)
    yield "products", lambda: put(torch.set_float32_matmul_precision, "medium", "highest")
    yield "math attention", lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    yield "anomaly detection", torch.autograd.detect_anomaly


@pytest.mark.parametrize("name", ["bfloat16", "float64", "autocast", "products", "default device"])
def test_state_set_elsewhere_while_loading_changes_nothing(tmp_path, name):
    """int8's weights are rotated back, an adapter's product is added, a head's rows are subtracted while loading."""
    from lastrerank.adapters import write_adapter
    from lastrerank.checkpoint import BUNDLED
    from lastrerank.families import FAMILIES
    from lastrerank.random_checkpoint import small_tokenizer, texts_for, write_random_checkpoint

    tokenizer = small_tokenizer(texts_for(FAMILIES["qwen3-reranker"]))
    pairs = write_random_checkpoint(tmp_path / "pairs", "tiny-qwen3", tokenizer=tokenizer, dtype=torch.float32)
    base = write_random_checkpoint(tmp_path / "base", "tiny", tokenizer=small_tokenizer(), dtype=torch.float32)
    width = Reranker.from_pretrained(base).config.hidden_size
    update = torch.randn(width, 4), torch.randn(4, Reranker.from_pretrained(base).config.intermediate_size)
    write_adapter(tmp_path / "adapter", str(base), {"model.layers.0.mlp.down_proj.weight": update}, {}, 4, 8.0)
    for model in (BUNDLED, pairs, tmp_path / "adapter"):
        expected = [r["relevance_score"] for r in Reranker.from_pretrained(model).rerank(QUERY, DOCUMENTS)]
        with dict(states())[name]():
            loaded = Reranker.from_pretrained(model)
        assert [r["relevance_score"] for r in loaded.rerank(QUERY, DOCUMENTS)] == expected, model


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", dict(states()))
def test_state_set_elsewhere_changes_nothing(small, backend, name):
    from lastrerank import ops

    if ops.availability(torch.device("cpu"), torch.float32)[backend]:
        pytest.skip(f"{backend} is not available")
    reranker = Reranker.from_pretrained(small, backend=backend)
    expected = scores(reranker)
    with dict(states())[name]():
        assert scores(reranker) == expected
        again = Reranker.from_pretrained(small, backend=backend)
        assert scores(again) == expected
    assert scores(again) == expected


def test_what_is_set_for_a_pass_is_put_back():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with contextlib.suppress(ZeroDivisionError), isolated(torch.device("cpu")):
            assert torch.backends.cuda.flash_sdp_enabled() and torch.is_inference_mode_enabled()
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium" and not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.set_float32_matmul_precision("highest")


FORKED = """
import os, sys, threading, time
import torch
torch.set_num_threads(2)
from lastrerank import Reranker
from lastrerank.engine import ClosedError, Engine
folder, backend = sys.argv[1:]
documents = [f"document {i} about trains, rivers and bridges " * 6 for i in range(40)]
reranker = Reranker.from_pretrained(folder, backend=backend)
get = lambda found: [round(r["relevance_score"], 5) for r in sorted(found, key=lambda r: r["index"])]
want = get(reranker.rerank("rivers", documents))
busy, stop = threading.Event(), False
def others():  # a thread that tokenises and computes while the process forks
    n = 0
    while not stop:
        reranker.rerank(f"query {n}", [f"text {n} {i} " * 30 for i in range(6)])
        n += 1
        busy.set()
thread = threading.Thread(target=others); thread.start(); busy.wait()
parents = Engine(reranker)
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        ok = get(reranker.rerank("rivers", documents)) == want
        with Engine(reranker) as engine:
            ok &= get(engine.rerank("rivers", documents).results) == want
        try:
            parents.rerank("rivers", documents)
            ok = False
        except ClosedError as error:
            ok &= "make an Engine in this one" in str(error)
        parents.close()
        os._exit(0 if ok else 3)
    children.append(child)
end = time.monotonic() + 90
codes = []
for child in children:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            codes.append(os.waitstatus_to_exitcode(status)); break
        if time.monotonic() > end:
            os.kill(child, 9); os.waitpid(child, 0); codes.append("hung"); break
        time.sleep(0.02)
stop = True
thread.join()
assert get(parents.rerank("rivers", documents).results) == want
parents.close()
print(codes)
"""


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_forked_child_reranks(small, backend):
    """Also one that was forked while another thread was tokenising and in the kernels; its parent goes on, too."""
    from lastrerank import ops

    if ops.availability(torch.device("cpu"), torch.float32)[backend]:
        pytest.skip(f"{backend} is not available")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(small), backend], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[0, 0, 0]"


def _in_another_process(reranker):
    return [r["relevance_score"] for r in reranker.rerank(QUERY, DOCUMENTS)]


def test_pickled_copied_and_spawned(small, tmp_path):
    reranker = Reranker.from_pretrained(small, dtype="float32", backend="reference", family="listwise-gguf")
    expected = scores(reranker)
    again = pickle.loads(pickle.dumps(reranker))
    assert again is not reranker and scores(again) == expected and again.backend == "reference"
    assert copy.deepcopy({"model": reranker})["model"] is reranker
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_in_another_process, (reranker,)) == [score for _, score, _ in expected]


def test_a_pickle_does_not_load_other_weights(small, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    kept = pickle.dumps(Reranker.from_pretrained(folder))
    raw = (folder / "config.json").read_text()
    (folder / "config.json").write_text(raw.replace("1000000.0", "10.0"))
    with pytest.raises(ValueError, match="not the checkpoint that the pickled Reranker had loaded"):
        pickle.loads(kept)


def test_the_identity_tells_apart_what_changes_scores(small, tiny_windowed):
    plain = Reranker.from_pretrained(small).identity()
    others = [Reranker.from_pretrained(small, **a).identity() for a in
              ({"dtype": "bfloat16"}, {"backend": "reference"}, {"family": "listwise-gguf"})]  # fmt: skip
    others.append(Reranker.from_pretrained(tiny_windowed).identity())
    assert all(other != plain for other in others) and Reranker.from_pretrained(small).identity() == plain
    assert set(plain) == {"model", "digest", "dtype", "backend"} and len(plain["digest"]) == 64


def test_sums_of_16_bit_products_on_a_gpu_are_fp32_and_what_was_set_is_put_back():
    """The flags are there without a GPU; by default PyTorch lets a library sum parts of a product in 16 bit."""
    from lastrerank import isolation

    matmul = torch.backends.cuda.matmul
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    if hasattr(matmul, "allow_fp16_accumulation"):
        names.append("allow_fp16_accumulation")
        matmul.allow_fp16_accumulation = True
    before = {name: getattr(matmul, name) for name in names}
    assert all(before.values())
    try:
        isolation._enter("cuda")
        assert not any(getattr(matmul, name) for name in names)
        isolation._leave("cuda")
        assert {name: getattr(matmul, name) for name in names} == before
    finally:
        if "allow_fp16_accumulation" in names:
            matmul.allow_fp16_accumulation = False


def test_state_is_put_back_when_the_last_pass_is_done():
    """Passes of several threads overlap: the first to end doesn't take the state from under the others."""
    import threading

    inside, leave, seen = threading.Event(), threading.Event(), []

    def long():
        with isolated(torch.device("cpu")):
            inside.set()
            leave.wait(10)
            seen.append(torch.backends.cuda.flash_sdp_enabled())

    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with isolated(torch.device("cpu")):
            thread = threading.Thread(target=long)
            thread.start()
            inside.wait(10)
        leave.set()
        thread.join()
        assert seen == [True] and not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


FORKED_FIRST = """
import os, pickle, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "true"
import torch
torch.set_num_threads(2)
from lastrerank import Reranker
folder, target = sys.argv[1:]
reranker = Reranker.from_pretrained(folder)
reranker.rerank("rivers", [f"text {i}" for i in range(40)])
torch.randn(4_000_000).sum()
kept = pickle.dumps(reranker)
children = []
for job in (lambda: Reranker.from_pretrained(folder), lambda: pickle.loads(kept), lambda:
reranker.save_pretrained(target),
            lambda: reranker.rerank("rivers", [f"another {i}" for i in range(40)])):
    child = os.fork()
    if not child:
        job()
        os._exit(0)
    children.append(child)
end, codes = time.monotonic() + 60, []
for child in children:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > end:
            codes.append(os.waitstatus_to_exitcode(status) if done else "hung")
            done or os.kill(child, 9)
            break
        time.sleep(0.02)
print(codes)
"""


def test_a_forked_child_loads_unpickles_saves_and_tokenises(small, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED_FIRST, str(small), str(tmp_path / "saved")], capture_output=True, text=True,
        timeout=200, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[0, 0, 0, 0]"


def test_a_pickle_of_a_relative_path_is_read_elsewhere(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    kept = pickle.dumps(Reranker.from_pretrained(small.name))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(kept).rerank("q", ["a"])


FIRST_CALLS = """
import sys
import torch
sizes = {"cos": [], "sin": []}
for name, found in sizes.items():
    def wrapped(x, call=getattr(torch, name), found=found):
        found.append(x.numel())
        return call(x)
    setattr(torch, name, wrapped)
    setattr(torch.Tensor, name, wrapped)
from lastrerank import Reranker
Reranker.from_pretrained(sys.argv[1], device="cpu", backend=sys.argv[2]).rerank("query", ["document"] * 50)
assert all(found[0] == 1 and max(found) > 1 for found in sizes.values()), sizes
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_first_calls_of_trigonometry_are_of_one_thread(small, backend):
    """What MKL chooses at a function's first call is not chosen by several threads at once."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS, str(small), backend], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
