"""PTX text -> a list of instructions with parsed operands. What is not understood is an error, never skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np


class PtxError(Exception):
    """The PTX is not understood, or the kernel did what it must not do."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Constant:
    bits: int  # two's complement, or the bits of a float


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x, %ctaid.y, ...


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Constant
    offset: int


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result and a predicate."""

    first: Operand
    second: Operand


Operand = Register | Constant | Special | Vector | Address | Pair


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # split at the dots
    operands: tuple[Operand | str, ...]  # a string is a label
    guard: tuple[str, bool] | None  # predicate register, and the value it must have
    text: str


@dataclass
class Program:
    """One entry: its parameters (address in their own space, bytes), the registers' widths in bits (1: predicate), the code."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # address of each shared variable


DYNAMIC_ALIGNMENT = 128
SPECIALS = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.DOTALL)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?"
)
LINES = re.compile(
    r"^[ \t]*\.(?:loc|file|pragma)\b[^\n;]*;?", re.MULTILINE
)  # where code came from; these end with their line


def entries(text: str) -> list[str]:
    return [m[1] for m in ENTRY.finditer(text)]


def width_of(kind: str) -> int:
    """Bits of a PTX type: b32, f16x2, pred, ..."""
    special = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "f32x2": 64}
    return special[kind] if kind in special else int(kind[1:])


def parse(text: str, entry: str) -> Program:
    """The program of one entry of a .ptx file."""
    text = LINES.sub("", re.sub(r"//[^\n]*", "", text))
    found = next((m for m in ENTRY.finditer(text) if m[1] == entry), None)
    if found is None:
        raise PtxError(f"no entry {entry}; there are {', '.join(entries(text)) or 'none'}")
    program = Program(entry)
    for kind, name, count in PARAMETER.findall(found[2]):
        # Each at a multiple of 16, far from the next: what is read past its end is not another one's.
        place = sum(-(-size // 16) * 16 + 4096 for _, size in program.parameters.values())
        program.parameters[name] = (place, width_of(kind) // 8 * int(count or 1))
    # Only dynamic shared memory (an extern array) is used, and there is one such array, at address 0.
    for declared in re.findall(r"(\.extern\s+)?\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        if not declared[0]:
            raise PtxError(f"static shared memory {declared[1]}: not supported")
        program.shared[declared[1]] = 0
    for statement in statements(body_of(text, found.end())):
        if statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.code)
        elif statement.startswith(".reg"):
            declare(program, statement)
        elif statement.startswith(".local"):
            raise PtxError(f"local memory: {statement}")
        elif statement.startswith("."):
            raise PtxError(f"unknown directive: {statement}")
        else:
            program.code.append(instruction(program, statement))
    return program


def body_of(text: str, start: int) -> str:
    """From behind the entry's brace to the one that closes it."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    raise PtxError("the entry is not closed")


def statements(body: str) -> list[str]:
    """Labels (with their colon) and statements. A brace before any operand opens a scope, later ones are vectors."""
    result = []
    current = ""
    for token in re.findall(r"[^;{}:]+|[;{}:]", body):
        if token == ":" and re.fullmatch(r"\s*[$\w]+\s*", current):
            result.append(current.strip() + ":")
            current = ""
        elif token == ";":
            if current.strip():
                result.append(" ".join(current.split()))
            current = ""
        elif token in "{}" and not current.strip():
            current = ""
        else:
            current += token
    if current.strip():
        raise PtxError(f"the entry ends within: {current.strip()}")
    return result


def declare(program: Program, statement: str) -> None:
    found = re.fullmatch(r"\.reg \.(\w+) (.*)", statement)
    if found is None:
        raise PtxError(f"not understood: {statement}")
    for name in found[2].split(","):
        many = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", name)
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        program.widths.update(dict.fromkeys(names, width_of(found[1])))


def instruction(program: Program, statement: str) -> Instruction:
    guard = None
    rest = statement
    if rest.startswith("@"):
        predicate, rest = rest[1:].split(None, 1)
        guard = (predicate.lstrip("!"), not predicate.startswith("!"))
    opcode, _, operands = rest.partition(" ")
    parts = tuple(opcode.replace(".shared::cta", ".shared").split("."))  # two spellings of one state space
    if parts[0] in ("bra", "call"):
        return Instruction(parts, (operands.strip(),), guard, statement)
    return Instruction(parts, tuple(operand(program, o) for o in split(operands)), guard, statement)


def split(operands: str) -> list[str]:
    """At the commas that are outside of brackets."""
    return [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", operands) if o.strip()]


def operand(program: Program, text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(operand(program, part) for part in split(text[1:-1])))
    if text.startswith("["):
        return address(program, text[1:-1].strip())
    if "|" in text:
        first, second = text.split("|")
        return Pair(operand(program, first), operand(program, second))
    if text in program.widths:
        return Register(text)
    if SPECIALS.fullmatch(text):
        return Special(text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Constant(int(text[2:], 16))
    if re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Constant(int(text.rstrip("U"), 0))
    if re.fullmatch(r"\d+\.\d+", text):  # the fraction of createpolicy
        return Constant(int(np.float32(text).view(np.uint32)))
    if text in program.shared:
        return Constant(program.shared[text])
    if text in program.parameters:
        return Constant(program.parameters[text][0])
    if text == "_":
        return Register("_")
    raise PtxError(f"operand not understood: {text}")


def address(program: Program, text: str) -> Address:
    found = re.fullmatch(r"([%\w$.]+)\s*(?:\+\s*(-?\w+))?", text)
    if found is None:
        raise PtxError(f"address not understood: [{text}]")
    offset = int(found[2] or "0", 0)
    base = operand(program, found[1])
    if not isinstance(base, (Register, Constant)):
        raise PtxError(f"address not understood: [{text}]")
    return Address(base, offset)
