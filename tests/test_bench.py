"""The benchmark itself, on a tiny checkpoint: it runs, checks scores before it times, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench.end_to_end
import bench.load
import bench.measure
import bench.profile_cpu
from bench.plots import plot_roofline
from bench.providers import PROVIDERS
from lastrerank import Reranker
from lastrerank.random_checkpoint import SHAPES, small_tokenizer, write_random_checkpoint


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.measure, "RESULTS", tmp_path)
    return tmp_path


def test_end_to_end_writes_results_and_a_plot(results, capsys):
    bench.end_to_end.main(
        ["--shape", "tiny", "--runs", "2", "--workloads", "16 lists of 150", "--name", "x", "--providers",
         "transformers-sdpa-float32", "lastrerank-reference-float32"]
    )  # fmt: skip
    report = json.loads((results / "x.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert [row["provider"] for row in report["rows"]] == ["transformers-sdpa-float32", "lastrerank-reference-float32"]
    assert all(row["tokens_per_s"] > 0 and row["max_difference"] < 5e-5 for row in report["rows"])
    assert (results / "x.png").stat().st_size > 1000


def test_end_to_end_of_pairs(results):
    """The card's way, ours, and ours without sharing: the same raw scores."""
    providers = ["transformers-sdpa-float32", "lastrerank-reference-float32", "lastrerank-native-unshared-float32"]
    bench.end_to_end.main(
        ["--shape", "tiny-qwen3", "--runs", "2", "--workloads", "512 tokens", "--name", "x", "--providers", *providers]
    )
    report = json.loads((results / "x.json").read_text())
    assert [row["provider"] for row in report["rows"]] == providers
    assert all(row["tokens_per_s"] > 0 and row["max_difference"] < 1e-4 for row in report["rows"])


