"""Packed sequences that continue others."""

from __future__ import annotations

import torch

from lastrerank.ops import Prefixes

# Lengths, and of each sequence the one that it continues.
CONTINUED = [([70, 5, 1, 130], [None, 0, 0, 0]), ([1, 3, 64, 2, 65, 9], [None, 0, None, 2, 2, None])]


def prefixes_of(seqlens, continued, device) -> Prefixes:
    starts = [sum(seqlens[:s]) for s in range(len(seqlens))]
    host = tuple((0, 0) if c is None else (starts[c], seqlens[c]) for c in continued)
    return Prefixes(torch.tensor(host, device=device).int(), host)
