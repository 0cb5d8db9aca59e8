"""A file of requests to a file of results: the same as one by one, resumed, and nothing mixed."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from lastrerank import Reranker, batch
from lastrerank.cli import app
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

ROWS = [
    {"id": "q1", "query": "page numbers", "documents": [{"id": "a", "text": "insert a page"}, {"id": "b", "text": ""}]},
    {"id": "q2", "query": "spelling", "documents": [{"_id": 7, "text": "the spelling checker"}], "top_n": 1},
    {"id": "q3", "query": "nothing", "documents": []},
    *({"id": f"r{i}", "query": f"query {i}", "documents": [{"id": f"d{j}", "text": f"text {j} {i}"} for j in range(3)]}
      for i in range(30)),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    return write_random_checkpoint(
        tmp_path_factory.mktemp("small"), "tiny", tokenizer=small_tokenizer(), overrides=overrides
    )


def run(folder, *arguments):
    return CliRunner().invoke(app, ["rerank", "--model", str(folder), *map(str, arguments)])


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_are_those_of_each_request_and_interruptions_change_nothing(folder, tmp_path, monkeypatch):
    source, output, trec = written(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", tmp_path / "out.run"
    ranked = Reranker.rerank_many

    def interrupted(self, requests, **options):
        if requests[0].query == "query 13":  # the second group
            raise KeyboardInterrupt
        return ranked(self, requests, **options)

    monkeypatch.setattr(Reranker, "rerank_many", interrupted)
    run(folder, "--requests", source, "--output", output)
    assert len(output.read_text().splitlines()) == batch.GROUP
    output.open("a").write('{"id": "torn')  # as a crash leaves it
    monkeypatch.undo()
    done = run(folder, "--requests", source, "--output", output, "--trec", trec)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"requests": 33, "resumed": batch.GROUP, "output": str(output)}
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    reranker = Reranker.from_pretrained(folder)
    for row, own in zip(ROWS, found, strict=True):
        expected = reranker.rerank(row["query"], row["documents"], row.get("top_n"))
        assert [r["index"] for r in own["results"]] == [r["index"] for r in expected]
        names = [r["document"].get("id", r["document"].get("_id")) for r in expected]
        assert [r["id"] for r in own["results"]] == names if names else own["results"] == []
        assert [r["relevance_score"] for r in own["results"]] == pytest.approx(
            [r["relevance_score"] for r in expected], abs=1e-5
        )
    lines = [line.split() for line in trec.read_text().splitlines()]
    assert lines[0][:2] == ["q1", "Q0"] and [line[3] for line in lines[:2]] == ["1", "2"]
    assert len(lines) == sum(len(row["results"]) for row in found)


def test_other_requests_or_another_model_are_not_mixed_in(folder, tmp_path):
    source, output = written(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert run(folder, "--requests", source, "--output", output).exit_code == 0
    before = output.read_bytes()
    written(source, [ROWS[0] | {"query": "another"}, *ROWS[1:]])
    refused = run(folder, "--requests", source, "--output", output)
    assert refused.exit_code == 2 and "of another requests" in refused.output and output.read_bytes() == before
    written(source)
    refused = run(folder, "--requests", source, "--output", output, "--dtype", "bfloat16", "--backend", "reference")
    assert refused.exit_code == 2 and "dtype and backend" in refused.output and output.read_bytes() == before
    # Options count as what requests don't state.
    refused = run(folder, "--requests", source, "--output", output, "--top-n", "1")
    assert refused.exit_code == 2 and "requests" in refused.output


def test_options_documents_and_gzip(folder, tmp_path):
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[:2]).encode()))
    output = tmp_path / "out.jsonl"
    done = run(folder, "--requests", source, "--output", output, "--return-documents", "--score-threshold", "-1")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[0]["results"][0]["document"] in ROWS[0]["documents"]
    row = {"query": "q", "documents": ["a", "b"], "top_n": None, "instruction": None}
    nulls = written(tmp_path / "nulls.jsonl", [row])
    assert run(folder, "--requests", nulls, "--output", tmp_path / "one.jsonl", "--top-n", "1").exit_code == 0
    assert len(json.loads((tmp_path / "one.jsonl").read_text())["results"]) == 1  # null is as absent
    done = run(folder, "--requests", source, "--output", tmp_path / "none.jsonl", "--score-threshold", "1.01")
    assert json.loads((tmp_path / "none.jsonl").read_text().splitlines()[0])["results"] == []


@pytest.mark.parametrize(
    "line, said",
    [("[1]", ":1: expected an object"), ('{"query": "q"}', ":1 has fields"), ("{", ":1: not JSON"),
     ('{"query": "q", "documents": ["a", 3]}', ":1.documents[1] is a int"), ("", "no requests"),
     ('{"query": "q", "documents": [], "score_threshold": "x"}', ":1.score_threshold is 'x'")],
)  # fmt: skip
def test_bad_lines_are_named_before_any_work(folder, tmp_path, line, said):
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n")
    done = run(folder, "--requests", source, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 2 and said in done.output, done.output
    assert not (tmp_path / "out.jsonl").exists()


def test_a_long_instruction_is_named_before_any_work(folder, tmp_path):
    rows = [*ROWS, {"query": "q", "documents": ["d"], "instruction": "word " * 500}]
    failed = run(folder, "--requests", written(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl")
    assert failed.exit_code == 2 and "in.jsonl:34: instruction has more than 64 tokens" in failed.output
    assert not (tmp_path / "out.jsonl").exists()


def test_what_goes_together(folder, tmp_path):
    source = written(tmp_path / "in.jsonl", [{"query": "q", "documents": ["a"]}])
    assert "expected --output" in run(folder, "--requests", source).output
    assert "expected a query" in run(folder).output
    for name in ("--output", "--trec"):
        given = {"--output": tmp_path / "out.jsonl"} | {name: "-"}
        refused = run(folder, "--requests", source, *(word for pair in given.items() for word in pair))
        assert refused.exit_code == 2 and f"{name[2:]} is '-', expected a file" in refused.output
    assert "go with --requests" in run(folder, "q", source, "--output", tmp_path / "x").output
    refused = run(folder, "--requests", source, "--output", tmp_path / "o.jsonl", "--trec", tmp_path / "o.run")
    assert refused.exit_code == 2 and ":1.id is None" in refused.output
    for more, said in ((("--json",), "don't go with --requests"), (("--explain",), "don't go with"),
                       (("--trec", source), "holds the requests")):  # fmt: skip
        refused = run(folder, "--requests", source, "--output", tmp_path / "o.jsonl", *more)
        assert refused.exit_code == 2 and said in refused.output, refused.output


def test_files_that_are_not_ours_are_not_touched(folder, tmp_path):
    source, other = written(tmp_path / "in.jsonl"), tmp_path / "notes.txt"
    other.write_text("no results, and no line's end")
    before = {path: path.read_bytes() for path in (source, other)}
    for output in (source, other):
        refused = run(folder, "--requests", source, "--output", output)
        assert refused.exit_code == 2, refused.output
    for trec in (tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json", source, tmp_path / "no" / "folder.run"):
        refused = run(folder, "--requests", source, "--output", tmp_path / "out.jsonl", "--trec", trec)
        assert refused.exit_code == 2 and "trec is" in refused.output, refused.output
    refused = run(folder, "--requests", source, "--output", tmp_path / "no" / "out.jsonl")
    assert refused.exit_code == 2 and "output is" in refused.output, refused.output
    assert {path: path.read_bytes() for path in (source, other)} == before and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "change, said",
    [({"max_doc_length": 10**6}, ":20.max_query_length"),
     ({"return_embeddings": True}, ":20.return_embeddings is True"),
     ({"instruction": "words and " * 200}, ":20: instruction has more than")],
)  # fmt: skip
def test_a_bad_request_is_named_by_its_line(folder, tmp_path, change, said):
    rows = [*ROWS[:19], ROWS[19] | change]
    done = run(folder, "--requests", written(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 2 and said in done.output.replace("\n", ""), done.output


@pytest.mark.parametrize(
    "rows, said",
    [([ROWS[0], ROWS[0]], ":2: its id 'q1' is that of"), ([ROWS[0] | {"id": "a b"}], ":1.id is 'a b'"),
     ([ROWS[0] | {"documents": [{"id": 1, "text": ""}, {"id": "1", "text": ""}]}], ":1: two documents have one id"),
     ([ROWS[0] | {"id": True}], ":1.id is True"), ([ROWS[0] | {"id": ""}], ":1.id is empty")],
)  # fmt: skip
def test_ids_that_no_trec_run_can_hold(folder, tmp_path, rows, said):
    source = written(tmp_path / "in.jsonl", rows)
    done = run(folder, "--requests", source, "--output", tmp_path / "o.jsonl", "--trec", tmp_path / "o.run")
    assert done.exit_code == 2 and said in done.output.replace("\n", ""), done.output
