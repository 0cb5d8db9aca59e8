"""One rerank call as data, checked before any work is done."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np

# The published block size: documents in one prompt, at most.
BLOCK_SIZE = 125

Document = str | Mapping[str, Any]


class _Result(TypedDict):
    document: Any
    relevance_score: float
    index: int
    embedding: np.ndarray | None


class RerankResult(_Result, total=False):
    """A row of what `rerank` returns.

    document: the caller's own object. relevance_score: as the family publishes it, of a listwise one a cosine in
    [-1, 1]. index: the document's position in the list that was given. embedding: fp32 `[P]`, not normalised, or None.
    raw_score: of a family that judges one document at a time, the logit that is ranked by.
    """

    raw_score: float


@dataclass(frozen=True)
class RerankRequest:
    """A query and its documents.

    documents: strings, or mappings with a `text`, in a sequence, an array or a column of one. An empty instruction is
    none. top_n: results wanted, None for all. Lengths are in tokens, None for the checkpoint's caps; a longer text is
    cut. block_size: documents in one prompt; of more than 125 as many as fit the context with all that stands around
    them. orders: the mean over this many seeded orders of the list is scored, at `orders` times the cost; 1 scores the
    list as given. score_threshold: results whose relevance_score is lower are left out.
    """

    query: str
    documents: Sequence[Document]
    top_n: int | None = None
    return_embeddings: bool = False
    max_doc_length: int | None = None
    max_query_length: int | None = None
    instruction: str | None = None
    block_size: int = BLOCK_SIZE
    orders: int = 1
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("query", "instruction"):  # a kind of str may mean something else by + and by ==
            value = getattr(self, name)
            if isinstance(value, str) and type(value) is not str:
                object.__setattr__(self, name, str.__str__(value))
        if self.instruction == "":
            object.__setattr__(self, "instruction", None)
        for name in ("top_n", "max_doc_length", "max_query_length", "block_size", "orders"):  # numpy's and the like
            value = getattr(self, name)
            if isinstance(value, numbers.Integral) and type(value) is not bool:
                object.__setattr__(self, name, int(value))
        if isinstance(self.score_threshold, numbers.Real) and type(self.score_threshold) is not bool:
            with contextlib.suppress(OverflowError):  # refused below
                object.__setattr__(self, "score_threshold", float(self.score_threshold))
        if isinstance(self.return_embeddings, np.bool_):
            object.__setattr__(self, "return_embeddings", bool(self.return_embeddings))
        # Arrays and columns: iterated by index, which in a column is a label.
        tolist = getattr(self.documents, "tolist", None)
        if not isinstance(self.documents, Sequence) and callable(tolist) and isinstance(listed := tolist(), list):
            object.__setattr__(self, "documents", listed)

    @classmethod
    def of(cls, value: RerankRequest | Mapping[str, Any], name: str = "request") -> RerankRequest:
        """A request from itself or from a mapping of its fields, checked.

        Raises:
            TypeError, ValueError: the message names the field, its position and its value.
        """
        if isinstance(value, Mapping):
            unknown = set(map(str, value)) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"{name} has fields {sorted(unknown)}, which are no options of rerank()")
            if "query" not in value or "documents" not in value:
                found = sorted(map(str, value))
                raise ValueError(f"{name} has fields {found}, expected 'query', 'documents' and options of rerank()")
            value = cls(**value)
        if not isinstance(value, RerankRequest):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a RerankRequest or a mapping")
        value._check("" if name == "request" else name + ".")
        return value

    @property
    def texts(self) -> list[str]:
        """The documents' texts, in order."""
        texts = (document if isinstance(document, str) else document["text"] for document in self.documents)
        return [text if type(text) is str else str.__str__(text) for text in texts]

    def _check(self, prefix: str) -> None:
        _check_text(self.query, prefix + "query")
        if not self.query:
            raise ValueError(f"{prefix}query is empty")
        if isinstance(self.documents, (str, bytes, Mapping)) or not isinstance(self.documents, Sequence):
            raise TypeError(
                f"{prefix}documents is a {type(self.documents).__name__}, expected a list of strings or of mappings"
            )
        for position, document in enumerate(self.documents):
            name = f"{prefix}documents[{position}]"
            if isinstance(document, Mapping):
                if "text" not in document:
                    raise ValueError(f"{name} has keys {sorted(map(str, document))}, expected 'text' among them")
                _check_text(document["text"], name + "['text']")
            else:
                _check_text(document, name)
        if self.instruction is not None:
            _check_text(self.instruction, prefix + "instruction")
        _check_integer(self.top_n, prefix + "top_n", 0, optional=True)
        _check_integer(self.max_doc_length, prefix + "max_doc_length", 1, optional=True)
        _check_integer(self.max_query_length, prefix + "max_query_length", 1, optional=True)
        _check_integer(self.block_size, prefix + "block_size", 1)
        _check_integer(self.orders, prefix + "orders", 1)
        threshold = self.score_threshold
        if threshold is not None:
            if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
                raise TypeError(f"{prefix}score_threshold is {threshold!r:.80}, expected a number")
            if not (isinstance(threshold, float) and math.isfinite(threshold)):
                raise ValueError(f"{prefix}score_threshold is {_shown(threshold)}, expected a finite number")
        if not isinstance(self.return_embeddings, bool):
            raise TypeError(f"{prefix}return_embeddings is {self.return_embeddings!r:.80}, expected True or False")


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__} ({value!r:.80}), expected a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} has a lone surrogate {value[error.start]!r} at character {error.start}: not valid Unicode text"
            ) from error


def _check_integer(value: object, name: str, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r:.80}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {_shown(value)}, expected at least {least}")
    if value >= 1 << 63:
        raise ValueError(f"{name} is {_shown(value)}, expected less than 2**63")


def _shown(number: float) -> str:
    """Python writes no integer of thousands of digits."""
    return f"of {number.bit_length()} bits" if isinstance(number, int) and abs(number) >= 1 << 256 else str(number)
