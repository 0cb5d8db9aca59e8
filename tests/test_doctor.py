"""Published scores: which checkpoint they are of, and what is said of one that has or hasn't them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from lastrerank import Reranker, doctor, ops
from lastrerank.families import FAMILIES
from lastrerank.goldens import GOLDENS, golden_of
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.random_checkpoint import small_tokenizer, texts_for, write_random_checkpoint
from lastrerank.show import report_lines

PUBLISHED = [
    "jinaai/jina-reranker-v3", "jinaai/jina-reranker-v3.5", "Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-4B",
    "Qwen/Qwen3-Reranker-8B", "mixedbread-ai/mxbai-rerank-base-v2", "mixedbread-ai/mxbai-rerank-large-v2",
    "zeroentropy/zerank-2", "zeroentropy/zerank-2-reranker",
]  # fmt: skip


def test_every_published_checkpoint_has_its_own():
    assert len({golden_of(name) for name in PUBLISHED}) == len(GOLDENS)
    assert golden_of("tomaarsen/Qwen3-Reranker-0.6B-seq-cls") is golden_of("Qwen/Qwen3-Reranker-0.6B")
    assert golden_of("Qwen/Qwen3-0.6B") is None and golden_of("jina-reranker-v2") is None
    for golden in GOLDENS:
        assert len(golden.documents) == len(golden.scores) and golden.tolerance > 0 and golden.source


def test_a_backend_that_fails_is_a_line_of_the_report(monkeypatch):
    """A report is asked for where something is wrong."""

    class Fails(ReferenceOperations):
        def attention(self, *arguments, **options):
            raise TypeError("warp_specialize() missing 3 required positional arguments")

    monkeypatch.setitem(ops.BACKENDS, "native", lambda device, dtype: Fails())
    monkeypatch.setattr(doctor, "_products", lambda: None)
    report = doctor.examine("cpu")
    assert not report["self_check"]["ok"] and set(report["self_check"]["difference"]) == {"reference"}
    [line] = [line for line in report_lines(report) if line.startswith("self-check")]
    assert "FAILED" in line and "native fails: TypeError: warp_specialize() missing 3" in line


@pytest.fixture
def folders(small, tmp_path):
    """Random checkpoints called like published ones."""
    shutil.copytree(small, tmp_path / "jina-reranker-v3.5")
    tokenizer = small_tokenizer(texts_for(FAMILIES["qwen3-reranker"]))
    write_random_checkpoint(tmp_path / "Qwen3-Reranker-0.6B", "tiny-qwen3", tokenizer=tokenizer, dtype=torch.float32)
    return tmp_path


@pytest.mark.parametrize("name", ["jina-reranker-v3.5", "Qwen3-Reranker-0.6B"])
def test_verifying(folders, monkeypatch, name):
    report = doctor.verify_checkpoint(folders / name)
    assert not report["ok"] and f"{name}: scores" in report["message"] and "allowed: 0.0" in report["message"]
    golden = golden_of(name)
    results = Reranker.from_pretrained(folders / name).rerank(
        golden.query, golden.documents, return_embeddings=bool(golden.vector)
    )
    ordered = sorted(results, key=lambda r: r["index"])
    own = replace(
        golden, scores=tuple(r.get("raw_score", r["relevance_score"]) for r in ordered),
        vector=tuple(map(float, ordered[0]["embedding"][:3])) if golden.vector else (),
    )  # fmt: skip
    monkeypatch.setattr(doctor, "golden_of", lambda name: own)
    assert doctor.verify_checkpoint(folders / name)["ok"]
    off = replace(own, scores=(own.scores[0] + 1.1 * own.tolerance, *own.scores[1:]))
    monkeypatch.setattr(doctor, "golden_of", lambda name: off)
    assert not doctor.verify_checkpoint(folders / name)["ok"]


def test_what_is_not_published_is_named(small):
    with pytest.raises(ValueError, match=r"small.*: no scores are known of it, only of jina-reranker-v3"):
        doctor.verify_checkpoint(small)
