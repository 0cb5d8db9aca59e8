"""Operands and numbers: readers and writers of registers, constants and addresses, and the halves' formats.

lanes is None for all threads of a block. Values are numpy arrays with an element a lane, or one for all where it is a
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .block import Block, Group
from .memory import SHARED_BASE
from .program import Address, Immediate, Operand, Pair, Register, Symbol, Vector

Lanes = np.ndarray | None
Run = Callable[[Block, Lanes], None]
Read = Callable[[Block, Lanes], np.ndarray]
Write = Callable[[Block, Lanes, np.ndarray], None]

TYPES = {
    "pred": bool, "s8": np.int8, "u8": np.uint8, "b8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "f16": np.float16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64,
    "u64": np.uint64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip


@dataclass(eq=False)
class Step:
    """An instruction, decoded. flow: it decides where its group goes; returns whether the group goes on at once."""

    text: str
    run: Run
    predicate: Read | None = None
    negated: bool = False
    flow: Callable[[Block, list[Group], Group], bool] | None = None
    done_waiting: Callable[[Block, np.ndarray], bool] | None = None
    slots: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    matrix_slots: frozenset[int] = frozenset()  # those of `slots` that matrix products use
    is_product: bool = False


def slots_of(operands: tuple[Operand, ...]) -> list[int]:
    found = []
    for operand in operands:
        match operand:
            case Register(slot=slot):
                found.append(slot)
            case Vector(items=items):
                found += slots_of(items)
            case Pair(first=first, second=second):
                found += slots_of((first, second))
            case Address(base=base, coordinates=coordinates):
                found += slots_of((base, *coordinates))
    return found


def reader(operand: Operand, kind: str) -> Read:
    """The operand's value as a type; of a wider register its lower bits."""
    dtype = np.dtype(TYPES[kind])
    match operand:
        case Register(slot=slot, bits=bits):
            return _register_reader(slot, bits, dtype)
        case Immediate(value=value, is_float=is_float):
            if is_float:
                single = np.array(value, np.uint32)
                constant = single.view(np.float32).astype(dtype) if dtype.kind == "f" else single.view(dtype)
            elif dtype.kind in "fb":
                constant = np.array(value, dtype)
            else:
                size = 8 * dtype.itemsize
                constant = np.array(value & ((1 << size) - 1), f"u{dtype.itemsize}").view(dtype)
            return lambda block, lanes: constant
        case Symbol(name=name):
            return _special_reader(name, dtype)
    raise NotImplementedError(f"not modelled: operand {operand}")


def _register_reader(slot: int, bits: np.dtype, dtype: np.dtype) -> Read:
    def read(block: Block, lanes: Lanes) -> np.ndarray:
        held = block.held(slot)
        held = held if lanes is None else held[lanes]
        if bits.itemsize != dtype.itemsize:
            held = held.astype(f"u{dtype.itemsize}")
        return held.view(dtype)

    return read


def _special_reader(name: str, dtype: np.dtype) -> Read:
    axis = "xyz".find(name[-1])
    special: dict[str, Read] = {
        "%tid": lambda block, lanes: block.lanes(lanes) if axis == 0 else np.array(0),
        "%ntid": lambda block, lanes: np.array(len(block.threads) if axis == 0 else 1),
        "%ctaid": lambda block, lanes: np.array(block.place[axis]),
        "%nctaid": lambda block, lanes: np.array(block.grid[axis]),
        "%laneid": lambda block, lanes: block.lanes(lanes) % 32,
        "global_smem": lambda block, lanes: np.array(SHARED_BASE),
    }
    find = special.get(name.split(".")[0])
    if find is None:
        raise NotImplementedError(f"not modelled: operand {name}")
    return lambda block, lanes: find(block, lanes).astype(dtype)


def writer(operand: Operand) -> Write:
    """Into a register; a value of another width is extended as its type says, or cut."""
    if isinstance(operand, Symbol) and operand.name.startswith("_"):
        return lambda block, lanes, value: None
    if not isinstance(operand, Register):
        raise NotImplementedError(f"not modelled: result {operand}")
    slot, bits = operand.slot, operand.bits

    def write(block: Block, lanes: Lanes, value: np.ndarray) -> None:
        if value.dtype.itemsize != bits.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{bits.itemsize}")
        value = value.view(bits)
        if lanes is None:
            block.registers[slot] = np.broadcast_to(value, len(block.threads)) if value.ndim == 0 else value
            return
        held = block.held(slot).copy()
        held[lanes] = value
        block.registers[slot] = held

    return write


def address_reader(operand: Operand, kind: str) -> Read:
    """`[k]` addresses."""
    assert isinstance(operand, Address)
    base, offset = reader(operand.base, kind), np.array(operand.offset, np.int64)

    def read(block: Block, lanes: Lanes) -> np.ndarray:
        found = base(block, lanes).astype(np.int64) + offset
        return np.broadcast_to(found, len(block.lanes(lanes)))

    return read


def items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


# Numbers.


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits uint16 of bf16 or f16 as fp32."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def to_half(values: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
