"""What one thread computes: PTX opcodes -> numpy functions of whole registers.

Each function takes the opcode's parts and the operands, already read as the instruction's type, and returns the result in that
type (or the type that it names). float32 fma is computed in float64 and rounded twice: exact where the float64 sum is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .program import PtxError, width_of
from .values import FLOATS, SIGNED, UNSIGNED, Array, bf16_bits, bf16_values, dtype_of, halves, pairs

Opcode = tuple[str, ...]

COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip

SIMPLE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum, "rcp": np.reciprocal, "sqrt": np.sqrt,
    "popc": np.bitwise_count, "mov": lambda a: a, "cvta": lambda a: a,
}  # fmt: skip


def is_type(part: str) -> bool:
    return part in ("pred", "f16x2", "bf16x2", "bf16", "f32x2") or (part[0] in "busf" and part[1:].isdigit())


def types_of(opcode: Opcode) -> list[str]:
    return [part for part in opcode[1:] if is_type(part)]


def divide(opcode: Opcode, a: Array, b: Array) -> Array:
    return np.asarray(a / b if opcode[-1][0] == "f" else (a - np.fmod(a, b)) // b)


def multiply(opcode: Opcode, a: Array, b: Array, *c: Array) -> Array:
    """mul and mad: .lo, .hi, .wide, or of floats."""
    kind = opcode[-1]
    if kind[0] == "f":
        if c:
            raise PtxError(f"unsupported: {'.'.join(opcode)}")
        return np.asarray(a * b)
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[min(2 * width_of(kind), 64)]
    if "wide" in opcode:
        product = a.astype(wide) * b.astype(wide)
    elif "hi" in opcode:
        if width_of(kind) == 64:
            raise PtxError(f"unsupported: {'.'.join(opcode)}")
        product = ((a.astype(wide) * b.astype(wide)) >> wide(width_of(kind))).astype(a.dtype)
    elif "lo" in opcode:
        product = a * b
    else:
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    return np.asarray(product + c[0] if c else product)


def fma(opcode: Opcode, a: Array, b: Array, c: Array) -> Array:
    return np.asarray((a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype_of(opcode[-1])))


def shift(opcode: Opcode, a: Array, count: Array) -> Array:
    """Counts past the width shift everything out."""
    width = width_of(opcode[-1])
    most = np.minimum(count, width - 1).astype(a.dtype)
    shifted = np.left_shift(a, most) if opcode[0] == "shl" else np.right_shift(a, most)
    emptied = shifted if opcode[0] == "shr" and opcode[-1][0] == "s" else np.zeros_like(shifted)
    return np.asarray(np.where(count >= width, emptied, shifted))


def funnel_shift(opcode: Opcode, low: Array, high: Array, count: Array) -> Array:
    """shf: 32 bits of {high, low}, shifted by count (mod 32 with .wrap, at most 32 with .clamp)."""
    by = (count & np.uint32(31) if "wrap" in opcode else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    if "r" in opcode:
        return np.asarray((both >> by).astype(np.uint32))
    return np.asarray(((both << by) >> np.uint64(32)).astype(np.uint32))


def power_of_two(_: Opcode, a: Array) -> Array:
    """ex2.approx, correctly rounded: the hardware is off by 2 units in the last place at most (PTX ISA, ex2)."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.exp2(a.astype(np.float64)).astype(np.float32))


