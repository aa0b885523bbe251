"""`Parts`: a GGUF block taken apart into codes, small scales and outer scales, and what they mean.

Splitting loses nothing: joining the parts gives the bytes back, those of a NaN too. Kernels run weights in this form, and
`Meaning.values` is what a decoder of such a type does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# IQ4_NL and IQ4_XS: a table fitted to Gaussian weights; MXFP4 and NVFP4: twice the values of e2m1, by bit pattern.
IQ4_TABLE: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_TABLE: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True, eq=False)
class Parts:
    """What n blocks hold. Shapes: E weights in a block, S small scales in it.

    Args:
        codes: uint8 `[n, E]`, in the order of the weights.
        scales: `[n, S]` small scales: uint8, or int8 where they are signed (Q3_K, Q6_K, IQ4_XS); of MXFP4 (e8m0) and NVFP4
            (unsigned e4m3) the bit patterns; None where a block has one scale alone.
        minima: uint8 `[n, S]`, None where a type has none.
        d: float16 `[n, 1]`, the outer scale; None where there is none (MXFP4, NVFP4).
        dmin: float16 `[n, 1]`, the outer scale of the minima; of Q4_1 and Q5_1 the minimum itself.
    """

    codes: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None


@dataclass(frozen=True)
class Meaning:
    """What the parts of a type mean: `w = (d · scale) · value(code) - dmin · minimum`, in fp32, in that order.

    Args:
        bits: of a code.
        group: weights that share a small scale (the block, where there is none).
        zero: the code that means 0; subtracted before scaling.
        table: value of each code, where it is no integer grid.
        scale_format: "integer", or how the bits of small scales are read: "e8m0" (2^(e-128)) or "ue4m3" (half its value).
    """

    bits: int
    group: int
    zero: int = 0
    table: tuple[int, ...] | None = None
    scale_format: str = "integer"

    def values(self, parts: Parts) -> Tensor:
        """float32 `[n, E]`."""
        if self.table is None:
            codes = parts.codes.float() - self.zero
        else:
            table = torch.tensor(self.table, dtype=torch.float32, device=parts.codes.device)
            codes = table[parts.codes.long()]
        codes = codes.view(len(codes), -1, self.group)
        scales = self._scales(parts)
        values = scales[:, :, None] * codes
        if parts.dmin is not None and parts.minima is not None:
            values = values - (parts.dmin.float() * parts.minima.float())[:, :, None]
        elif parts.dmin is not None:
            values = values + parts.dmin.float()[:, :, None]
        return values.flatten(1)

    def _scales(self, parts: Parts) -> Tensor:
        """float32 `[n, S]`."""
        if parts.scales is None:
            assert parts.d is not None
            return parts.d.float()
        if self.scale_format == "integer":
            assert parts.d is not None
            return parts.d.float() * parts.scales.float()
        decoded = half_e8m0 if self.scale_format == "e8m0" else half_ue4m3
        return decoded(parts.scales)


def half_e8m0(exponents: Tensor) -> Tensor:
    """float32 2^(e - 128) of uint8 e: half of what e8m0 means, for tables of doubled values; 0 and 1 give subnormal numbers."""
    bits = exponents.int()
    return torch.where(bits < 2, 0x00200000 << bits.clamp(max=1), (bits - 1).clamp(min=0) << 23).view(torch.float32)


def half_ue4m3(codes: Tensor) -> Tensor:
    """float32 half of an unsigned e4m3 (bias 7, bit 7 unused); 0x7F, its NaN, means 0."""
    exponent, mantissa = ((codes >> 3) & 15).int(), (codes & 7).float()
    powers = ((exponent + 120) << 23).view(torch.float32)  # 2^(e - 7)
    values = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * powers)
    return torch.where((codes == 0) | (codes == 0x7F), 0.0, values * 0.5)
