"""Triton launches on CPU tensors, compiled for a chip and executed by the emulator.

    with emulating("sm_90", mode="lazy") as launches:
        rms_norm(x, weight, eps)

What runs is the PTX that a GPU would be given by the launcher itself: its specialisation, its order, its descriptors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.compile_kernels import TARGETS, CompilingDriver

from .block import MODES, Block
from .instructions import decode
from .memory import GlobalMemory
from .program import Program, parse
from .units import TensorMap

_programs: dict[str, tuple[Program, list[Any]]] = {}


@dataclass
class Launch:
    """One that was executed: the kernel's name, blocks and instructions."""

    kernel: str
    blocks: int
    instructions: int


@contextmanager
def emulating(
    chip: str = "sm_90", mode: str = "lazy", seed: int = 0, change: Callable[[str], str] | None = None
) -> Iterator[list[Launch]]:
    """Within, launches are executed here, asynchronous work early, late or at random (`MODES`).

    change: of the PTX before it is executed, to plant a fault. Yields the launches, as they come.

    Raises:
        Fault: from a launch, what the kernel must not do.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {MODES}")
    launches: list[Launch] = []
    original, active = JITFunction.run, driver._active

    @np.errstate(all="ignore")  # the hardware's arithmetic warns of nothing
    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = original(self, *arguments, grid=grid, warmup=True, **keywords)
        bound = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        given = [bound[name] for name in self.arg_names if kernel.src.signature.get(name, "constexpr") != "constexpr"]
        sizes = (*(grid(bound) if callable(grid) else grid), 1, 1)
        launches.append(_execute(kernel, given, sizes[:3], mode, seed, change))
        return kernel

    JITFunction.run = run
    driver.set_active(CompilingDriver(TARGETS[chip]))
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = original, active


def _execute(
    kernel: Any, given: list[Any], grid: tuple[int, ...], mode: str, seed: int, change: Callable[[str], str] | None
) -> Launch:
    program, steps = _program(kernel, change)
    memory, storages = GlobalMemory(), {}

    def address(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = (storage, memory.put(_bytes(storage).numpy()))
        return storages[storage.data_ptr()][1] + tensor.storage_offset() * tensor.element_size()

    arguments: list[Any] = []
    for value in given:
        if isinstance(value, torch.Tensor):
            arguments.append(address(value))
        elif hasattr(value, "block_shape"):  # a tensor descriptor: the map, then sizes and strides
            arguments += [_tensor_map(value, address(value.base)), *value.shape, *value.strides]
        else:
            arguments.append(value)
    arguments += [0] * 2  # scratch that Triton's launcher adds, which these kernels don't use
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name} has {len(program.parameters)} parameters, {len(arguments)} arguments")
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    order = list(enumerate(places))
    if mode == "random":
        random.Random(seed).shuffle(order)
    executed = 0
    for number, place in order:
        block = Block(
            program, steps, memory, arguments, number, place, grid, kernel.metadata.shared + 1024, mode, seed
        )  # fmt: skip
        block.run()
        executed += block.executed
    for storage, start in storages.values():
        _bytes(storage).copy_(torch.from_numpy(memory.get(start, storage.nbytes())))
    return Launch(program.name, len(places), executed)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage)


def _program(kernel: Any, change: Callable[[str], str] | None) -> tuple[Program, list[Any]]:
    text = kernel.asm["ptx"]
    if change is not None:
        program = parse(change(text))
        return program, decode(program)
    if kernel.hash not in _programs:
        program = parse(text)
        _programs[kernel.hash] = (program, decode(program))
    return _programs[kernel.hash]


def _tensor_map(descriptor: Any, address: int) -> TensorMap:
    size = descriptor.base.element_size()
    rows, columns = descriptor.block_shape
    return TensorMap(address, *descriptor.shape, descriptor.strides[0] * size, size, rows, min(columns, 128 // size))