def lop3(opcode: Opcode, a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def prmt(opcode: Opcode, a: Array, b: Array, selector: Array) -> Array:
    if opcode[1:] != ("b32",):
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def extract(opcode: Opcode, a: Array, start: Array, length: Array) -> Array:
    """bfe"""
    start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    field = (a.astype(np.int64) >> start) & ((np.int64(1) << length) - 1)
    if opcode[-1][0] == "s":
        field = np.where((field >> np.maximum(length - 1, 0)) & 1, field - (np.int64(1) << length), field)
    return np.asarray(field.astype(dtype_of(opcode[-1])))


def insert(opcode: Opcode, a: Array, into: Array, start: Array, length: Array) -> Array:
    """bfi.b32"""
    if opcode[-1] != "b32":
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    start, length = start.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
    ones = ((np.uint64(1) << length) - np.uint64(1)) << start
    placed = (a.astype(np.uint64) << start) & ones
    return np.asarray(((into.astype(np.uint64) & ~ones) | placed).astype(np.uint32))


def sticky_sum(a: Array, b: Array) -> Array:
    """a + b in float64, moved by one unit in the direction of what was rounded off (Knuth's TwoSum), so that rounding to a
    narrower type does not see a tie where there is none."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    beyond = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(total) & np.isfinite(error), beyond, total)


def packed(opcode: Opcode, *operands: Array) -> Array:
    """Arithmetic of f16x2, bf16x2 and f32x2, in float64."""
    kind = opcode[-1]
    if "ftz" in opcode or "sat" in opcode or "relu" in opcode:
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    values = [halves(kind, operand) for operand in operands]
    if opcode[0] == "fma":
        return pairs(kind, sticky_sum(values[0] * values[1], values[2]))
    functions: dict[str, Callable[..., Any]] = {**SIMPLE, "mul": np.multiply}
    if opcode[0] not in ("add", "sub", "mul", "min", "max", "neg", "abs"):
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    return pairs(kind, functions[opcode[0]](*values))


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(opcode: Opcode, source: Array) -> Array:
    """cvt of one value; the operand is read as the second type."""
    to, origin = types_of(opcode)
    values = bf16_values(source) if origin == "bf16" else source
    rounding = next((part for part in opcode if part in ROUNDINGS), None)
    if values.dtype.kind == "f" and to[0] == "f" and rounding is not None:  # to a whole number that stays a float
        values = ROUNDINGS[rounding](values)
    if to == "bf16":
        return bf16_bits(values)
    if to[0] == "f":
        return values.astype(FLOATS[width_of(to)])
    if values.dtype.kind == "f":
        if rounding is None:
            raise PtxError(f"unsupported: {'.'.join(opcode)}")
        limits = np.iinfo(dtype_of(to))
        whole = np.clip(np.nan_to_num(ROUNDINGS[rounding](values.astype(np.float64))), limits.min, limits.max)
        return np.asarray(whole).astype(dtype_of(to))
    if "sat" in opcode:
        limits = np.iinfo(dtype_of(to))
        values = np.clip(values.astype(np.int64), limits.min, limits.max)
    return values.astype(dtype_of(to))


def compute(opcode: Opcode, operands: list[Array]) -> Array:
    """The result of any instruction that is a function of its operands alone."""
    name, kind = opcode[0], opcode[-1]
    if kind in ("f16x2", "bf16x2", "f32x2") and name not in ("mov", "selp"):
        return packed(opcode, *operands)
    if mixed(opcode):
        half = bf16_values(operands[0]) if kind == "bf16" else operands[0].astype(np.float32)
        return np.asarray(SIMPLE[name](half, operands[1]))
    if kind in ("f16", "bf16") and name != "mov":
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    if name == "selp":
        return np.where(operands[2], operands[0], operands[1])
    special: dict[str, Callable[..., Array]] = {
        "mul": multiply, "mad": multiply, "fma": fma, "div": divide, "shl": shift, "shr": shift, "shf": funnel_shift,
        "ex2": power_of_two, "lop3": lop3, "prmt": prmt, "bfe": extract, "bfi": insert, "rem": lambda _, a, b: np.fmod(a, b),
    }  # fmt: skip
    if name in special:
        return special[name](opcode, *operands)
    if name not in SIMPLE or "sat" in opcode or "cc" in opcode:
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    return np.asarray(SIMPLE[name](*operands))


def mixed(opcode: Opcode) -> bool:
    """add and sub of a half to a float, as in add.rn.f32.bf16 (sm100 and later)."""
    return opcode[0] in ("add", "sub") and opcode[-2] == "f32" and opcode[-1] in ("f16", "bf16")


def operand_types(opcode: Opcode, count: int) -> list[str]:
    """The type in which each operand is read, where it is not the instruction's."""
    name, kind = opcode[0], opcode[-1]
    types = [kind] * count
    if mixed(opcode):
        types[1] = "f32"
    elif name in ("shl", "shr"):
        types[1] = "b32"
    elif name in ("bfe", "bfi"):
        types[-2:] = ["b32", "b32"]
    elif name == "selp":
        types[2] = "pred"
    elif name == "mad" and "wide" in opcode:
        types[2] = f"{kind[0]}{2 * width_of(kind)}"
    return types


def result_type(opcode: Opcode) -> str:
    kind = opcode[-1]
    if opcode[0] in ("mul", "mad") and "wide" in opcode:
        return f"{kind[0]}{2 * width_of(kind)}"
    return "u32" if opcode[0] == "popc" else kind
