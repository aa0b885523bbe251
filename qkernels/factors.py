"""`Factors`: scales (and zeros) that are products of a small number a group and an outer one for many groups.

    scales = small * outer   (small / outer where the kind divides)          zeros = -(small_zeros * outer_zeros)

in fp32, rounded once. K-quants keep 4- to 8-bit integers under a float16 per 256 weights, NVFP4 keeps e4m3 under one float32; the
scales derived here are what these types' own readers multiply by, and only the factors write them back without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from .errors import TensorError
from .scheme import FACTORS, FactorKind, QuantScheme
from .text import describe, dtype_name

OUTER_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Factors:
    """Shapes: N out_features, G groups, S outer factors a row (`FactorKind.outer_groups`). Leading dimensions are experts.

    Args:
        small: uint8, int8 or float8_e4m3fn `[..., N, G]`.
        outer: fp16, bf16 or fp32 `[..., N, S]`.
        small_zeros: uint8 `[..., N, G]`, or None.
        outer_zeros: like outer, or None.
    """

    small: Tensor
    outer: Tensor
    small_zeros: Tensor | None = None
    outer_zeros: Tensor | None = None

    def nbits(self, scheme: QuantScheme) -> int:
        """Bits of the information held: small integers at the width of their range."""
        small = self.small.numel() * (1 if self.small_zeros is None else 2) * kind_of(scheme).small_bits
        return small + sum(t.numel() * t.element_size() * 8 for t in (self.outer, self.outer_zeros) if t is not None)

    def scales(self, scheme: QuantScheme) -> Tensor:
        """fp32 `[..., N, G]`."""
        kind = kind_of(scheme)
        outer = self._spread(self.outer, kind)
        return self.small.float() / outer if kind.divides else self.small.float() * outer

    def zeros(self, scheme: QuantScheme) -> Tensor | None:
        """fp32 `[..., N, G]`: offsets, or None."""
        if self.small_zeros is None or self.outer_zeros is None:
            return None
        return -(self.small_zeros.float() * self._spread(self.outer_zeros, kind_of(scheme)))

    def _spread(self, outer: Tensor, kind: FactorKind) -> Tensor:
        """One fp32 value a group, or one for all of a row."""
        per = kind.groups_per_outer
        return (
            outer.float() if per is None else outer.float().repeat_interleave(per, dim=-1)[..., : self.small.shape[-1]]
        )

    def check(self, rows: Sequence[int], G: int, scheme: QuantScheme) -> None:
        """Raise TensorError unless these are the factors of a weight of `[..., N]` rows with G groups under `scheme`."""
        kind = kind_of(scheme)
        offsets = kind.zeros == "offset"
        small, outer = [*rows, G], [*rows, kind.outer_groups(G)]
        small_dtype: torch.dtype = getattr(torch, kind.small)
        for name, t, dtypes, shape in (
            ("small", self.small, (small_dtype,), small),
            ("outer", self.outer, OUTER_DTYPES, outer),
            ("small_zeros", self.small_zeros, (torch.uint8,) if offsets else (), small),
            ("outer_zeros", self.outer_zeros, OUTER_DTYPES if offsets else (), outer),
        ):
            fits = not dtypes if t is None else t.dtype in dtypes and list(t.shape) == shape
            if not fits:
                expected = f"{' or '.join(map(dtype_name, dtypes))} {shape}" if dtypes else "None"
                raise TensorError(f"factors.{name} must be {expected} for {scheme}, got {describe(t)}")
        self.check_values(scheme)

    def check_values(self, scheme: QuantScheme) -> None:
        """Raise TensorError unless all are numbers that a weight of `scheme` may have, in whatever order they lie."""
        kind = kind_of(scheme)
        for name, t in zip(("small", "outer", "small_zeros", "outer_zeros"), self._tensors(), strict=True):
            if t is not None and t.device.type != "meta" and t.numel():
                _check_values(name, t, kind, scheme)

    def rows(self, part: slice) -> Factors:
        """Those of some rows."""
        return self._each(lambda t: t[..., part, :])

    def of_expert(self, expert: int) -> Factors:
        """Those of one expert of a stack."""
        return self._each(lambda t: t[expert])

    def groups(self, first: int, last: int, scheme: QuantScheme) -> Factors:
        """Those of groups first … last - 1; the cuts are those of outer factors, or a row's end."""
        per = kind_of(scheme).groups_per_outer
        small_zeros = None if self.small_zeros is None else self.small_zeros[..., first:last]
        cut = replace(self, small=self.small[..., first:last], small_zeros=small_zeros)
        if per is None:
            return cut
        part = slice(first // per, -(-last // per))
        zeros = None if self.outer_zeros is None else self.outer_zeros[..., part]
        return replace(cut, outer=self.outer[..., part], outer_zeros=zeros)

    def to(self, device: torch.device | str) -> Factors:
        """The same on another device."""
        return self._each(lambda t: t.to(device))

    @staticmethod
    def joined(parts: Sequence[Factors], join: Callable[[list[Tensor]], Tensor]) -> Factors:
        """Those of weights of one scheme that are joined by `join` (torch.cat or torch.stack)."""

        def of(tensors: Sequence[Tensor | None]) -> Tensor | None:
            found = [t for t in tensors if t is not None]
            return join([as_bytes(t) for t in found]).view(found[0].dtype) if found else None

        small, outer, small_zeros, outer_zeros = map(of, zip(*(part._tensors() for part in parts), strict=True))
        assert small is not None
        assert outer is not None
        return Factors(small, outer, small_zeros, outer_zeros)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.small, self.outer, self.small_zeros, self.outer_zeros

    def _each(self, of: Callable[[Tensor], Tensor]) -> Factors:
        small, outer, small_zeros, outer_zeros = (t if t is None else of(t) for t in self._tensors())
        assert small is not None
        assert outer is not None
        return Factors(small, outer, small_zeros, outer_zeros)


def kind_of(scheme: QuantScheme) -> FactorKind:
    """The entry of `FACTORS` that a scheme names."""
    assert scheme.factors is not None
    return FACTORS[scheme.factors]


def as_bytes(t: Tensor) -> Tensor:
    """Floats of one byte as the bytes that they are, for what torch does not do with them."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def _check_values(name: str, t: Tensor, kind: FactorKind, scheme: QuantScheme) -> None:
    values = t.float() if t.dtype.itemsize == 1 and t.dtype.is_floating_point else t
    low, high = (float(end) for end in values.aminmax())  # one pass without a copy, where a NaN is both ends
    if not t.dtype.is_floating_point:
        if low < kind.low or high > kind.high:
            raise TensorError(
                f"factors.{name} must be {kind.low} … {kind.high} for {scheme}, got {low:.0f} … {high:.0f}"
            )
        return
    if not (isfinite(low) and isfinite(high)):
        bad = int((~values.float().isfinite()).sum())
        raise TensorError(f"factors.{name} must be finite, got {bad} NaN or infinite entries")
    if name == "outer" and kind.divides and bool((values == 0).any()):
        raise TensorError(f"factors.outer of {scheme} divides and must not be 0")
