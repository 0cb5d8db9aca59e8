"""What a family of rerankers is, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lastrerank.lists import ListPrompt
from lastrerank.pairs import PairPrompt


@dataclass(frozen=True)
class Cosine:
    """Documents and query are projected; a score is their cosine (see `Operations.score`)."""

    kind = "cosine"


@dataclass(frozen=True)
class Logit:
    """A score is one logit of the read row, of the word `true`, less that of `false` where there is one.

    scale, activation: what becomes of it, in fp32, in the number that is published: None or "sigmoid".
    """

    true: str
    false: str | None
    scale: float = 1.0
    activation: str | None = None

    @property
    def kind(self) -> str:
        """What a published score is: a logit or a probability."""
        return "logit" if self.activation is None else "probability"

    def token_ids(self, tokenizer: Tokenizer) -> tuple[int, int | None]:
        """Of `true` and `false`.

        Raises:
            ValueError: one is no single token.
        """

        def one(word: str) -> int:
            # Of the model alone: a file may ask for padding, or for a space before every text.
            ids = [token.id for token in tokenizer.model.tokenize(word)]
            if len(ids) != 1:
                raise ValueError(f"tokenizer.json: {word!r} has ids {ids}, expected one: its logit is the score")
            return ids[0]

        return one(self.true), None if self.false is None else one(self.false)

    def published(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores fp32 `[N]` as they are published, fp32 `[N]`."""
        scaled = raw * np.float32(self.scale)
        return scaled if self.activation is None else sigmoid(scaled)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """In the dtype of x; of any number."""
    small = np.exp(-np.abs(x))  # of a negative number: it can't overflow
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(x.dtype)


@dataclass(frozen=True)
class Family:
    """One description of a family of checkpoints: its prompt, and how a score is read and published.

    repositories: pattern of the last part of its Hub ids, and of folders named like them. signature: a sentence
    of its prompt that no other's has, and its labels, by which a prompt in sentence-transformers' files is known.

    Raises:
        ValueError: prompt and readout don't fit.
    """

    name: str
    prompt: ListPrompt | PairPrompt
    readout: Cosine | Logit
    repositories: str | None = None
    signature: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompt, ListPrompt) != isinstance(self.readout, Cosine):
            raise ValueError(
                f"family {self.name!r} has a {type(self.prompt).__name__} and a {type(self.readout).__name__}: lists "
                "are read by a cosine, pairs by a logit"
            )


def repository_name(name: str) -> str:
    """The last part of a Hub id, without the mark of a conversion to sequence classification."""
    return re.sub(r"-seq(-cls)?$", "", name.rpartition("/")[2])
