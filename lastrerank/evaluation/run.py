"""Reranking a first stage's candidates over a dataset: runs that are kept, resumed and scored.

A run is a file of JSON lines: its settings, then a query a line with its documents, best first, and their scores.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import BeirDataset
from lastrerank.evaluation.first_stage import Bm25
from lastrerank.progress import Progress
from lastrerank.request import RerankRequest
from lastrerank.reranker import Reranker, ranked

# Document ids by query, best first.
Ranking = dict[str, list[str]]

ORDERS = ("descending", "ascending", "random")
METRICS = ("nDCG@10", "RR@10", "AP", "R@10", "R@100")


def bm25_candidates(dataset: BeirDataset, depth: int) -> Ranking:
    """The `depth` best documents of every query by BM25; a query that shares no token with any has none."""
    found = Bm25(dataset.documents).top(dataset.queries.values(), depth)
    return {query: [name for name, _ in top] for query, top in zip(dataset.queries, found, strict=True)}


def read_trec_run(path: str | os.PathLike[str], dataset: BeirDataset, depth: int) -> Ranking:
    """Candidates from a TREC run file: `query Q0 document rank score tag`, ordered by score.

    Raises:
        ValueError: a line is malformed, names an unknown document, or no query of the dataset is in the file.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        try:
            query, document, score = fields[0], fields[2], float(fields[4])
        except (IndexError, ValueError) as error:
            expected = "expected 'query Q0 document rank score tag'"
            raise ValueError(f"{path}:{number}: {expected}, got {line!r:.80}") from error
        if document not in dataset.documents:
            raise ValueError(f"{path}:{number}: document {document!r} is not in the corpus")
        found.setdefault(query, []).append((score, document))
    if not found.keys() & dataset.queries.keys():
        raise ValueError(f"{path}: none of the {len(dataset.queries)} queries is in it")
    return {
        query: [name for _, name in sorted(found.get(query, []), key=lambda x: -x[0])[:depth]]
        for query in dataset.queries
    }


def ordered(candidates: Ranking, order: str, seed: int = 0) -> Ranking:
    """The candidates as the reranker gets to see them: the first stage's order, its reverse, or a seeded shuffle."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {ORDERS}")
    if order == "random":
        return {q: random.Random(f"{seed}/{q}").sample(names, len(names)) for q, names in candidates.items()}
    return {q: names[::-1] if order == "ascending" else names for q, names in candidates.items()}


@dataclass(frozen=True)
class Run:
    """Documents of each query, best first, what it took, and how many queries had been done before."""

    ranking: Ranking
    prompt_tokens: int
    seconds: float
    resumed: int


def rerank_run(
    reranker: Reranker,
    dataset: BeirDataset,
    candidates: Ranking,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    max_doc_length: int | None = None,
    progress: bool | None = None,
) -> Run:
    """Rerank the candidates of every query in packed passes; what `path` already holds is not done again.

    Args:
        path: the run's file; written a query at a time, so that an interrupted run goes on where it stopped.
        settings: what the run depends on; kept in the file and compared on resuming.

    Raises:
        ValueError: `path` holds a run with other settings, or of other queries.
    """
    target, settings = Path(path), json.loads(json.dumps(dict(settings)))
    done = _read_run(target, settings, candidates)
    resumed = len(done)
    started, tokens = time.perf_counter(), 0
    with target.open("a", encoding="utf-8") as lines, Progress("queries", "queries", progress) as bar:
        if not resumed and target.stat().st_size == 0:
            lines.write(json.dumps({"settings": settings}) + "\n")
        left = [query for query in candidates if query not in done]
        bar.add_total(len(left))
        for group in _groups(left, 16):
            requests = [
                RerankRequest.of(
                    RerankRequest(
                        dataset.queries[q], [dataset.documents[d] for d in candidates[q]], max_doc_length=max_doc_length
                    )
                )
                for q in group
            ]
            encoded = [reranker.encode(request) for request in requests]
            tokens += sum(e.num_tokens for e in encoded)
            for query, request, scored in zip(
                group, requests, reranker.score_encoded(encoded, progress=False), strict=True
            ):
                results = ranked(request, scored)
                done[query] = [candidates[query][r["index"]] for r in results]
                scores = [r["relevance_score"] for r in results]
                lines.write(json.dumps({"query": query, "documents": done[query], "scores": scores}) + "\n")
            lines.flush()
            bar.advance(len(group))
    return Run({query: done[query] for query in candidates}, tokens, time.perf_counter() - started, resumed)


def _groups(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _read_run(path: Path, settings: Mapping[str, Any], candidates: Ranking) -> Ranking:
    """Finished queries of an earlier start. A last line that was cut off is removed from the file."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    lines = whole.decode("utf-8").splitlines()
    if not lines:
        return {}
    before = json.loads(lines[0]).get("settings", {})
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{path} is a run with {name} = {before.get(name)!r}, this one has {settings.get(name)!r}: "
                "name another output folder, or remove the file"
            )
    done = {}
    for number, line in enumerate(lines[1:], 2):
        row = json.loads(line)
        if sorted(row["documents"]) != sorted(candidates.get(row["query"], [])):
            raise ValueError(f"{path}:{number}: query {row['query']!r} has other candidates now")
        done[row["query"]] = row["documents"]
    return done


def evaluate_ranking(dataset: BeirDataset, ranking: Ranking) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over the dataset's queries, and each query's values, of `METRICS` by `ir_measures` (trec_eval's formulas).

    A query without candidates counts as 0.
    """
    import ir_measures

    measures = {ir_measures.parse_measure(name): name for name in METRICS}
    qrels = [ir_measures.Qrel(q, d, gain) for q, gains in dataset.qrels.items() for d, gain in gains.items()]
    # By place, not by score: equal scores keep the order they were given.
    run = [ir_measures.ScoredDoc(q, d, -place) for q, names in ranking.items() for place, d in enumerate(names)]
    each: dict[str, dict[str, float]] = {query: dict.fromkeys(METRICS, 0.0) for query in dataset.queries}
    for value in ir_measures.iter_calc(list(measures), qrels, run):
        each[value.query_id][measures[value.measure]] = value.value
    means = {name: sum(values[name] for values in each.values()) / len(each) for name in METRICS}
    return means, each
