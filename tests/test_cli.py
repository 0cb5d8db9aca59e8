"""The command line as a user and as a program meet it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture
def run(small, tmp_path):
    def run(*arguments, stdin=None, model=True):
        command = [sys.executable, "-m", "lastrerank", *arguments]
        if model:
            command += ["--model", str(small)]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=300, cwd=tmp_path, encoding="utf-8"
        )

    return run


def test_files_and_jsonl(run, tmp_path):
    (tmp_path / "a.txt").write_text("a document in a file\nwith two lines", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('"a string"\n{"text": "an object", "id": 3}\n', encoding="utf-8")
    done = run("rerank", "a query", "a.txt", "b.jsonl", "--json", "--explain", "--top-n", "2")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["results"]) == 2 and answer["random"] is True and answer["blocks"] == [3]
    assert {"index", "name", "relevance_score", "document", "tokens", "cut"} == set(answer["results"][0])
    assert "random" in done.stderr


def test_stdin_and_table(run):
    done = run("rerank", "a query", "--explain", stdin='one\n{"text": "two"}\nthree [not markup]\n\n')
    assert done.returncode == 0, done.stderr
    assert "prompt tokens in 1 block(s) [3]" in done.stdout and "[not markup]" in done.stdout
    assert "the order means nothing" in done.stdout


def test_bench_times_what_agrees(run):
    done = run("bench", "--documents", "3", "--doc-tokens", "20", "--runs", "2", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {"reference"} <= {row["backend"] for row in rows}
    for row in rows:
        assert row["prompt_tokens"] > 60 and row["seconds"]["runs"] == 2
        assert row["tokens_per_s"] == pytest.approx(row["prompt_tokens"] / row["seconds"]["median"])
        assert row["max_difference"] <= (0.2 if row["dtype"] == "int8" else 1e-5)
    shown = run("bench", "--documents", "3", "--doc-tokens", "20", "--runs", "1", "--device", "cpu")
    assert "tokens/s" in shown.stdout and "reference" in shown.stdout


def test_no_documents_is_an_empty_answer(run):
    done = run("rerank", "a query", "--json", stdin="")
    assert done.returncode == 0 and json.loads(done.stdout)["results"] == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("rerank", ""), "a", "query is empty"),
        (("rerank", "q", "nowhere.txt"), None, "nowhere.txt"),
        (("rerank", "q", "bad.jsonl"), None, "bad.jsonl:2: not JSON"),
        (("rerank", "q", "number.jsonl"), None, "number.jsonl:1: expected a string or an object"),
        (("rerank", "q", "--top-n", "-1"), "a", "top_n is -1"),
        (("rerank", "q", "--device", "tpu"), "a", "device is 'tpu'"),
        (("bench", "--runs", "0"), None, "runs is 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, arguments, stdin, message):
    (tmp_path / "bad.jsonl").write_text('"fine"\n{\n', encoding="utf-8")
    (tmp_path / "number.jsonl").write_text("3\n", encoding="utf-8")
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_demo(run):
    done = run("demo", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["results"]) == answer["blocks"][0] >= 8
    assert len({r["name"].split()[0] for r in answer["results"]}) >= 6


def test_doctor(run, small):
    done = run("doctor", "--json", model=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backends"]["reference"] is None and report["self_check"]["ok"]
    assert all(difference <= 2e-5 for difference in report["self_check"]["difference"].values())
    done = run("doctor", "--verify", str(small), model=False)
    assert done.returncode == 1 and "verify         FAILED: scores" in done.stdout
