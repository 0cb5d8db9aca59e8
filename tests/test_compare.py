"""Several models side by side, peers of other libraries among them."""

from __future__ import annotations

import json
import sys
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_evaluation import dataset_folder, write_dataset  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from lastrerank.cli import app
from lastrerank.evaluation import contenders
from lastrerank.evaluation.compare import PUBLISHED, compare
from lastrerank.evaluation.contenders import Own, RankedList
from lastrerank.evaluation.run import bm25_candidates
from lastrerank.families import FAMILIES
from lastrerank.random_checkpoint import small_tokenizer, texts_for, write_random_checkpoint


class Fixed:
    """Ranks by a rule; counts what it was asked for."""

    parameters, max_doc_length = 7, None

    def __init__(self, name, reverse=False):
        self.name, self.reverse, self.lists = name, reverse, 0

    def identity(self):
        return {"model": self.name, "digest": self.name, "dtype": "none", "backend": "none"}

    def rank(self, lists, max_doc_length):
        self.lists += len(lists)
        order = [list(range(len(d)))[:: -1 if self.reverse else 1] for _, d in lists]
        return [RankedList(o, [-float(i) for i in range(len(o))], 10 * len(o)) for o in order]


def test_a_table_of_models(dataset_folder, tmp_path):  # noqa: F811
    made = {"first": Fixed("first"), "turned": Fixed("turned", reverse=True)}
    loaders = {name: lambda own=own: own for name, own in made.items()}
    options = {"split": "dev", "top_k": 5, "orders": ["descending", "random"], "progress": False}
    searched = []

    def counted(dataset, depth):
        searched.append(dataset.name)
        return bm25_candidates(dataset, depth)

    with patch("lastrerank.evaluation.report.bm25_candidates", counted):
        report = compare(loaders, [dataset_folder], tmp_path / "out", **options)
    assert len(searched) == 1  # the first stage is every model's
    rows = report["rows"]
    assert [(row["model"], row["ranking"]) for row in rows] == [
        ("first stage", ""), ("first", "descending"), ("first", "random"), ("turned", "descending"),
        ("turned", "random"),
    ]  # fmt: skip
    by = {(row["model"], row["ranking"]): row for row in rows}
    assert by["first", "descending"]["nDCG@10"] == by["first stage", ""]["nDCG@10"]
    assert by["turned", "descending"]["nDCG@10"] < by["first", "descending"]["nDCG@10"]
    assert by["first", "descending"]["parameters"] == 7 and by["first", "descending"]["prompt_tokens"] > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    # Significance, against another computation of the same test.
    found = next(d for d in report["differences"] if d["ranking"] == "descending")
    each = {
        name: [json.loads(line)["nDCG@10"] for line in (tmp_path / "out" / name / "per_query.jsonl").open()
               if json.loads(line)["ranking"] == "descending"] for name in made
    }  # fmt: skip
    delta = np.array(each["turned"]) - np.array(each["first"])
    assert found["difference"] == pytest.approx(delta.mean()) and found["queries"] == len(delta) == 6
    statistic = delta.mean() / (delta.std(ddof=1) / len(delta) ** 0.5)
    from scipy.stats import t

    assert found["p"] == pytest.approx(2 * t.sf(abs(statistic), len(delta) - 1))
    # Again: nothing is ranked twice; and a model more is only that model's work.
    third = Fixed("third")
    again = compare(loaders | {"third": lambda: third}, [dataset_folder], tmp_path / "out", **options)
    assert [m.lists for m in made.values()] == [12, 12] and third.lists == 12
    same = next(d for d in again["differences"] if d["model"] == "third" and d["against"] == "first")
    assert same["difference"] == 0 and same["p"] is None


def test_other_weights_are_no_resumed_run(dataset_folder, tmp_path):  # noqa: F811
    options = {"split": "dev", "top_k": 5, "progress": False}
    loaders = {"a": lambda: Fixed("a"), "b": lambda: Fixed("b")}
    compare(loaders, [dataset_folder], tmp_path / "out", **options)
    with pytest.raises(ValueError, match="a run with digest = 'b', this one has 'other'"):
        compare(loaders | {"b": lambda: Fixed("other")}, [dataset_folder], tmp_path / "out", **options)


def test_bad_comparisons_are_named(dataset_folder, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="1 model, expected two or more"):
        compare({"a": lambda: Fixed("a")}, [dataset_folder], tmp_path)
    with pytest.raises(ValueError, match="expected names that make different folders"):
        compare({"a/b": lambda: Fixed("a"), "a b": lambda: Fixed("b")}, [dataset_folder], tmp_path)
    with pytest.raises(ImportError, match=r"pylate is not installed: pip install pylate"):
        contenders.peer("late-interaction:x")
    for name in ("bge", "cross-encoder:", "bert:x"):
        with pytest.raises(ValueError, match=r"expected one of \['cross-encoder:ID', 'late-interaction:ID'\]"):
            contenders.peer(name)


