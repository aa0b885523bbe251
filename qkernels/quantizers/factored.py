"""Scales (and zeros) as products of a small factor a group and an outer one for many: the plain rounding of each.

    outer = the largest scale under it / the largest small factor, rounded to its dtype;  small = the nearest to scale / outer

Scales that are rounded here are no best ones; what searches them together with the codes has a better error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError
from ..factors import Factors, kind_of
from ..scheme import FactorKind, QuantScheme

OUTER_DTYPE = {"nvfp4": torch.float32, "nvfp4m": torch.float32}  # the others are GGUF's, which have float16
_LARGEST_E4M3 = 448.0


def nearest_factors(scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Factors:
    """The factors whose products come close to scales and zeros.

    Args:
        scales: `[..., N, G]`, not negative.
        zeros: None, or offsets `[..., N, G]`, not positive.
        scheme: one with factors.

    Raises:
        ArgumentError: an outer factor overflows its dtype.
    """
    kind = kind_of(scheme)
    dtype = OUTER_DTYPE.get(scheme.factors or "", torch.float16)
    outer, small = _split(scales, kind, dtype, kind.divides)
    if zeros is None:
        return Factors(small, outer)
    outer_zeros, small_zeros = _split(-zeros, kind, dtype, False)
    return Factors(small, outer, small_zeros, outer_zeros)


def _split(values: Tensor, kind: FactorKind, dtype: torch.dtype, divides: bool) -> tuple[Tensor, Tensor]:
    """Outer and small factors of values that are not negative."""
    largest = float(kind.high) if kind.high else _LARGEST_E4M3
    groups = values.shape[-1]
    per = kind.groups_per_outer or max(groups, 1)
    blocks = pad(values, (0, -groups % per)).unflatten(-1, (-1, per))
    top = blocks.amax(-1)
    if kind.span is None:  # one outer factor for the whole tensor, kept once a row
        top = top.amax(dim=(-2, -1), keepdim=True).expand(top.shape)
    outer = (torch.where(top > 0, largest / top, 1.0) if divides else top / largest).to(dtype)
    if outer.device.type != "meta" and not bool(outer.isfinite().all()):
        raise ArgumentError(
            f"a scale of {float(top.max()):.3g} gives an outer factor that {dtype} cannot hold; these weights need a scheme with "
            f"plain scales, such as w4a16_g32"
        )
    unit = outer.to(values.dtype).unsqueeze(-1)
    relative = blocks * unit if divides else torch.where(unit > 0, blocks / unit, 0.0)
    relative = relative.flatten(-2)[..., :groups].clamp(max=largest)
    small_dtype: torch.dtype = getattr(torch, kind.small)
    return outer.contiguous(), (relative if small_dtype.is_floating_point else relative.round()).to(
        small_dtype
    ).contiguous()
