"""Prompts of many documents: one causal context, a marker read after each document and one after the query.

Nothing after the last readout can change a score (attention is causal), so prompts end there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lastrerank.config import ModelConfig
from lastrerank.prompt import EncodedBlock, EncodedRequest, PieceEncoder, rough_tokens, share, substitute
from lastrerank.request import BLOCK_SIZE, RerankRequest
from lastrerank.texts import CutText, Steps, run

EMBED_TOKEN = "<|embed_token|>"
RERANK_TOKEN = "<|rerank_token|>"

# Caps in tokens (query, document) of the two published generations; neither configuration states them.
V3_CAPS = (512, 2048)
V35_CAPS = (1024, 8192)


@dataclass(frozen=True)
class ListPrompt:
    """A prompt as data. `{count}`, `{query}`, `{instruction}`, `{index}` and `{document}` are filled in.

    The prompt is `opening`, `instruction` if one is given, one `passage` per document joined by `separator`, then
    `closing`, which ends with the marker that is read for the query. `passage` holds the marker read for its
    document, directly after `{document}`.

    control_tokens_in_text: False encodes what users wrote as plain text. True does what the published code does:
        removes the two marker strings in one pass and lets every other control token in user text through.
    """

    opening: str
    instruction: str
    passage: str
    separator: str
    closing: str
    control_tokens_in_text: bool = False

    def __post_init__(self) -> None:
        if "{document}" + EMBED_TOKEN not in self.passage or self.passage.count(EMBED_TOKEN) != 1:
            raise ValueError(f"passage is {self.passage!r}, expected '{{document}}{EMBED_TOKEN}' in it once")
        if not self.closing.endswith(RERANK_TOKEN):
            raise ValueError(f"closing is {self.closing!r}, expected {RERANK_TOKEN} at its end")

    def texts(self) -> tuple[str, ...]:
        """All of its own texts."""
        return self.opening, self.instruction, self.passage, self.separator, self.closing

    def encoder(self, tokenizer: Tokenizer, config: ModelConfig) -> ListEncoder:
        """For one checkpoint."""
        return ListEncoder(tokenizer, self, config)


class ListEncoder:
    """See `lastrerank.prompt.RequestEncoder`.

    Args:
        tokenizer: the checkpoint's tokenizer with its control tokens.
        prompt: the prompt.
        config: of the checkpoint; without one there are no caps, and only `encode_block` is of use.
        cache_bytes: bound on the cache of encoded texts (ids and text together).

    Raises:
        ValueError: the tokenizer lacks a control token of the prompt, plain text can reach one of its ids, or a cap is
            too large for the context.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: ListPrompt, config: ModelConfig | None = None, cache_bytes: int = 64 << 20
    ) -> None:
        for name, marker in (("embed", EMBED_TOKEN), ("rerank", RERANK_TOKEN)):
            if tokenizer.token_to_id(marker) is None:
                raise ValueError(f"tokenizer.json has no {marker}: not the tokenizer of a last-token reranker ({name})")
        self.prompt = prompt
        self.pieces = PieceEncoder(tokenizer, prompt.texts(), prompt.control_tokens_in_text, cache_bytes)
        self.control_ids = self.pieces.control_ids
        if config is not None:
            self.max_query_length, self.max_doc_length = list_caps(config)
            self._context = config.max_context

    def check(self, request: RerankRequest, prefix: str = "") -> tuple[int, int]:
        query_cap = request.max_query_length or self.max_query_length
        doc_cap = request.max_doc_length or self.max_doc_length
        if 2 * query_cap + doc_cap > self._context:
            raise ValueError(
                f"{prefix}max_query_length {query_cap} and {prefix}max_doc_length {doc_cap}: the query, twice, and one "
                f"document don't fit the context of {self._context} tokens"
            )
        return query_cap, doc_cap

    def estimated_rows(self, request: RerankRequest) -> int:
        query_cap, doc_cap = self.check(request)
        query, instruction = rough_tokens(request.query, query_cap), rough_tokens(request.instruction or "", query_cap)
        fixed = 150 + 2 * query + instruction
        texts = sum(15 + rough_tokens(text, doc_cap) for text in request.texts)
        return request.orders * (fixed * -(-len(request.documents) // request.block_size) + texts)

    def encode_by_slices(self, request: RerankRequest) -> Steps[EncodedRequest]:
        query_cap, doc_cap = self.check(request)
        query = self.cut([request.query], query_cap)[0]
        most = self.max_query_length
        if request.instruction and self.cut([request.instruction], most)[0].cut:
            raise ValueError(f"instruction has more than {most} tokens, what this checkpoint's queries may have")
        documents = yield from self.cut_by_slices(request.texts, doc_cap)
        capacity, around = self._context - 2 * query.length, 0
        if request.block_size > BLOCK_SIZE:  # what stands around so many documents is more than a context has to spare
            empty = self.cut([""], doc_cap)[0]
            one, two = (len(self.encode_block(query, [empty] * n, request.instruction).ids) for n in (1, 2))
            capacity, around = self._context - one, two - one + len(str(request.block_size))  # digits of its number
        blocks: list[EncodedBlock] = []
        block_documents: list[np.ndarray] = []
        block_orders: list[int] = []
        for order, permutation in enumerate(_orders(len(documents), request.orders)):
            ordered = [documents[i] for i in permutation]
            for members in _blocks(ordered, capacity, doc_cap, request.block_size, around):
                indices = permutation[members]
                blocks.append(self.encode_block(query, [documents[i] for i in indices], request.instruction))
                block_documents.append(indices)
                block_orders.append(order)
                yield
        return EncodedRequest(
            request, tuple(share(blocks)), tuple(block_documents), tuple(block_orders),
            tuple(document.length for document in documents), tuple(document.cut for document in documents), query.cut,
        )  # fmt: skip

    # Texts

    def cut(self, texts: Sequence[str], cap: int) -> list[CutText]:
        """Tokenise texts and cut each to its first `cap` tokens; see `lastrerank.texts`."""
        return run(self.cut_by_slices(texts, cap))

    def cut_by_slices(self, texts: Sequence[str], cap: int) -> Steps[list[CutText]]:
        """The same as a generator that yields after each slice of the work."""
        if self.prompt.control_tokens_in_text:
            texts = [_without_markers(text) for text in texts]
        return (yield from self.pieces.texts.cut_by_slices(texts, cap))

    # Blocks

    def encode_block(
        self, query: CutText, documents: Sequence[CutText], instruction: str | None = None
    ) -> EncodedBlock:
        """One prompt over `documents` (at least one), ids identical to encoding it as one string. An empty instruction
        is none."""
        prompt, pieces = self.prompt, self.pieces
        values = {"{count}": str(len(documents)), "{query}": query.text}
        if instruction:
            plain = not prompt.control_tokens_in_text
            values["{instruction}"] = instruction if plain else _without_markers(instruction)
        chunks: list[np.ndarray] = []
        doc_rows = np.empty(len(documents), np.int64)
        pending = ""  # text since the last control token, placeholders filled
        query_rows: list[int] = []
        total = 0

        def emit(ids: np.ndarray) -> None:
            nonlocal total
            chunks.append(ids)
            total += len(ids)

        def fill(part: str) -> None:
            """Append a part of the prompt: text joins `pending`, a control token flushes it."""
            nonlocal pending
            for piece in pieces.split(part):
                if piece in pieces.control_ids:
                    if pending:
                        emit(pieces.piece(pending))
                        pending = ""
                    if piece == RERANK_TOKEN:
                        query_rows.append(total)
                    emit(np.array([pieces.control_ids[piece]], np.int32))
                else:
                    pending += substitute(piece, values)

        fill(prompt.opening)
        if instruction:
            fill(prompt.instruction)
        before, after = prompt.passage.split("{document}" + EMBED_TOKEN)
        for index, document in enumerate(documents):
            values["{index}"] = str(index)
            if index:
                fill(prompt.separator)
            fill(before)
            if document.text and pieces.is_boundary(pending, document.text):
                emit(pieces.piece(pending))
                emit(document.ids)
            else:  # the first characters merge with what stands before them (a line break does)
                emit(pieces.encode(pending + document.text))
            pending = ""
            doc_rows[index] = total
            emit(np.array([pieces.control_ids[EMBED_TOKEN]], np.int32))
            fill(after)
        fill(prompt.closing)
        early = query_rows[0] if len(query_rows) > 1 else None
        return EncodedBlock(np.concatenate(chunks), doc_rows, query_rows[-1], early)


def list_caps(config: ModelConfig) -> tuple[int, int]:
    """Caps in tokens of the query and of a document: the checkpoint's own, or those of the published generation.

    Raises:
        ValueError: one is too large for the context.
    """
    published = V35_CAPS if config.windowed else V3_CAPS
    query, document = config.max_query_length or published[0], config.max_doc_length or published[1]
    for name, cap in (("max_query_length", query), ("max_doc_length", document)):
        if cap > config.max_context // 4:
            raise ValueError(
                f"config.json: {name} {cap} is more than a quarter of the context ({config.max_context} tokens); "
                f'a checkpoint with a small context declares its own caps: "lastrerank": {{"{name}": ...}}'
            )
    return query, document


def _orders(count: int, orders: int) -> Iterator[np.ndarray]:
    """Permutations of the list: the caller's order, then seeded random ones."""
    yield np.arange(count)
    generator = np.random.default_rng(0)
    for _ in range(orders - 1):
        yield generator.permutation(count)


def _blocks(
    documents: Sequence[CutText], capacity: int, doc_cap: int, block_size: int, around: int
) -> Iterator[list[int]]:
    """The published block rule: close a block when it is full or has no room for a longest document; around: tokens
    that are counted beside each one's own, of which the published rule has none."""
    members: list[int] = []
    left = capacity
    for index, document in enumerate(documents):
        members.append(index)
        left -= document.length + around
        if len(members) >= block_size or left <= doc_cap + around:
            yield members
            members, left = [], capacity
    if members:
        yield members


def _without_markers(text: str) -> str:
    """As the published code cleans text: in one pass, which a marker within a marker survives."""
    return text.replace(EMBED_TOKEN, "").replace(RERANK_TOKEN, "")
