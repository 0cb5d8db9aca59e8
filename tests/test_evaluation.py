"""BEIR folders, the first stage, runs and their scores."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lastrerank.cli import app
from lastrerank.evaluation.beir import read_beir
from lastrerank.evaluation.first_stage import Bm25, bm25_tokens
from lastrerank.evaluation.report import evaluate
from lastrerank.evaluation.run import bm25_candidates, evaluate_ranking, ordered, read_trec_run, rerank_run
from lastrerank.kept import locked


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
    assert bm25_tokens("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert bm25_tokens("cafe\u0301 CAFÉ") == ["café", "café"]


def test_bm25_finds_and_orders():
    index = Bm25({"a": "apple apple pie", "b": "apple and a very long text about other things", "c": "sky"})
    (found, nothing) = index.top(["apple", "zebra"], 10)
    assert [name for name, _ in found] == ["a", "b"] and found[0][1] > found[1][1] > 0
    assert nothing == []


def write_dataset(root, documents, queries, qrels, split="dev"):
    root.mkdir(exist_ok=True)
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": i, "title": "", "text": t}) + "\n" for i, t in documents.items())
    )
    (root / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in queries.items())
    )
    (root / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore"] + [f"{q}\t{d}\t{g}" for q, gains in qrels.items() for d, g in gains.items()]
    (root / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def dataset_folder(tmp_path):
    documents = {f"d{i}": f"words about topic {i} and more words " * (1 + i % 3) for i in range(12)}
    queries = {f"q{i}": f"topic {i}" for i in range(5)} | {"none": "zebra"}
    qrels = {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 1} for i in range(5)} | {"none": {"d0": 1}}
    return write_dataset(tmp_path / "toy", documents, queries, qrels)


def test_metrics_against_their_formulas(dataset_folder):
    dataset = read_beir(dataset_folder, "dev")
    ranking = {"q0": ["d5", "d0", "d6", "d1"], "q1": ["d2", "d1"], "q2": ["d7"], "none": []}
    means, each = evaluate_ranking(dataset, ranking)
    ideal = 2 + 1 / math.log2(3)
    assert each["q0"]["nDCG@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert each["q0"]["RR@10"] == 0.5 and each["q0"]["AP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert each["q1"]["nDCG@10"] == pytest.approx((1 + 2 / math.log2(3)) / ideal) and each["q1"]["R@10"] == 1
    assert set(each["q2"].values()) == set(each["none"].values()) == set(each["q3"].values()) == {0.0}
    assert means["RR@10"] == pytest.approx((0.5 + 1) / 6)


def test_orders():
    candidates = {"a": list("vwxyz"), "b": ["one"], "c": []}
    assert ordered(candidates, "descending") == candidates
    assert ordered(candidates, "ascending")["a"] == list("zyxwv")
    shuffled = ordered(candidates, "random", 1)
    assert shuffled == ordered(candidates, "random", 1) != ordered(candidates, "random", 2)
    assert sorted(shuffled["a"]) == candidates["a"]
    with pytest.raises(ValueError, match="order is 'upward'"):
        ordered(candidates, "upward")


def test_trec_run(dataset_folder, tmp_path):
    dataset = read_beir(dataset_folder, "dev")
    (tmp_path / "run").write_text("q0 Q0 d3 1 0.5 x\nq0 Q0 d4 2 0.9 x\nother Q0 d1 1 1 x\n")
    found = read_trec_run(tmp_path / "run", dataset, 10)
    assert found["q0"] == ["d4", "d3"] and found["q1"] == []
    for line, message in (("q0 Q0 d99 1 0.5 x", "document 'd99'"), ("q0 d3", "expected 'query Q0"),
                          ("z Q0 d3 1 1 x", "none of the 6 queries")):  # fmt: skip
        (tmp_path / "run").write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            read_trec_run(tmp_path / "run", dataset, 10)


def test_equal_scores_of_a_run_are_ordered_as_trec_eval_does(dataset_folder, tmp_path):
    import ir_measures

    dataset = read_beir(dataset_folder, "dev")
    (tmp_path / "run").write_text("".join(f"q0 Q0 d{i} {n} 0.5 x\n" for n, i in enumerate((10, 0, 3, 1), 1)))
    found = read_trec_run(tmp_path / "run", dataset, 10)
    assert found["q0"] == ["d3", "d10", "d1", "d0"]
    qrels = [ir_measures.Qrel(q, d, gain) for q, gains in dataset.qrels.items() for d, gain in gains.items()]
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    theirs = {m.query_id: m.value for m in ir_measures.iter_calc([ir_measures.nDCG @ 10], qrels, run)}
    assert evaluate_ranking(dataset, found)[1]["q0"]["nDCG@10"] == pytest.approx(theirs["q0"])


def test_a_query_that_is_a_document_is_not_found_by_itself(tmp_path):
    """ArguAna; a document whose id is the query's by chance stays."""
    documents = {"a": "one claim about apples", "b": "a claim about apples, too", "1": "claim about apples, and more",
                 "2": "some claim about apples"}  # fmt: skip
    queries = {"a": "one  claim about apples", "1": "claim about apples", "2": "claim about apples"}
    qrels = {"a": {"b": 1}, "1": {"b": 1}, "2": {"2": 1}}
    dataset = read_beir(write_dataset(tmp_path / "d", documents, queries, qrels), "dev")
    found = bm25_candidates(dataset, 4)
    assert sorted(found["a"]) == ["1", "2", "b"] and len(found["1"]) == len(found["2"]) == 4
    (tmp_path / "run").write_text("a Q0 a 1 2 x\na Q0 b 2 1 x\n1 Q0 1 1 2 x\n2 Q0 2 1 2 x\n")
    assert read_trec_run(tmp_path / "run", dataset, 1) == {"a": ["b"], "1": ["1"], "2": ["2"]}


