"""Text to token ids and readout rows: the prompt of a last-token listwise reranker.

The prompt is part of the checkpoint's interface, byte for byte. It is tokenised in segments: control tokens split a
text before anything else happens to it, so encoding what stands between them piece by piece gives the ids of the
whole prompt encoded at once, and the rows to read are known from construction. Ids are never searched for markers,
and what a user wrote is encoded by a tokenizer that knows no control token: text can't add, move or remove a readout.

Nothing after the last readout can change a score (attention is causal), so templates end there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from lastrerank.texts import CutText, Steps, TextEncoder, run

EMBED_TOKEN = "<|embed_token|>"
RERANK_TOKEN = "<|rerank_token|>"

_SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking."
)
_ASK = (
    "I will provide you with {count} passages, each indicated by a numerical identifier. "
    "Rank the passages based on their relevance to query: {query}"
)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt as data. `{count}`, `{query}`, `{instruction}`, `{index}` and `{document}` are filled in.

    The prompt is `opening`, `instruction` if one is given, one `passage` per document joined by `separator`, then
    `closing`, which ends with the marker that is read for the query. `passage` holds the marker read for its
    document, directly after `{document}`.

    control_tokens_in_text: False encodes what users wrote as plain text. True does what the published code does:
        removes the two marker strings in one pass and lets every other control token in user text through.
    """

    name: str
    opening: str
    instruction: str
    passage: str
    separator: str
    closing: str
    control_tokens_in_text: bool = False

    def __post_init__(self) -> None:
        if "{document}" + EMBED_TOKEN not in self.passage or self.passage.count(EMBED_TOKEN) != 1:
            raise ValueError(f"template {self.name!r}: passage must hold '{{document}}{EMBED_TOKEN}' once")
        if not self.closing.endswith(RERANK_TOKEN):
            raise ValueError(f"template {self.name!r}: closing must end with {RERANK_TOKEN}")


TRANSFORMERS = PromptTemplate(
    name="transformers",
    opening=f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{_ASK}\n",
    instruction="<instruct>\n{instruction}\n</instruct>\n",
    passage='<passage id="{index}">\n{document}' + EMBED_TOKEN + "\n</passage>",
    separator="\n",
    closing="\n<query>\n{query}" + RERANK_TOKEN,
)
# The GGUF and MLX packages of v3.5 put a second marker after the first query; the late one is read here too.
GGUF = PromptTemplate(
    name="gguf",
    opening=f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{_ASK}{RERANK_TOKEN}\n",
    instruction=TRANSFORMERS.instruction,
    passage=TRANSFORMERS.passage,
    separator=TRANSFORMERS.separator,
    closing=TRANSFORMERS.closing,
)
TEMPLATES = {template.name: template for template in (TRANSFORMERS, GGUF)}


@dataclass(frozen=True)
class EncodedBlock:
    """One prompt. ids: int32 `[T]`. doc_rows: int64 `[N]`, the marker after each document. query_row: the last row.
    early_query_row: the marker after the first query, in templates that have one (training reads it)."""

    ids: np.ndarray
    doc_rows: np.ndarray
    query_row: int
    early_query_row: int | None = None


