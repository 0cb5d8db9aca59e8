"""What a family of rerankers is, as data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lastrerank.lists import ListPrompt
from lastrerank.pairs import PairPrompt


@dataclass(frozen=True)
class Cosine:
    """Documents and query are projected; a score is their cosine (see `Operations.score`)."""


@dataclass(frozen=True)
class Logit:
    """A score is one logit of the read row, of the word `true`, less that of `false` where there is one.

    scale, activation: what becomes of it, in fp32, in the number that is published: None or "sigmoid".
    """

    true: str
    false: str | None
    scale: float = 1.0
    activation: str | None = None

    def token_ids(self, tokenizer: Tokenizer) -> tuple[int, int | None]:
        """Of `true` and `false`.

        Raises:
            ValueError: one is no single token.
        """

        def one(word: str) -> int:
            ids = tokenizer.encode(word, add_special_tokens=False).ids
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

    repositories: pattern of the last part of its Hub ids (and folders named like them), conversions to sequence
    classification ("-seq-cls") included; None where it is only taken by name. token_ids: of the words that are read,
    as `1_LogitScore/config.json` of sentence-transformers has them.
    """

    name: str
    prompt: ListPrompt | PairPrompt
    readout: Cosine | Logit
    repositories: str | None = None
    token_ids: tuple[int, int | None] | None = None
