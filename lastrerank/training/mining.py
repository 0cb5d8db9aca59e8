"""From raw (query, document) pairs to training lists: hard negatives by BM25, optionally a teacher's logits."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lastrerank.evaluation.first_stage import Bm25
from lastrerank.progress import Progress
from lastrerank.request import RerankRequest
from lastrerank.reranker import Reranker
from lastrerank.training.data import EVERY


@dataclass(frozen=True)
class Pair:
    """A query, the position of the document that answers it, and the pool its negatives come from."""

    query: str
    positive: int
    pool: str


def sample_pairs(
    rows: Sequence[Mapping[str, Any]], sample: Mapping[tuple[str, str | None], int], seed: int = 0
) -> list[Pair]:
    """A seeded sample of rows of `read_pairs`, each in the pool of its source and language.

    Args:
        sample: pairs by source and language; None stands for every language of the source that isn't named, each.
    """
    rng, chosen = random.Random(seed), []
    for (source, language), count in sample.items():
        named = {own for own_source, own in sample if own_source == source and own is not None}
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            wanted = row["lang"] == language or (language is None and row["lang"] not in named)
            if row["source"] == source and wanted and len(row["query"]) > 2:
                groups[row["lang"]].append(row)
        for group in groups.values():
            chosen += rng.sample(group, min(count, len(group)))
    return [Pair(row["query"], row["positive"], f"{row['source']}/{row['lang']}") for row in chosen]


def sample_texts(documents: Sequence[str], rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[str]:
    """Texts for a vocabulary: at most 4 MB of English documents, 1.6 MB of every other language, 3,000 queries of each.

    rows: of `read_pairs`; `lang` is a language, or that of a query and of its document, `xx>yy`.
    """
    language: dict[int, str] = {}
    queries: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        spoken = row["lang"].split(">")
        language[row["positive"]] = spoken[-1]
        queries[spoken[0]].append(row["query"])
    grouped: dict[str, list[str]] = defaultdict(list)
    for index, text in enumerate(documents):
        grouped[language.get(index, "en")].append(text)
    rng, texts = random.Random(seed), []
    for name, group in grouped.items():
        rng.shuffle(group)
        size, most = 0, 4_000_000 if name == "en" else 1_600_000
        for text in group:
            texts.append(text)
            size += len(text.encode())
            if size > most:
                break
    for group in queries.values():
        rng.shuffle(group)
        texts += group[:3000]
    return texts


def mine_lists(
    documents: Sequence[str],
    pairs: Sequence[Pair],
    *,
    depth: int = 20,
    teacher: Callable[[Pair, Sequence[int], Sequence[float]], Sequence[float]] | None = None,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """For every pair the `depth` best documents of its pool by BM25 that don't answer the same query.

    Args:
        documents: texts.
        pairs: of all pools; a pool's documents are its pairs' positives, of the one without a name (`EVERY`) all.
        depth: negatives kept.
        teacher: (pair, [positive, *negatives], BM25 scores as a share of the best) -> a logit for each.
        progress: as in `Reranker.rerank`.

    Returns:
        Rows of `lists.jsonl`, documents by position.
    """
    pools: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        pools[pair.pool].append(pair)
    rows = []
    with Progress("mining", "queries", progress, len(pairs)) as bar:
        for pool, members in pools.items():
            ids = list(range(len(documents))) if pool == EVERY else sorted({pair.positive for pair in members})
            index = Bm25({str(i): documents[i] for i in ids})
            answers: dict[str, set[int]] = defaultdict(set)
            for pair in members:
                answers[pair.query].add(pair.positive)
            # Answers are left out, and so is what has an answer's text.
            most = depth + 10 + max(map(len, answers.values()))
            for pair, found in zip(members, index.top((p.query for p in members), most), strict=True):
                bar.advance(1)
                best = found[0][1] if found else 1.0
                share = {int(i): score / best for i, score in found}
                texts = {documents[i] for i in answers[pair.query]}
                negatives = [
                    i for i in share if i not in answers[pair.query] and documents[i] not in texts
                ][:depth]  # fmt: skip
                row: dict[str, Any] = {
                    "query": pair.query, "positive": pair.positive, "negatives": negatives, "pool": pool,
                }  # fmt: skip
                if teacher is not None:
                    listed = [pair.positive, *negatives]
                    logits = teacher(pair, listed, [share.get(i, 0.0) for i in listed])
                    row["teacher"] = [round(float(x), 3) for x in logits]
                rows.append(row)
    return rows


def rank_negatives(
    model: Reranker,
    documents: Sequence[str],
    rows: Sequence[dict[str, Any]],
    depth: int,
    *,
    progress: bool | None = None,
) -> list[dict[str, Any]]:
    """The same lists with the `depth` negatives that the model ranks best, hardest first.

    The model's own mistakes are the second stage's negatives (arXiv 2509.25085, section 3). A teacher's logits go with
    them.
    """
    found = []
    with Progress("ranking negatives", "lists", progress, len(rows)) as bar:
        for start in range(0, len(rows), 16):
            group = rows[start : start + 16]
            requests = [RerankRequest(row["query"], [documents[i] for i in row["negatives"]]) for row in group]
            for row, results in zip(group, model.rerank_many(requests, progress=False), strict=True):
                kept = [result["index"] for result in results[:depth]]
                new = row | {"negatives": [row["negatives"][i] for i in kept]}
                if "teacher" in row:
                    new["teacher"] = [row["teacher"][0], *(row["teacher"][i + 1] for i in kept)]
                found.append(new)
            bar.advance(len(group))
    return found
