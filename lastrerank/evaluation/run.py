"""Reranking a first stage's candidates over a dataset: runs that are kept, resumed and scored.

A run is a file of JSON lines: its settings, then a query a line with its documents, best first, and their scores.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import BeirDataset, lines_of
from lastrerank.evaluation.contenders import Contender, Own
from lastrerank.evaluation.first_stage import Bm25
from lastrerank.kept import digest, locked, read_records
from lastrerank.progress import Progress
from lastrerank.reranker import Reranker

logger = logging.getLogger("lastrerank")

# Document ids by query, best first.
Ranking = dict[str, list[str]]

ORDERS = ("descending", "ascending", "random")
METRICS = ("nDCG@10", "RR@10", "AP", "R@10", "R@100")


def bm25_candidates(dataset: BeirDataset, depth: int) -> Ranking:
    """The `depth` best documents of every query by BM25, but for the query itself; a query that shares no token with
    any has none."""
    found = Bm25(dataset.documents).top(dataset.queries.values(), depth + 1)
    return {
        query: [name for name, _ in top if not is_itself(dataset, query, name)][:depth]
        for query, top in zip(dataset.queries, found, strict=True)
    }


def is_itself(dataset: BeirDataset, query: str, document: str) -> bool:
    """Whether a document is the query: where queries are documents (ArguAna), it has the query's id and, after its
    title, its text, and is no answer. BEIR's evaluation goes by ids alone, which elsewhere may be equal by chance."""
    if query != document or document in dataset.qrels.get(query, {}) or document not in dataset.documents:
        return False
    ours, theirs = (" ".join(text.split()) for text in (dataset.queries[query], dataset.documents[document]))
    return f" {theirs}".endswith(f" {ours}")


def read_trec_run(path: str | os.PathLike[str], dataset: BeirDataset, depth: int) -> Ranking:
    """Candidates from a TREC run file: `query Q0 document rank score tag`, by score, of equal ones the document whose
    id is the last first, as trec_eval has them; the query itself is left out (see `is_itself`).

    Raises:
        ValueError: a line is malformed, names an unknown document, or no query of the dataset is in the file.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(lines_of(Path(path)), 1):
        fields = re.split(r"[ \t]+", line.strip(" \t"))  # identifiers may hold any other white space
        if fields == [""]:
            continue
        try:
            query, document, score = fields[0], fields[2], float(fields[4])
        except (IndexError, ValueError) as error:
            expected = "expected 'query Q0 document rank score tag'"
            raise ValueError(f"{path}:{number}: {expected}, got {line!r:.80}") from error
        if document not in dataset.documents:
            raise ValueError(f"{path}:{number}: document {document!r} is not in the corpus")
        if math.isnan(score) or (query, document) in seen:
            raise ValueError(f"{path}:{number}: expected a number, and every document once: {line!r:.80}")
        seen.add((query, document))
        found.setdefault(query, []).append((score, document))
    if not found.keys() & dataset.queries.keys():
        raise ValueError(f"{path}: none of the {len(dataset.queries)} queries is in it")
    return {
        query: [
            name for _, name in sorted(found.get(query, []), reverse=True) if not is_itself(dataset, query, name)
        ][:depth]
        for query in dataset.queries
    }


def check_order(order: str) -> None:
    """Raises ValueError if it is none of `ORDERS`."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {ORDERS}")


