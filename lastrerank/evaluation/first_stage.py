"""First stage: BM25 by `bm25s`, with a tokenisation that serves languages written without spaces.

Words are runs of letters with their marks, digits and underscores, lower-cased; runs of Chinese, Japanese, Korean or
Thai characters become overlapping bigrams. No stemming, no stop words.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache

# Characters of languages without spaces between words (Hiragana, Katakana, Han, Thai); and with Hangul, whose words are
# divided in the same way.
UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿฀-๿"
_DIVIDED = f"{UNSPACED}가-힯"
_FIRST_DIVIDED = re.compile(f"[{_DIVIDED}]")


def bm25_tokens(text: str) -> list[str]:
    """Tokens as described above."""
    tokens: list[str] = []
    for word in _words().findall(text.lower() if text.isascii() else unicodedata.normalize("NFC", text).lower()):
        if _FIRST_DIVIDED.match(word) and len(word) > 1:
            tokens.extend(word[i : i + 2] for i in range(len(word) - 1))
        else:
            tokens.append(word)
    return tokens


@cache
def _words() -> re.Pattern[str]:
    """Python's pattern language has no name for the marks that many scripts' letters carry (vowel signs)."""
    marks = "".join(c for c in map(chr, range(0x300, sys.maxunicode)) if unicodedata.category(c)[0] == "M")
    marks = "".join(c for c in marks if not _FIRST_DIVIDED.match(c))
    return re.compile(f"[{_DIVIDED}]+|[^\\W{_DIVIDED}](?:[^\\W{_DIVIDED}]|[{marks}])*")


class Bm25:
    """A BM25 index (bm25s, k1 1.5, b 0.75) over documents by id.

    Raises:
        ValueError: no document has a word.
    """

    def __init__(self, documents: Mapping[str, str]) -> None:
        import bm25s

        self._ids = list(documents)
        self._vocabulary: dict[str, int] = {}
        corpus = [[self._number(token) for token in bm25_tokens(text)] for text in documents.values()]
        if not self._vocabulary:
            raise ValueError(f"documents: none of {len(self._ids)} has a word, so BM25 has nothing to find")
        self._index = bm25s.BM25()
        self._index.index((corpus, self._vocabulary), show_progress=False)

    def _number(self, token: str) -> int:
        return self._vocabulary.setdefault(token, len(self._vocabulary))

    def top(self, queries: Iterable[str], k: int) -> list[list[tuple[str, float]]]:
        """Per query at most k (document id, score), best first, those that share a token with it."""
        tokens = [[t for t in bm25_tokens(q) if t in self._vocabulary] for q in queries]
        results: list[list[tuple[str, float]]] = []
        for query in tokens:
            if not query:
                results.append([])
                continue
            found, scores = self._index.retrieve([query], k=min(k, len(self._ids)), show_progress=False)
            results.append([(self._ids[i], float(s)) for i, s in zip(found[0], scores[0], strict=True) if s > 0])
        return results
