"""Every kernel compiled ahead of time for the chips served, no GPU needed; `python -m bench.compile_kernels`.

The launchers of `kernels/` are called as the model calls them, on CPU tensors of the published shape, under a driver
that only compiles: what is compiled is exactly what a GPU would be given, alignment and specialisation included. From
the result: registers a thread, spills, shared memory, occupancy and the instructions that matter.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled in the interpreter")

import torch
import triton
from lastrerank.kernels import attention, logit, qk_norm_rope, rms_norm, score, swiglu
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.measure import write_results

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One table a version of Triton: what a compiler gives is its own.
RESULTS = f"kernels_compiled_triton_{triton.__version__}"
# Per chip, from the vendors' tuning guides: shared memory of a block and of a multiprocessor in bytes, registers of a
# multiprocessor, its warps (for AMD: of a compute unit, whose 4 SIMDs hold 512 registers a lane and 8 waves each).
_AMPERE, _CONSUMER, _HOPPER, _CDNA = (166_912, 167_936), (101_376, 102_400), (232_448, 233_472), (65_536, 65_536)
SHARED = {"sm_80": _AMPERE, "sm_86": _CONSUMER, "sm_89": _CONSUMER, "sm_90": _HOPPER, "sm_100": _HOPPER,
          "sm_103": _HOPPER, "sm_120": _CONSUMER, "gfx942": _CDNA}  # fmt: skip
# Of those here, the chips that multiply e4m3 as PyTorch stores it.
_FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
REGISTERS, WARPS = {"cuda": 65_536, "hip": 131_072}, {"cuda": 64, "hip": 32}


class CompilingDriver:
    """Stands where the GPU's driver stands, and knows only what chip it would be."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Within, kernel launches compile for `target` and launch nothing; yields the compiled kernels, in order."""
    compiled: list[Any] = []
    original, active = JITFunction.run, driver._active

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = original(self, *arguments, grid=grid, warmup=True, **keywords)
        compiled.append(kernel)
        return kernel

    JITFunction.run = run
    driver.set_active(CompilingDriver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = original
        driver._active = active


def launches() -> dict[str, Callable[[], Any]]:
    """Each launch the model makes, by what it is; Qwen3-0.6B's shape in bf16, and the other forms a kernel has."""
    bf16, rows = torch.bfloat16, 256

    def norm(dtype: torch.dtype) -> Callable[[], Any]:
        x, weight = torch.zeros(rows, 1024, dtype=dtype), torch.ones(1024, dtype=dtype)
        return lambda: rms_norm.rms_norm(x, weight, 1e-6)

    def add_norm() -> None:
        x = torch.zeros(rows, 1024, dtype=bf16)
        rms_norm.add_rms_norm(x, x.clone(), torch.ones(1024, dtype=bf16), 1e-6)

    def rope(heads: int, kv_heads: int, dim: int) -> Callable[[], Any]:
        qkv, weight = torch.zeros(rows, (heads + 2 * kv_heads) * dim, dtype=bf16), torch.ones(dim, dtype=bf16)
        table, positions = torch.zeros(rows, dim // 2), torch.arange(rows)
        weights = (weight if heads else None, weight if kv_heads else None)
        return lambda: qk_norm_rope.qk_norm_rope(qkv, *weights, table, table, positions, heads, kv_heads, 1e-6)

    def quantized(with_norm: bool) -> Callable[[], Any]:
        x, weight = torch.zeros(rows, 1024, dtype=bf16), torch.ones(1024, dtype=bf16)
        return lambda: rms_norm.quantized_rows(x, *((x.clone(), weight, 1e-6) if with_norm else ()))

    def quantized_gate() -> None:
        swiglu.quantized_swiglu(torch.zeros(rows, 6144, dtype=bf16))

    def gate() -> None:
        swiglu.swiglu(torch.zeros(rows, 6144, dtype=bf16))

    def attend(
        dtype: torch.dtype, dim: int, window: int | None, read: bool, continued: bool = False, portable: bool = False
    ) -> Callable[[], Any]:
        q, k, v = torch.zeros(rows, 32 * dim, dtype=dtype).split([16 * dim, 8 * dim, 8 * dim], 1)
        q, k, v = (x.unflatten(1, (-1, dim)) for x in (q, k, v))
        cu = torch.tensor([0, 100, rows], dtype=torch.int32)
        where = torch.tensor([99, rows - 1]) if read else None
        q = q[where].contiguous() if where is not None else q
        prefixes = torch.tensor([[0, 0], [0, 100]], dtype=torch.int32) if continued else None
        return lambda: attention.attention(
            q, k, v, cu, rows - 100, window, dim**-0.5, rows=where, prefixes=prefixes, portable=portable
        )

    def readout() -> None:
        maps = (torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0, 0]), torch.tensor([0]))
        weights = (torch.ones(1024, dtype=bf16), torch.zeros(512, 1024, dtype=bf16), torch.zeros(512, 512, dtype=bf16))
        score.score(torch.zeros(16, 1024, dtype=bf16), *maps, *weights, 1e-6)

    def head() -> None:
        logit.logit(torch.zeros(16, 1024, dtype=bf16), torch.ones(1024, dtype=bf16), torch.zeros(1024), 1e-6)

    return {
        "rms_norm": norm(bf16), "rms_norm float32": norm(torch.float32), "add_rms_norm": add_norm,
        "qk_norm_rope": rope(16, 8, 128), "qk_norm_rope queries": rope(16, 0, 128),
        "qk_norm_rope keys": rope(0, 8, 128), "qk_norm_rope d=64": rope(14, 2, 64), "swiglu": gate,
        "attention": attend(bf16, 128, None, False), "attention window": attend(bf16, 128, 1024, False),
        "attention rows": attend(bf16, 128, None, True), "attention rows window": attend(bf16, 128, 1024, True),
        "attention window float16": attend(torch.float16, 128, 1024, False),
        "attention d=64": attend(bf16, 64, None, False),
        "attention d=64 window": attend(bf16, 64, 1024, False),
        "attention float32": attend(torch.float32, 128, None, False),
        "attention float32 window": attend(torch.float32, 128, 1024, False),
        "attention continued": attend(bf16, 128, None, False, True),
        "attention continued window": attend(bf16, 128, 1024, False, True),
        "attention continued rows": attend(bf16, 128, None, True, True),
        "attention continued rows window": attend(bf16, 128, 1024, True, True),
        "attention continued d=64": attend(bf16, 64, None, False, True),
        "attention continued float32": attend(torch.float32, 128, None, False, True),
        "portable attention": attend(bf16, 128, None, False, portable=True),
        "portable attention window": attend(bf16, 128, 1024, False, portable=True),
        "portable attention window float16": attend(torch.float16, 128, 1024, False, portable=True),
        "portable attention d=64": attend(bf16, 64, None, False, portable=True),
        "portable attention d=64 window": attend(bf16, 64, 1024, False, portable=True),
        "score": readout, "logit": head,
        "quantized rows": quantized(False), "quantized add_rms_norm": quantized(True),
        "quantized swiglu": quantized_gate,
    }  # fmt: skip


