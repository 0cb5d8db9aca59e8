"""PTX text to instructions: statements, scopes, operands, labels. No meaning yet; that is `instructions.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

BITS = {"pred": np.dtype(bool), "b8": np.dtype(np.uint8), "b16": np.dtype(np.uint16), "b32": np.dtype(np.uint32),
        "b64": np.dtype(np.uint64)}  # fmt: skip
# A register's own type to how its bits are kept.
STORAGE = {f"{kind}{size}": BITS[f"b{size}"] for kind in "busf" for size in (8, 16, 32, 64)} | {"pred": BITS["pred"]}


@dataclass(frozen=True)
class Register:
    slot: int
    bits: np.dtype


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point number."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a special register (with its %), shared memory, or `_`."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pair:
    """`value|predicate`, of instructions that write both."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Vector | Address | Pair


@dataclass
class Instruction:
    """`@predicate op operands;`. parts are those of op between its dots."""

    op: str
    operands: tuple[Operand, ...]
    text: str
    predicate: Register | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Program:
    """One kernel.

    parameters: (name, type) in order, type "descriptor" for the 128 bytes of a tensor map. registers: storage of each
    slot. labels and tables (of `brx.idx`): where they lead in `code`. threads: of a block.
    """

    name: str
    threads: int
    parameters: list[tuple[str, str]] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: list[np.dtype] = field(default_factory=list)


def parse(text: str) -> Program:
    """The only kernel of a PTX file.

    Raises:
        ValueError: something isn't understood; the message has it.
    """
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry\s+(\S+?)\(\s*(.*?)\)", text, re.S)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if head is None or threads is None:
        raise ValueError("no kernel with a known number of threads")
    program = Program(head[1], int(threads[1]))
    for parameter in head[2].split(","):
        name = re.search(r"([\w$]+)(\[\d+\])?\s*$", parameter)
        kind = "descriptor" if name[2] else re.search(r"\.([busf]\d+)", parameter)[1]
        program.parameters.append((name[1], kind))
    names: dict[str, Register] = {}
    scopes = [""]
    opened = 0
    for statement in _statements(_body(text, head.end())):
        if statement == "{":
            opened += 1
            scopes.append(f"@{opened}")
        elif statement == "}":
            scopes.pop()
        else:
            _add(program, names, statement, scopes)
    return program


def _body(text: str, start: int) -> str:
    depth, begin = 0, text.index("{", start)
    for brace in re.compile("[{}]").finditer(text, begin):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[begin + 1 : brace.start()]
    raise ValueError("the kernel's body doesn't end")


def _statements(body: str) -> list[str]:
    """Instructions, directives, `label:` and the braces of scopes."""
    found = []
    for piece in re.sub(r"(?m)^\s*\.(loc|section|file)\b[^\n]*$", "", body).split(";"):
        rest = piece.strip()
        while rest:
            head = re.match(r"[{}]|[$\w]+:(?!:)", rest)
            found.append(head[0] if head is not None else " ".join(rest.split()))
            rest = rest[head.end() :].lstrip() if head is not None else ""
    return found


def _add(program: Program, names: dict[str, Register], statement: str, scopes: list[str]) -> None:
    if statement.endswith(":"):
        program.labels[statement[:-1] + scopes[-1]] = len(program.code)
        return
    if statement.startswith(".reg"):
        _declare(program, names, statement, scopes[-1])
        return
    table = re.fullmatch(r"\.branchtargets\s+(.*)", statement)
    if table is not None:
        label = [name for name, place in program.labels.items() if place == len(program.code)][-1]
        program.tables[label] = [target.strip() for target in table[1].split(",")]
        return
    if statement.startswith("."):
        return
    guarded = re.match(r"@(!?)([%\w]+)\s+(.*)", statement)
    predicate, negated, rest = None, False, statement
    if guarded is not None:
        negated, rest = guarded[1] == "!", guarded[3]
        predicate = _operand(guarded[2], names, scopes)
    op, _, arguments = rest.partition(" ")
    operands = tuple(_operand(argument, names, scopes) for argument in _split(arguments))
    program.code.append(Instruction(op, operands, statement, predicate, negated))


def _declare(program: Program, names: dict[str, Register], statement: str, scope: str) -> None:
    kind, listed = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
    for name in listed.split(","):
        family = re.fullmatch(r"(.*)<(\d+)>", name.strip())
        own = [name.strip()] if family is None else [f"{family[1]}{n}" for n in range(int(family[2]))]
        for one in own:
            names[one + scope] = Register(len(program.registers), STORAGE[kind])
            program.registers.append(STORAGE[kind])


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [part for part in [*parts, current.strip()] if part]


def _operand(text: str, names: dict[str, Register], scopes: list[str]) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(item, names, scopes) for item in _split(text[1:-1])))
    if text.startswith("["):
        first, *rest = _split(text[1:-1])
        found = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\d+))?", first)
        coordinates = _operand(rest[0], names, scopes) if rest else Vector(())
        return Address(_operand(found[1], names, scopes), int(found[2] or 0), coordinates.items)
    if "|" in text:
        return Pair(*(_operand(item, names, scopes) for item in text.split("|")))
    for scope in reversed(scopes):
        if text + scope in names:
            return names[text + scope]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), True)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.removesuffix("U"), 0))
    # A label is looked for in its own scope first.
    return Symbol(text if text.startswith(("%", "$")) or len(scopes) == 1 else text + scopes[-1])
