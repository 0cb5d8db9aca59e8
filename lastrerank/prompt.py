"""What prompts of every kind share: pieces of text to ids, prompts as data, and what one shares with another.

A prompt is part of a checkpoint's interface, byte for byte. It is tokenised in segments: control tokens split a text
before anything else happens to it, so encoding what stands between them piece by piece gives the ids of the whole
prompt encoded at once, and the rows to read are known from construction. Ids are never searched for markers, and what
a user wrote is encoded by a tokenizer that knows no control token: text can't add, move or remove a readout.

`lastrerank.lists` makes prompts of many documents, `lastrerank.pairs` of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from lastrerank.request import RerankRequest
from lastrerank.texts import Steps, TextEncoder, bare_tokenizer

# A shared beginning is worth a second range of keys where it is this share of a prompt, and at least so many rows.
_LEAST_SHARE, _LEAST_SHARED = 1 / 32, 8


@dataclass(frozen=True, eq=False)
class Prefix:
    """Leading ids that several prompts of a request have: computed once in a pass. ids: int32 `[P]`."""

    ids: np.ndarray


@dataclass(frozen=True)
class EncodedBlock:
    """One prompt. own_ids: int32, all of it but what `prefix` holds. doc_rows: int64 `[N]`, the row of the prompt that
    is read for each document. query_row: the last row, where one is read for the query. early_query_row: the marker
    after the first query, in prompts that have one (training reads it). prefix: what its first ids share with other
    prompts of the request; no row is read there."""

    own_ids: np.ndarray
    doc_rows: np.ndarray
    query_row: int | None
    early_query_row: int | None = None
    prefix: Prefix | None = None

    def __len__(self) -> int:
        """Ids of the prompt."""
        return len(self.own_ids) + (0 if self.prefix is None else len(self.prefix.ids))

    @property
    def ids(self) -> np.ndarray:
        """int32 `[T]`, the whole prompt."""
        return self.own_ids if self.prefix is None else np.concatenate([self.prefix.ids, self.own_ids])

    @property
    def read_rows(self) -> np.ndarray:
        """int64: the documents' rows and then the query's."""
        return self.doc_rows if self.query_row is None else np.append(self.doc_rows, self.query_row)

    def alone(self) -> EncodedBlock:
        """The same prompt, sharing nothing."""
        return replace(self, own_ids=self.ids, prefix=None)


@dataclass(frozen=True)
class EncodedRequest:
    """A request as prompts, ready to be packed with others.

    blocks: one prompt each. block_documents: for each block the indices of its documents in the request.
    block_orders: for each block the order it belongs to, 0 being the caller's. doc_tokens: bare tokens of each
    document after cutting. cut: whether each document was cut; query_cut: whether the query was.
    """

    request: RerankRequest
    blocks: tuple[EncodedBlock, ...]
    block_documents: tuple[np.ndarray, ...]
    block_orders: tuple[int, ...]
    doc_tokens: tuple[int, ...]
    cut: tuple[bool, ...]
    query_cut: bool

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all blocks."""
        return sum(len(block) for block in self.blocks)

    def rows(self, budget: int) -> int:
        """Rows of all passes, each of at most `budget` rows where it can be (see `PassRows`): what the prompts of one
        pass share counts once."""
        total, rows = 0, PassRows()
        for block in self.blocks:
            if not rows.fits(block, budget):
                total, rows = total + rows.total, PassRows()
            rows.add(block)
        return total + rows.total


class RequestEncoder(Protocol):
    """Requests to prompts, for one checkpoint. Safe to use from several threads.

    max_query_length, max_doc_length: caps in tokens where the request doesn't say.
    """

    max_query_length: int
    max_doc_length: int

    def check(self, request: RerankRequest, prefix: str = "") -> tuple[int, int]:
        """Caps of the query and of a document, in tokens.

        Raises:
            ValueError: what the request asks for can't be done with this prompt; `prefix` stands before the field's
            name.
        """

    def estimated_rows(self, request: RerankRequest) -> int:
        """About the rows that a request will have, before it is tokenised. Raises what `check` does."""

    def encode_by_slices(self, request: RerankRequest) -> Steps[EncodedRequest]:
        """Tokenise a checked request; a generator that yields after each slice of the work."""


class PassRows:
    """Rows of a pass that is being put together: what its blocks share counts once."""

    def __init__(self) -> None:
        self.total = 0
        self._prefixes: set[Prefix | None] = set()

    def fits(self, block: EncodedBlock, budget: int) -> bool:
        """Whether the pass stays within `budget` rows with this block, too, or is empty. A pass whose blocks all share
        one beginning may have as many other rows as that has: apart they would compute it again each."""
        if not self.total:
            return True
        total = self.total + self._rows_of(block)
        if block.prefix is not None and self._prefixes == {block.prefix}:
            budget = max(budget, 2 * len(block.prefix.ids))
        return total <= budget

    def add(self, *blocks: EncodedBlock) -> int:
        """Add blocks; returns the rows there are now."""
        for block in blocks:
            self.total += self._rows_of(block)
            self._prefixes.add(block.prefix)
        return self.total

    def _rows_of(self, block: EncodedBlock) -> int:
        return len(block.own_ids) if block.prefix in self._prefixes else len(block)


