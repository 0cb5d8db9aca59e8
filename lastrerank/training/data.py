"""Training lists: a query, its positive, mined hard negatives, and random negatives drawn anew every time.

On disk: `documents.jsonl` (`id`, `text`) and `lists.jsonl` (`query`, `positive` = a document's id, `negatives` = ids of
hard ones, optionally `teacher` = one logit for the positive and each negative, `label` = what the positive has of the
teacher's distribution by itself, whatever the logits, `pool` = name of the group of documents that random negatives
come from, `renamed` = whether its tokens give way to others), plain or gzip.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import json_lines
from lastrerank.kept import write_records


@dataclass(frozen=True)
class TrainingList:
    """documents[positive] answers the query.

    teacher: a logit per document, or None.
    copy_of: for each document the index of its augmented copy, -1 for the copies themselves, or None for no copies.
    renamed: whether tokens of its texts are to give way to others drawn at random, the same one everywhere in the list:
        what is left to rank by is that the query and a document have the same ones.
    """

    query: str
    documents: tuple[str, ...]
    positive: int
    teacher: tuple[float, ...] | None = None
    copy_of: tuple[int, ...] | None = None
    renamed: bool = False


@dataclass(frozen=True)
class ListRow:
    """A line of `lists.jsonl`, documents by their position in the documents file."""

    query: str
    positive: int
    negatives: tuple[int, ...]
    teacher: tuple[float, ...] | None
    pool: str
    renamed: bool = False
    label: float = 0.0


class TrainingData:
    """Lists drawn at random for ever, reproducibly: list number n of a seed is always the same.

    Args:
        documents: texts.
        rows: lists over them.
        weights: relative frequency of each row's pool; None for rows as they are.
    """

    def __init__(
        self,
        documents: Sequence[str],
        rows: Sequence[ListRow],
        weights: dict[str, float] | None = None,
    ) -> None:
        if not rows:
            raise ValueError("no training lists")
        self.documents, self.rows = documents, rows
        self._by_pool: dict[str, list[ListRow]] = {}
        self._pool_documents: dict[str, list[int]] = {}
        self._answers: dict[tuple[str, str], set[int]] = {}
        for row in rows:
            self._by_pool.setdefault(row.pool, []).append(row)
            self._answers.setdefault((row.pool, row.query), set()).add(row.positive)
        for pool, members in self._by_pool.items():
            self._pool_documents[pool] = sorted({row.positive for row in members})
        self._pools = list(self._by_pool)
        self._weights = [
            len(self._by_pool[pool]) if weights is None else weights.get(pool, 0.0) for pool in self._pools
        ]

    @property
    def pools(self) -> dict[str, list[ListRow]]:
        """Lists by the name of their pool."""
        return self._by_pool

    def draw(self, seed: int, number: int, hard: int, easy: int, augment: bool = False) -> TrainingList:
        """List `number`: the positive, up to `hard` mined negatives and `easy` random ones, in random order.

        With augment, a copy of every document with sentences dropped or reordered is put at a random place.
        """
        rng = random.Random(f"{seed}/{number}")
        pool = rng.choices(self._pools, self._weights)[0]
        row = rng.choice(self._by_pool[pool])
        chosen = rng.sample(range(len(row.negatives)), min(hard, len(row.negatives)))
        known = {*self._answers[row.pool, row.query], *row.negatives}  # a query's other answers are no negatives
        candidates = self._pool_documents[pool]
        randoms: list[int] = []
        for _ in range(4 * easy):
            candidate = rng.choice(candidates)
            if len(randoms) < easy and candidate not in known:
                randoms.append(candidate)
                known.add(candidate)
        ids = [row.positive, *(row.negatives[i] for i in chosen), *randoms]
        teacher: list[float] | None = None
        if row.teacher is not None:
            # A random document is at best as good as the worst of the mined ones, in the teacher's eyes.
            floor = min(row.teacher)
            logits = [row.teacher[0], *(row.teacher[i + 1] for i in chosen), *([floor] * len(randoms))]
            teacher = labelled(logits, row.label)
        texts = [self.documents[i] for i in ids]
        if augment:
            texts += [augmented(text, rng) for text in texts]
        order = list(range(len(texts)))
        rng.shuffle(order)  # place p holds text order[p]
        place = {text: p for p, text in enumerate(order)}
        count = len(ids)
        copy_of = tuple(place[text + count] if text < count else -1 for text in order) if augment else None
        logits_in_order = None if augment or teacher is None else tuple(teacher[k] for k in order)  # copies have none
        return TrainingList(
            row.query, tuple(texts[k] for k in order), place[0], logits_in_order, copy_of, row.renamed
        )


def labelled(logits: Sequence[float], label: float) -> list[float]:
    """Logits of a distribution in which the first document has `label` by itself and the rest is the softmax of
    `logits`."""
    if not label:
        return list(logits)
    highest = max(logits)
    shares = [math.exp(logit - highest) for logit in logits]
    total = sum(shares)
    target = [(1 - label) * share / total for share in shares]
    target[0] += label
    return [math.log(max(share, 1e-30)) for share in target]


def augmented(text: str, rng: random.Random) -> str:
    """A text-augmented copy: sentences reordered, about a fifth of them dropped (words, if there is one sentence)."""
    parts = [part for part in re.split(r"(?<=[.!?。！？\n])\s*", text) if part]
    if len(parts) < 2:
        parts = text.split(" ")
        kept = [part for part in parts if rng.random() > 0.2]
        return " ".join(kept or parts)
    kept = [part for part in parts if rng.random() > 0.2] or parts
    rng.shuffle(kept)
    return " ".join(kept)


def _documents(folder: str | os.PathLike[str]) -> tuple[list[str], dict[Any, int]]:
    """Texts, and the position of each id among them."""
    texts: list[str] = []
    numbers: dict[Any, int] = {}
    for where, row in json_lines(Path(folder), "documents"):
        name = row.get("id")
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not isinstance(row.get("text"), str):
            raise ValueError(f"{where}: expected 'id', a string or a number, and 'text', a string")
        if name in numbers:
            raise ValueError(f"{where}: id {name!r:.80} is there twice")
        numbers[name] = len(texts)
        texts.append(row["text"])
    return texts, numbers


def read_training_data(folder: str | Path, weights: dict[str, float] | None = None) -> TrainingData:
    """Read `documents.jsonl[.gz]` and `lists.jsonl[.gz]`.

    Raises:
        ValueError: a file is missing, or a line is malformed; the message names the file and line.
    """
    documents, number = _documents(folder)
    rows = []
    for where, row in json_lines(Path(folder), "lists"):
        try:
            negatives = tuple(number[i] for i in row["negatives"])
            teacher = tuple(map(float, row["teacher"])) if row.get("teacher") is not None else None
            pool, renamed, label = row.get("pool", "all"), bool(row.get("renamed", False)), float(row.get("label", 0.0))
            rows.append(ListRow(row["query"], number[row["positive"]], negatives, teacher, pool, renamed, label))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected query, positive, negatives over known documents: {error}") from error
        if number[row["positive"]] in negatives:
            raise ValueError(f"{where}: the positive {row['positive']!r:.80} is among the negatives")
        if not 0 <= label < 1 or (label and teacher is None):
            raise ValueError(f"{where}: label is {label}, expected at least 0, less than 1, and a teacher beside it")
        if teacher is not None and len(teacher) != len(negatives) + 1:
            raise ValueError(f"{where}: teacher has {len(teacher)} logits for {len(negatives) + 1} documents")
    return TrainingData(documents, rows, weights)


def read_pairs(folder: str | os.PathLike[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """`documents.jsonl[.gz]` as texts, and the rows of `pairs.jsonl[.gz]`, their `positive` a position among them.

    Raises:
        ValueError: a file is missing, a line is malformed, or names no known document; the message names file and line.
    """
    documents, numbers = _documents(folder)
    rows = []
    for where, row in json_lines(Path(folder), "pairs"):
        if row.get("positive") not in numbers or not row.get("query"):
            raise ValueError(f"{where}: expected a query and the id of a known document as positive")
        rows.append(row | {"positive": numbers[row["positive"]]})
    return documents, rows


def write_lists(folder: str | os.PathLike[str], documents: Iterable[str], lists: Iterable[dict[str, Any]]) -> Path:
    """What `read_training_data` reads, documents by position; the documents come last, so with them it is whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_records(target / "lists.jsonl", lists)
    write_records(target / "documents.jsonl", ({"id": i, "text": text} for i, text in enumerate(documents)))
    return target
