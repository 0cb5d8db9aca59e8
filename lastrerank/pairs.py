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
from lastrerank.texts import CutText, Steps, run


@dataclass(frozen=True)
class PairPrompt:
    """A prompt as data. `{query}`, `{document}` and `{instruction}` are filled in.

    pieces: encoded one by one. One of them holds `{document}`; what stands after it in that piece is never cut.
    instructed: the pieces when there is an instruction; None where the family defines none.
    default_instruction: where there always is one.
    strip: white space around both texts goes.
    max_length: tokens, unless the request gives a cap of its own for documents. Texts are cut on the right: the
        document, then what stands before it in its piece.
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
class _Filled:
    """A request's prompt, but for the document: int32 ids before and after the document's piece, the text and ids that
    stand before the document in its piece, the text after it, and ids that its piece may have."""

    before: np.ndarray
    label: str
    label_ids: np.ndarray
    rest: str
    after: np.ndarray
    room: int


class PairEncoder:
    """See `lastrerank.prompt.RequestEncoder`.

    Args:
        tokenizer: the checkpoint's tokenizer with its control tokens.
        prompt: the prompt.
        config: of the checkpoint.

    Raises:
        ValueError: the tokenizer lacks a control token of the prompt, plain text can reach one of its ids, or the
            context has no room for a query and a document.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: PairPrompt, config: ModelConfig) -> None:
        self.prompt = prompt
        self.pieces = PieceEncoder(tokenizer, prompt.texts())
        self.control_ids = self.pieces.control_ids
        self._context = min(config.max_context, config.max_positions)
        variants = [prompt.pieces, prompt.instructed or prompt.pieces]
        self._outside = max(self._fixed(pieces, inside=False) for pieces in variants)
        # Tokens of the prompt's own beside query, document and instruction; labels within pieces of texts among them.
        self._frame = self._outside + max(self._fixed(pieces, inside=True) for pieces in variants)
        self._room = room = self._counted(self._context) - (self._frame - self._outside)
        if room < 2:
            raise ValueError(
                f"config.json: a context of {self._context} tokens has no room for a query and a document: this "
                f"family's prompt has {self._frame} tokens of its own"
            )
        self.max_query_length = config.max_query_length or max(1, int(room * prompt.query_share))
        self.max_doc_length = config.max_doc_length or room
        self._own_caps = config.max_query_length, config.max_doc_length

    def check(self, request: RerankRequest, prefix: str = "") -> tuple[int, int]:
        for name, given, unset, why in (
            ("return_embeddings", request.return_embeddings, False, "a score is one number of one row: no vectors"),
            ("block_size", request.block_size, BLOCK_SIZE, "every document has a prompt of its own"),
            ("orders", request.orders, 1, "no document sees another, so order changes nothing"),
        ):
            if given != unset:
                raise ValueError(f"{prefix}{name} is {given!r}, which this family of models hasn't: {why}")
        if request.instruction and self.prompt.instructed is None:
            raise ValueError(f"{prefix}instruction is {request.instruction!r:.80}: this family's prompt has no place "
                             "for one")  # fmt: skip
        query_cap = request.max_query_length or self.max_query_length
        doc_cap = request.max_doc_length or self.max_doc_length
        room = self._context - self._frame
        given_query = request.max_query_length or self._own_caps[0]
        given_doc = request.max_doc_length or self._own_caps[1]
        if given_doc is None and given_query is not None and given_query > self._room:
            raise ValueError(
                f"{prefix}max_query_length is {given_query}: a query may have {self._room} tokens, unless "
                "max_doc_length says what is left to a document"
            )
        if given_doc is not None and given_doc + (given_query or 1) > room:
            raise ValueError(
                f"{prefix}max_doc_length is {given_doc}: with a query of {given_query or 1} tokens and {self._frame} "
                f"of the prompt's own that doesn't fit the context of {self._context} tokens"
            )
        return min(query_cap, room - 1), min(doc_cap, room - 1)

    def estimated_rows(self, request: RerankRequest) -> int:
        query_cap, doc_cap = self.check(request)
        shared = self._frame + rough_tokens(request.query, query_cap) + rough_tokens(request.instruction or "", doc_cap)
        return shared + sum(self._frame // 2 + rough_tokens(text, doc_cap) for text in request.texts)

    def encode_by_slices(self, request: RerankRequest) -> Steps[EncodedRequest]:
        query_cap, doc_cap = self.check(request)
        query, texts = request.query, request.texts
        if self.prompt.strip:
            query, texts = query.strip(), [text.strip() for text in texts]
        query_cut = False
        if request.max_query_length or self._own_caps[0]:
            kept = self.pieces.texts.cut([query], query_cap)[0]
            query, query_cut = kept.text, kept.cut
        # A cap of the caller's own goes before the published one, up to the context.
        own_cap = request.max_doc_length or self._own_caps[1]
        most = self._counted(self._context) if own_cap is None else doc_cap
        filled, cut_here = self._filled(query, request.instruction, None if own_cap is None else doc_cap)
        query_cut |= cut_here
        blocks: list[EncodedBlock] = []
        lengths: list[int] = []
        cuts: list[bool] = []
        gap = " " if filled.label.endswith(" ") else ""
        label = filled.label[: len(filled.label) - len(gap)]
        for start in range(0, len(texts), 64):
            group = texts[start : start + 64]
            # By one cap for all queries, so that a document seen before is remembered.
            documents = yield from self.pieces.texts.cut_by_slices([gap + text for text in group], most, True)
            for text, document in zip(group, documents, strict=True):
                ids, length, cut = self._document_piece(filled, label, gap + text, document)
                ids = np.concatenate([filled.before, ids, filled.after])
                blocks.append(EncodedBlock(ids, np.array([len(ids) - 1]), None))
                lengths.append(length)
                cuts.append(cut)
            yield
        return EncodedRequest(
            request, tuple(share(blocks)), tuple(np.array([i]) for i in range(len(blocks))), (0,) * len(blocks),
            tuple(lengths), tuple(cuts), query_cut,
        )  # fmt: skip

    def _document_piece(
        self, filled: _Filled, label: str, text: str, document: CutText
    ) -> tuple[np.ndarray, int, bool]:
        """Ids of the piece that holds the document, how many of them are the document's, and whether it was cut."""
        pieces, room = self.pieces, filled.room
        bounded = not text or pieces.is_boundary(label, text)
        if filled.rest and not document.cut:
            whole = pieces.encode(label + document.text + filled.rest)
            if len(whole) <= room:
                return whole, document.length, False
        if filled.rest:
            rest = pieces.piece(filled.rest)
            kept = document.ids[: max(0, room - len(filled.label_ids) - len(rest))]
            return np.concatenate([filled.label_ids, kept, rest]), len(kept), True
        if bounded:
            whole = np.concatenate([filled.label_ids, document.ids])
        elif document.cut:
            most = len(filled.label_ids) + document.length
            whole = run(pieces.texts.cut_by_slices([label + text], most, True))[0].ids
        else:  # the document's first characters merge with what stands before them
            whole = pieces.encode(label + document.text)
        kept_ids = whole[:room]
        cut = document.cut or (len(kept_ids) < len(whole) and document.length > 0)
        return kept_ids, max(0, len(kept_ids) - len(filled.label_ids)), cut

    def _filled(self, query: str, instruction: str | None, own_doc_cap: int | None) -> tuple[_Filled, bool]:
        """The request's prompt but for its documents, and whether the query was cut."""
        prompt, pieces = self.prompt, self.pieces
        instruction = instruction or prompt.default_instruction
        parts = prompt.pieces if instruction is None else prompt.instructed or prompt.pieces
        values = {"{query}": query, "{instruction}": instruction or ""}
        # What `max_length` leaves to pieces with texts; `inside` is what stands between them.
        texts = [n for n, part in enumerate(parts) if _holds_text(part)]
        outside = sum(len(pieces.fixed(p)) for n, p in enumerate(parts) if n < texts[0] or n > texts[-1])
        inside = sum(len(pieces.fixed(p)) for n, p in enumerate(parts) if texts[0] < n < texts[-1] and n not in texts)
        counted = self._counted(self._context) if own_doc_cap is None else self._context - outside
        room, query_cut = counted - inside, False
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        label = rest = ""
        seen = False
        for number, part in enumerate(parts):
            if "{document}" in part:
                seen = True
                label, rest = (substitute(text, values) for text in part.split("{document}"))
                continue
            if number in texts:
                most = min(room, int((counted if own_doc_cap is None else room) * prompt.query_share))
                found = run(pieces.texts.cut_by_slices([substitute(part, values)], most, True))[0]
                query_cut |= found.cut
                room -= len(found.ids)
                ids = found.ids
            else:
                ids = pieces.fixed(part)
            (after if seen else before).append(ids)
        gap = 1 if label.endswith(" ") else 0
        own = run(pieces.texts.cut_by_slices([label[: len(label) - gap]], room, True))[0]
        query_cut |= own.cut
        if rest and len(own.ids) + len(pieces.encode(rest)) > room:
            raise ValueError(f"query has more tokens than the {room} that this family's prompt may have")
        return _Filled(_joined(before), label, own.ids, rest, _joined(after), room), query_cut

    def _counted(self, context: int) -> int:
        """Tokens that pieces with texts and what stands between them may have together."""
        most = self.prompt.max_length
        if self.prompt.frame_counts:
            return min(most, context) - self._outside
        return min(most, context - self._outside)

    def _fixed(self, parts: Sequence[str], inside: bool) -> int:
        """Tokens of the prompt's own: outside of the span of texts, or inside it, labels of texts included."""
        texts = [n for n, part in enumerate(parts) if _holds_text(part)]
        blank = {"{query}": "", "{document}": "", "{instruction}": self.prompt.default_instruction or ""}
        return sum(
            len(self.pieces.fixed(substitute(part, blank)))
            for n, part in enumerate(parts) if (texts[0] <= n <= texts[-1]) == inside
        )  # fmt: skip


def _holds_text(part: str) -> bool:
    return any(name in part for name in ("{query}", "{document}", "{instruction}"))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