def ordered(candidates: Ranking, order: str, seed: int = 0) -> Ranking:
    """The candidates as the reranker gets to see them: the first stage's order, its reverse, or a seeded shuffle."""
    check_order(order)
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
    model: Reranker | Contender,
    dataset: BeirDataset,
    candidates: Ranking,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    max_doc_length: int | None = None,
    progress: bool | None = None,
) -> Run:
    """Rerank the candidates of every query; what `path` already holds is not done again.

    Args:
        model: what ranks, sixteen queries at a time.
        path: the run's file; written a query at a time, so that an interrupted run goes on where it stopped.
        settings: what else the run depends on. They are kept in the file with the model's identity (weights by digest,
            dtype, backend) and the cap, and of each query a digest of its text and its documents' in their order; all
            of it is compared on resuming.

    Raises:
        ValueError: `path` holds a run with other settings or weights, or of other texts, or is being written.
    """
    target = Path(path)
    contender = Own(model) if isinstance(model, Reranker) else model
    for query, text in dataset.queries.items():
        if not text:
            raise ValueError(f"{dataset.name}: query {query!r:.80} is empty")
    own = {**settings, **contender.identity(), "max_doc_length": max_doc_length or contender.max_doc_length}
    inputs = {
        q: digest(dataset.queries[q], [[d, dataset.documents[d]] for d in names])[:16]
        for q, names in candidates.items()
    }
    with locked(target, "this run"):
        done = _read_run(target, json.loads(json.dumps(own)), inputs, candidates)
        resumed, started, tokens = len(done), time.perf_counter(), 0
        left = [query for query in candidates if query not in done]
        if resumed:
            logger.warning("%s: %d of %d queries were ranked before", target, resumed, len(candidates))
        with target.open("a", encoding="utf-8") as lines, Progress(
            dataset.name, "queries", progress, len(left)
        ) as bar:
            if lines.tell() == 0:
                lines.write(json.dumps({"settings": own}) + "\n")
            for group in _groups(left, 16):
                lists = [(dataset.queries[q], [dataset.documents[d] for d in candidates[q]]) for q in group]
                for query, found in zip(group, contender.rank(lists, max_doc_length), strict=True):
                    tokens += found.tokens
                    done[query] = [candidates[query][place] for place in found.order]
                    row = {"query": query, "documents": done[query], "scores": found.scores, "input": inputs[query]}
                    lines.write(json.dumps(row) + "\n")
                lines.flush()
                bar.advance(len(group))
    return Run({query: done[query] for query in candidates}, tokens, time.perf_counter() - started, resumed)


def _groups(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _read_run(path: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], candidates: Ranking) -> Ranking:
    """Finished queries of an earlier start."""
    rows = read_records(path)
    if not rows:
        return {}
    before = rows[0].get("settings")
    if not isinstance(before, dict):
        raise ValueError(f"{path}: no run of this package's: its first line has no settings")
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{path} is a run with {name} = {before.get(name)!r}, this one has {settings.get(name)!r}: "
                "name another output folder, or remove the file"
            )
    done: Ranking = {}
    for number, row in enumerate(rows[1:], 2):
        query = str(row.get("query"))
        found = row.get("documents")
        same = query in inputs and row.get("input") == inputs[query] and isinstance(found, list)
        if not same or sorted(map(str, found)) != sorted(candidates[query]):  # type: ignore[arg-type]
            raise ValueError(f"{path}:{number}: query {query!r} has other candidates or other texts now")
        done[query] = row["documents"]
    return done


def evaluate_ranking(dataset: BeirDataset, ranking: Ranking) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over the dataset's queries, and each query's values, of `METRICS` by `ir_measures` (trec_eval's formulas).

    A query without candidates counts as 0.
    """
    import ir_measures

    measures = {}
    for name in METRICS:
        kind, _, cut = name.partition("@")  # `parse_measure` of 0.4.3 wants `ast.Num`, gone in Python 3.14
        measure = getattr(ir_measures, kind)
        measures[measure @ int(cut) if cut else measure] = name
    qrels = [ir_measures.Qrel(q, d, gain) for q, gains in dataset.qrels.items() for d, gain in gains.items()]
    # By place, not by score: equal scores keep the order they were given.
    run = [ir_measures.ScoredDoc(q, d, -place) for q, names in ranking.items() for place, d in enumerate(names)]
    each: dict[str, dict[str, float]] = {query: dict.fromkeys(METRICS, 0.0) for query in dataset.queries}
    for value in ir_measures.iter_calc(list(measures), qrels, run):
        each[value.query_id][measures[value.measure]] = value.value
    means = {name: sum(values[name] for values in each.values()) / len(each) for name in METRICS}
    return means, each
