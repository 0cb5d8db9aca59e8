"""Queries made from a document, so that training sees more of them than people wrote: what its own words say best.

Three kinds, drawn at random: a few words, the rarer the likelier; a run of words as it stands; a piece of a sentence
with some of its words left out. In languages written without spaces runs of characters take the place of words.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable

from lastrerank.evaluation.first_stage import UNSPACED

# Shares of keywords, of runs of words, and of pieces of a sentence.
_KINDS = (0.45, 0.25, 0.3)
_EDGES = ".,;:!?()[]{}<>\"'“”„«»*"
_UNSPACED = re.compile(f"[{UNSPACED}]{{2,}}")


class QueryMaker:
    """Makes queries for documents of one collection.

    texts: its documents; how rare a word is, is counted there.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._holding: Counter[str] = Counter()
        self._texts = 0
        for text in texts:
            self._texts += 1
            self._holding.update({word.lower() for word in _words(text)})

    def make(self, text: str, rng: random.Random) -> str:
        """A query that `text` answers; empty if the text is too short for one."""
        unspaced = _UNSPACED.findall(text)
        if sum(map(len, unspaced)) > len(text) / 4:
            if rng.random() < _KINDS[0]:
                return " ".join(_run(rng.choice(unspaced), rng.randint(2, 6), rng) for _ in range(rng.randint(1, 4)))
            sentences = [part for part in re.split(r"[。！？!?\n]", text) if len(part) > 2]
            return _run(rng.choice(sentences), rng.choice((3, 5, 8, 12, 20)), rng) if sentences else ""
        words = _words(text)
        if len(words) < 4:
            return ""
        kind = rng.choices(("keywords", "run", "sentence"), _KINDS)[0]
        if kind == "run":
            count = rng.randint(1, 5)
            first = rng.randrange(len(words) - min(count, len(words)) + 1)
            return " ".join(words[first : first + count])
        sentences = [s for s in re.split(r"(?<=[.!?])\s|\n", text) if len(s.split()) > 4]
        if kind == "sentence" and sentences:
            part = rng.choice(sentences).split()
            count, left_out = rng.randint(5, 18), rng.choice((0.0, 0.2, 0.4))
            first = rng.randrange(max(1, len(part) - count + 1))
            return " ".join(word for word in part[first : first + count] if rng.random() >= left_out)
        own = [word for word in dict.fromkeys(words) if any(map(str.isalpha, word))] or words
        rarity = [math.log(1 + self._texts / (1 + self._holding[word.lower()])) ** 2 for word in own]
        return " ".join(dict.fromkeys(rng.choices(own, rarity, k=rng.choice((1, 2, 2, 3, 3, 4, 5, 8, 12)))))


def _words(text: str) -> list[str]:
    return [word for word in (part.strip(_EDGES) for part in text.split()) if word]


def _run(text: str, count: int, rng: random.Random) -> str:
    first = rng.randrange(max(1, len(text) - count + 1))
    return text[first : first + count].strip()