@pytest.mark.parametrize(
    ("provider", "module", "bound"),
    [("openvino-float32", "openvino", 5e-6), ("openvino-int8", "nncf", 0.1),
     ("onnxruntime-float32", "onnxruntime", 5e-6), ("onnxruntime-int8", "onnxruntime", 0.1),
     ("llama.cpp-f16", "llama_cpp", 2e-3), ("llama.cpp-bf16", "llama_cpp", 2e-2), ("llama.cpp-q8_0", "llama_cpp", 0.1),
     ("llama.cpp-q4_0", "llama_cpp", 0.5), ("openvino-bfloat16", "openvino", 2e-2),
     ("torch.compile-bfloat16", "torchao", 2e-2),
     ("torch.compile-float32", "torchao", 5e-6), ("torchao-int8", "torchao", 0.1)],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen3"])
def test_a_peer_gives_the_baselines_scores(tmp_path, documents, provider, module, bound, shape):
    pytest.importorskip(module, reason=f"{module} is not installed; make bench-cpu has it")
    folder = write_random_checkpoint(tmp_path / "checkpoint", shape)  # converted checkpoints are written beside it
    bound *= 1 if shape == "tiny" else bench.end_to_end.LOGITS
    requests = [("Tabelle", documents[:5]), ("sea", documents[5:7])]
    expected, found = (
        np.concatenate(PROVIDERS[name](folder)(requests)) for name in ("transformers-sdpa-float32", provider)
    )
    assert 0 < np.abs(found - expected).max() < bound


def test_requests_have_as_many_tokens_as_asked_for(tmp_path):
    """By a tokenizer, too, that reads a word as one token only behind a space."""
    write_random_checkpoint(tmp_path, "tiny", tokenizer=small_tokenizer(["read the of and to in is that on with"] * 9))
    reranker = Reranker.from_pretrained(tmp_path)
    [(query, documents)] = bench.end_to_end.make_requests(1, 4, 30, 9, reranker)
    lengths = [cut.length for cut in reranker.encoder.cut([query, *documents], 100)]
    assert lengths == [9, 30, 30, 30, 30] and len(set(documents)) == 4


def test_profile_counts_what_a_pass_does(results):
    """The operations take most of a pass but not more than all of it, and the products' counts are the formula's."""
    try:
        bench.profile_cpu.main(["--shape", "tiny", "--workloads", "512 tokens", "--runs", "2", "--name", "x"])
    except RuntimeError as reason:
        pytest.skip(f"native backend: {reason}")
    rows = json.loads((results / "x.json").read_text())["rows"]
    for dtype in ("float32", "bfloat16", "int8"):
        parts = {row["operation"]: row for row in rows if row["dtype"] == dtype and row["operation"] != "peak"}
        parts.pop("swiglu", None)  # computed with its product where widths are those of whole panels
        assert parts.keys() == {"linears", "attention", "rms_norm", "add_rms_norm", "qk_norm_rope", "score"}
        assert 0.2 < sum(row["share"] for row in parts.values()) < 1.2  # medians apart don't add up exactly
        config, tokens = SHAPES["tiny"], parts["attention"]["prompt_tokens"]
        width, kv_width = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
        weights = config["hidden_size"] * (2 * width + 2 * kv_width + 3 * config["intermediate_size"])
        # Of a layer. The last one computes only what is read.
        full = {"attention": tokens * (tokens + 1) // 2 * 4 * width, "linears": 2 * tokens * weights}
        layers = config["num_hidden_layers"]
        for operation, count in full.items():
            found = parts[operation]["gflops"] * parts[operation]["seconds"] * 1e9
            assert (layers - 1) * count < found < layers * count


@pytest.mark.takes_minutes
def test_gpu_check_runs_on_tiny_shapes(tmp_path):
    """What a first meeting with a GPU runs, in Triton's interpreter: every part passes, and rows are what they say."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run python -m bench.gpu_check itself")
    script = "import sys; import bench.measure as m; from pathlib import Path; m.RESULTS = Path(sys.argv[1])\n"
    script += "import bench.gpu_check as g; sys.exit(g.main(['--tiny']))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    bad = [row for row in rows if "failed" in row or ("left_out" in row and row["part"] != "kernels")]
    assert bad == []  # a peer of the kernels may not be installed
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        "device", "correctness", "self-check", "end to end", "memory", "attention", "seconds", "kernels",
        "device after",
    ]  # fmt: skip
    assert "attach this file to an issue" in done.stderr and "self-check    tiny-v3.5: right" in done.stderr
    timed = {(row["kernel"], row["provider"]) for row in rows if row["part"] == "kernels" and "milliseconds" in row}
    ours = {"rms_norm", "add_rms_norm", "swiglu", "qk_norm_rope", "score", "attention", "attention window 1024"}
    assert {kernel for kernel, provider in timed if provider == "lastrerank"} == ours
    assert (tmp_path / "gpu_check.csv").read_text().count("\n") == len(rows) + 1


def test_bench_kernels_without_a_gpu_says_why(capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "bench.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no GPU here, so no times" in done.stderr
    assert "_attention_kernel" in done.stderr and "sm_90" in done.stderr


def test_roofline_plot(tmp_path):
    row = {"kernel": "rms_norm", "provider": "lastrerank", "intensity": 1.0, "tflops": 2.0}
    rows = [{"kernel": "ceilings", "tflops": 600.0, "gb_per_s": 3000.0}, row]
    (tmp_path / "x.json").write_text(json.dumps({"machine": {"gpu": "a GPU", "torch": "2"}, "rows": rows}))
    assert plot_roofline(tmp_path / "x.json").stat().st_size > 1000


def test_load_on_a_tiny_model(results, small, capsys):
    """Nothing wrong, nothing lost, and what is counted is what was sent."""
    arguments = ["--model", str(small), "--documents", "2", "--seconds", "1", "--loads", "1", "--memory-requests", "20"]
    assert bench.load.main([*arguments, "--name", "x"]) == 0
    rows = json.loads((results / "x.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["one at a time", "load", "engine", "memory"]
    assert rows[1]["answered"] > 0 and rows[1]["wrong"] == rows[1]["failed"] == rows[3]["wrong"] == 0
    assert rows[3]["requests"] == 20 and len(rows[3]["resident_bytes"]) == 10
    assert (results / "x.png").stat().st_size > 1000


def test_a_provider_with_wrong_scores_is_not_timed():
    requests = [("q", ["a"])]
    scorers = {
        "transformers-sdpa-float32": lambda r: [np.array([0.5])],
        "lastrerank-reference-float32": lambda r: [np.array([0.6])],
    }
    rows = bench.end_to_end.measure("w", requests, 10, scorers, runs=1)
    assert "seconds" in rows[0] and "seconds" not in rows[1]
