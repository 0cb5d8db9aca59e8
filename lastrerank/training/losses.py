"""The losses of arXiv 2509.25085, section 3, over one list each. All in fp32, `t` is the temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs: `[N, P], [M, P] -> [N, M]`."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).t()


def rank_loss(scores: torch.Tensor, positive: int, t: float) -> torch.Tensor:
    """InfoNCE: `-log softmax(scores / t)[positive]`, scores `[N]` cosines."""
    return torch.logsumexp(scores / t, 0) - scores[positive] / t


def disperse_loss(docs: torch.Tensor, t: float) -> torch.Tensor:
    """`log(1/K sum_{i<j} exp(s(d_i, d_j) / t))` over all pairs of the N = K + 1 documents `[N, P]`; N >= 2."""
    count = len(docs)
    i, j = torch.triu_indices(count, count, offset=1, device=docs.device)
    return torch.logsumexp(cosine(docs, docs)[i, j] / t, 0) - math.log(count - 1)


def similar_loss(docs: torch.Tensor, copies: torch.Tensor, t: float) -> torch.Tensor:
    """Mean InfoNCE of each document `[N, P]` with its augmented copy `[N, P]`, the other documents as negatives."""
    positive = (F.normalize(docs.float(), dim=-1) * F.normalize(copies.float(), dim=-1)).sum(-1) / t
    others = (cosine(docs, docs) / t).fill_diagonal_(float("-inf"))
    return (torch.logsumexp(torch.cat([positive[:, None], others], dim=1), 1) - positive).mean()


def distill_loss(scores: torch.Tensor, teacher: torch.Tensor, t: float) -> torch.Tensor:
    """`KL(softmax(teacher) || softmax(scores / t))`: teacher `[N]` are logits, scores `[N]` cosines."""
    target = torch.softmax(teacher.float(), 0)
    return F.kl_div(torch.log_softmax(scores / t, 0), target, reduction="sum")
