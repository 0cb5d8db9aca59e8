"""Matrix instructions, the copy engine and mbarriers.

Layouts are those of the PTX ISA's figures: of fragments (mma.sync, wgmma, ldmatrix) by lane and register, of wgmma's
operands in shared memory with the 128-byte swizzle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .block import Barrier, Block
from .memory import SHARED_BASE, Fault
from .operands import Lanes, Run, Step, address_reader, from_half, items, reader, slots_of, writer
from .program import Address, Instruction, Program, Register, Symbol, Vector

_LANE = np.arange(32)
_ROW, _COLUMN = _LANE // 4, 2 * (_LANE % 4)  # of a lane's first element in an 8 x 8 fragment


def _whole_warps(block: Block, lanes: Lanes, size: int, text: str) -> np.ndarray:
    """Lanes `[n, size]`."""
    here = block.lanes(lanes)
    if len(here) % size or (here.reshape(-1, size)[:, 0] % size).any() or (np.diff(here.reshape(-1, size)) != 1).any():
        raise Fault(f"{text:.100}: by part of {size} threads")
    return here.reshape(-1, size)


def matrix_instruction(instruction: Instruction, program: Program) -> Run | Step:
    name = instruction.parts[0]
    if name in ("ldmatrix", "stmatrix"):
        return _fragments(instruction)
    return _mma(instruction) if name == "mma" else _wgmma(instruction)


def _fragments(instruction: Instruction) -> Run:
    """ldmatrix and stmatrix: 8 x 8 matrices of 16-bit elements; lane 8 i + r holds the address of row r of matrix i."""
    loads, transposed, text = instruction.parts[0] == "ldmatrix", "trans" in instruction.parts, instruction.text
    where, listed = instruction.operands[::-1] if loads else instruction.operands
    address, registers = address_reader(where, "u32"), items(listed)
    reads, writes = [reader(x, "b32") for x in registers] if not loads else [], [writer(x) for x in registers]

    def run(block: Block, lanes: Lanes) -> None:
        warps = _whole_warps(block, lanes, 32, text)
        at = address(block, lanes).reshape(len(warps), 32)
        values = [np.broadcast_to(read(block, lanes), warps.size).reshape(len(warps), 32) for read in reads]
        for number in range(len(registers)):
            rows = at[:, 8 * number : 8 * number + 8].ravel()
            places = block.shared.places(rows, 16, text)  # [8 n, 16]
            owners = np.repeat(warps[:, 0] // 32, 8)[:, None]
            if loads:
                raw = block.shared.read(places, owners, text)
                matrix = np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 8, 8)
                matrix = matrix.transpose(0, 2, 1) if transposed else matrix
                own = np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)
                writes[number](block, lanes, own)
            else:
                matrix = np.ascontiguousarray(values[number]).view(np.uint16).reshape(-1, 8, 8)
                matrix = matrix.transpose(0, 2, 1) if transposed else matrix
                raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16)
                block.shared.write(places, raw, np.broadcast_to(owners, places.shape), text)

    return run


def _halves(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The two elements of a register."""
    return from_half(bits.astype(np.uint16), kind), from_half((bits >> np.uint32(16)).astype(np.uint16), kind)


