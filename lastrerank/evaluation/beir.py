"""BEIR-format folders: `corpus.jsonl`, `queries.jsonl` (plain or gzip) and `qrels/<split>.tsv`."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BeirDataset:
    """documents: text (title and body) by id. queries: text by id, those judged in the split. qrels: query id ->
    document id -> gain."""

    name: str
    split: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(
    folder: str | os.PathLike[str],
    split: str = "test",
    *,
    query_folder: str | os.PathLike[str] | None = None,
    max_queries: int | None = None,
    seed: int = 0,
) -> BeirDataset:
    """Read a dataset.

    Args:
        folder: where the documents are, and everything else unless `query_folder` is given.
        split: name of the qrels file.
        query_folder: queries and qrels of another folder with the same document ids (cross-lingual evaluation).
        max_queries: a seeded sample of this many judged queries.
        seed: of the sample.

    Raises:
        ValueError: a file is missing or malformed, or the qrels name queries or documents that aren't there.
    """
    import random

    root, query_root = Path(folder), Path(query_folder or folder)
    documents = {}
    for row in _rows(root, "corpus"):
        if str(row["_id"]) in documents:
            raise ValueError(f"{root}: the corpus has two documents {row['_id']!r}")
        title = row.get("title") or ""
        documents[str(row["_id"])] = f"{title} {row['text']}".strip() if title else row["text"]
    path = query_root / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = sorted(p.stem for p in (query_root / "qrels").glob("*.tsv"))
        raise ValueError(f"split is {split!r}: no {path}; splits there: {found}")
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines_of(path)):
        if not line:
            continue
        fields = line.split("\t")
        if number == 0 and len(fields) == 3 and not re.fullmatch(r"[-+.\deE]+", fields[2]):
            continue  # a header
        if len(fields) != 3 or not re.fullmatch(r"-?[0-9]+", fields[2]):
            raise ValueError(f"{path}:{number + 1}: expected 'query-id<TAB>corpus-id<TAB>score', got {line!r:.80}")
        if fields[1] not in documents:
            raise ValueError(f"{path}:{number + 1}: document {fields[1]!r} is not in the corpus")
        judged_before = qrels.setdefault(fields[0], {})
        gain = int(fields[2])
        if judged_before.setdefault(fields[1], gain) != gain:
            raise ValueError(
                f"{path}:{number + 1}: {fields[0]!r} and {fields[1]!r} were judged {judged_before[fields[1]]} before, "
                f"now {gain}"
            )
    texts: dict[str, str] = {}
    for row in _rows(query_root, "queries"):
        if texts.setdefault(str(row["_id"]), row["text"]) != row["text"]:
            raise ValueError(f"{query_root}: queries.jsonl has two queries {row['_id']!r}")
    missing = [query for query in qrels if query not in texts]
    if missing:
        raise ValueError(f"{path}: {len(missing)} judged queries are not in queries.jsonl, the first: {missing[0]!r}")
    judged = list(qrels)
    if max_queries is not None and max_queries < 1:
        raise ValueError(f"max_queries is {max_queries}, expected 1 or more")
    if max_queries is not None and max_queries < len(judged):
        judged = sorted(random.Random(seed).sample(judged, max_queries), key=judged.index)
    if not qrels:
        raise ValueError(f"{path}: nothing is judged there")
    name = name_of(root) if query_folder is None else f"{name_of(query_root)}>{name_of(root)}"
    return BeirDataset(name, split, documents, {q: texts[q] for q in judged}, {q: qrels[q] for q in judged})


def name_of(folder: str | os.PathLike[str]) -> str:
    """What a dataset is called: its folder's name, of a link the link's."""
    return Path(os.path.abspath(folder)).name


def check_names(folders: Sequence[str | os.PathLike[str]], argument: str) -> None:
    """Raises ValueError, which begins with the argument's name, if two datasets are called the same."""
    names = [name_of(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} is {list(map(str, folders))}: two of one name, by which results are kept")


def lines_of(path: Path) -> list[str]:
    """A text file's lines: they end at a line feed, not at every character that Unicode calls the end of a line.

    Raises:
        ValueError: it can't be read as UTF-8; the message names it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error
    return [line.removesuffix("\r") for line in text.split("\n")]


def _rows(folder: Path, stem: str) -> Iterator[dict[str, Any]]:
    for where, row in json_lines(folder, stem):
        if not isinstance(row.get("text"), str) or not isinstance(row.get("_id"), (str, int)):
            found = {name: row[name] for name in ("_id", "text") if name in row} or sorted(row)
            raise ValueError(f"{where}: expected '_id', a string or a number, and 'text', a string, got {found!s:.80}")
        yield row


def json_lines(folder: Path, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) for every line of `<stem>.jsonl` or `<stem>.jsonl.gz`.

    Raises:
        ValueError: neither file is there, or a line is no JSON object; the message names file and line.
    """
    for path, opener in ((folder / f"{stem}.jsonl", open), (folder / f"{stem}.jsonl.gz", gzip.open)):
        if path.is_file():
            with opener(path, "rb") as lines:  # type: ignore[operator]
                number = 0
                try:
                    for number, line in enumerate(lines, 1):
                        if line.strip(b" \t\r\n"):
                            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                            if not isinstance(row, dict):
                                raise ValueError("no object")
                            yield f"{path}:{number}", row
                except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
            return
    raise ValueError(f"{folder}: neither {stem}.jsonl nor {stem}.jsonl.gz is there")
