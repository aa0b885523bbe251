"""The options that every quantization method shares, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import torch

from ..errors import ArgumentError, SchemeError
from ..scheme import ActBitsIsAct, GroupSize, QuantScheme, ZeroKind
from .grid import Clip, checked_scale_dtype

Self = TypeVar("Self", bound="Options")


@dataclass(frozen=True)
class Options(ActBitsIsAct):
    """What codes look like, whichever method chooses them.

    Args:
        bits, group_size, symmetric, act, codebook: see `QuantScheme`; `symmetric=False` means integer zero points.
        zeros: a zero kind by name where `symmetric` does not say enough ("float", "offset").
        scale_dtype: how scales are stored; None: the dtype of a 16-bit weight, else float16.
        clip: "mse" searches a narrower range per group, "none" keeps the full range.

    Raises:
        SchemeError, ArgumentError: an option is out of range or contradicts another.
    """

    bits: int = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    zeros: ZeroKind | None = None
    act: str | None = None
    codebook: str | None = None
    scale_dtype: torch.dtype | None = None
    clip: Clip = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise SchemeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.zeros is not None and (self.zeros == "none") != self.symmetric:
            raise SchemeError(f"zeros={self.zeros!r} contradicts symmetric={self.symmetric}; give only one of them")
        checked_scale_dtype(self.scale_dtype)
        if self.clip not in get_args(Clip):
            raise ArgumentError(f'clip must be "none" or "mse", got {self.clip!r}')
        _ = self.scheme  # raises where the fields do not make a scheme

    @property
    def name(self) -> str:
        """The method's name in reports and on the command line."""
        return type(self).__name__.lower()

    @property
    def scheme(self) -> QuantScheme:
        """What the codes of this method mean."""
        zeros: ZeroKind = self.zeros or ("none" if self.symmetric else "int")
        return QuantScheme(self.bits, self.group_size, zeros, self.act, self.codebook)

    def with_scheme(self: Self, scheme: str | QuantScheme) -> Self:
        """The same method with another scheme."""
        parsed = QuantScheme.parse(scheme)
        return replace(
            self,
            bits=parsed.bits,
            group_size=parsed.group_size,
            symmetric=parsed.symmetric,
            zeros=parsed.zeros,
            act=parsed.act,
            codebook=parsed.codebook,
        )
