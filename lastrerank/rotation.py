"""The rotation under which int8 linears are quantised: blocks of inputs times the Walsh-Hadamard matrix.

`(R W) (R x) = W x` for the orthogonal R, so a product is the same, but a large activation or weight no longer stretches
the grid under all others of its row: it is shared among a block's numbers (QuaRot, arXiv 2404.00456). The native
kernels rotate activations as they quantise them (`rotate` in csrc/vectors.h).
"""

from __future__ import annotations

import math
from functools import cache

import torch

from lastrerank.config import MOST_ROTATED


def block_of(width: int) -> int:
    """Numbers that are rotated together, of rows of `width`: the largest power of two that divides it, at most 64."""
    return math.gcd(width, MOST_ROTATED)


@cache
def _signs(block: int) -> torch.Tensor:
    """The matrix before it is divided by its size's root: -1 to the number of bits that row and column share."""
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu"), matrix)
    return matrix


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[N, K]` on the CPU, rotated; its own inverse. Of int8's numbers of steps exact up to the last rounding."""
    block = block_of(rows.shape[1])
    return (rows.unflatten(1, (-1, block)) @ _signs(block).to(rows.dtype)).flatten(1) * block**-0.5
