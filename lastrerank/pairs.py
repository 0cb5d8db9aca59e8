"""Prompts of one document each: a query and a document in a frame that is never cut, read at the last token.

A prompt is made of pieces that are encoded apart and laid end to end, as each publisher's code does it: where a piece
is a whole string, its words and punctuation merge across what was filled in; where it isn't, they don't. Texts are cut
at ids, never decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lastrerank.config import ModelConfig
from lastrerank.prompt import EncodedBlock, EncodedRequest, PieceEncoder, rough_tokens, share, substitute
from lastrerank.request import BLOCK_SIZE, RerankRequest
from lastrerank.texts import Steps, run


@dataclass(frozen=True)
class PairPrompt:
    """A prompt as data. `{query}`, `{document}` and `{instruction}` are filled in.

    pieces: encoded one by one. One of them holds `{document}`; what stands after it in that piece is never cut.
    instructed: the pieces when there is an instruction; None where the family defines none.
    default_instruction: where there always is one.
    strip: white space around both texts goes.
    max_length: tokens, unless the request gives a cap of its own for documents. Texts are cut on the right: the
        document, then what stands before it in its piece; where the request has a cap for documents, of that only the
        query's end.
    frame_counts: whether pieces before the first and after the last text count in `max_length`.
    query_share: of `max_length`, what a query's own piece may take.
    """

    pieces: tuple[str, ...]
    instructed: tuple[str, ...] | None = None
    default_instruction: str | None = None
    strip: bool = False
    max_length: int = 8192
    frame_counts: bool = True
    query_share: float = 1.0

    def __post_init__(self) -> None:
        for pieces in (self.pieces, self.instructed or self.pieces):
            for name in ("{query}", "{document}"):
                if sum(piece.count(name) for piece in pieces) != 1:
                    raise ValueError(f"pieces are {pieces!r}, expected {name} in one of them, once")

    def texts(self) -> tuple[str, ...]:
        """All of its own texts."""
        return self.pieces + (self.instructed or ())

    def encoder(self, tokenizer: Tokenizer, config: ModelConfig) -> PairEncoder:
        """For one checkpoint."""
        return PairEncoder(tokenizer, self, config)


@dataclass(frozen=True)
class _Text:
    """A text as it stands behind what precedes it: int32 ids, with the space between, how many of them are its own, and
    whether others were cut off."""

    ids: np.ndarray
    length: int
    cut: bool


@dataclass(frozen=True)
class _Filled:
    """A request's prompt, but for the document: int32 ids before and after the document's piece, and of that piece
    those before (`label`) and behind the document (`rest`), the same as text where it can be encoded as a whole with
    the document, the space between, and how many ids the piece may have."""

    before: np.ndarray
    label: np.ndarray
    rest: np.ndarray
    after: np.ndarray
    texts: tuple[str, str] | None
    gap: str
    room: int


class PairEncoder:
    """See `lastrerank.prompt.RequestEncoder`.

    Args:
        tokenizer: the checkpoint's tokenizer with its control tokens.
        prompt: the prompt.
        config: of the checkpoint.

    Raises:
        ValueError: the tokenizer lacks a control token of the prompt, plain text can reach one of its ids, or the
            context has no room for a query and a document, or for the caps that the configuration has.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: PairPrompt, config: ModelConfig) -> None:
        self.prompt = prompt
        self.pieces = PieceEncoder(tokenizer, prompt.texts())
        self.control_ids = self.pieces.control_ids
        for part in prompt.texts():
            if _holds_text(part) and len(self.pieces.split(part)) > 1:
                raise ValueError(f"the piece {part!r:.80} holds a text and a control token: they must be pieces apart")
        if not len(self.pieces.piece(" ")):
            raise ValueError("tokenizer.json: a space has no token, so labels and texts of a prompt would run together")
        self._context = min(config.max_context, config.max_positions)
        # Tokens of the prompt's own, labels of texts among them: outside of the span of texts, and all.
        variants = (prompt.pieces, prompt.instructed or prompt.pieces)
        self._outside = max(self._fixed(_frame_of(pieces)) for pieces in variants)
        self._frame = max(self._fixed(pieces) for pieces in variants)
        # What is left to query and document together, under the published length.
        self._room = self._counted() - (self._frame - self._outside)
        if self._room < 2:
            raise ValueError(
                f"config.json: a context of {self._context} tokens has no room for a query and a document: this "
                f"family's prompt has {self._frame} tokens of its own"
            )
        self._own_caps = config.max_query_length, config.max_doc_length
        self._published_query = max(1, int(self._room * prompt.query_share))
        self.max_query_length = config.max_query_length or self._published_query
        self.max_doc_length = config.max_doc_length or self._room
        whole = "".join(prompt.pieces)
        self._query_first = whole.index("{query}") < whole.index("{document}")
        last = next(number for number, part in enumerate(prompt.pieces) if "{document}" in part)
        self._after = self._fixed(prompt.pieces[last + 1 :])
        self.check(RerankRequest("a query", []), "config.json: lastrerank.")

    def check(self, request: RerankRequest, prefix: str = "") -> tuple[int, int]:
        for name, given, unset, why in (
            ("return_embeddings", bool(request.return_embeddings), False, "a score is one number of one row"),
            ("block_size", request.block_size, BLOCK_SIZE, "every document has a prompt of its own"),
            ("orders", request.orders, 1, "no document sees another, so order changes nothing"),
        ):
            if given != unset:
                raise ValueError(f"{prefix}{name} is {given!r}, which this family of models hasn't: {why}")
        if request.instruction and self.prompt.instructed is None:
            raise ValueError(f"{prefix}instruction is {request.instruction!r:.80}: this family's prompt has no place "
                             "for one")  # fmt: skip
        own_query, own_doc = self._caps_of(request)
        if own_doc is None and own_query is not None and own_query > self._published_query:
            raise ValueError(
                f"{prefix}max_query_length is {own_query}: a query may have {self._published_query} tokens, unless "
                "max_doc_length says what is left to a document"
            )
        widest = self._context - self._frame
        if own_doc is not None and own_doc + (own_query or 1) > widest:
            raise ValueError(
                f"{prefix}max_doc_length is {own_doc}: with a query of {own_query or 1} tokens and {self._frame} of "
                f"the prompt's own that doesn't fit the context of {self._context} tokens"
            )
        return own_query or self._published_query, own_doc or self._room

    def estimated_rows(self, request: RerankRequest) -> int:
        query_cap, doc_cap = self.check(request)
        query = rough_tokens(request.query, query_cap) + rough_tokens(request.instruction or "", query_cap)
        # What stands behind the document is every document's own.
        shared, each = (query, self._after) if self._query_first else (0, self._frame + query)
        return self._frame + shared + sum(each + rough_tokens(text, doc_cap) for text in request.texts)

    def encode_by_slices(self, request: RerankRequest) -> Steps[EncodedRequest]:
        self.check(request)
        query, texts = request.query, request.texts
        if self.prompt.strip:
            query, texts = query.strip(), [text.strip() for text in texts]
        if request.instruction and self.pieces.texts.cut([request.instruction], self.max_query_length)[0].cut:
            raise ValueError(f"instruction has more than {self.max_query_length} tokens, what a query may have")
        own_query, own_doc = self._caps_of(request)
        filled, query_cut = self._filled(query, request.instruction, own_query, own_doc is not None)
        blocks: list[EncodedBlock] = []
        lengths: list[int] = []
        cuts: list[bool] = []
        for start in range(0, len(texts), 64):
            group = texts[start : start + 64]
            # By one cap for all queries, so that a document seen before is remembered.
            most = self._counted() if own_doc is None else own_doc
            for text, own in zip(group, (yield from self._behind(filled.gap, group, most)), strict=True):
                ids, length = self._document_piece(filled, text, own)
                ids = np.concatenate([filled.before, ids, filled.after])
                blocks.append(EncodedBlock(ids, np.array([len(ids) - 1]), None))
                lengths.append(length)
                cuts.append(own.cut or length < own.length)
            yield
        return EncodedRequest(
            request, tuple(share(blocks)), tuple(np.array([i]) for i in range(len(blocks))), (0,) * len(blocks),
            tuple(lengths), tuple(cuts), query_cut,
        )  # fmt: skip

    def _behind(self, gap: str, texts: Sequence[str], cap: int) -> Steps[list[_Text]]:
        """Texts behind `gap`, cut to `cap` tokens of their own."""
        found = yield from self.pieces.texts.cut_by_slices([gap + text for text in texts], cap + len(gap), True)
        behind = []
        for text, entry in zip(texts, found, strict=True):
            # The space is a token of its own before a digit, say, and merges with a word.
            alone = int(gap != "" and len(entry.ids) > 0 and entry.ids[0] == self.pieces.piece(gap)[0])
            ids = entry.ids[: cap + alone]
            cut = entry.cut or len(ids) < len(entry.ids)
            behind.append(_Text(ids, len(ids) - alone, cut and text != ""))
        return behind

    def _document_piece(self, filled: _Filled, text: str, own: _Text) -> tuple[np.ndarray, int]:
        """Ids of the piece that holds the document, and how many of them are the document's."""
        pieces, room = self.pieces, filled.room
        alone, apart = len(own.ids) - own.length, len(filled.label) + len(filled.rest)
        if filled.texts is not None:
            label, rest = filled.texts
            if len(filled.rest):  # encoded as a whole, if nothing of it is cut
                whole = None if own.cut else pieces.encode(label + filled.gap + text + rest)
                if whole is not None and len(whole) <= room:
                    return whole, own.length
            elif text and not pieces.is_boundary(label, filled.gap + text):  # its first characters merge with the label
                most = min(room, apart + len(own.ids)) if own.cut else room
                whole = run(pieces.texts.cut_by_slices([label + filled.gap + text], most, True))[0].ids
                return whole, min(own.length, max(0, len(whole) - apart - alone))
        kept = own.ids[: max(0, room - apart)]
        return np.concatenate([filled.label, kept, filled.rest])[:room], max(0, len(kept) - alone)

    def _filled(
        self, query: str, instruction: str | None, own_query: int | None, own_doc: bool
    ) -> tuple[_Filled, bool]:
        """The request's prompt but for its documents, and whether the query was cut."""
        prompt, pieces = self.prompt, self.pieces
        instruction = instruction or prompt.default_instruction
        parts = prompt.pieces if instruction is None else prompt.instructed or prompt.pieces
        values = {"{query}": query, "{instruction}": instruction or ""}
        spans = [n for n, part in enumerate(parts) if _holds_text(part)]
        between = sum(
            len(pieces.fixed(part)) for n, part in enumerate(parts) if spans[0] < n < spans[-1] and n not in spans
        )
        # A cap of the caller's own for documents widens the prompt up to the context, for them; the query's cap stays.
        published, counted = self._counted() - between, self._counted()
        limit = self._context - self._outside - between if own_doc else published
        query_most = limit if own_doc and own_query is not None else min(published, int(counted * prompt.query_share))
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        cut, used, target = False, 0, before
        label = rest = np.zeros(0, np.int32)
        texts: tuple[str, str] | None = ("", "")
        gap = ""
        for number, part in enumerate(parts):
            if "{document}" in part:
                target = after
                left, right = part.split("{document}")
                gap = " " if left.endswith(" ") else ""
                left = left.removesuffix(" ")
                # As published the cut of a prompt takes a query's end and what stands behind it. Where documents have a
                # cap of their own, the query alone is cut.
                query_cap = self._published_query if own_doc and own_query is None else own_query
                label, cut_left = self._piece(left, values, query_cap, limit - used + int(own_doc))
                rest, cut_right = self._piece(right, values, query_cap, limit - used + 1)
                cut |= cut_left or cut_right
                texts = None if cut_left or cut_right else (substitute(left, values), substitute(right, values))
            elif number in spans:
                ids, cut_here = self._piece(part, values, own_query, query_most)
                cut, used = cut or cut_here, used + len(ids)
                target.append(ids)
            else:
                target.append(pieces.fixed(part))
        room = limit - used
        if (len(rest) or own_doc) and len(label) + len(rest) > room:
            raise ValueError(
                f"query and instruction have more tokens than the prompt has room for: with its own they are "
                f"{len(label) + len(rest)}, expected at most {room}"
            )
        return _Filled(_joined(before), label, rest, _joined(after), texts, gap, room), cut

    def _piece(self, part: str, values: dict[str, str], own_query: int | None, most: int) -> tuple[np.ndarray, bool]:
        """Ids of a part with texts, at most `most`, and whether any were cut off, by that or by the query's cap."""
        if own_query is not None and "{query}" in part:
            left, right = part.split("{query}")
            gap = " " if left.endswith(" ") else ""
            query = run(self._behind(gap, [values["{query}"]], own_query))[0]
            if query.cut:
                left, right = substitute(left.removesuffix(" "), values), substitute(right, values)
                ids = np.concatenate([self.pieces.encode(left), query.ids, self.pieces.encode(right)])
                return ids[:most], True
        found = run(self.pieces.texts.cut_by_slices([substitute(part, values)], max(1, most), True))[0]
        return found.ids[: max(0, most)], found.cut or len(found.ids) > most

    def _caps_of(self, request: RerankRequest) -> tuple[int | None, int | None]:
        """Caps of query and document that the request or the configuration gives."""
        return request.max_query_length or self._own_caps[0], request.max_doc_length or self._own_caps[1]

    def _counted(self) -> int:
        """Tokens that pieces with texts and what stands between them may have together, as published."""
        if self.prompt.frame_counts:
            return min(self.prompt.max_length, self._context) - self._outside
        return min(self.prompt.max_length, self._context - self._outside)

    def _fixed(self, parts: Sequence[str]) -> int:
        """Tokens of the prompt's own in some of its pieces, labels of texts included."""
        blank = {"{query}": "", "{document}": "", "{instruction}": self.prompt.default_instruction or ""}
        return sum(len(self.pieces.fixed(substitute(part, blank))) for part in parts)


def _frame_of(parts: Sequence[str]) -> list[str]:
    """Pieces before the first text and after the last."""
    spans = [n for n, part in enumerate(parts) if _holds_text(part)]
    return [part for n, part in enumerate(parts) if not spans[0] <= n <= spans[-1]]


def _holds_text(part: str) -> bool:
    return any(name in part for name in ("{query}", "{document}", "{instruction}"))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