def share(blocks: Sequence[EncodedBlock]) -> list[EncodedBlock]:
    """The same prompts, each with the ids that all of as many documents as it have in common: the longest common
    prefix, short of the first row that one of them reads. Causal rows depend on the ids before them alone."""
    groups: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        groups.setdefault(len(block.doc_rows), []).append(number)
    shared = list(blocks)
    for members in groups.values():
        first = blocks[members[0]].ids
        length = min(int(blocks[number].read_rows[0]) for number in members) if len(members) > 1 else 0
        for number in members[1:]:
            ids = blocks[number].ids
            length = min(length, len(first), len(ids))
            differs = np.flatnonzero(first[:length] != ids[:length])
            length = int(differs[0]) if len(differs) else length
        rows = sum(len(blocks[number]) for number in members)
        if length >= max(_LEAST_SHARED, _LEAST_SHARE * rows / len(members)):
            prefix = Prefix(first[:length].copy())
            for number in members:
                block = blocks[number]
                shared[number] = replace(block, own_ids=block.own_ids[length:].copy(), prefix=prefix)
    return shared


class PieceEncoder:
    """Pieces of prompts to ids for one tokenizer. Safe to use from several threads.

    Args:
        tokenizer: the checkpoint's tokenizer with its control tokens.
        prompt: the prompt's own texts: every control token in them must be the tokenizer's.
        control_tokens_in_text: whether control tokens in what users wrote are control tokens.
        cache_bytes: bound on the cache of encoded texts (ids and text together).

    Raises:
        ValueError: the tokenizer lacks a control token of the prompt, or plain text can reach one of its ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Iterable[str],
        control_tokens_in_text: bool = False,
        cache_bytes: int = 64 << 20,
    ) -> None:
        self.control_ids = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        # The vocabulary is shared: writing and reading it again would take longer than reading it from the file.
        plain = bare_tokenizer(tokenizer, tokenizer.model)
        prompt = tuple(prompt)
        for part in prompt:
            for token in re.findall(r"<\|[^|<>]+\|>|</?think>", part):
                if token not in self.control_ids:
                    raise ValueError(f"the prompt has {token}, which tokenizer.json does not: not this family's")
        reachable = set(self.control_ids.values())
        for content in self.control_ids:
            if reachable & set(plain.encode(content, add_special_tokens=False).ids):
                raise ValueError(f"tokenizer.json: the text {content!r} encodes to a control token even as plain text")

        self._plain, whole = plain, _untrimmed(tokenizer)
        # What user text is encoded with; segments of the prompt hold no control token, so either serves them.
        self.texts = TextEncoder(plain, cache_bytes=cache_bytes)
        if control_tokens_in_text:
            self.texts = TextEncoder(whole, self.control_ids, cache_bytes)
        self._controls = re.compile(
            "(" + "|".join(re.escape(c) for c in sorted(self.control_ids, key=len, reverse=True)) + ")"
        )
        self._pieces = lru_cache(maxsize=4096)(self.encode)
        self._boundary = lru_cache(maxsize=65536)(self._is_boundary)
        for part in (substitute(part, {}, "") for part in prompt):
            if whole.encode(part, add_special_tokens=False).ids != self.fixed(part).tolist():
                raise ValueError(f"tokenizer.json: a text behind a control token has other ids than by itself, in "
                                 f"{part!r:.80}: prompts are put together from both")  # fmt: skip

    def split(self, part: str) -> list[str]:
        """A part of the prompt, control tokens apart; some pieces may be empty."""
        return self._controls.split(part)

    def piece(self, text: str) -> np.ndarray:
        """Ids int32 of text without control tokens; remembered, unless a caller's long text is in it."""
        return self._pieces(text) if len(text) <= 1024 else self.encode(text)

    def fixed(self, part: str) -> np.ndarray:
        """Ids int32 of a part of the prompt in which no user's text stands."""
        found = [
            np.array([self.control_ids[piece]], np.int32) if piece in self.control_ids else self.piece(piece)
            for piece in self.split(part) if piece
        ]  # fmt: skip
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def is_boundary(self, before: str, text: str) -> bool:
        """Whether the tokenizer always splits between what ends in `before` and a text that isn't empty."""
        return self._boundary(before[-3:], _head(text))

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 of text without control tokens."""
        return np.asarray(self.texts.encode([text])[text], np.int32)

    def _is_boundary(self, tail: str, head: str) -> bool:
        pre_tokenizer = self._plain.pre_tokenizer
        if pre_tokenizer is None:
            return False
        normalizer = self._plain.normalizer
        if normalizer is not None:
            joint = normalizer.normalize_str(tail + head)
            tail, head = normalizer.normalize_str(tail), normalizer.normalize_str(head)
            if joint != tail + head:
                return False
        pieces = pre_tokenizer.pre_tokenize_str(tail + head)
        cut = sum(span[0] < len(tail) for _, span in pieces)
        return [p for p, _ in pieces[cut:]] == [p for p, _ in pre_tokenizer.pre_tokenize_str(head)]


def rough_tokens(text: str, cap: int) -> int:
    """Tokens before they are counted: four characters a token, in other scripts than Latin three bytes, `cap` at
    most."""
    head = text[: 8 * cap]
    return min(len(head) // 4 if head.isascii() else len(head.encode("utf-8", "replace")) // 3, cap)


def substitute(part: str, values: dict[str, str], default: str | None = None) -> str:
    """Fill placeholders in one pass, so that a value that looks like a placeholder stays text. default: of those that
    have no value, else they stay."""
    return re.sub(
        r"\{[a-z]+\}", lambda match: values.get(match[0], match[0] if default is None else default), part
    )


def _untrimmed(tokenizer: Tokenizer) -> Tokenizer:
    """That neither cuts nor pads."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def _head(text: str) -> str:
    """The characters that decide whether a text merges with what stands before it: leading white space and one
    more."""
    spaces = len(text[:16]) - len(text[:16].lstrip())
    return text[: spaces + 1]