def test_two_datasets_of_one_name_and_unknown_orders_are_refused_at_once(dataset_folder, tmp_path, small_reranker):
    with pytest.raises(ValueError, match="two of one name"):
        evaluate(small_reranker, [dataset_folder, tmp_path / "other" / "toy"], tmp_path / "out")
    with pytest.raises(ValueError, match="order is 'upward'"):
        evaluate(small_reranker, [tmp_path / "not there"], tmp_path / "out", orders=["upward"])


def test_a_run_resumes_where_it_was_cut_off(dataset_folder, tmp_path, small_reranker):
    dataset = read_beir(dataset_folder, "dev")
    candidates = bm25_candidates(dataset, 8)
    path, settings = tmp_path / "run.jsonl", {"order": "descending"}
    whole = rerank_run(small_reranker, dataset, candidates, path, settings)
    assert whole.resumed == 0 and whole.ranking["none"] == []
    for query, names in candidates.items():
        expected = small_reranker.rerank(dataset.queries[query], [dataset.documents[d] for d in names])
        assert whole.ranking[query] == [names[r["index"]] for r in expected]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # settings, two queries, and half of a third
    again = rerank_run(small_reranker, dataset, candidates, path, settings)
    assert again.resumed == 2 and again.ranking == whole.ranking
    assert [json.loads(x)["documents"] for x in path.read_text().splitlines()[1:]] == [
        json.loads(x)["documents"] for x in lines[1:]
    ]
    with pytest.raises(ValueError, match="a run with order = 'descending', this one has 'random'"):
        rerank_run(small_reranker, dataset, candidates, path, {"order": "random"})
    with pytest.raises(ValueError, match="other candidates or other texts now"):
        rerank_run(small_reranker, dataset, bm25_candidates(dataset, 3), path, settings)