def describe(chip: str, kernel: Any) -> dict[str, Any]:
    """What one compiled kernel takes of a chip, and the instructions it is made of."""
    metadata, target = kernel.metadata, TARGETS[chip]
    if target.backend == "cuda":
        registers, spilled = _cuda_resources(kernel.asm["cubin"])
        overlap = overlap_of(cuobjdump(kernel.asm["cubin"], "--dump-sass").splitlines()) if chip == "sm_90" else {}
        text = kernel.asm["ptx"]
        wide = len(re.findall(r"ld\.global\.(?:\w+\.)*(?:v4\.b32|v2\.b64)|cp\.async\.\S+ .*, 0x10", text))
        matrix = sorted(set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", text)))
    else:
        text, overlap = kernel.asm["amdgcn"], {}
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]) * 4
        wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
        matrix = sorted(set(re.findall(r"v_mfma", text)))
    # A kernel whose warps have roles has more of them than who starts it.
    asked = re.search(r"\.reqntid (\d+)", text)
    warps = int(asked[1]) // target.warp_size if asked else metadata.num_warps
    blocks = [
        REGISTERS[target.backend] // (max(registers, 1) * warps * target.warp_size),
        WARPS[target.backend] // warps,
    ]
    if metadata.shared:
        blocks.append(SHARED[chip][1] // (metadata.shared + 1024 * (target.backend == "cuda")))
    return {
        "chip": chip, "kernel": metadata.name, "warps": warps, "stages": metadata.num_stages,
        "registers": registers, "spilled_bytes": spilled, "shared_bytes": metadata.shared,
        "occupancy": round(min(blocks) * warps / WARPS[target.backend], 3),
        "matrix_instructions": matrix, "loads_of_16_bytes": wide, **overlap,
    }  # fmt: skip


def overlap_of(instructions: Iterable[str]) -> dict[str, int]:
    """How a Hopper kernel keeps its matrix unit busy, by its SASS in order: asynchronous products (HGMMA), waits for
    them (a product each is what ptxas does to a kernel that it can't order), exponentials in all and those between a
    product's start and the wait for it. Nothing for code without such products."""
    products = waits = exponentials = hidden = 0
    running = False
    for instruction in instructions:
        if "HGMMA" in instruction:
            products, running = products + 1, True
        elif "WARPGROUP.DEPBAR" in instruction:
            waits, running = waits + 1, "gsb0, 0x0" not in instruction  # with another number some may go on
        elif "MUFU.EX2" in instruction:
            exponentials, hidden = exponentials + 1, hidden + running
    if not products:
        return {}
    return {"products": products, "waits": waits, "exponentials": exponentials, "exponentials_under_products": hidden}


def cuobjdump(cubin: bytes, what: str) -> str:
    """What NVIDIA's tool, which Triton brings, says of a cubin: its resources or its SASS."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills) of the only kernel in a cubin."""
    usage = cuobjdump(cubin, "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def table(chips: list[str]) -> list[dict[str, Any]]:
    """A row for every chip, launch and kernel."""
    rows = []
    for chip in chips:
        for name, launch in launches().items():
            if name.startswith("quantized") and chip not in _FLOAT8:
                continue
            if name.startswith("portable") and chip not in attention.OWN:
                continue
            with compiling_for(TARGETS[chip]) as compiled:
                launch()
            rows += [{"launch": name, **describe(chip, kernel)} for kernel in compiled]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people, on stderr."""
    for row in rows:
        print(
            f"{row['chip']:7} {row['launch']:24} {row['kernel']:21} {row['warps']:2} warps "
            f"{row['registers']:4} registers {row['spilled_bytes']:4} B spilled"
            f" {row['shared_bytes']:7} B shared  occupancy {row['occupancy']:.2f}  "
            f"{' '.join(row['matrix_instructions'])} {row['loads_of_16_bytes']} wide loads",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--name", default=RESULTS)
    options = parser.parse_args()
    rows = table(options.chips)
    show(rows)
    write_results(options.name, rows)


if __name__ == "__main__":
    main()
