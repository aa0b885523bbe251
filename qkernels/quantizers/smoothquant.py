"""SmoothQuant: divide loud input channels and multiply their weights, so that both fit into 8 bits.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (2022). Section and equation numbers below are that paper's.

`Y = (X diag(s)^-1) (diag(s) W)` (equation 3). The division is folded into the norm or linear layer that makes X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..scheme import GroupSize
from ..tensor import QuantTensor
from .options import Needs, Options, ScaleRule
from .rtn import rounding_of

# Keeps a scale away from 0 where a channel hardly ever fires, or has hardly any weight.
SMALLEST_MAGNITUDE = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Options):
    """SmoothQuant. Options as in `Options` (W8A8, one scale an output channel, unless said otherwise), and:

    Args:
        alpha: how much of the difficulty moves from activations to weights, 0 to 1; 0.5 splits it evenly (section 4.1).

    Raises:
        SchemeError, ArgumentError: an option is out of range.

    >>> from qkernels import SmoothQuant
    >>> str(SmoothQuant().scheme), str(SmoothQuant(4, 128).scheme)
    ('w8a8_channel', 'w4a8_g128')
    >>> # quantize(model, SmoothQuant(alpha=0.5), calibration=[text], save_to="out/")
    """

    needs: ClassVar[Needs] = "moments"

    bits: int = 8
    group_size: GroupSize = "channel"
    act: str | None = "int8"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.alpha, bool)
            or not isinstance(self.alpha, (int, float))
            or not 0 <= self.alpha <= 1  # NaN is no number between them
        ):
            raise ArgumentError(f"alpha must be in [0, 1], got {self.alpha!r}")

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Round a weight `[N, K]` whose input channels are already scaled to nearest; moments are not looked at.

        Raises:
            ArgumentError: the weight is not floating `[N, K]`, or has NaN or infinite entries.
        """
        return rounding_of(self).quantize(weight, name=name)

    def scale_rule(self) -> ScaleRule:
        """Itself: `scales`."""
        return self

    def scales(self, largest_input: Tensor, largest_weight: Tensor) -> Tensor:
        """`[K]`: `max|X_j|^α / max|W_j|^(1-α)` (equation 4), from both magnitudes `[K]`.

        A channel whose input was always 0, or that no weight reads, keeps a scale of 1. The scales are divided by the
        geometric mean of their extremes: a common factor changes neither side's rounding, and this one keeps numbers near 1.
        """
        live = (largest_input > 0) & (largest_weight > 0)
        if not bool(live.any()):
            return torch.ones_like(largest_input)
        of_input = largest_input.clamp(min=SMALLEST_MAGNITUDE) ** self.alpha
        scales = of_input / largest_weight.clamp(min=SMALLEST_MAGNITUDE) ** (1 - self.alpha)
        scales = scales / (scales[live].max() * scales[live].min()).sqrt()
        return torch.where(live, scales, torch.ones_like(scales))