def test_the_command(dataset_folder, tmp_path, small):
    arguments = ["eval", str(dataset_folder), "--model", str(small), "--split", "dev", "--top-k", "5", "--order",
                 "descending", "--order", "random", "--output", str(tmp_path / "out"), "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["ranking"] for row in report["rows"]] == ["first stage", "descending", "random"]
    assert report["rows"][0]["nDCG@10"] > 0.5 and report["rows"][1]["R@10"] == report["rows"][0]["R@10"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    assert len((tmp_path / "out" / "per_query.jsonl").read_text().splitlines()) == 18
    again = CliRunner().invoke(app, arguments)
    assert [row.get("resumed") for row in json.loads(again.stdout.splitlines()[-1])["rows"]] == [None, 6, 6]
    bad = CliRunner().invoke(app, ["eval", str(dataset_folder), "--model", str(small), "--split", "nope"])
    assert bad.exit_code == 2


def test_cross_lingual_folders(dataset_folder, tmp_path, small_reranker):
    """Questions of one folder over the documents of another with the same ids."""
    other = write_dataset(tmp_path / "german", {"d0": "unused"}, {"x": "topic 3"}, {"x": {"d3": 1}})
    report = evaluate(small_reranker, [dataset_folder], tmp_path / "o", split="dev", query_folder=other, top_k=4)
    assert [row["dataset"] for row in report["rows"]] == ["german>toy"] * 2 and report["rows"][0]["queries"] == 1


def test_a_run_knows_the_weights_that_made_it(dataset_folder, tmp_path, small, small_reranker, caplog):
    """The same folder name and other weights, another dtype, backend or cap: refused, never taken for its own."""
    from lastrerank import Reranker

    dataset = read_beir(dataset_folder, "dev")
    candidates = bm25_candidates(dataset, 3)
    path = tmp_path / "run.jsonl"
    rerank_run(small_reranker, dataset, candidates, path, {})
    again = rerank_run(small_reranker, dataset, candidates, path, {})
    assert again.resumed == len(candidates) and "6 of 6 queries were ranked before" in caplog.text

    other = tmp_path / small.name
    shutil.copytree(small, other)
    state = load_file(other / "model.safetensors")
    save_file(state | {"model.norm.weight": state["model.norm.weight"].flip(0)}, other / "model.safetensors")
    for arguments, what in (({"id_or_path": other}, "digest"), ({"id_or_path": small, "dtype": "bfloat16"}, "dtype"),
                            ({"id_or_path": small, "backend": "reference"}, "backend"),
                            ({"id_or_path": small, "family": "listwise-gguf"}, "digest")):  # fmt: skip
        reranker = Reranker.from_pretrained(**arguments)
        with pytest.raises(ValueError, match=f"a run with {what} = "):
            rerank_run(reranker, dataset, candidates, path, {})
    with pytest.raises(ValueError, match="a run with max_doc_length = 256, this one has 9"):
        rerank_run(small_reranker, dataset, candidates, path, {}, max_doc_length=9)


def test_a_run_knows_its_texts_and_their_order(dataset_folder, tmp_path, small_reranker):
    dataset = read_beir(dataset_folder, "dev")
    candidates = bm25_candidates(dataset, 3)
    path = tmp_path / "run.jsonl"
    rerank_run(small_reranker, dataset, candidates, path, {})
    turned = {query: names[::-1] for query, names in candidates.items()}
    changed = replace(dataset, documents={name: text + "!" for name, text in dataset.documents.items()})
    asked = replace(dataset, queries={name: text + "?" for name, text in dataset.queries.items()})
    for other, lists in ((dataset, turned), (changed, candidates), (asked, candidates)):
        with pytest.raises(ValueError, match="other candidates or other texts now"):
            rerank_run(small_reranker, other, lists, path, {})


def test_two_runs_do_not_share_a_file(dataset_folder, tmp_path, small_reranker):
    dataset = read_beir(dataset_folder, "dev")
    with locked(tmp_path / "run.jsonl", "a test"), pytest.raises(ValueError, match="in use by another process"):
        rerank_run(small_reranker, dataset, bm25_candidates(dataset, 3), tmp_path / "run.jsonl", {})


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x1c", "\xa0", "\u3000", "\ufeff"])
def test_lines_end_at_line_feeds_and_fields_at_tabs_and_spaces(tmp_path, mark, small_reranker):
    first = f"page{mark}one"
    folder = write_dataset(tmp_path, {first: f"the river{mark}Rhine", "two": "bread"}, {f"q{mark}1": "river"},
                           {f"q{mark}1": {first: 1}})  # fmt: skip
    dataset = read_beir(folder, "dev")
    assert list(dataset.documents) == [first, "two"] and dataset.qrels == {f"q{mark}1": {first: 1}}
    for resumed in (0, 1):
        run = rerank_run(small_reranker, dataset, {f"q{mark}1": [first, "two"]}, tmp_path / "run.jsonl", {})
        assert run.resumed == resumed and sorted(run.ranking[f"q{mark}1"]) == sorted([first, "two"])
    (tmp_path / "trec").write_bytes(f"q{mark}1 Q0\t{first}  1 2.0 x\r\n\n".encode())
    if mark not in "\x0b":  # white space in ASCII
        assert read_trec_run(tmp_path / "trec", dataset, 10) == {f"q{mark}1": [first]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("corpus.jsonl", b'{"_id": "1", "text": "a"}\nnot json\n', r"corpus\.jsonl:2"),
     ("corpus.jsonl", b'{"_id": "1", "text": 5}\n', r"corpus\.jsonl:1: expected .* a string, got .*'text': 5"),
     ("queries.jsonl", b"[1]\n", r"queries\.jsonl:1"), ("queries.jsonl", b"\xff\xfe\n", r"queries\.jsonl:1"),
     ("qrels/dev.tsv", b"q0\td0\n", r"dev\.tsv:1"), ("qrels/dev.tsv", b"\xff", r"dev\.tsv")],
)  # fmt: skip
def test_damaged_datasets_are_named(dataset_folder, tmp_path, file, content, message):
    shutil.copytree(dataset_folder, tmp_path / "copy")
    (tmp_path / "copy" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_beir(tmp_path / "copy", "dev")


@pytest.mark.parametrize("line", ["q0 Q0 d3 1 nan x", "q0 Q0 d4 2 0.1 x"])
def test_runs_without_an_order_are_refused(dataset_folder, tmp_path, line):
    (tmp_path / "run").write_text(f"q0 Q0 d4 1 0.5 x\n{line}\n")
    with pytest.raises(ValueError, match=r"run:2: expected a number, and every document once"):
        read_trec_run(tmp_path / "run", read_beir(dataset_folder, "dev"), 10)


def test_what_would_be_dropped_from_a_dataset_is_refused(dataset_folder, tmp_path):
    shutil.copytree(dataset_folder, tmp_path / "copy")
    (tmp_path / "copy" / "qrels" / "dev.tsv").write_text("q0\td0\t1.0\n")  # no header
    with pytest.raises(ValueError, match=r"dev\.tsv:1"):
        read_beir(tmp_path / "copy", "dev")
    (tmp_path / "copy" / "qrels" / "dev.tsv").write_text("q0\td0\t1\nq0\td0\t1\nq0\td0\t2\n")
    with pytest.raises(ValueError, match=r"dev\.tsv:3: 'q0' and 'd0' were judged 1 before, now 2"):
        read_beir(tmp_path / "copy", "dev")
    shutil.copy(dataset_folder / "qrels" / "dev.tsv", tmp_path / "copy" / "qrels" / "dev.tsv")
    with pytest.raises(ValueError, match="max_queries is -1"):
        read_beir(tmp_path / "copy", "dev", max_queries=-1)
    queries = (tmp_path / "copy" / "queries.jsonl").read_text()
    (tmp_path / "copy" / "queries.jsonl").write_text(queries + '{"_id": "q0", "text": "another"}\n')
    with pytest.raises(ValueError, match="two queries 'q0'"):
        read_beir(tmp_path / "copy", "dev")
    (tmp_path / "copy" / "queries.jsonl").write_text(queries)
    corpus = (tmp_path / "copy" / "corpus.jsonl").read_text()
    (tmp_path / "copy" / "corpus.jsonl").write_text(corpus + corpus.split("\n")[0] + "\n")
    with pytest.raises(ValueError, match="two documents"):
        read_beir(tmp_path / "copy", "dev")


def test_a_run_that_was_tampered_with_is_refused(dataset_folder, tmp_path, small_reranker):
    dataset = read_beir(dataset_folder, "dev")
    path = tmp_path / "run.jsonl"
    rerank_run(small_reranker, dataset, bm25_candidates(dataset, 3), path, {})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["documents"] = rows[1]["documents"][:1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"run\.jsonl:2"):
        rerank_run(small_reranker, dataset, bm25_candidates(dataset, 3), path, {})
