"""AWQ: scale the input channels that matter up before rounding, and take the scale out where it costs nothing.

Lin, Tang, Tang, Yang, Dang, Han: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
Section numbers below are that paper's.

`W x = (W s) (x / s)`: a channel scaled up by s has its rounding error divided by s (section 3.2). `x / s` is folded into
the norm or linear layer that makes x, so inference pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..tensor import QuantTensor
from .grid import Clip, assemble, checked_weight, fit, nearest, stored_dtype
from .options import Needs, Options, ScaleSearch
from .rtn import RTN

# Keeps a scale away from 0 where a channel hardly ever fires.
SMALLEST_SCALE = 1e-4

# Queries and keys meet in a product: a clipped outlier there is wrong twice, so their range stays whole.
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class AWQ(Options):
    """AWQ. Options as in `Options` (asymmetric by default, as AWQ checkpoints are), and:

    Args:
        clip: "mse" (the default) searches, per group, the clipping range with the least output error (section 3.2 of the
            paper's code).
        grid: how many ratios from 0 to 1 are tried; 1 always is, and so is leaving the weights as they are.
        duo_scaling: scales also shrink where the weights of a channel are large.
        search_tokens: the parent block is run on about this many calibration tokens for the best trials; others end sooner.

    Raises:
        SchemeError, ArgumentError: an option is out of range.

    >>> from qkernels import AWQ
    >>> str(AWQ(bits=4, group_size=64).scheme), str(AWQ(symmetric=True).scheme)
    ('w4a16_g64_asym', 'w4a16_g128')
    >>> # quantize(model, AWQ(), calibration=[text], save_to="out/", format="awq")
    """

    needs: ClassVar[Needs] = "moments"

    symmetric: bool = False
    clip: Clip = "mse"
    grid: int = 20
    duo_scaling: bool = True
    search_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grid", "search_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.duo_scaling, bool):
            raise ArgumentError(f"duo_scaling must be True or False, got {self.duo_scaling!r}")

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[N, K]` whose input channels are already scaled.

        Args:
            moments: `[K, K]` second moments of the inputs (up to a factor), for the clipping search; None leaves the range
                as it is.
            name: queries' and keys' (`UNCLIPPED`) keep their range, too.

        Raises:
            ArgumentError: the weight is not floating `[N, K]`, or has NaN or infinite entries.
        """
        values = checked_weight(weight, name)
        scale_dtype = stored_dtype(weight, self.scale_dtype, self.scheme)
        if moments is None or not clips(name.removesuffix(".weight")):
            grid = fit(values, self.scheme, scale_dtype)
        else:
            grid = fit(values, self.scheme, scale_dtype, self.clip, moments)
        return assemble(nearest(values, grid, self.scheme), grid, self.scheme, scale_dtype)

    def scale_search(self) -> ScaleSearch:
        """Itself: `candidates`, judged by `rounded`."""
        return self

    def rounded(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The weight `[N, K]` that inference would see if its input channels were scaled by `scales` `[K]` and rounded to
        the full range: `Q(W s) / s` (equation 4)."""
        plain = RTN(scale_dtype=stored_dtype(weight, self.scale_dtype, self.scheme)).with_scheme(self.scheme)
        return plain.quantize(weight * scales).dequantize().to(weight.dtype) / scales

    def candidates(self, input_magnitude: Tensor, weight_magnitude: Tensor) -> list[Tensor]:
        """The scales `[K]` to try: none at all, then `x^r`, r from 0 to 1 (equation 5), over `w^(1-r)` with duo scaling.

        Each is divided by the geometric mean of its extremes, so that scales stay around 1. Channels that were always 0
        keep a scale of 1.
        """
        live = input_magnitude > 0
        tries = [torch.ones_like(input_magnitude)]
        if not bool(live.any()):
            return tries
        for step in range(self.grid + 1):
            ratio = step / self.grid
            scales = input_magnitude**ratio
            if self.duo_scaling:
                scales = scales / (weight_magnitude ** (1 - ratio) + SMALLEST_SCALE)
            elif step == 0:
                continue  # x^0: no scale again
            scales = scales.clamp(min=SMALLEST_SCALE)
            scales = scales / (scales[live].max() * scales[live].min()).sqrt()
            tries.append(torch.where(live & torch.isfinite(scales), scales, torch.ones_like(scales)))
        return tries


@dataclass(frozen=True)
class ScaleChoice:
    """The outcome of a search: scales `[K]`, their loss, and the loss without any scale."""

    scales: Tensor
    loss: float
    unscaled_loss: float


def search(candidates: Sequence[Tensor], loss: Callable[[Tensor, range], float], batches: int = 1) -> ScaleChoice:
    """The candidate with the least loss (equation 5); the first candidate means "no scale" and wins a tie.

    A race: whoever is clearly worse on the first batch runs no further. After 1, 2, 4, … batches the better third goes on, and
    "no scale" always. Of 22 candidates and 8 batches that is 48 of 176 runs.

    Args:
        loss: squared error of the parent block's output, over some of the batches, when its weights are `AWQ.rounded` with these
            scales.
        batches: how many there are.
    """
    losses, running, seen, best = [0.0] * len(candidates), [*range(len(candidates))], 0, 0
    while seen < batches:
        stop = min(max(2 * seen, 1), batches)
        for i in running:
            losses[i] += loss(candidates[i], range(seen, stop))
        seen = stop
        running.sort(
            key=lambda i: losses[i] if losses[i] == losses[i] else float("inf")
        )  # stable: the first wins a tie
        best = running[0]
        running = sorted({0, *running[: max(len(running) // 3, 2)]})
    return ScaleChoice(candidates[best], losses[best], losses[0])


def clips(name: str) -> bool:
    """Whether the layer of this name takes part in the clipping search."""
    return not name.endswith(UNCLIPPED)


def weight_magnitude(weights: Sequence[Tensor], group_length: int) -> Tensor:
    """`[K]`: how large the weights of each input channel are, as a mean over all rows of |w| / the largest |w| of the group."""
    rows = torch.cat([weight.float().abs() for weight in weights])
    shares = [part / part.amax(-1, keepdim=True).clamp(min=1e-12) for part in rows.split(group_length, -1)]
    return torch.cat(shares, -1).mean(0)


def fold_into_norm(
    weight: Tensor, bias: Tensor | None, scales: Tensor, dtype: torch.dtype, unit_offset: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide a norm's output channels by `scales` `[K]`.

    The new gain is rounded to `dtype`, in which it will be stored, and the scale is corrected by what that rounding lost:
    the product of gain and scale stays what it was, so scales need not be powers of two.

    Args:
        unit_offset: the norm multiplies by 1 + weight (Gemma).

    Returns:
        The new weight and bias, and the scales that the consumers' input channels must be multiplied with.
    """
    offset = 1.0 if unit_offset else 0.0
    gain = weight + offset
    folded = (gain / scales - offset).to(dtype).to(weight.dtype)
    rounded_gain = folded + offset
    usable = (gain != 0) & (rounded_gain != 0)
    exact = torch.where(usable, gain / torch.where(usable, rounded_gain, torch.ones_like(gain)), scales)
    return folded, None if bias is None else bias / exact, exact


def fold_into_rows(weight: Tensor, bias: Tensor | None, scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divide a linear layer's output channels by `scales` `[N]`."""
    return weight / scales.unsqueeze(-1), None if bias is None else bias / scales
