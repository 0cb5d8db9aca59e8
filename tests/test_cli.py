"""The command line as a user and as a program meet it."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lastrerank.documents import read_documents
from lastrerank.speed import recommendation


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
        assert row["max_difference"] <= {"int8": 0.2, "bfloat16": 0.02}.get(row["dtype"], 1e-5)
        assert row["tau"] == 1.0 or row["dtype"] in ("int8", "bfloat16")
    shown = run("bench", "--documents", "3", "--doc-tokens", "20", "--runs", "1", "--device", "cpu")
    assert "tokens/s" in shown.stdout and "reference" in shown.stdout and "use backend=" in shown.stdout
    for option, value, message in (("--family", "no-such", "family"), ("--revision", "x", "revision is 'x'"),
                                   ("--threads", "0", "--threads")):  # fmt: skip
        refused = run("bench", option, value, "--device", "cpu")
        assert refused.returncode == 2 and message in refused.stderr


def test_what_is_recommended():
    def row(backend, dtype, tokens_per_s, max_difference, tau):
        return {"backend": backend, "dtype": dtype, "tokens_per_s": tokens_per_s, "max_difference": max_difference,
                "tau": tau}  # fmt: skip

    said = recommendation([
        row("native", "float32", 120.0, 1e-6, 1.0), row("reference", "float32", 100.0, 0.0, 1.0),
        row("native", "bfloat16", 90.0, 2e-3, 0.99), row("native", "int8", 240.0, 0.03, 0.985),
    ])  # fmt: skip
    assert said.startswith("use backend='native', dtype='float32':") and "bfloat16" not in said
    assert "dtype='int8' on 'native' is 2.00 x as fast" in said and "tau of 0.985" in said
    # On a GPU all are in 16 bits, the reference, too.
    rows = [row("triton", "bfloat16", 900.0, 4e-3, 0.99), row("reference", "bfloat16", 90.0, 3e-3, 0.99)]
    said = recommendation(rows)
    assert said == "use backend='triton', dtype='bfloat16': the fastest with the reference's scores"


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


def test_doctor(run, small, tmp_path):
    done = run("doctor", "--json", model=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backends"]["reference"] is None and report["self_check"]["ok"]
    if report["backends"]["native"] is None:
        from lastrerank.ops import native

        assert report["products"]["instruction_set"] == native.instruction_sets()[0]
        assert all(rate > 1 for rate in report["products"]["rates"].values())
    assert all(difference <= 2e-5 for difference in report["self_check"]["difference"].values())
    done = run("doctor", "--verify", str(small), model=False)
    assert done.returncode == 2 and "no scores are known of it, only of jina-reranker-v3" in done.stderr
    shutil.copytree(small, tmp_path / "jina-reranker-v3.5")
    done = run("doctor", "--verify", "jina-reranker-v3.5", model=False)
    assert done.returncode == 1 and "verify         FAILED: jina-reranker-v3.5: scores" in done.stdout


FILES = {
    "bom.jsonl": b'\xef\xbb\xbf"one"\n{"text": "two", "id": 7}\n',
    "a.ndjson": b'"one"\r\n{"text": "two", "id": 7}\r\n',
    "a.JSONL": b'"one"\n\n{"text": "two", "id": 7}',
    "a.json": b'["one", {"text": "two", "id": 7}]',
    "a.csv": b'id,text\n1,one\n2,"two, with\na line"\n',
    "a.tsv": b"text\tid\none\t1\ntwo\t2\n",
    "a.jsonl.gz": gzip.compress(b'"one"\n"two"\n'),
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_people_have_them(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    documents, names = read_documents([path])
    assert len(documents) == 2 and all(own.startswith(str(path)) for own in names) and len(set(names)) == 2
    texts = [document if isinstance(document, str) else document["text"] for document in documents]
    assert texts[0] == "one" and texts[1].startswith("two")
    if b'"id": 7' in FILES[name]:
        assert documents[1] == {"text": "two", "id": 7}


REFUSED = {
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "latin1.txt": (b"caf\xe9", "no UTF-8 at byte 3"),
    "a.pdf": (b"%PDF-1.4\n", "a PDF"),
    "a.docx": (b"PK\x03\x04rest", "office document"),
    "a.bin": (b"abc\0def", "zero bytes"),
    "a.json": (b'{"text": "x"}', "expected an array of documents"),
    "b.json": (b"[1]", r"b.json[0]: expected a string or an object"),
    "c.json": (b'[{"text": "x", "n": NaN}]', "NaN is no JSON"),
    "a.rtf": (b"{\\rtf1 page}", "an RTF document"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0", "an image"),
    "a.csv": (b"id,body\n1,x\n", "name one of ['id', 'body'] with --column"),
    "b.jsonl": (b'"x"\n{"txt": 1}\n', "b.jsonl:2: expected a string or an object"),
    "a.txt.gz": (b"no gzip", "can't be read"),
    "b.txt.gz": (gzip.compress(b"text")[:12] + b"\xff" * 20, "can't be read"),
    "b.csv": (b'text\none\n"two,2\nthree\n', "b.csv:"),
    "c.csv": (b"text,text\none,two\n", "two columns of one name"),
    "d.csv": (b"text,id\none,1,2\n", "another number of columns"),
    "c.jsonl": (b'{"text": "x", "n": 1e999}\n', "c.jsonl:1: not JSON: 1e999"),
    "d.jsonl": (b'{"text": "x", "n": "\\ud800"}\n', "d.jsonl:1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_with_a_hint(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_documents([tmp_path / name])


def test_a_refusal_is_one_line_and_exit_two(run, tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n")
    done = run("rerank", "a query", "a.pdf", "--json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a PDF" in done.stderr and not done.stdout


def test_folders_and_standard_input(run, tmp_path):
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "folder" / "b.txt").write_text("one")
    (tmp_path / "folder" / "deeper" / "a.jsonl").write_text('"two"\n"three"\n')
    (tmp_path / "folder" / ".hidden").write_bytes(b"\0")
    (tmp_path / "folder" / "deeper" / "b.txt").write_text("five")
    done = run("rerank", "a query", "folder", "-", "--json", stdin="four\n")
    assert done.returncode == 0, done.stderr
    names = {result["name"] for result in json.loads(done.stdout)["results"]}
    assert len(names) == 5 and {"b.txt", "deeper/b.txt"} < names  # files of one name stay apart
    (tmp_path / "empty").mkdir()
    done = run("rerank", "a query", "empty")
    assert done.returncode == 2 and "a folder without files" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [('[\n  "one",\n  {"text": "two"}\n]\n', ["one", "two"]), ('["one", "two"]', ["one", "two"]),
     ('[1] one\n"two" it said\n', ["[1] one", '"two" it said']), (' {"text": "one"}\n"two"\n', ["one", "two"])],
)  # fmt: skip
def test_standard_input_is_lines_or_an_array(monkeypatch, given, expected):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    documents, _ = read_documents([Path("-")])
    assert [document if isinstance(document, str) else document["text"] for document in documents] == expected


@pytest.mark.parametrize(
    ("given", "where"),
    [('"x"\n{"text": "y", "score": NaN}\n', "stdin:2: not JSON: NaN"), ('{"text": "y",}\n', "stdin:1: not JSON"),
     ('[\n"one",\n]\n', "stdin:1: not JSON"), ('["one"]\n["two"]\n', "stdin:1: expected a string"),
     ('[{"text": 1}]', "stdin[0]: expected a string")],
)  # fmt: skip
def test_broken_json_on_standard_input_is_no_text(monkeypatch, given, where):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    with pytest.raises(ValueError, match=re.escape(where)):
        read_documents([Path("-")])


def test_a_folder_loses_nothing(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("linked")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "upwards").symlink_to(folder)
    (folder / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert read_documents([folder]) == (["linked"] * 2, ["again/a.txt", "linked/a.txt"])
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="broken: can't be read"):
        read_documents([folder])
    (folder / "broken").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        read_documents([folder])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("open")
    real = Path.iterdir

    def iterdir(folder):  # root may read everything
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(ValueError, match="closed: can't be read: Permission denied"):
        read_documents([tmp_path])


def test_a_column_is_of_a_table(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "body": "b"}\n')
    (tmp_path / "a.csv").write_text("body\nb\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv.txt").write_text("body\nb\n")
    for source in (tmp_path / "a.jsonl", tmp_path / "folder"):
        with pytest.raises(ValueError, match="column is 'body': none of the sources is a table"):
            read_documents([source], "body")
    assert read_documents([tmp_path / "a.csv"], "body")[0] == [{"text": "b"}]
    assert len(read_documents([tmp_path], "body")[0]) == 3


def test_a_quote_swallows_no_rows_of_tab_separated_ones(tmp_path):
    path = tmp_path / "collection.tsv"
    path.write_text('id\ttext\n1\t"The quick\n2\tbrown fox"\n3\tjumps\n')
    with pytest.raises(ValueError, match=r"collection\.tsv:3: here ends a field that a quote began lines before"):
        read_documents([path], "text")
    path.write_text('id\ttext\n1\t"a ""quick"" one"\n2\tbrown fox\n')
    assert [document["text"] for document in read_documents([path], "text")[0]] == ['a "quick" one', "brown fox"]


def test_an_empty_model_is_not_the_default(run):
    for command in (("rerank", "q", "-"), ("serve",), ("bench",)):
        done = run(*command, "--model", " ", stdin="text\n", model=False)
        assert done.returncode == 2 and "--model is ' '" in done.stderr, command


def test_what_stands_in_documents_does_not_reach_the_terminal(run):
    done = run("rerank", "a\x1b]0;title\x07 query", "-", "--explain", stdin="page \x1b[2J numbers \u202e\x9b31m\n")
    assert done.returncode == 0
    assert not any(mark in done.stdout for mark in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e"))
    assert "\\x1b[2J" in done.stdout
    done = run("rerank", "q", "no\x1b[2Jfile")
    assert done.returncode == 2 and "\x1b" not in done.stderr


def test_options_are_those_of_the_api(run, small_reranker):
    documents = ["one two three four five six", "two", "three"]
    options = ("--orders", "3", "--block-size", "2", "--max-doc-length", "3", "--max-query-length", "2")
    done = run("rerank", "a query of words", "-", "--json", "--threads", "1", *options, stdin="\n".join(documents))
    expected = small_reranker.rerank(
        "a query of words", documents, orders=3, block_size=2, max_doc_length=3, max_query_length=2
    )
    rows = json.loads(done.stdout)["results"]
    assert [(r["index"], round(r["relevance_score"], 5)) for r in rows] == [
        (r["index"], round(r["relevance_score"], 5)) for r in expected
    ]


def test_version_convert_and_help(run, small, tmp_path):
    done = run("--version", model=False)
    assert done.returncode == 0 and done.stdout.startswith("lastrerank 0")
    done = run("convert", str(small), "out", "--dtype", "bfloat16", model=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert run("convert", "nowhere", "out", model=False).returncode == 2
    code = "import sys, lastrerank, lastrerank.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"
