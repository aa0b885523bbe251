"""What a whole warp computes: mma, ldmatrix, shuffles, on registers of shape [warps, 32]. Fragments as the PTX manual has them:
l is the lane, g = l // 4 its group, t = l % 4 its place in the group."""

from __future__ import annotations

import re

import numpy as np

from .memory import LANES
from .program import PtxError
from .values import Array, bf16_values, dtype_of

lane = np.arange(LANES)
g, t = lane // 4, lane % 4


def elements(kind: str, registers: list[Array]) -> Array:
    """[warps, 32, registers, elements of a register], in a type that the product is exact in."""
    words = np.ascontiguousarray(np.stack(registers, axis=2), np.uint32)
    if kind in ("f16", "bf16"):
        bits = words.view(np.uint16).reshape(*words.shape, 2)
        return bits.view(np.float16).astype(np.float32) if kind == "f16" else bf16_values(bits)
    if kind in ("s8", "u8"):
        return np.asarray(words.view(dtype_of(kind)).reshape(*words.shape, 4).astype(np.int32))
    raise PtxError(f"mma of {kind} is not supported")


def mma(opcode: tuple[str, ...], a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """d = a b + c; registers [warps, 32] of 32 bits in and out. Sums in fp32 (int32), rounded once for fp16 accumulators."""
    shape = next((part for part in opcode if re.fullmatch(r"m\d+n\d+k\d+", part)), "")
    kind, a_kind, b_kind, _ = opcode[-4:]
    if shape not in ("m16n8k16", "m16n8k32") or opcode[4:6] != ("row", "col") or a_kind != b_kind:
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    per = 2 if shape == "m16n8k16" else 4  # elements of a register
    if per != {"f16": 2, "bf16": 2, "s8": 4, "u8": 4}[a_kind]:
        raise PtxError(f"unsupported: {'.'.join(opcode)}")
    warps, depth = len(a[0]), 8 * per
    a_values, b_values = elements(a_kind, a), elements(b_kind, b)
    A = np.zeros((warps, 16, depth), a_values.dtype)
    B = np.zeros((warps, depth, 8), a_values.dtype)
    for e in range(per):
        for r in range(4):  # rows g, g + 8; then the right half of k
            A[:, g + r % 2 * 8, t * per + e + r // 2 * depth // 2] = a_values[:, :, r, e]
        for r in range(2):
            B[:, t * per + e + r * depth // 2, g] = b_values[:, :, r, e]
    D = np.matmul(A, B)
    for row, column, value in accumulators(kind, c):
        D[:, row, column] += value
    return registers_of(kind, D)


def accumulators(kind: str, registers: list[Array]) -> list[tuple[Array, Array, Array]]:
    """(rows, columns, values [warps, 32]) of what the registers hold."""
    if kind in ("f32", "s32"):
        return [
            (g + r // 2 * 8, 2 * t + r % 2, np.ascontiguousarray(v).view(dtype_of(kind)))
            for r, v in enumerate(registers)
        ]
    if kind != "f16":
        raise PtxError(f"mma with accumulators of {kind} is not supported")
    values = elements("f16", registers)
    return [(g + r * 8, 2 * t + e, values[:, :, r, e]) for r in range(2) for e in range(2)]


def registers_of(kind: str, D: Array) -> list[Array]:
    if kind in ("f32", "s32"):
        values = [D[:, g + r // 2 * 8, 2 * t + r % 2] for r in range(4)]
        return [np.ascontiguousarray(v, dtype_of(kind)).view(np.uint32) for v in values]
    both = [np.stack([D[:, g + r * 8, 2 * t + e] for e in range(2)], axis=2) for r in range(2)]
    return [np.ascontiguousarray(v, np.float16).view(np.uint32)[:, :, 0] for v in both]


def load_matrix(rows: Array, count: int, transposed: bool) -> list[Array]:
    """rows: uint8 [warps, 32, 16], the row that each lane's address names -> `count` registers [warps, 32]"""
    result = []
    for m in range(count):
        matrix = np.ascontiguousarray(rows[:, 8 * m : 8 * m + 8]).view(np.uint16)
        if transposed:
            matrix = matrix.transpose(0, 2, 1)
        result.append(np.ascontiguousarray(matrix).view(np.uint32)[:, g, t])
    return result


def rows_of_matrices(registers: list[Array]) -> Array:
    """stmatrix, the way back from `load_matrix`: registers [warps, 32] -> uint8 [warps, 8 rows of each, 16]"""
    rows = np.zeros((len(registers[0]), 8 * len(registers), 4), np.uint32)
    for m, register in enumerate(registers):
        rows[:, 8 * m + g, t] = register
    return rows.view(np.uint8)


def shuffle(mode: str, values: Array, operand: Array) -> Array:
    """With all lanes and the whole warp as one segment: [warps, 32] -> [warps, 32]."""
    by = operand.astype(np.int64)
    sources = {
        "bfly": lane ^ by,
        "idx": by & 31,
        "down": np.where(lane + by < LANES, lane + by, lane),
        "up": np.where(lane >= by, lane - by, lane),
    }
    return np.take_along_axis(values, np.broadcast_to(sources[mode], values.shape), axis=1)
