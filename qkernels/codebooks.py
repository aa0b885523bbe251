"""Codebooks: what a code means where it is no integer. One table, one number each, which C++ and Triton share.

    nf4          quantiles of a normal distribution              fp4    bitsandbytes' 4-bit float, scaled to [-1, 1]
    e2m1         4-bit float of MXFP4 and NVFP4                  iq4nl  GGUF's uneven 4-bit integers
    e4m3, e5m2   8-bit floats

A code is an index: for the floats that have one it is the value's bit pattern.
"""

from __future__ import annotations

import math

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of a standard normal, scaled to [-1, 1], with an exact 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' 4-bit float, by bit pattern: sign, 2 bits of exponent, 1 of mantissa, scaled so that the largest is 1.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4, *(-value for value in _FP4))
# GGUF's IQ4_NL and IQ4_XS (ggml, ggml-common.h: kvalues_iq4nl), times a scale of 1/127 or so.
IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def float_values(exponent: int, mantissa: int, specials: str) -> tuple[float, ...]:
    """The values of a small float by bit pattern: sign, exponent, mantissa, with subnormals.

    Args:
        exponent, mantissa: bits of each; the bias is 2^(exponent-1) - 1.
        specials: "none": every pattern is a number (OCP Microscaling 1.0, 5.3.3, e2m1); "nan": all ones is NaN (OCP OFP8 1.0,
            e4m3); "inf": the largest exponent holds infinity and NaN, as in IEEE 754 (OFP8, e5m2).
    """
    bias, steps, top = (1 << (exponent - 1)) - 1, 1 << mantissa, (1 << exponent) - 1
    values = []
    for pattern in range(1 << (exponent + mantissa)):
        e, m = pattern >> mantissa, pattern & (steps - 1)
        if (specials == "inf" and e == top) or (specials == "nan" and e == top and m == steps - 1):
            values.append(math.inf if specials == "inf" and m == 0 else math.nan)
        else:
            values.append(math.ldexp(m if e == 0 else steps + m, max(e, 1) - bias - mantissa))
    return (*values, *(-value for value in values))


E2M1 = float_values(2, 1, "none")  # 0, 0.5, 1, 1.5, 2, 3, 4, 6
E4M3 = float_values(4, 3, "nan")  # up to 448
E5M2 = float_values(5, 2, "inf")  # up to 57344

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": NF4, "fp4": FP4, "e2m1": E2M1, "iq4nl": tuple(map(float, IQ4NL)), "e4m3": E4M3, "e5m2": E5M2,
}  # fmt: skip
# What the ops are told: csrc/types.h has the same list. 0: codes are integers.
CODEBOOK_NUMBERS: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(CODEBOOKS, 1)}
# Codebooks of integers times a step, which int8 activations can multiply exactly.
INTEGER_STEPS: dict[str, float] = {"e2m1": 0.5, "iq4nl": 1.0}


def width_of(codebook: str) -> int:
    """Bits of a code."""
    return (len(CODEBOOKS[codebook]) - 1).bit_length()
