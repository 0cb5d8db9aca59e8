"""The rotation under which int8 linears are quantised: blocks of inputs times the Walsh-Hadamard matrix.

`(R W) (R x) = W x` for the orthogonal R, so a product is the same, but a large activation or weight no longer stretches
the grid under all others of its row: it is shared among a block's numbers (QuaRot, arXiv 2404.00456). The native
kernels rotate activations as they quantise them (`rotate` in csrc/vectors.h).
"""

from __future__ import annotations

import math

import torch

from lastrerank.config import MOST_ROTATED

# The largest magnitude of a quantised weight: 7 bits, as the native kernels want it (csrc/kernels.cpp).
INT8_MAX = 64


def block_of(width: int) -> int:
    """Numbers that are rotated together, of rows of `width`: the largest power of two that divides it, at most 64."""
    return math.gcd(width, MOST_ROTATED)


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[N, K]`, rotated; its own inverse. In the kernels' order of sums."""
    width = rows.shape[1]
    turned, step = rows * block_of(width) ** -0.5, 1
    while step < block_of(width):
        a, b = turned.reshape(-1, width // (2 * step), 2, step).unbind(2)
        turned, step = torch.stack([a + b, a - b], 2).reshape(-1, width), 2 * step
    return turned
