"""Registers as numpy arrays of unsigned integers, one element per thread, and how the types of PTX look at them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import width_of

Array = NDArray[Any]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


def dtype_of(kind: str) -> Any:
    """numpy's type for a scalar PTX type; bf16 and the packed types are handled by their bits."""
    if kind == "pred":
        return np.bool_
    if kind in ("bf16", "f16x2", "bf16x2", "f32x2") or kind[0] in "bu":
        return UNSIGNED[width_of(kind)]
    return (SIGNED if kind[0] == "s" else FLOATS)[width_of(kind)]


def bf16_values(bits: Array) -> Array:
    """bf16 bits -> float32"""
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def bf16_bits(values: Array) -> Array:
    """float32 or float64 -> bf16 bits, rounded once to nearest even."""
    bits = np.ascontiguousarray(values, np.float64).view(np.uint64)
    dropped = np.uint64(52 - 7)
    one = np.uint64(1)
    rounded = bits + ((one << (dropped - one)) - one) + ((bits >> dropped) & one)
    exact = (rounded >> dropped << dropped).view(np.float64).astype(np.float32)
    result = (exact.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    # Below 2^-126 the bits count units of 2^-133; rint is to even, too.
    units = np.rint(np.minimum(np.abs(values), 2.0**-120).astype(np.float64) * 2.0**133).astype(np.uint16)
    small = np.where(np.signbit(values), units | np.uint16(0x8000), units)
    result = np.where(np.abs(values) < 2.0**-126, small, result)
    return np.where(np.isnan(values), np.uint16(0x7FFF), result)


def halves(kind: str, pairs: Array) -> Array:
    """f16x2, bf16x2 or f32x2 registers [n] -> float64 [n, 2]"""
    if kind == "f32x2":
        return np.ascontiguousarray(pairs).view(np.float32).reshape(-1, 2).astype(np.float64)
    bits = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, 2)
    return (bits.view(np.float16) if kind == "f16x2" else bf16_values(bits)).astype(np.float64)


def pairs(kind: str, values: Array) -> Array:
    """float [n, 2] -> f16x2, bf16x2 or f32x2 registers [n], rounded to nearest even"""
    if kind == "f32x2":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint64).reshape(-1)
    bits = values.astype(np.float16).view(np.uint16) if kind == "f16x2" else bf16_bits(values)
    return np.ascontiguousarray(bits).view(np.uint32).reshape(-1)
