"""What the compiled attention kernel would reach on an H100, modelled from its instructions.

**Modelled, not measured.** A step of a loop costs a multiprocessor

    tensor + (1 - hidden) * issue + tiles * latency        clocks

tensor: its products at 4,096 operations a clock (NVIDIA's H100 whitepaper: 989 TFLOP/s dense at 1.83 GHz on 132
multiprocessors). issue: its instructions, those of two warps on each of four schedulers, one a clock. hidden: the share
of its exponentials between a product's start and the wait for it; both counts are read off the SASS. latency: per tile
of 64 keys, barriers and what waits for memory. It and the clock are what make the loop of Triton's tutorial kernel, 348
instructions a tile with nothing hidden, give 460 TFLOP/s, the lower end of what is published of it (460 to 487, not
causal, head width 128). Programs go to the first free multiprocessor in the order of the launch. Read the results as
+5 / -20 %: no number here was timed on a device.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.compile_kernels import TARGETS, compiling_for, cuobjdump, launches, overlap_of
from bench.measure import write_results

MULTIPROCESSORS, CLOCK = 132, 1.6e9  # under its power limit at such a load, not the 1.83 GHz of the data sheet
OPERATIONS_A_CLOCK = 4096
LATENCY, FILL, START = 204, 1000, 3500  # clocks: of a tile of 64 keys, of a loop's first copies, of a program
QUERY_HEADS, KV_HEADS, HEAD_DIM, ROWS, BLOCK_M = 16, 8, 128, 64, 128
LENGTHS = (1259, 2048, 4096, 8192, 16384, 32768, 131072)


@dataclass(frozen=True)
class Loop:
    """One loop of the kernel: keys of a step, its instructions, and the share of its exponentials under products."""

    keys: int
    instructions: int
    hidden: float

    @property
    def clocks(self) -> float:
        tensor = 4 * BLOCK_M * self.keys * HEAD_DIM / OPERATIONS_A_CLOCK
        return tensor + (1 - self.hidden) * 2 * self.instructions + self.keys / 64 * LATENCY


@dataclass(frozen=True)
class Kernel:
    """whole: the loop over keys that every row sees; masked: over others. heads_outermost: the order before the list
    of tiles, in which all tiles of a head come before the next head's."""

    name: str
    whole: Loop
    masked: Loop
    heads_outermost: bool = False


# What the loops were before they were rewritten, without and with a window: `_loops` of the kernel at commit 6de31ab
# (Triton 3.6.0, tiles of 128 x 64, nothing hidden).
BEFORE = {False: (Loop(64, 373, 0.0), Loop(64, 453, 0.0)), True: (Loop(64, 380, 0.0), Loop(64, 615, 0.0))}


def compiled(window: bool) -> Kernel:
    """The kernel as it is, by its SASS for sm_90."""
    with compiling_for(TARGETS["sm_90"]) as kernels:
        launches()["attention window" if window else "attention"]()
    loops = list(_loops(cuobjdump(kernels[-1].asm["cubin"], "--dump-sass")))
    whole = min((loop for copies, loop in loops if not copies), key=lambda loop: loop.instructions)
    # Jumps out of waits span several loops: the loop itself is the shortest.
    masked = min((loop for copies, loop in loops if copies), key=lambda loop: loop.instructions)
    return Kernel("now", whole, masked)


def _loops(sass: str) -> Iterator[tuple[bool, Loop]]:
    """Innermost loops with products: whether they fetch by ordinary copies, and what they are."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    for end, text in lines:
        target = re.search(r"BRA\S*\s+(?:\w+,\s*)?0x([0-9a-f]+)", text)
        body = [t for place, t in lines if target is not None and int(target[1], 16) <= place <= end]
        if target is None or int(target[1], 16) >= end or not overlap_of(body):
            continue
        found, keys = overlap_of(body), sum(16 for t in body if "HGMMA.64x128" in t)  # of PV: 16 keys an instruction
        hidden = found["exponentials_under_products"] / max(1, found["exponentials"])
        yield any("LDGSTS" in t for t in body), Loop(keys, len(body), hidden)


def teraflops(kernel: Kernel, length: int, window: int | None) -> float:
    """Of one sequence."""
    tiles = range(-(-length // ROWS) - 1, -1, -1)
    costs = [_clocks(kernel, tile, length, window) for tile in tiles]
    order = costs * KV_HEADS if kernel.heads_outermost else [cost for cost in costs for _ in range(KV_HEADS)]
    free = [0.0] * MULTIPROCESSORS
    for cost in order:
        heapq.heapreplace(free, free[0] + cost)
    pairs = sum(min(row + 1, window or row + 1) for row in range(length))
    return 4 * QUERY_HEADS * HEAD_DIM * pairs / (max(free) / CLOCK) / 1e12


def _clocks(kernel: Kernel, tile: int, length: int, window: int | None) -> float:
    lowest, highest = tile * ROWS, min((tile + 1) * ROWS, length) - 1
    edge = steps = 0
    if window is not None:
        begin = max(0, lowest - window + 1) // 64 * 64
        edge = -(-max(0, highest - window + 1) // 64) * 64
        steps += -(-(min(edge, highest + 1) - begin) // 64)
    whole = max(0, lowest + 1 - edge) // kernel.whole.keys
    steps += -(-(highest + 1 - edge - whole * kernel.whole.keys) // 64)
    loops = 1 + (whole > 0) + (edge > 0)
    return START + loops * FILL + whole * kernel.whole.clocks + steps * kernel.masked.clocks


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[dict[str, Any]] = []
    for window in (None, 1024):
        before = BEFORE[window is not None]
        for kernel in (
            Kernel("before, head after head", *before, heads_outermost=True),
            Kernel("before, with the list of tiles", *before), compiled(window is not None),
        ):  # fmt: skip
            found = {str(length): round(teraflops(kernel, length, window)) for length in LENGTHS}
            rows.append({
                "modelled": True, "kernel": kernel.name, "window": window, "tflops": found,
                "whole": vars(kernel.whole), "masked": vars(kernel.masked),
            })  # fmt: skip
            print(f"modelled, window {window}, {kernel.name:32}", *(f"{x:5}" for x in found.values()), file=sys.stderr)
    write_results("attention_modelled", rows)


if __name__ == "__main__":
    main()
