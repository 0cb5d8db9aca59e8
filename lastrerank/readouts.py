"""What stands after the decoder: from the states that were read to scores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lastrerank.ops import Operations
from lastrerank.packing import readout_maps


class Readout(Protocol):
    """From read rows `[R, D]` of blocks, documents' rows and then the query's, if one is read, to fp32 vectors `[N, P]`
    (P may be 0) and raw scores `[N]` of the N documents, in their order."""

    def __call__(
        self,
        ops: Operations,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        counts: Sequence[int],
        owners: Sequence[Hashable],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """norm `[D]`, eps: of the final norm. counts: documents of each block. owners: whose each block is; blocks of
        one owner may be fused."""


@dataclass(frozen=True)
class Projector:
    """Cosine of projected states, blocks of one owner fused: w1 `[P1, D]`, w2 `[P, P1]`."""

    w1: torch.Tensor
    w2: torch.Tensor

    def __call__(
        self,
        ops: Operations,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        counts: Sequence[int],
        owners: Sequence[Hashable],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Readout`."""
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        where = readout_maps(counts, [numbers[owner] for owner in owners], hidden.device)
        vectors, _, scores = ops.score(
            hidden, where.doc_rows, where.query_rows, where.doc_sequence, where.sequence_request, norm,
            self.w1, self.w2, eps,
        )  # fmt: skip
        return vectors, scores


@dataclass(frozen=True)
class Head:
    """One logit of each row, or the difference of two: vector fp32 `[D]`, a row of the vocabulary's head less
    another's."""

    vector: torch.Tensor

    def __call__(
        self,
        ops: Operations,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        counts: Sequence[int],
        owners: Sequence[Hashable],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Readout`."""
        scores = ops.logit(hidden, norm, self.vector, eps)
        return scores.new_empty(len(scores), 0), scores
