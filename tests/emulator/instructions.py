"""What each PTX instruction does: `decode` makes of a program's instructions functions of a block and its active lanes.

Source: NVIDIA's PTX ISA. An instruction or form that isn't here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .block import Block, Group
from .memory import Fault
from .operands import (
    TYPES,
    Lanes,
    Run,
    Step,
    address_reader,
    from_half,
    items,
    reader,
    slots_of,
    to_half,
    writer,
)  # fmt: skip
from .program import Address, Immediate, Instruction, Operand, Pair, Program, Symbol, Vector
from .units import copy_instruction, matrix_instruction


def decode(program: Program) -> list[Step]:
    """A step for every instruction.

    Raises:
        NotImplementedError: one that isn't modelled; the message has it.
    """
    steps = []
    for instruction in program.code:
        maker = _MAKERS.get(instruction.parts[0])
        if maker is None:
            raise NotImplementedError(f"not modelled: {instruction.text:.120}")
        made = maker(instruction, program)
        step = made if isinstance(made, Step) else Step(instruction.text, made)
        if instruction.predicate is not None:
            step.predicate, step.negated = reader(instruction.predicate, "pred"), instruction.negated
        step.slots = frozenset(slots_of(instruction.operands))
        stores = instruction.parts[0] in ("st", "stmatrix", "bar", "cp", "mbarrier", "bra", "ret")
        step.writes = frozenset() if stores else frozenset(slots_of(instruction.operands[:1]))
        steps.append(step)
    used = frozenset().union(*(step.matrix_slots for step in steps))  # so far, products alone have some
    for step in steps:
        step.matrix_slots = step.slots & used
    return steps


def _join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


_BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _arithmetic(instruction: Instruction, program: Program) -> Run:
    """Element by element, of one type."""
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    if kind in ("bf16x2", "f16x2", "bf16", "f16"):
        return _half_arithmetic(instruction)
    if "wide" in parts:
        return _wide(instruction)
    write, sources = writer(instruction.operands[0]), [reader(x, kind) for x in instruction.operands[1:]]
    floating = kind.startswith("f")
    single: dict[str, Callable[..., np.ndarray]] = {
        "neg": np.negative, "abs": np.abs, "not": np.invert, "min": np.fmin if floating else np.minimum,
        "max": np.fmax if floating else np.maximum,
        "mul": _high_product if "hi" in parts else np.multiply, "rem": np.fmod, "div": _quotient,
        "fma": _fused, "mad": _fused if floating else lambda a, b, c: a * b + c,
        "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": lambda a: np.float32(1) / a,
        "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    }  # fmt: skip
    function = _BINARY.get(name) or single[name]
    return lambda block, lanes: write(block, lanes, np.asarray(function(*(x(block, lanes) for x in sources))))


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product of fp32 is exact in fp64; the sum is rounded there, then here."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    whole = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64)) * whole).astype(a.dtype)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits == 64:
        raise NotImplementedError("not modelled: mul.hi of 64 bits")
    wide = np.dtype(f"{a.dtype.kind}8")
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)


def _wide(instruction: Instruction) -> Run:
    kind = instruction.parts[-1]
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    write, a, b = writer(instruction.operands[0]), *(reader(x, kind) for x in instruction.operands[1:3])
    added = [reader(x, wide) for x in instruction.operands[3:]]
    dtype = TYPES[wide]

    def run(block: Block, lanes: Lanes) -> None:
        product = a(block, lanes).astype(dtype) * b(block, lanes).astype(dtype)
        write(block, lanes, product + added[0](block, lanes) if added else product)

    return run


def _half_arithmetic(instruction: Instruction) -> Run:
    name, kind = instruction.parts[0], instruction.parts[-1]
    packed, kind = kind.endswith("x2"), kind.removesuffix("x2")
    write, sources = writer(instruction.operands[0]), [
        reader(x, "b32" if packed else "b16") for x in instruction.operands[1:]
    ]
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fused, "max": np.fmax,
                "min": np.fmin, "neg": np.negative, "abs": np.abs}[name]  # fmt: skip

    def half(values: list[np.ndarray], shift: int) -> np.ndarray:
        bits = [(x >> x.dtype.type(shift) if packed else x).astype(np.uint16) for x in values]
        return to_half(function(*(from_half(x, kind) for x in bits)), kind)

    def run(block: Block, lanes: Lanes) -> None:
        values = [x(block, lanes) for x in sources]
        write(block, lanes, _join(half(values, 0), half(values, 16)) if packed else half(values, 0))

    return run


def _shift(instruction: Instruction, program: Program) -> Run:
    name, kind = instruction.parts[0], instruction.parts[-1]
    write, value, by = writer(instruction.operands[0]), reader(instruction.operands[1], kind), reader(
        instruction.operands[2], "u32"
    )
    bits = int(kind[1:])

    def run(block: Block, lanes: Lanes) -> None:
        a, n = value(block, lanes), by(block, lanes)
        most = np.minimum(n, np.uint32(bits - 1)).astype(a.dtype)
        shifted = a << most if name == "shl" else a >> most
        # Beyond the width nothing is left, but the sign.
        beyond = shifted if name == "shr" and a.dtype.kind == "i" else np.zeros_like(shifted)
        write(block, lanes, np.where(n >= bits, beyond, shifted).astype(a.dtype))

    return run


def _bit_field(instruction: Instruction, program: Program) -> Run:
    """bfe: `length` bits from `start` on; signed, the last of them is the sign."""
    kind = instruction.parts[-1]
    write, value, start, length = writer(instruction.operands[0]), reader(instruction.operands[1], "u32"), *(
        reader(x, "u32") for x in instruction.operands[2:]
    )

    def run(block: Block, lanes: Lanes) -> None:
        a, at, count = (x(block, lanes).astype(np.int64) for x in (value, start, length))
        field = (a >> at) & ((1 << count) - 1)
        if kind == "s32":
            field = np.where((field >> (count - 1)) & 1, field - (1 << count), field)
        write(block, lanes, field.astype(np.int32) if kind == "s32" else field.astype(np.uint32))

    return run


def _permute(instruction: Instruction, program: Program) -> Run:
    """prmt.b32: four bytes of eight, by the nibbles of a selector."""
    write, *sources = writer(instruction.operands[0]), *(reader(x, "b32") for x in instruction.operands[1:])
    low, high, select = sources

    def run(block: Block, lanes: Lanes) -> None:
        both = low(block, lanes).astype(np.uint64) | (high(block, lanes).astype(np.uint64) << np.uint64(32))
        chosen = select(block, lanes).astype(np.uint64)
        result = np.zeros(np.broadcast(both, chosen).shape, np.uint64)
        for place in range(4):
            nibble = (chosen >> np.uint64(4 * place)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result |= byte << np.uint64(8 * place)
        write(block, lanes, result.astype(np.uint32))

    return run


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
            "hs": np.greater_equal}  # fmt: skip


def _compare(instruction: Instruction, program: Program) -> Run:
    name, kind = instruction.parts[1], instruction.parts[-1]
    write, a, b = writer(instruction.operands[0]), *(reader(x, kind) for x in instruction.operands[1:3])
    unordered = kind.startswith("f") and len(name) == 3 and name.endswith("u")
    if len(instruction.operands) > 3 or (name not in (*_COMPARE, "nan", "num") and not unordered):
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")

    def run(block: Block, lanes: Lanes) -> None:
        x, y = a(block, lanes), b(block, lanes)
        nan = np.isnan(x) | np.isnan(y) if kind.startswith("f") else np.zeros((), bool)
        if name in ("nan", "num"):
            write(block, lanes, nan if name == "nan" else ~nan)
            return
        found = _COMPARE[name[:2]](x, y)
        write(block, lanes, np.asarray(found | nan if unordered else found & ~nan))

    return run


def _select(instruction: Instruction, program: Program) -> Run:
    kind = instruction.parts[-1]
    write, a, b = writer(instruction.operands[0]), *(reader(x, kind) for x in instruction.operands[1:3])
    which = reader(instruction.operands[3], "pred")
    return lambda block, lanes: write(block, lanes, np.where(which(block, lanes), a(block, lanes), b(block, lanes)))


def _move(instruction: Instruction, program: Program) -> Run:
    kind = instruction.parts[-1]
    target, source = instruction.operands
    if isinstance(target, Vector) or isinstance(source, Vector):
        return _pack(target, source, kind)
    write = writer(target)
    if isinstance(source, Symbol) and "_param_" in source.name:  # a parameter's address: of a tensor map
        number = [name for name, _ in program.parameters].index(source.name)
        return lambda block, lanes: write(block, lanes, np.array(number, np.int64))
    read = reader(source, kind)
    return lambda block, lanes: write(block, lanes, read(block, lanes))


def _pack(target: Operand, source: Operand, kind: str) -> Run:
    """`{low, high}` to one register, or back."""
    whole = np.dtype(TYPES[kind])
    parts = items(target if isinstance(target, Vector) else source)
    part = np.dtype(f"u{whole.itemsize // len(parts)}")
    if isinstance(target, Vector):
        read, writes = reader(source, kind), [writer(x) for x in parts]

        def unpack(block: Block, lanes: Lanes) -> None:
            value = np.ascontiguousarray(np.broadcast_to(read(block, lanes), len(block.lanes(lanes))))
            for number, write in enumerate(writes):
                write(block, lanes, value.view(part).reshape(len(value), -1)[:, number].copy())

        return unpack
    write, reads = writer(target), [reader(x, f"b{8 * part.itemsize}") for x in parts]

    def pack(block: Block, lanes: Lanes) -> None:
        value = np.zeros(len(block.lanes(lanes)), whole)
        for number, read in enumerate(reads):
            value |= read(block, lanes).astype(whole) << whole.type(8 * part.itemsize * number)
        write(block, lanes, value)

    return pack


def _convert(instruction: Instruction, program: Program) -> Run:
    plain = {"rn", "rz", "rni", "rzi", "rm", "rp", "ftz", "satfinite", "sat"}
    to, *rest = [part for part in instruction.parts[1:] if part not in plain]
    write = writer(instruction.operands[0])
    if to in ("bf16x2", "f16x2", "e4m3x2"):
        high, low = (reader(x, "f32") for x in instruction.operands[1:])
        if to == "e4m3x2":
            return lambda b, l: write(  # noqa: E741 (block, lanes)
                b, l, _float8(low(b, l)).astype(np.uint16) | (_float8(high(b, l)).astype(np.uint16) << np.uint16(8))
            )
        half = to.removesuffix("x2")
        return lambda b, l: write(b, l, _join(to_half(low(b, l), half), to_half(high(b, l), half)))  # noqa: E741
    source = rest[0]
    if source in ("bf16", "f16") and to == "f32":
        bits = reader(instruction.operands[1], "b16")
        return lambda block, lanes: write(block, lanes, from_half(bits(block, lanes), source))
    read = reader(instruction.operands[1], source)
    if to in ("bf16", "f16"):
        return lambda block, lanes: write(block, lanes, to_half(read(block, lanes), to))
    if to.startswith("f") and "rz" in instruction.parts:
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")
    nearest, dtype = "rni" in instruction.parts, TYPES[to]

    def run(block: Block, lanes: Lanes) -> None:
        value = read(block, lanes)
        write(block, lanes, (np.rint(value) if nearest else value).astype(dtype))

    return run


def _float8(values: np.ndarray) -> np.ndarray:
    clipped = torch.from_numpy(np.clip(np.atleast_1d(values), -448, 448).copy())
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


# Between lanes.


def _shuffle(instruction: Instruction, program: Program) -> Run:
    """shfl.sync of whole warps: bfly, idx, up, down."""
    mode = instruction.parts[2]
    target, source, by, clamp = instruction.operands[:4]
    write, read, distance = writer(target.first if isinstance(target, Pair) else target), reader(source, "b32"), reader(
        by, "s32"
    )
    if isinstance(target, Pair) or not isinstance(clamp, Immediate) or clamp.value not in (31, 0):
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")

    def run(block: Block, lanes: Lanes) -> None:
        here, by_lane = block.lanes(lanes), distance(block, lanes)
        lane = here % 32
        other = {"bfly": lane ^ by_lane, "idx": by_lane + 0 * lane, "up": lane - by_lane, "down": lane + by_lane}[mode]
        other = np.where((other >= 0) & (other < 32), other, lane) + here // 32 * 32
        if not np.isin(other, here).all():
            raise Fault(f"{instruction.text:.100}: from a lane that isn't there")
        values = np.zeros(len(block.threads), np.uint32)
        values[here] = read(block, lanes)
        write(block, lanes, values[other])

    return run


def _reduce(instruction: Instruction, program: Program) -> Run:
    name, kind = instruction.parts[2], instruction.parts[-1]
    write, read = writer(instruction.operands[0]), reader(instruction.operands[1], kind)
    function = {"min": np.min, "max": np.max, "add": np.sum, "or": np.bitwise_or.reduce,
                "and": np.bitwise_and.reduce, "xor": np.bitwise_xor.reduce}[name]  # fmt: skip

    def run(block: Block, lanes: Lanes) -> None:
        warps = block.warps_of(lanes)
        values = np.broadcast_to(read(block, lanes), len(warps))
        result = np.empty_like(values)
        for warp in np.unique(warps):
            result[warps == warp] = function(values[warps == warp])
        write(block, lanes, result)

    return run


def _elect(instruction: Instruction, program: Program) -> Run:
    pair = instruction.operands[0]
    assert isinstance(pair, Pair)
    lane, chosen = writer(pair.first), writer(pair.second)

    def run(block: Block, lanes: Lanes) -> None:
        warps = block.warps_of(lanes)
        first = np.zeros(len(warps), bool)
        first[np.unique(warps, return_index=True)[1]] = True
        chosen(block, lanes, first)
        lane(block, lanes, np.zeros(len(warps), np.uint32))

    return run


# Memory.


def _load_store(instruction: Instruction, program: Program) -> Run:
    space, kind = instruction.parts[1].split("::")[0], instruction.parts[-1]
    if space == "param":
        return _parameter(instruction, program)
    if space not in ("global", "shared"):
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")
    loads = instruction.parts[0] == "ld"
    where, values = instruction.operands[::-1] if loads else instruction.operands
    address = address_reader(where, "u64" if space == "global" else "u32")
    registers, dtype, text = items(values), np.dtype(TYPES[kind]), instruction.text
    size = dtype.itemsize * len(registers)
    if loads:
        writes = [writer(x) for x in registers]

        def load(block: Block, lanes: Lanes) -> None:
            at = address(block, lanes)
            if space == "global":
                raw = block.memory.read(at, size, block.number, text)
            else:
                places = block.shared.places(at, size, text)
                raw = block.shared.read(places, block.warps_of(lanes)[:, None], text)
            value = np.ascontiguousarray(raw).view(dtype)
            for number, write in enumerate(writes):
                write(block, lanes, np.ascontiguousarray(value[:, number]))

        return load
    reads = [reader(x, kind) for x in registers]

    def store(block: Block, lanes: Lanes) -> None:
        at = address(block, lanes)
        value = np.stack([np.broadcast_to(read(block, lanes), len(at)) for read in reads], 1)
        raw = np.ascontiguousarray(value).view(np.uint8)
        if space == "global":
            block.memory.write(at, raw, block.number, text)
        else:
            places = block.shared.places(at, size, text)
            block.shared.write(places, raw, np.broadcast_to(block.warps_of(lanes)[:, None], places.shape), text)

    return store


def _parameter(instruction: Instruction, program: Program) -> Run:
    target, source = instruction.operands
    assert isinstance(source, Address) and isinstance(source.base, Symbol)
    number = [name for name, _ in program.parameters].index(source.base.name)
    write, dtype = writer(target), np.dtype(TYPES[instruction.parts[-1]])

    def run(block: Block, lanes: Lanes) -> None:
        value = block.arguments[number]
        if dtype.kind == "f" or isinstance(value, float):
            held = np.array(value, np.float32).view(np.uint32)
            write(block, lanes, held.view(dtype))
            return
        bits = 8 * dtype.itemsize
        write(block, lanes, np.array(int(value) & ((1 << bits) - 1), f"u{dtype.itemsize}").view(dtype))

    return run


# Control.


def _nothing(block: Block, lanes: Lanes) -> None:
    pass


def _ignored(instruction: Instruction, program: Program) -> Run:
    return _nothing


def _fence(instruction: Instruction, program: Program) -> Run:
    if instruction.op.startswith("fence.proxy.async"):
        return lambda block, lanes: block.shared.fence(np.unique(block.warps_of(lanes)))
    return _nothing


def _branch(instruction: Instruction, program: Program) -> Step:
    label = instruction.operands[0]
    assert isinstance(label, Symbol)
    predicate = None if instruction.predicate is None else reader(instruction.predicate, "pred")

    def flow(block: Block, groups: list[Group], group: Group) -> bool:
        target = program.labels[label.name]
        if predicate is None:
            group.pc = target
            return True
        everyone = len(group.lanes) == len(block.threads)
        taken = predicate(block, None if everyone else group.lanes) != instruction.negated
        if taken.all() or not taken.any():
            group.pc = target if taken.all() else group.pc + 1
            return True
        groups.append(Group(group.lanes[taken], target))
        group.lanes, group.pc = group.lanes[~taken], group.pc + 1
        return False

    return Step(instruction.text, _nothing, flow=flow)


def _indexed_branch(instruction: Instruction, program: Program) -> Step:
    index, table = reader(instruction.operands[0], "u32"), instruction.operands[1]
    assert isinstance(table, Symbol)

    def flow(block: Block, groups: list[Group], group: Group) -> bool:
        targets = program.tables[table.name]
        chosen = np.broadcast_to(index(block, group.lanes), len(group.lanes))
        groups.remove(group)
        for one in np.unique(chosen):
            groups.append(Group(group.lanes[chosen == one], program.labels[targets[one]]))
        return False

    return Step(instruction.text, _nothing, flow=flow)


def _return(instruction: Instruction, program: Program) -> Step:
    predicate = None if instruction.predicate is None else reader(instruction.predicate, "pred")

    def flow(block: Block, groups: list[Group], group: Group) -> bool:
        if predicate is not None:
            ends = predicate(block, group.lanes) != instruction.negated
            group.lanes, group.pc = group.lanes[~ends], group.pc + 1
            if len(group.lanes):
                return True
        groups.remove(group)
        return False

    return Step(instruction.text, _nothing, flow=flow)


def _barrier(instruction: Instruction, program: Program) -> Step | Run:
    if instruction.op.startswith("bar.warp"):
        return _nothing
    if "sync" not in instruction.parts or instruction.predicate is not None:
        raise NotImplementedError(f"not modelled: {instruction.text:.120}")
    number = reader(instruction.operands[0], "u32")
    threads = [reader(x, "u32") for x in instruction.operands[1:]]

    def flow(block: Block, groups: list[Group], group: Group) -> bool:
        expected = int(np.ravel(threads[0](block, group.lanes))[0]) if threads else len(block.threads)
        group.pc += 1
        block.arrive(group, int(np.ravel(number(block, group.lanes))[0]), expected)
        return group.waits is None

    return Step(instruction.text, _nothing, flow=flow)


_MAKERS: dict[str, Callable[[Instruction, Program], Any]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "and", "or", "xor", "not", "neg", "abs", "ex2",
         "lg2", "sqrt", "rsqrt", "rcp"), _arithmetic),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("ld", "st"), _load_store),
    **dict.fromkeys(("mov", "cvta"), _move),
    **dict.fromkeys(("setmaxnreg", "griddepcontrol", "prefetch", "nanosleep", "membar"), _ignored),
    **dict.fromkeys(("bar", "barrier"), _barrier),
    **dict.fromkeys(("ret", "exit"), _return),
    **dict.fromkeys(("ldmatrix", "stmatrix", "mma", "wgmma"), matrix_instruction),
    **dict.fromkeys(("cp", "mbarrier"), copy_instruction),
    "bfe": _bit_field, "prmt": _permute, "setp": _compare, "selp": _select, "cvt": _convert, "shfl": _shuffle,
    "redux": _reduce, "elect": _elect, "fence": _fence, "bra": _branch, "brx": _indexed_branch,
}  # fmt: skip
