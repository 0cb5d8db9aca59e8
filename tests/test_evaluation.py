"""BEIR folders and the first stage."""

from __future__ import annotations

import gzip
import json

import pytest

from lastrerank.evaluation.beir import read_beir
from lastrerank.evaluation.first_stage import Bm25, bm25_tokens


@pytest.fixture
def folder(tmp_path):
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt", encoding="utf-8") as lines:
        for i, text in enumerate(["red apple", "blue sky", "表の挿入"]):
            lines.write(json.dumps({"_id": f"d{i}", "title": "T" if i == 0 else "", "text": text}) + "\n")
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(["apple", "sky", "unjudged"]))
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t2\nq1\td1\t1\n")
    return tmp_path


def test_reading(folder):
    data = read_beir(folder)
    assert data.documents == {"d0": "T red apple", "d1": "blue sky", "d2": "表の挿入"}
    assert data.queries == {"q0": "apple", "q1": "sky"} and data.qrels == {"q0": {"d0": 2}, "q1": {"d1": 1}}
    assert len(read_beir(folder, max_queries=1).queries) == 1


def test_bad_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"split is 'dev'.*splits there: \['test'\]"):
        read_beir(folder, "dev")
    path = folder / "qrels" / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq0\td9\t1\n")
    with pytest.raises(ValueError, match=r"test\.tsv:2: document 'd9' is not in the corpus"):
        read_beir(folder)
    path.write_text("q9\td0\t1\n")
    with pytest.raises(ValueError, match="1 judged queries are not in queries"):
        read_beir(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"neither queries\.jsonl nor queries\.jsonl\.gz"):
        read_beir(folder)


def test_tokens_of_languages_with_and_without_spaces():
    assert bm25_tokens("Hello, WORLD-2!") == ["hello", "world", "2"]
    assert bm25_tokens("表の挿入 table") == ["表の", "の挿", "挿入", "table"]
    assert bm25_tokens("표 삽입") == ["표", "삽입"]
    assert bm25_tokens("") == []


def test_bm25_finds_and_orders():
    index = Bm25({"a": "apple apple pie", "b": "apple and a very long text about other things", "c": "sky"})
    (found, nothing) = index.top(["apple", "zebra"], 10)
    assert [name for name, _ in found] == ["a", "b"] and found[0][1] > found[1][1] > 0
    assert nothing == []
