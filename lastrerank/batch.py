"""A file of requests to a file of results, resumed where it was interrupted: `lastrerank rerank --requests`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastrerank.documents import json_lines_of
from lastrerank.kept import digest, locked, read_records, write_file
from lastrerank.progress import Progress
from lastrerank.request import RerankRequest, RerankResult
from lastrerank.reranker import Reranker

# Requests whose results are written at once.
GROUP = 16


@dataclass(frozen=True)
class BatchRequest:
    """A line of a requests file. id: its own, or None. names: of its documents, or None where they have none."""

    request: RerankRequest
    id: str | None
    names: tuple[str, ...] | None


def read_requests(path: str | os.PathLike[str], options: Mapping[str, Any]) -> list[BatchRequest]:
    """Requests, one a line: an object with `query`, `documents`, and what else a `RerankRequest` has; `id` comes back,
    as do the documents' (`id` or `_id`).

    Args:
        options: of requests that don't state them.

    Raises:
        ValueError: a line is none; the message names it.
    """
    found: list[BatchRequest] = []
    for where, row in json_lines_of(Path(path)):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with 'query' and 'documents', got {str(row)[:60]!r}")
        given = {name: value for name, value in row.items() if name != "id"}
        try:
            request = RerankRequest.of({**options, **given}, where)
        except TypeError as error:
            raise ValueError(str(error)) from error
        names = [
            (document.get("id", document.get("_id")) if isinstance(document, Mapping) else None)
            for document in request.documents
        ]
        known = None if None in names or not names else tuple(map(str, names))
        found.append(BatchRequest(request, None if row.get("id") is None else str(row["id"]), known))
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
            `relevance_score`, `raw_score` if the family has one.
        trec: also a TREC run, `id Q0 document rank score lastrerank`, of requests and documents that all have ids.
        return_documents: whether results hold the documents.

    Returns:
        How many requests there are, and how many had been done before.

    Raises:
        ValueError: `output` is of other requests or another model, or is in use, or `trec` lacks ids.
    """
    target = Path(output)
    if trec is not None:
        for number, one in enumerate(requests):
            if one.id is None or (one.names is None and one.request.documents):
                raise ValueError(f"requests[{number}] or its documents have no id, which a TREC run needs")
            if any(not name or name != "".join(name.split()) for name in (one.id, *(one.names or ()))):
                raise ValueError(f"requests[{number}]: an id is empty or holds white space, which a TREC run can't")
    wanted = [[vars(one.request) | {"documents": list(one.request.documents)}, one.id] for one in requests]
    settings = {**reranker.identity(), "requests": digest(*wanted), "return_documents": return_documents}
    kept = target.with_name(f"{target.name}.settings.json")
    with locked(target, "this output"):
        records = read_records(target)
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
        if records and before != settings:
            found = [name for name in settings if (before or {}).get(name) != settings[name]]
            raise ValueError(f"{target} is of another {' and '.join(found)}: name another output, or remove it")
        write_file(kept, json.dumps(settings, indent=1) + "\n")
        left = requests[len(records) :]
        documents = sum(len(one.request.documents) for one in left)
        bar = Progress("reranking", "documents", progress, documents)
        with target.open("a", encoding="utf-8") as lines, bar:
            for start in range(0, len(left), GROUP):
                group = left[start : start + GROUP]
                answers = reranker.rerank_many([one.request for one in group], progress=False)
                for one, results in zip(group, answers, strict=True):
                    lines.write(json.dumps(_line(one, results, return_documents), ensure_ascii=False) + "\n")
                lines.flush()
                bar.advance(sum(len(one.request.documents) for one in group))
        if trec is not None:
            write_file(trec, "".join(_trec_lines(requests, read_records(target))))
    return {"requests": len(requests), "resumed": len(records), "output": str(target)}


def _line(one: BatchRequest, results: Sequence[RerankResult], return_documents: bool) -> dict[str, Any]:
    rows = []
    for result in results:
        row: dict[str, Any] = {"index": result["index"]}
        if one.names is not None:
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
