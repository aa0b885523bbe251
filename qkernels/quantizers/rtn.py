"""Round to nearest: every weight gets the nearest code on its group's grid. No calibration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..tensor import QuantTensor
from .grid import assemble, checked_weight, fit, nearest, stored_dtype
from .options import Options


@dataclass(frozen=True)
class RTN(Options):
    """Round to nearest. Options as in `Options`; `RTN().with_scheme("nf4_g64")` takes any scheme.

    >>> import torch
    >>> from qkernels import RTN
    >>> weight = RTN(bits=4, group_size=32).quantize(torch.randn(8, 64))  # a QuantTensor
    >>> weight.codes.shape, weight.scales.shape
    (torch.Size([8, 64]), torch.Size([8, 2]))
    """

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[..., N, K]` (leading dimensions are experts).

        Args:
            weight: floating, on any device; a meta tensor gives the shapes and dtypes of the result.
            moments: not looked at.
            name: how error messages call it.

        Raises:
            ArgumentError: the weight is not floating `[..., N, K]`, or has NaN or infinite entries.
        """
        values = checked_weight(weight, name)
        scale_dtype = stored_dtype(weight, self.scale_dtype, self.scheme)
        grid = fit(values, self.scheme, scale_dtype, self.clip)
        return assemble(nearest(values, grid, self.scheme), grid, self.scheme, scale_dtype)


def rounding_of(method: Options) -> Options:
    """What a method falls back to for a weight without moments: itself if it needs none, what it names
    (`Options.without_moments`), else rounding to nearest with the same scheme, dtype of scales, and clipping."""
    if method.needs == "weight":
        return method
    return method.without_moments() or RTN(scale_dtype=method.scale_dtype, clip=method.clip).with_scheme(method.scheme)
