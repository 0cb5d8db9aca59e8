"""The benchmark itself, on a tiny checkpoint: it runs, checks scores before it times, and writes what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

import bench.end_to_end
import bench.measure


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


def test_a_provider_with_wrong_scores_is_not_timed():
    requests = [("q", ["a"])]
    scorers = {
        "transformers-sdpa-float32": lambda r: [np.array([0.5])],
        "lastrerank-reference-float32": lambda r: [np.array([0.6])],
    }
    rows = bench.end_to_end.measure("w", requests, 10, scorers, runs=1)
    assert "seconds" in rows[0] and "seconds" not in rows[1]