@pytest.fixture
def pointwise(tmp_path):
    tokenizer = small_tokenizer(texts_for(FAMILIES["qwen3-reranker"]))
    return write_random_checkpoint(tmp_path / "pairs", "tiny-qwen3", tokenizer=tokenizer, dtype=torch.float32)


def test_the_command(dataset_folder, tmp_path, small, pointwise, small_reranker):  # noqa: F811
    arguments = ["eval", str(dataset_folder), "--model", str(small), "--model", str(pointwise), "--split", "dev",
                 "--top-k", "5", "--output", str(tmp_path / "out"), "--published"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "As published, not measured here" in result.stdout and "jina-reranker-v3.5" in result.stdout
    assert "p of a paired t-test against small" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["published"] == json.loads(json.dumps(PUBLISHED))
    assert [row["parameters"] for row in report["rows"][1:]] == [
        Own(small_reranker).parameters, report["rows"][2]["parameters"]]  # fmt: skip
    assert [row.get("resumed") for row in report["rows"]] == [None, 6, 6]
    capped = CliRunner().invoke(
        app, ["eval", str(dataset_folder), "--peer", "cross-encoder:x", "--max-doc-length", "5", "--model", str(small)]
    )
    assert capped.exit_code == 2 and ("cuts by its own tokenizer" in capped.output or "pip install" in capped.output)
    for option, value in (("--dtype", "bfloat16"), ("--backend", "native")):
        whose = CliRunner().invoke(app, ["eval", str(dataset_folder), "--peer", "cross-encoder:x", option, value])
        assert whose.exit_code == 2 and "peers have their own" in whose.output
    twice = CliRunner().invoke(app, ["eval", str(dataset_folder), "--model", str(small), "--model", str(small)])
    assert twice.exit_code == 2 and "expected different names" in twice.output
    for option, value in (("--family", "qwen3-reranker"), ("--revision", "main")):
        whose = CliRunner().invoke(app, [*arguments, option, value])
        assert whose.exit_code == 2 and f"{option} {value} beside 2 models" in whose.output
    other = ["eval", str(dataset_folder), "--model", str(pointwise), "--split", "dev", "--top-k", "5",
             "--output", str(tmp_path / "other"), "--family"]  # fmt: skip
    assert CliRunner().invoke(app, [*other, "qwen3-reranker"]).exit_code == 0
    wrong = CliRunner().invoke(app, [*other, "mxbai-rerank-v2"])
    assert wrong.exit_code == 2 and "is a run with digest" in wrong.output  # another model, by what it reads
    bad = CliRunner().invoke(app, ["eval", str(dataset_folder), "--peer", "x:y", "--split", "dev"])
    assert bad.exit_code == 2 and "peer is 'x:y'" in bad.output


def test_parameters_are_those_of_transformers(small, small_reranker):
    from bench.baseline import TransformersReranker

    theirs = TransformersReranker(small)
    expected = sum(p.numel() for p in theirs.model.parameters()) + theirs.w1.numel() + theirs.w2.numel()
    assert Own(small_reranker).parameters == expected


def test_a_late_interaction_model(monkeypatch):
    """PyLate's conventions, by a stand-in: a matrix a text, and the score is the sum of the best matches."""

    class ColBERT(torch.nn.Module):
        def __init__(self, model_name_or_path, device):
            super().__init__()
            assert model_name_or_path == "some/model" and device is None
            self.weight = torch.nn.Parameter(torch.ones(3, 2))

        def encode(self, texts, is_query, show_progress_bar):
            if is_query:
                return [np.array([[1.0, 0.0], [0.0, 1.0]]) for _ in texts]
            return [np.array([[float("nan") if t == "nan" else len(t), 1.0]]) for t in texts]

    module = types.ModuleType("pylate")
    module.models = types.SimpleNamespace(ColBERT=ColBERT)
    monkeypatch.setitem(sys.modules, "pylate", module)
    monkeypatch.setattr(contenders, "version", lambda name: "1.0")
    peer = contenders.peer("late-interaction:some/model")
    assert peer.parameters == 6 and peer.identity()["backend"] == "pylate 1.0"
    found = peer.rank([("q", ["a", "abc", "ab"]), ("q", [])], None)
    assert found == [RankedList([1, 2, 0], [4.0, 3.0, 2.0], 5), RankedList([], [], 2)]
    with pytest.raises(RuntimeError, match="scores are not finite"):
        peer.rank([("q", ["a", "nan"])], None)
    with pytest.raises(ValueError, match="max_doc_length is 5: late-interaction:some/model cuts by its own"):
        peer.rank([("q", ["a"])], 5)
