"""Documents from files as people have them: text, JSON lines, JSON arrays, tables, gzip, folders, standard input.

What is not text, or not one of these, is refused with a hint, never ranked as if it were.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LINES, _TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
_UTF_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
             (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip
_BINARY = (
    (b"%PDF-", "a PDF: convert it first (pdftotext)"),
    (b"PK\x03\x04", "a ZIP or an office document: save it as text"),
    (b"\xd0\xcf\x11\xe0", "an office document: save it as text"),
    (b"%!PS", "PostScript: convert it first (ps2txt)"),
    (b"{\\rtf", "an RTF document: save it as text"),
    (b"\x89PNG", "an image"), (b"\xff\xd8\xff", "an image"), (b"GIF8", "an image"),
)


def read_documents(sources: list[Path], column: str | None = None) -> tuple[list[Any], list[str]]:
    """Documents, and a name for each.

    Args:
        sources: files: `.jsonl` and `.ndjson` hold a document a line (a string, or an object with `text`), `.json` an
            array of them, `.csv` and `.tsv` a table with a header; any other is one document. With `.gz` after it a
            file is unpacked. A folder stands for its files, those of linked folders too. `-` is standard input: a
            document a line, as text or JSON, or one JSON array.
        column: of tables; None: `text`.

    Raises:
        ValueError: a source can't be read, or isn't what it seems; the message names it, and its line. Or there is a
            column and no table.
    """
    documents, names = [], []
    if column is not None and not any(map(_has_table, sources)):
        raise ValueError(f"column is {column!r}: none of the sources is a table (.csv, .tsv)")
    for source in sources:
        for name, document in _standard_input() if str(source) == "-" else _path(source, column or "text"):
            documents.append(document)
            names.append(name)
    return documents, names


def _has_table(source: Path) -> bool:
    return any(map(_has_table, _files_in(source))) if source.is_dir() else _suffix(source) in _TABLES


def _suffix(path: Path) -> str:
    """Without `.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def json_lines_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a `.jsonl` file (`.gz` too, `-` is standard input) with where it stands.

    Raises:
        ValueError: it can't be read, or a line is no JSON.
    """
    data = sys.stdin.buffer.read() if str(path) == "-" else _unpacked(path)[0]
    source = "stdin" if str(path) == "-" else str(path)
    for where, line in _numbered(_decoded(data, source), source):
        yield where, _json(line, where)


def _unpacked(path: Path) -> tuple[bytes, str]:
    """A file's content and its suffix, without `.gz`."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data, _suffix(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _path(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise ValueError(f"{path}: a folder without files")
        for entry in files:
            for name, document in _path(entry, column):
                # Files of one name in several folders must be told apart.
                yield str(entry.relative_to(path)) if name == entry.name else name, document
        return
    data, suffix = _unpacked(path)
    text = _decoded(data, str(path))
    if suffix in _LINES:
        yield from _lines(text, str(path), json_only=True)
    elif suffix == ".json":
        yield from _array(_json(text, str(path)), str(path))
    elif suffix in _TABLES:
        yield from _table(text, path, _TABLES[suffix], column)
    else:
        yield path.name, text


def _files_in(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """All but what is hidden, in order; nothing that can't be read is left out. above: real folders it stands in."""
    real = os.path.realpath(folder)
    if real in above:  # a link upwards has no end
        return []
    found: list[Path] = []
    try:
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _files_in(entry, (*above, real))
            elif entry.is_file() or not entry.exists():  # a link that leads nowhere is named when it is read
                found.append(entry)
            else:
                raise ValueError(f"{entry}: neither a file nor a folder")
    except OSError as error:
        raise ValueError(f"{error.filename}: can't be read: {error.strerror or error}") from error
    return found


def _standard_input() -> Iterator[tuple[str, Any]]:
    if sys.stdin.isatty():
        raise ValueError("no documents: name files, or pipe one document a line to stdin")
    text = _decoded(sys.stdin.buffer.read(), "stdin")
    if text.lstrip().startswith("["):
        try:
            array = _json(text, "stdin")
        except ValueError:  # lines, of which the first begins with a bracket
            pass
        else:
            return _array(array, "stdin")
    return _lines(text, "stdin", json_only=False)


def _decoded(data: bytes, source: str) -> str:
    for start, what in _BINARY:
        if data.startswith(start):
            raise ValueError(f"{source}: {what}")
    for mark, name in _UTF_BOMS:
        if data.startswith(mark):
            raise ValueError(f"{source}: {name}, expected UTF-8 (iconv -f {name} -t UTF-8)")
    if b"\0" in data:
        raise ValueError(f"{source}: holds zero bytes, so it is no text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: no UTF-8 at byte {error.start}: convert it first (iconv -t UTF-8)") from error


def _numbered(text: str, source: str) -> Iterator[tuple[str, str]]:
    """Lines that aren't empty, and where they stand."""
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.removesuffix("\r"):
            yield f"{source}:{number}", line


def _array(value: Any, source: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, list):
        found = type(value).__name__
        raise ValueError(f"{source}: expected an array of documents, got {found}; lines of JSON end in .jsonl")
    for number, document in enumerate(value):
        yield f"{source}[{number}]", _document(document, f"{source}[{number}]")


def _lines(text: str, source: str, json_only: bool) -> Iterator[tuple[str, Any]]:
    for where, line in _numbered(text, source):
        value: Any = line
        begins = line.lstrip()[:1]
        if json_only or begins in ("{", "[", '"'):
            try:
                value = _json(line, where)
            except ValueError as error:
                if json_only:
                    raise
                # A quote or a bracket begins many a text.
                if begins == "{" or line.strip() == "[":
                    raise ValueError(f"{error}; text that begins with {begins} must come as a JSON string") from error
        yield where, _document(value, where)


def _table(text: str, path: Path, delimiter: str, column: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(rows.fieldnames or ())
        if column not in names:
            raise ValueError(f"{path}: a table without a column {column!r}; name one of {names} with --column")
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns of one name among {names}")
        for row in rows:
            if row[column] is None or None in row:
                raise ValueError(f"{path}:{rows.line_num}: a row of another number of columns than the header's")
            if delimiter == "\t" and any("\n" in value for value in row.values()):
                # In most such files a quote is a quote, and this one would swallow the rows up to the next.
                raise ValueError(
                    f"{path}:{rows.line_num}: here ends a field that a quote began lines before: save it as .csv if "
                    'that is meant; else a quote at the beginning of a field is written """'
                )
            rest = {name: value for name, value in row.items() if name not in (column, "text")}
            yield f"{path}:{rows.line_num}", {"text": row[column], **rest}
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from error


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits)

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=number)
        if "\\ud" in text.lower():  # half of a pair has no UTF-8
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _document(value: Any, where: str) -> Any:
    if isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("text"), str)):
        return value
    raise ValueError(f"{where}: expected a string or an object with 'text', got {str(value)[:60]!r}")
