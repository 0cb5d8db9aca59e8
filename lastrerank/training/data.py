"""Training lists: a query, its positive, mined hard negatives, and random negatives drawn anew every time.

On disk: `documents.jsonl` (`id`, `text`) and `lists.jsonl` (`query`, `positive` = a document's id, `negatives` = ids of
hard ones, optionally `teacher` = one logit for the positive and each negative, `label` = what the positive has of the
teacher's distribution by itself, whatever the logits, `pool` = name of the group whose other answers random negatives
are, without it every document, `renamed` = whether its tokens give way to others), plain or gzip.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastrerank.evaluation.beir import json_lines
from lastrerank.kept import write_records

logger = logging.getLogger("lastrerank")

# The pool of lists that name none.
EVERY = "all"


@dataclass(frozen=True)
class TrainingList:
    """documents[positive] answers the query.

    teacher: a logit per document, or None. label: what the positive has of the teacher's distribution by itself.
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
    label: float = 0.0


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
        weights: relative frequency of each row's pool, 0 for one that isn't named; None for rows as they are.

    Raises:
        ValueError: there are no rows whose list can have a negative, or a weight is no number or of no pool.
    """

    def __init__(
        self,
        documents: Sequence[str],
        rows: Sequence[ListRow],
        weights: dict[str, float] | None = None,
    ) -> None:
        if not rows:
            raise ValueError("no training lists")
        # Documents of one text are one: the first of them.
        first: dict[str, int] = {}
        self._same = [first.setdefault(text, number) for number, text in enumerate(documents)]
        self.documents = documents
        self._answers: dict[tuple[str, str], set[int]] = {}
        positives: dict[str, set[int]] = {}
        for row in rows:
            self._answers.setdefault((row.pool, row.query), set()).add(self._same[row.positive])
            positives.setdefault(row.pool, set()).add(self._same[row.positive])
        self._pool_documents = {
            pool: sorted(set(self._same) if pool == EVERY else own) for pool, own in positives.items()
        }
        self.rows: list[ListRow] = []
        alone: list[ListRow] = []
        for row in rows:
            every = self._answers[row.pool, row.query].issuperset(self._pool_documents[row.pool])
            (alone if every and not self._negatives(row) else self.rows).append(row)
        if alone:
            found = (f"{len(alone)} of {len(rows)} lists can have no negative, the first of query "
                     f"{alone[0].query!r:.80} in pool {alone[0].pool!r:.40}")  # fmt: skip
            if not self.rows:
                raise ValueError(f"{found}: one document teaches no order")
            logger.warning("%s: they are left out", found)
        self._by_pool: dict[str, list[ListRow]] = {}
        for row in self.rows:
            self._by_pool.setdefault(row.pool, []).append(row)
        for pool, weight in (weights or {}).items():
            if pool not in positives:
                raise ValueError(f"weights has the pool {pool!r:.80}, expected of {sorted(positives)!s:.200}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights: {pool!r:.80} has {weight}, expected a finite number, 0 or more")
        if weights is not None and not any(weights.get(pool) for pool in self._by_pool):
            raise ValueError(f"weights is {weights!s:.200}: no pool that has lists would be drawn")
        self._pools = list(self._by_pool)
        self._weights = [
            len(self._by_pool[pool]) if weights is None else weights.get(pool, 0.0) for pool in self._pools
        ]

    @property
    def unmined(self) -> int:
        """Lists that have no mined negative."""
        return sum(not self._negatives(row) for row in self.rows)

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
        negatives = self._negatives(row)
        chosen = rng.sample(negatives, min(hard, len(negatives)))
        known = self._answers[row.pool, row.query] | {self._same[i] for i in row.negatives}
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
            teacher = [row.teacher[0], *(row.teacher[i + 1] for i in chosen), *([floor] * len(randoms))]
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
            row.query, tuple(texts[k] for k in order), place[0], logits_in_order, copy_of, row.renamed, row.label
        )

    def _negatives(self, row: ListRow) -> list[int]:
        """Which of a row's negatives are some: a query's other answers are none, nor is what has an answer's text, and
        of a text one is enough."""
        answers = self._answers[row.pool, row.query]
        places: dict[int, int] = {}
        for place, number in enumerate(row.negatives):
            if self._same[number] not in answers:
                places.setdefault(self._same[number], place)
        return list(places.values())


def labelled(logits: Sequence[float], label: float, positive: int) -> list[float]:
    """Logits of a distribution in which document `positive` has `label` by itself and the rest is the softmax of
    `logits`."""
    if not label:
        return list(logits)
    highest = max(logits)
    shares = [math.exp(logit - highest) for logit in logits]
    total = sum(shares)
    target = [(1 - label) * share / total for share in shares]
    target[positive] += label
    return [math.log(max(share, 1e-30)) for share in target]


def augmented(text: str, rng: random.Random) -> str:
    """A text-augmented copy: sentences reordered, about a fifth of them dropped (of one sentence its words, without
    spaces its characters)."""
    spaced = len(text.split()) > 1
    joint = " " if spaced else ""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+", text) if part]
    if len(parts) < 2:
        parts = text.split() if spaced else list(text)
        return joint.join([part for part in parts if rng.random() > 0.2] or parts)
    kept = [part for part in parts if rng.random() > 0.2] or parts
    rng.shuffle(kept)
    return joint.join(kept)


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
        query, (pool,) = _query_of(row, where), _names_of(row, where, "pool")
        positive = _document_of(row.get("positive"), number, f"{where}: positive")
        listed, logits = row.get("negatives"), row.get("teacher")
        if not isinstance(listed, list):
            raise ValueError(f"{where}: negatives is {listed!r:.80}, expected a list of documents' ids")
        negatives = tuple(_document_of(i, number, f"{where}: negatives") for i in listed)
        renamed, label = row.get("renamed", False), row.get("label", 0.0)
        if not isinstance(renamed, bool):
            raise ValueError(f"{where}: renamed is {renamed!r:.80}, expected true or false")
        if logits is not None and not (isinstance(logits, list) and all(map(_is_finite, logits))):
            raise ValueError(f"{where}: teacher is {logits!r:.80}, expected a list of finite numbers")
        teacher = None if logits is None else tuple(map(float, logits))
        rows.append(ListRow(query, positive, negatives, teacher, pool or EVERY, renamed, label))
        if positive in negatives:
            raise ValueError(f"{where}: the positive {row['positive']!r:.80} is among the negatives")
        if not _is_finite(label) or not 0 <= label < 1 or (label and teacher is None):
            raise ValueError(f"{where}: label is {label}, expected at least 0, less than 1, and a teacher beside it")
        if teacher is not None and len(teacher) != len(negatives) + 1:
            raise ValueError(f"{where}: teacher has {len(teacher)} logits for {len(negatives) + 1} documents")
    return TrainingData(documents, rows, weights)


def read_pairs(folder: str | os.PathLike[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """`documents.jsonl[.gz]` as texts, and the rows of `pairs.jsonl[.gz]`: `positive` a position among them, `pool` by
    its name, or of `source` and `lang`.

    Raises:
        ValueError: a file is missing, a line is malformed, or names no known document; the message names file and line.
    """
    documents, numbers = _documents(folder)
    rows = []
    for where, row in json_lines(Path(folder), "pairs"):
        query, (pool, *parts) = _query_of(row, where), _names_of(row, where, "pool", "source", "lang")
        positive = _document_of(row.get("positive"), numbers, f"{where}: positive")
        pool = pool or "/".join(filter(None, parts)) or EVERY
        rows.append(row | {"query": query, "positive": positive, "pool": pool})
    return documents, rows


def _query_of(row: Mapping[str, Any], where: str) -> str:
    query = row.get("query")
    if not isinstance(query, str) or not query:
        raise ValueError(f"{where}: query is {query!r:.80}, expected a string that isn't empty")
    return query


def _names_of(row: Mapping[str, Any], where: str, *fields: str) -> list[str]:
    """Empty where there is none."""
    for field in fields:
        if not isinstance(row.get(field), (str, type(None))):
            raise ValueError(f"{where}: {field} is {row[field]!r:.80}, expected a string")
    return [row.get(field) or "" for field in fields]


def _document_of(name: object, numbers: Mapping[Any, int], what: str) -> int:
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name not in numbers:
        raise ValueError(f"{what}: {name!r:.80} is no known document's id")
    return numbers[name]


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def write_lists(folder: str | os.PathLike[str], documents: Iterable[str], lists: Iterable[dict[str, Any]]) -> Path:
    """What `read_training_data` reads, documents by position; the documents come last, so with them it is whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_records(target / "lists.jsonl", lists)
    write_records(target / "documents.jsonl", ({"id": i, "text": text} for i, text in enumerate(documents)))
    return target