def _product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a @ b + c` in fp64, rounded once: hardware's order of summation isn't documented, its precision is fp32."""
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


def _mma(instruction: Instruction) -> Run:
    """mma.sync m16n8k16 of halves with fp32 accumulators, a warp."""
    found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", instruction.op)
    if found is None:
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")
    kind, text = found[1], instruction.text
    targets, *sources = (items(operand) for operand in instruction.operands)
    writes = [writer(x) for x in targets]
    a_reads, b_reads = ([reader(x, "b32") for x in source] for source in sources[:2])
    c_reads = [reader(x, "f32") for x in sources[2]]

    def run(block: Block, lanes: Lanes) -> None:
        warps = _whole_warps(block, lanes, 32, text)
        count = len(warps)

        def values(read: Callable[..., np.ndarray]) -> np.ndarray:
            return np.broadcast_to(read(block, lanes), warps.size).reshape(count, 32)

        a, b = np.zeros((count, 16, 16), np.float32), np.zeros((count, 16, 8), np.float32)
        c = np.zeros((count, 16, 8), np.float32)
        for number, read in enumerate(a_reads):
            row, column = _ROW + 8 * (number % 2), _COLUMN + 8 * (number // 2)
            a[:, row, column], a[:, row, column + 1] = _halves(values(read), kind)
        for number, read in enumerate(b_reads):
            b[:, _COLUMN + 8 * number, _ROW], b[:, _COLUMN + 8 * number + 1, _ROW] = _halves(values(read), kind)
        for number, read in enumerate(c_reads):
            c[:, _ROW + 8 * (number // 2), _COLUMN + number % 2] = values(read)
        d = _product(a, b, c)
        for number, write in enumerate(writes):
            write(block, lanes, d[:, _ROW + 8 * (number // 2), _COLUMN + number % 2].ravel())

    return run


@dataclass
class _WgmmaJob:
    """A product of one warpgroup: registers of accumulators, and of A unless it is in shared memory; lower bytes of the
    elements there."""

    group: int
    accumulators: list[int]
    a_slots: list[int]
    a_places: np.ndarray | None
    b_places: np.ndarray
    accumulate: bool
    width: int
    kind: str
    done: bool = False

    def __post_init__(self) -> None:
        lower = [x.ravel() for x in (self.a_places, self.b_places) if x is not None]
        self.read = np.concatenate([x + byte for x in lower for byte in (0, 1)])
        self.warps = np.arange(4) + 4 * self.group

    def do(self, block: Block) -> None:
        """Once: as soon as the mode has it, at the latest when it is waited for."""
        if self.done:
            return
        self.done = True
        lanes = slice(128 * self.group, 128 * self.group + 128)
        warp = np.arange(4)[:, None]
        row, column = (16 * warp + _ROW).ravel(), np.broadcast_to(_COLUMN, (4, 32)).ravel()  # [128]

        def operand(places: np.ndarray) -> np.ndarray:
            low, high = block.shared.bytes[places], block.shared.bytes[places + 1]
            return from_half(low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8)), self.kind)

        if self.a_places is None:
            a = np.zeros((64, 16), np.float32)
            for number, slot in enumerate(self.a_slots):
                at, first = row + 8 * (number % 2), column + 8 * (number // 2)
                a[at, first], a[at, first + 1] = _halves(block.held(slot)[lanes], self.kind)
        else:
            a = operand(self.a_places)
        # Accumulator 4 j + 2 h + e of a lane: row 8 h lower, column 8 j + e further.
        number = np.arange(len(self.accumulators))
        at = row[:, None] + 8 * (number // 2 % 2)
        place = column[:, None] + 8 * (number // 4) + number % 2
        d = np.zeros((64, self.width), np.float32)
        if self.accumulate:
            d[at, place] = np.stack([block.held(slot)[lanes].view(np.float32) for slot in self.accumulators], 1)
        d = _product(a, operand(self.b_places).T, d)
        for slot, values in zip(self.accumulators, d[at, place].T, strict=True):
            found = block.held(slot).copy()
            found[lanes] = np.ascontiguousarray(values).view(np.uint32)
            block.registers[slot] = found


def _operand_places(descriptor: int, rows: int, transposed: bool, text: str) -> np.ndarray:
    """Bytes (the lower of each element) of a `[rows, 16]` operand that a 64-bit matrix descriptor points to."""
    start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 62 != 1:
        raise NotImplementedError(f"not modelled: a swizzle of other than 128 bytes in {text:.100}")
    n, k = np.arange(rows)[:, None], np.arange(16)[None]
    if transposed:  # rows run along the 128 bytes
        offset = n // 64 * leading + n % 64 * 2 + k // 8 * stride + k % 8 * 128
    else:
        offset = n // 8 * stride + n % 8 * 128 + k * 2
    address = start + offset
    return (address ^ (((address >> 7) & 7) << 4)) - SHARED_BASE


def _wgmma(instruction: Instruction) -> Run | Step:
    name, text = instruction.parts[1], instruction.text
    if name == "fence":
        return _each_group(text, lambda block, group: block.products[group].changed.clear())
    if name == "commit_group":

        def commit(block: Block, group: int) -> None:
            products = block.products[group]
            products.closed.append(products.open)
            products.open = []

        return _each_group(text, commit)
    if name == "wait_group":
        keep = int(getattr(instruction.operands[0], "value", 0))
        return _each_group(text, lambda block, group: _wait_for_products(block, group, keep))
    found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.op)
    if found is None:
        raise NotImplementedError(f"not modelled: {text:.120}")
    accumulators = slots_of(instruction.operands[:1])
    a_operand, b_operand, accumulate, *flags = instruction.operands[1:]
    in_registers = isinstance(a_operand, Vector)
    negate_a, negate_b, *transposed = (getattr(flag, "value", None) for flag in flags)
    if (negate_a, negate_b) != (1, 1):
        raise NotImplementedError(f"not modelled: a negated operand in {text:.100}")
    a_transposed, b_transposed = (0, transposed[0]) if in_registers else transposed
    a_read = None if in_registers else reader(a_operand, "b64")
    b_read, on = reader(b_operand, "b64"), reader(accumulate, "pred")
    a_slots = slots_of((a_operand,)) if in_registers else []
    width, kind = int(found[1]), found[2]

    def issue(block: Block, group: int) -> None:
        lanes = block.threads[128 * group : 128 * group + 128]

        def one(read: Any) -> int:
            return int(np.ravel(read(block, lanes))[0])

        job = _WgmmaJob(
            group, accumulators, a_slots,
            None if a_read is None else _operand_places(one(a_read), 64, bool(a_transposed), text),
            _operand_places(one(b_read), width, bool(b_transposed), text), bool(one(on)), width, kind,
        )  # fmt: skip
        block.shared.begin_read(job.read, job.warps, text)
        products = block.products[group]
        products.open.append(job)
        if block.mode == "eager" or (block.mode == "random" and block.random.random() < 0.3):
            for each in products.pending():  # they run in their order
                each.do(block)

    step = _each_group(text, issue)
    step.is_product, step.matrix_slots = True, frozenset([*accumulators, *a_slots])
    return step


def _wait_for_products(block: Block, group: int, keep: int) -> None:
    products = block.products[group]
    while len(products.closed) > keep:
        for job in products.closed.pop(0):
            job.do(block)
            block.shared.end_read(job.read, job.warps)


def _each_group(text: str, act: Callable[[Block, int], None]) -> Step:
    def run(block: Block, lanes: Lanes) -> None:
        for group in _whole_warps(block, lanes, 128, text)[:, 0] // 128:
            act(block, int(group))

    return Step(text, run)


# Copies and mbarriers.


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory, strides and element sizes in bytes, and the box that one copy fetches: at most the
    swizzle's 128 bytes wide."""

    address: int
    height: int
    width: int
    stride: int
    size: int
    rows: int
    columns: int

    def fetch(self, block: Block, row: int, column: int, text: str) -> np.ndarray:
        """Bytes `[rows, columns * size]` from an element on; zeros outside of the matrix."""
        box = np.zeros((self.rows, self.columns * self.size), np.uint8)
        down = np.arange(max(0, -row), min(self.rows, self.height - row))
        along = np.arange(max(0, -column), min(self.columns, self.width - column))
        if len(down) and len(along):
            first = self.address + (row + down) * self.stride
            places = first[:, None] + (column + along) * self.size
            raw = block.memory.read(places.ravel(), self.size, block.number, text)
            box[down[0] : down[-1] + 1, along[0] * self.size : (along[-1] + 1) * self.size] = raw.reshape(len(down), -1)
        return box


def copy_instruction(instruction: Instruction, program: Program) -> Run | Step:
    if instruction.parts[0] == "mbarrier":
        return _mbarrier(instruction)
    if instruction.op.startswith("cp.async.bulk"):
        return _tensor_copy(instruction)
    if instruction.op == "cp.async.commit_group":
        return lambda block, lanes: _commit_copies(block, lanes, instruction.text)
    if instruction.op.startswith("cp.async.wait"):
        keep = int(getattr(instruction.operands[0], "value", 0)) if instruction.operands else 0
        return lambda block, lanes: _wait_for_copies(block, lanes, keep, instruction.text)
    return _copy(instruction)


def _copy(instruction: Instruction) -> Run:
    """cp.async: bytes beyond the source's size are zeros."""
    text = instruction.text
    target, source = address_reader(instruction.operands[0], "u32"), address_reader(instruction.operands[1], "u64")
    size = int(getattr(instruction.operands[2], "value", 0))
    real = reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def run(block: Block, lanes: Lanes) -> None:
        here = block.lanes(lanes)
        places, sources = block.shared.places(target(block, lanes), size, text), source(block, lanes)
        bytes_read = np.broadcast_to(size if real is None else real(block, lanes), len(here))
        if not np.isin(bytes_read, (0, size)).all():
            raise NotImplementedError(f"not modelled: part of a copy in {text:.100}")
        for warp in np.unique(here // 32):
            own = here // 32 == warp
            block.shared.begin_copy(places[own], np.full((own.sum(), 1), warp), text)
            job = (places[own], sources[own], bytes_read[own] > 0, text)
            block.copies[warp].open.append(job)
            if block.mode == "eager":
                _land_copy(block, job)

    return run


def _land_copy(block: Block, job: Any) -> None:
    places, sources, real, text = job
    raw = np.zeros(places.shape, np.uint8)
    if real.any():
        raw[real] = block.memory.read(sources[real], places.shape[1], block.number, text)
    # No fence is asked for before wgmma reads it: pipelines of Triton and CUTLASS make none after cp.async.
    block.shared.land(places, raw)


def _each_whole_warp(block: Block, lanes: Lanes, text: str) -> np.ndarray:
    return _whole_warps(block, lanes, 32, text)[:, 0] // 32


def _commit_copies(block: Block, lanes: Lanes, text: str) -> None:
    for warp in _each_whole_warp(block, lanes, text):
        copies = block.copies[warp]
        copies.closed.append(copies.open)
        copies.open = []


def _wait_for_copies(block: Block, lanes: Lanes, keep: int, text: str) -> None:
    for warp in _each_whole_warp(block, lanes, text):
        copies = block.copies[warp]
        while len(copies.closed) > keep:
            for job in copies.closed.pop(0):
                if block.mode != "eager":
                    _land_copy(block, job)
                block.shared.end_copy(job[0], int(warp))


def _tensor_copy(instruction: Instruction) -> Run:
    """A box of a matrix `[rows, columns]` by the copy engine, swizzled by 128 bytes; zeros outside of the matrix."""
    text = instruction.text
    # Triton 3.7 names the block's own memory, 3.6 a cluster's, which is the same in a cluster of one.
    wanted = [f"cp.async.bulk.tensor.2d.shared::{to}.global.mbarrier::complete_tx::bytes" for to in ("cluster", "cta")]
    if instruction.op not in wanted:
        raise NotImplementedError(f"not modelled: {text:.120}")
    target, barrier = (address_reader(instruction.operands[n], "u32") for n in (0, 2))
    source = instruction.operands[1]
    assert isinstance(source, Address)
    descriptor, coordinates = reader(source.base, "s64"), [reader(x, "s32") for x in source.coordinates]

    def run(block: Block, lanes: Lanes) -> None:
        here = block.lanes(lanes)
        if len(np.unique(here // 32)) != len(here):
            raise Fault(f"{text:.100}: by several threads of a warp")

        def of_lane(value: np.ndarray, number: int) -> int:
            return int(np.broadcast_to(value, len(here))[number])

        for number, lane in enumerate(here):
            tensor: TensorMap = block.arguments[of_lane(descriptor(block, lanes), number)]
            column, row = (of_lane(x(block, lanes), number) for x in coordinates)
            across = tensor.columns * tensor.size
            address = of_lane(target(block, lanes), number) + np.arange(tensor.rows * across).reshape(-1, across)
            if across != 128 or address[0, 0] % 1024:
                raise NotImplementedError(f"not modelled: rows of {across} bytes at {address[0, 0]}")
            places = (address ^ (((address >> 7) & 7) << 4)) - SHARED_BASE
            if places.min() < 0 or places.max() >= len(block.shared.bytes):
                raise Fault(f"{text:.100}: outside of shared memory")
            block.shared.begin_copy(places.ravel(), np.array([lane // 32]), text)
            fetch = partial(tensor.fetch, block, row, column, text)  # read when it arrives, not when it is asked for
            block.tensor_copies.append((places.ravel(), fetch, of_lane(barrier(block, lanes), number), text))
            if block.mode == "eager":
                block.land(block.tensor_copies.pop())

    return run


def _mbarrier(instruction: Instruction) -> Run | Step:
    action, text = instruction.parts[1], instruction.text
    listed = [x for x in instruction.operands if not (isinstance(x, Symbol) and x.name.startswith("_"))]
    where = next(n for n, x in enumerate(listed) if isinstance(x, Address))
    address = address_reader(listed[where], "u32")
    after = [reader(x, "u32") for x in listed[where + 1 :]]

    if action == "try_wait":
        return _try_wait(instruction, address, after[0])
    if any(isinstance(x, Register) for x in listed[:where]):
        raise NotImplementedError(f"not modelled: {text:.120}")

    def run(block: Block, lanes: Lanes) -> None:
        here = block.lanes(lanes)
        values = [np.broadcast_to(read(block, lanes), len(here)) for read in after]
        for number, at in enumerate(address(block, lanes)):
            at, warp = int(at), here[number] // 32
            if action == "init":
                count = int(values[0][number])
                block.barriers[at] = Barrier(count, count, np.zeros(len(block.shared.clock), np.int32))
            elif action == "inval":
                block.barriers.pop(at, None)
            elif action == "arrive":
                barrier = block.barrier_at(at, text)
                expects = "expect_tx" in instruction.parts
                barrier.bytes += int(values[0][number]) if expects else 0
                barrier.pending -= 1 if expects or not values else int(values[0][number])
                if barrier.pending < 0:
                    raise Fault(f"{text:.100}: more arrivals than the mbarrier was made for")
                barrier.known = np.maximum(barrier.known, block.shared.release(np.array([warp])))
                block.phase_may_end(barrier)
            else:
                raise NotImplementedError(f"not modelled: {text:.120}")

    return run


def _try_wait(instruction: Instruction, address: Any, parity: Any) -> Step:
    """Waits for the phase of that parity to be complete; the hardware's version may give up, which nothing may need."""
    done, text = writer(instruction.operands[0]), instruction.text

    def passed(block: Block, lanes: np.ndarray) -> bool:
        wanted = np.broadcast_to(parity(block, lanes), len(lanes))
        phases = [block.barrier_at(int(at), text).phase for at in address(block, lanes)]
        return bool((np.array(phases) != (wanted & 1)).all())

    def flow(block: Block, groups: Any, group: Any) -> bool:
        if not passed(block, group.lanes):
            group.waits = "mbarrier"
            return False
        for at in np.unique(address(block, group.lanes)):
            barrier = block.barrier_at(int(at), text)
            for warp in np.unique(group.lanes // 32):
                if barrier.published is not None:
                    block.shared.acquire(np.array([warp]), barrier.published)
                for places in barrier.landed:
                    block.shared.end_copy(places, int(warp))
        done(block, group.lanes, np.ones(len(group.lanes), bool))
        group.pc += 1
        return True

    return Step(text, lambda block, lanes: None, flow=flow, done_waiting=passed)
