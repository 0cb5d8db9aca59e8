"""A file of requests to a file of results, resumed where it was interrupted: `lastrerank rerank --requests`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lastrerank.documents import json_lines_of
from lastrerank.kept import digest, locked, read_records, write_file
from lastrerank.progress import Progress
from lastrerank.request import RerankRequest, RerankResult
from lastrerank.reranker import Reranker
from lastrerank.stored import read_json

# Requests whose results are written at once.
GROUP = 16


@dataclass(frozen=True)
class BatchRequest:
    """A line of a requests file, `where` it stands. id: its own, as it came, or None. names: of its documents."""

    request: RerankRequest
    where: str
    id: Any
    names: tuple[Any, ...]


def read_requests(path: str | os.PathLike[str], options: Mapping[str, Any]) -> list[BatchRequest]:
    """Requests, one a line: an object of `query`, `documents` and what else a `RerankRequest` has, null as if absent;
    `id` comes back, as do the documents' (`id` or `_id`).

    Args:
        options: of requests that don't state them.

    Raises:
        ValueError: a line is none; the message names it.
    """
    found: list[BatchRequest] = []
    for where, row in json_lines_of(Path(path)):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with 'query' and 'documents', got {str(row)[:60]!r}")
        given = {name: value for name, value in row.items() if name != "id" and value is not None}
        if given.pop("return_embeddings", False) is not False:
            raise ValueError(f"{where}.return_embeddings is {row['return_embeddings']!r:.40}: no file holds embeddings")
        try:
            request = RerankRequest.of({**options, **given}, where)
        except TypeError as error:
            raise ValueError(str(error)) from error
        names = (
            document.get("id", document.get("_id")) if isinstance(document, Mapping) else None
            for document in request.documents
        )
        found.append(BatchRequest(request, where, row.get("id"), tuple(names)))
    if not found:
        raise ValueError(f"{path}: no requests")
    return found


def rerank_file(
    reranker: Reranker,
    requests: Sequence[BatchRequest],
    output: str | os.PathLike[str],
    *,
    trec: str | os.PathLike[str] | None = None,
    return_documents: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a line of results for each request, in their order; what `output` holds already is not done again.

    Beside it, `OUTPUT.settings.json` keeps what the results depend on: the model by digest, the requests by theirs.

    Args:
        output: JSON lines: `id` if the request has one, `results` of `index`, `id` if the document has one,
            `relevance_score`, `raw_score` if the family has one. A file without such settings is never touched.
        trec: also a TREC run, `id Q0 document rank score lastrerank`, of requests and documents that all have ids.
        return_documents: whether results hold the documents.

    Returns:
        How many requests there are, and how many had been done before.

    Raises:
        ValueError: a request is bad, `output` is of other requests or another model, or is in use, or `trec` lacks ids;
            nothing has been done then.
    """
    target = Path(output)
    kept = target.with_name(f"{target.name}.settings.json")
    for name, path in (("output", target), ("trec", target if trec is None else Path(trec))):
        if path.name == "-":
            raise ValueError(f"{name} is '-', expected a file: what it holds is not done again")
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{name} is {path}, whose folder isn't there")
    for one in requests:
        reranker.encoder.check(one.request, f"{one.where}.")
        try:  # only tokenising shows whether query and instruction are too long
            reranker.encode(replace(one.request, documents=[]))
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from error
    if trec is not None:
        _check_trec(requests, Path(trec), (target, kept))
    wanted = [[vars(one.request) | {"documents": list(one.request.documents)}, one.id] for one in requests]
    settings = {**reranker.identity(), "requests": digest(*wanted), "return_documents": return_documents}
    with locked(target, "this output"):
        if target.exists() and target.stat().st_size:
            before = read_json(kept) if kept.is_file() else {}
            found = [name for name in settings if before.get(name) != settings[name]]
            if found:
                raise ValueError(f"{target} is of another {' and '.join(found)}: name another output, or remove it")
        records = read_records(target)
        if len(records) > len(requests):
            raise ValueError(f"{target} has {len(records)} lines for {len(requests)} requests: remove it")
        write_file(kept, json.dumps(settings, indent=1) + "\n")
        left = requests[len(records) :]
        documents = sum(len(one.request.documents) for one in left)
        bar = Progress("reranking", "documents", progress, documents)
        with target.open("a", encoding="utf-8") as lines, bar:
            for start in range(0, len(left), GROUP):
                group = left[start : start + GROUP]
                for one, results in zip(group, _reranked(reranker, group), strict=True):
                    lines.write(json.dumps(_line(one, results, return_documents), ensure_ascii=False) + "\n")
                lines.flush()
                bar.advance(sum(len(one.request.documents) for one in group))
        if trec is not None:
            write_file(trec, "".join(_trec_lines(requests, read_records(target))))
    return {"requests": len(requests), "resumed": len(records), "output": str(target)}


def _check_trec(requests: Sequence[BatchRequest], path: Path, others: Sequence[Path]) -> None:
    if path.resolve() in [other.resolve() for other in others]:
        raise ValueError(f"trec is {path}, which is an output already")
    seen: dict[str, str] = {}
    for one in requests:
        places = ("id", *(f"documents[{n}].id" for n in range(len(one.names))))
        for place, name in zip(places, (one.id, *one.names), strict=True):
            if not isinstance(name, (str, int)) or isinstance(name, bool) or str(name) != "".join(str(name).split()):
                raise ValueError(f"{one.where}.{place} is {name!r:.60}, a TREC run needs words or numbers")
            if name == "":
                raise ValueError(f"{one.where}.{place} is empty")
        if len(set(map(str, one.names))) < len(one.names):
            raise ValueError(f"{one.where}: two documents have one id")
        if str(one.id) in seen:
            raise ValueError(f"{one.where}: its id {one.id!r} is that of {seen[str(one.id)]}")
        seen[str(one.id)] = one.where


def _reranked(reranker: Reranker, group: Sequence[BatchRequest]) -> list[list[RerankResult]]:
    try:
        return reranker.rerank_many([one.request for one in group], progress=False)
    except ValueError:
        for one in group:  # which one it was
            try:
                reranker.rerank_many([one.request], progress=False)
            except ValueError as error:
                raise ValueError(f"{one.where}: {error}") from error
        raise


def _line(one: BatchRequest, results: Sequence[RerankResult], return_documents: bool) -> dict[str, Any]:
    rows = []
    for result in results:
        row: dict[str, Any] = {"index": result["index"]}
        if one.names[result["index"]] is not None:
            row["id"] = one.names[result["index"]]
        row["relevance_score"] = result["relevance_score"]
        if "raw_score" in result:
            row["raw_score"] = result["raw_score"]
        if return_documents:
            row["document"] = result["document"]
        rows.append(row)
    return ({} if one.id is None else {"id": one.id}) | {"results": rows}


def _trec_lines(requests: Sequence[BatchRequest], records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{one.id} Q0 {row['id']} {rank} {row.get('raw_score', row['relevance_score'])!r} lastrerank\n"
        for one, record in zip(requests, records, strict=True) for rank, row in enumerate(record["results"], 1)
    ]  # fmt: skip
