"""A byte-level BPE vocabulary fitted to other texts: what they don't use goes, what they need is added.

A merge list decides everything: the earliest merge that applies is applied first. So what is kept keeps its order, with
everything it is merged from, and a text all of whose tokens are kept is read as before; what is learnt anew comes
after, and applies where the old tokens end.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from tokenizers import Tokenizer


def fitted(
    tokenizer: Tokenizer, texts: Iterable[str], keep: int, add: int, always: Sequence[str] = ()
) -> tuple[Tokenizer, list[tuple[int, ...]]]:
    """A tokenizer of at most `keep` of the old tokens and `add` new ones, its special tokens last.

    Args:
        tokenizer: a byte-level BPE one.
        texts: the more often a token stands in them, the sooner it is kept, and pairs become new ones.
        keep: old tokens that are kept, with those that they are merged from and the single bytes; specials don't count.
        add: new tokens.
        always: texts whose tokens are kept however rare they are.

    Returns:
        The tokenizer, and for each of its ids the old ids that spell it.

    Raises:
        ValueError: the tokenizer is no byte-level BPE one.
    """
    raw = json.loads(tokenizer.to_str())
    if raw["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(raw["pre_tokenizer"]):
        raise ValueError(f"tokenizer.json: a {raw['model']['type']} model, expected a byte-level BPE one")
    written = (merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    merges: list[tuple[str, str]] = [(first, second) for first, second in written]
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    parents = {a + b: (a, b) for a, b in reversed(merges)}

    words = _words(tokenizer, texts)
    spelled = {word: _spelled(tokenizer, word) for word in words}
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for token in spelled[word]:
            counts[token] += count
    kept: set[str] = {token for token in vocabulary if len(token) == 1}

    def keep_with_parents(token: str) -> None:
        if token not in kept and token not in special:
            kept.add(token)
            for part in parents.get(token, ()):
                keep_with_parents(part)

    for text in always:
        for word in _words(tokenizer, [text]):
            for token in _spelled(tokenizer, word):
                keep_with_parents(token)
    for token, _ in counts.most_common():
        if len(kept) >= keep:
            break
        keep_with_parents(token)
    merges = [(a, b) for a, b in merges if a in kept and b in kept and a + b in kept]

    remaining = _with_model(raw, kept, merges, ())
    pieces = [(_spelled(remaining, word), count) for word, count in words.items()]
    new = _learnt(pieces, add, kept)
    tokens = [token for token in vocabulary if token in kept] + [a + b for a, b in new]
    result = _with_model(raw, tokens, merges + new, list(special))
    before = [
        (vocabulary[token],) if token in kept else tuple(vocabulary[part] for part in _spelled(tokenizer, token))
        for token in tokens
    ]
    return result, before + [(number,) for number in special.values()]


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """What merges can't cross, as strings of byte letters, with counts."""
    found: Counter[str] = Counter()
    for text in texts:
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        found.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return found


def _spelled(tokenizer: Tokenizer, word: str) -> list[str]:
    return [token.value for token in tokenizer.model.tokenize(word)]


def _with_model(
    raw: dict[str, object], tokens: Iterable[str], merges: Sequence[tuple[str, str]], special: Sequence[str]
) -> Tokenizer:
    """The same tokenizer with other tokens and merges, ids in their order, special ones after them."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    known = {token["content"]: token for token in raw["added_tokens"]}  # type: ignore[attr-defined]
    numbered = [known[name] | {"id": len(vocabulary) + i} for i, name in enumerate(special)]
    model = raw["model"] | {"vocab": vocabulary, "merges": [list(merge) for merge in merges]}  # type: ignore[operator]
    return Tokenizer.from_str(json.dumps(raw | {"model": model, "added_tokens": numbered, "post_processor": None}))


def _learnt(pieces: Sequence[tuple[list[str], int]], add: int, kept: Collection[str]) -> list[tuple[str, str]]:
    """The next `add` merges of byte-pair encoding over words in pieces, with counts; each spells a token that isn't
    there yet."""
    taken = set(kept)
    words = [list(parts) for parts, _ in pieces]
    weights = [count for _, count in pieces]
    counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, parts in enumerate(words):
        for pair in pairwise(parts):
            counts[pair] += weights[number]
            where[pair].add(number)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[str, str]] = []
    while queue and len(merges) < add:
        negative, best = heapq.heappop(queue)
        if counts[best] != -negative:  # it has become rarer since
            if counts[best] > 1:
                heapq.heappush(queue, (-counts[best], best))
            continue
        if -negative < 2:
            break
        if best[0] + best[1] in taken:  # spelt otherwise
            continue
        merges.append(best)
        taken.add(best[0] + best[1])
        grown: set[tuple[str, str]] = set()
        for number in where.pop(best):
            parts, weight = words[number], weights[number]
            for pair in pairwise(parts):
                counts[pair] -= weight
            merged: list[str] = []
            left = ""  # a pair is two neighbours as they are: what has just been merged isn't the left one of another
            for part in parts:
                if (left, part) == best:
                    merged[-1] += part
                    left = ""
                else:
                    merged.append(part)
                    left = part
            words[number] = merged
            for pair in pairwise(merged):
                counts[pair] += weight
                where[pair].add(number)
                grown.add(pair)
        for pair in grown:
            heapq.heappush(queue, (-counts[pair], pair))
    return merges