class PromptEncoder:
    """Encodes prompts for one tokenizer and template. Safe to use from several threads.

    Args:
        tokenizer: the checkpoint's tokenizer with its control tokens.
        template: the prompt.
        cache_bytes: bound on the cache of encoded texts (ids and text together).

    Raises:
        ValueError: the tokenizer lacks a control token of the template, or plain text can reach one of its ids.
    """

    def __init__(self, tokenizer: Tokenizer, template: PromptTemplate, cache_bytes: int = 64 << 20) -> None:
        self.template = template
        raw = json.loads(tokenizer.to_str())
        self.control_ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
        raw["added_tokens"], raw["post_processor"] = [], None
        raw["truncation"] = raw["padding"] = None
        plain = Tokenizer.from_str(json.dumps(raw))
        for name, marker in (("embed", EMBED_TOKEN), ("rerank", RERANK_TOKEN)):
            if marker not in self.control_ids:
                raise ValueError(f"tokenizer.json has no {marker}: not the tokenizer of a last-token reranker ({name})")
        reachable = set(self.control_ids.values())
        for content in self.control_ids:
            if reachable & set(plain.encode(content, add_special_tokens=False).ids):
                raise ValueError(f"tokenizer.json: the text {content!r} encodes to a control token even as plain text")

        self._plain = plain
        # What user text is encoded with; segments of the template hold no control token, so either serves them.
        self._texts = TextEncoder(plain, cache_bytes=cache_bytes)
        if template.control_tokens_in_text:
            raw = json.loads(tokenizer.to_str())
            raw["truncation"] = raw["padding"] = None
            self._texts = TextEncoder(Tokenizer.from_str(json.dumps(raw)), self.control_ids, cache_bytes)
        self._split_controls = re.compile(
            "(" + "|".join(re.escape(c) for c in sorted(self.control_ids, key=len, reverse=True)) + ")"
        )
        self._pieces = lru_cache(maxsize=4096)(self._encode_piece)
        self._boundary = lru_cache(maxsize=65536)(self._is_boundary)
        for part in (template.opening, template.instruction, template.passage, template.separator, template.closing):
            for token in re.findall(r"<\|[^|<>]+\|>", part):
                if token not in self.control_ids:
                    raise ValueError(f"template {template.name!r} uses {token}, which tokenizer.json does not have")

    # Texts

    def cut(self, texts: Sequence[str], cap: int) -> list[CutText]:
        """Tokenise texts and cut each to its first `cap` tokens; see `lastrerank.texts`."""
        return run(self.cut_by_slices(texts, cap))

    def cut_by_slices(self, texts: Sequence[str], cap: int) -> Steps[list[CutText]]:
        """The same as a generator that yields after each slice of the work."""
        if self.template.control_tokens_in_text:
            texts = [_without_markers(text) for text in texts]
        return (yield from self._texts.cut_by_slices(texts, cap))

    # Blocks

    def encode_block(
        self, query: CutText, documents: Sequence[CutText], instruction: str | None = None
    ) -> EncodedBlock:
        """One prompt over `documents` (at least one), ids identical to encoding it as one string. An empty instruction
        is none."""
        template = self.template
        values = {"{count}": str(len(documents)), "{query}": query.text}
        if instruction:
            plain = not template.control_tokens_in_text
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
            """Append a part of the template: text joins `pending`, a control token flushes it."""
            nonlocal pending
            for piece in self._split_controls.split(part):
                if piece in self.control_ids:
                    if pending:
                        emit(self._piece(pending))
                        pending = ""
                    if piece == RERANK_TOKEN:
                        query_rows.append(total)
                    emit(np.array([self.control_ids[piece]], np.int32))
                else:
                    pending += _substitute(piece, values)

        fill(template.opening)
        if instruction:
            fill(template.instruction)
        before, after = template.passage.split("{document}" + EMBED_TOKEN)
        for index, document in enumerate(documents):
            values["{index}"] = str(index)
            if index:
                fill(template.separator)
            fill(before)
            if document.text and self._boundary(pending[-3:], _head(document.text)):
                emit(self._piece(pending))
                emit(document.ids)
            else:  # the first characters merge with what stands before them (a line break does)
                emit(self._encode_piece(pending + document.text))
            pending = ""
            doc_rows[index] = total
            emit(np.array([self.control_ids[EMBED_TOKEN]], np.int32))
            fill(after)
        fill(template.closing)
        early = query_rows[0] if len(query_rows) > 1 else None
        return EncodedBlock(np.concatenate(chunks), doc_rows, query_rows[-1], early)

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.asarray(self._texts.encode([text])[text], np.int32)

    def _piece(self, text: str) -> np.ndarray:
        """Ids of what stands between texts; remembered, unless a caller's long text is in it."""
        return self._pieces(text) if len(text) <= 1024 else self._encode_piece(text)

    def _is_boundary(self, tail: str, head: str) -> bool:
        """Whether the tokenizer always splits between a segment ending in `tail` and a text starting with `head`."""
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


def _without_markers(text: str) -> str:
    """As the published code cleans text: in one pass, which a marker within a marker survives."""
    return text.replace(EMBED_TOKEN, "").replace(RERANK_TOKEN, "")


def _head(text: str) -> str:
    """The characters that decide whether a document merges with its prefix: leading white space and one more."""
    spaces = len(text[:16]) - len(text[:16].lstrip())
    return text[: spaces + 1]


def _substitute(piece: str, values: dict[str, str]) -> str:
    """Fill placeholders in one pass, so that a value that looks like a placeholder stays text."""
    return re.sub(r"\{[a-z]+\}", lambda match: values.get(match[0], match[0]), piece)
