"""HQQ: fit scale and float zero point of every group to its weights, without calibration.

Badri, Shaji: "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). Equation names below are
that article's.

The article minimizes ‖W - s (C - z)‖_p^p, p < 1, over the zero points z alone: the scale stays that of the full range.
Here both are solved for, in closed form, and the best grid seen is kept. The article's shrinkage takes nothing out of an
error below 10^(-1/1.3) = 0.17 (its β = 10 and p = 0.7), which the weights of a language model never reach, so that its
iteration is least squares for z.

Here an error is measured in units of its column's mean |w|. Input channels differ in loudness, and where one is loud its
weights are small, in models that were trained; an error that is large beside them costs most, though calibration would have
to tell by how much. With plain errors the fit moves z off the integers, 0 has no code any more, and small weights, which were
right as 0, get an error of up to half a step: HQQ then costs more than rounding with integer zeros (docs/quality.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError, SchemeError
from ..scheme import GroupSize, ZeroKind
from ..tensor import QuantTensor
from .grid import Clip, Grid, assemble, checked_weight, decode, encode, fit, nearest, stored_dtype
from .options import Options

# β of the half-quadratic splitting, in units of 1 / (root mean square of the group's error)^(2 - p): the shrinkage then takes
# out what is larger than the usual error, whatever the size of the weights.
BETA = 1.0
# A column counts at most as one of 1/16 of the usual magnitude: one that is all but zero, for its input is dead, would
# otherwise settle its groups' grids alone.
LEAST_UNIT = 1 / 16


@dataclass(frozen=True)
class HQQ(Options):
    """HQQ. Options as in `Options` (groups of 64 and float zero points, which are what is fitted), and:

    Args:
        clip: the first grid: "mse" (the default) starts from the best share of the full range, "none" from the full range.
        iterations: at most so many times codes and grid are fitted to each other; groups that stop improving stop.
        p: the norm of the weight's error that is made small, in (0, 2]. The default of 2 costs least on the bundled model and on
            MiniLM (docs/quality.md).

    Raises:
        SchemeError, ArgumentError: an option is out of range.

    >>> import torch
    >>> from qkernels import HQQ
    >>> weight = HQQ(bits=3).quantize(torch.randn(8, 128))
    >>> str(weight.scheme), weight.zeros.shape
    ('w3a16_g64_fzero', torch.Size([8, 2]))
    """

    integer_zeros: ClassVar[bool] = False

    group_size: GroupSize = 64
    symmetric: bool = False
    zeros: ZeroKind | None = "float"
    clip: Clip = "mse"
    iterations: int = 20
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme.zeros != "float" or self.group_size == "tensor" or self.codebook:
            raise SchemeError(
                f"HQQ fits float zero points of groups or channels (w{self.bits}a16_g64_fzero, w{self.bits}a16_channel_fzero), "
                f"got {self.scheme}; RTN takes any scheme"
            )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise ArgumentError(f"iterations must be an integer of at least 0, got {self.iterations!r}")
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 < self.p <= 2:
            raise ArgumentError(f"p must be in (0, 2], got {self.p!r}")

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[..., N, K]` (leading dimensions are experts).

        Args:
            weight: floating, on any device; a meta tensor gives the shapes and dtypes of the result.
            moments: not looked at.
            name: how error messages call it.

        Raises:
            ArgumentError: the weight is not floating `[..., N, K]`, has NaN or infinite entries, or a scale overflows.
        """
        values = checked_weight(weight, name)
        scale_dtype = stored_dtype(weight, self.scale_dtype, self.scheme)
        scheme = self.scheme
        start = fit(values, scheme, scale_dtype, self.clip)
        if values.is_meta:
            return assemble(nearest(values, start, scheme), start, scheme, scale_dtype)
        length = scheme.group_length(values.shape[-1])
        width = start.scales.shape[-1] * length
        groups, emphasis = (
            pad(t, (0, width - t.shape[-1])).unflatten(-1, (-1, length)) for t in (values, column_emphasis(values))
        )
        assert start.zeros is not None
        # from the zeros as they are, and from rounded ones, which have a code for 0
        exact, whole = (
            self.refined(groups, emphasis, Grid(start.scales, zeros), scale_dtype)
            for zeros in (start.zeros, start.zeros.round())
        )
        losses = (self.objective(groups, emphasis, grid) for grid in (exact, whole))
        grid = _better(exact, whole, *losses)
        return assemble(nearest(values, grid, scheme), grid, scheme, scale_dtype)

    def refined(self, groups: Tensor, emphasis: Tensor, start: Grid, scale_dtype: torch.dtype) -> Grid:
        """The best grid met on the way from `start`: alternately the nearest codes, and the grid that fits them best.

        With p = 2 each half-step lowers the squared error but for the rounding of scales and zeros to `scale_dtype`, so the
        best is kept, not the last; no group ends up with a larger error than it started with.

        Args:
            groups: `[..., G, size]`.
            emphasis: `[..., 1, G, size]`, what errors are multiplied with (`column_emphasis`); 0 where the last group is padded.
            start: scales and zeros `[..., G]`.
        """
        best, least = start, self.objective(groups, emphasis, start)
        grid = start
        for _ in range(self.iterations):
            grid = self.step(groups, emphasis, grid, scale_dtype)
            loss = self.objective(groups, emphasis, grid)
            if not bool((loss < least).any()):
                break
            best, least = _better(best, grid, least, loss), torch.minimum(least, loss)
        return best

    def objective(self, groups: Tensor, emphasis: Tensor, grid: Grid) -> Tensor:
        """`[..., G]`: Σ |w - ŵ|^p of each group (the article's main objective), in the columns' units."""
        difference = (groups - self._restored(groups, grid)[1]).abs() * emphasis
        return (difference.square() if self.p == 2 else difference.pow(self.p)).sum(-1)

    def step(self, groups: Tensor, emphasis: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Grid:
        """One iteration: codes of `grid`, the sparse part of the error taken out (sub-problem 1), and the least-squares scale
        and zero for what remains (sub-problem 2, here for both).

        A group whose codes are all the same, or whose slope is not positive, keeps its grid.
        """
        codes, restored = self._restored(groups, grid)
        sparse = shrink((groups - restored) * emphasis, (emphasis > 0).to(groups.dtype), self.p)
        target = groups - sparse / emphasis.clamp(min=torch.finfo(emphasis.dtype).tiny)
        shares = emphasis.square() / emphasis.square().sum(-1, keepdim=True)
        mean_code = (codes * shares).sum(-1)
        mean_target = (target * shares).sum(-1)
        code_offsets = codes - mean_code.unsqueeze(-1)
        variance = (code_offsets.square() * shares).sum(-1)
        scales = (code_offsets * target * shares).sum(-1) / variance.clamp(min=1e-12)
        scales = scales.to(scale_dtype).to(groups.dtype)
        usable = (variance > 0) & (scales > 0) & torch.isfinite(scales)
        scales = torch.where(usable, scales, grid.scales)
        # the zero is fitted to the scale as it is stored, so that it makes up for its rounding
        zeros = (mean_code - mean_target / scales).to(scale_dtype).to(groups.dtype)
        assert grid.zeros is not None
        usable = usable & torch.isfinite(zeros)
        return Grid(torch.where(usable, scales, grid.scales), torch.where(usable, zeros, grid.zeros))

    def _restored(self, groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Nearest codes, and the weights that they stand for, `[..., G, size]`."""
        assert grid.zeros is not None
        scales, zeros = grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
        codes = encode(groups, scales, zeros, self.scheme)
        return codes, decode(codes, scales, zeros, self.scheme)


def column_emphasis(weight: Tensor) -> Tensor:
    """`[..., N, K]` -> `[..., 1, K]`: one over the mean |w| of each column, that in units of the mean over all columns and at
    least `LEAST_UNIT`."""
    magnitude = weight.abs().mean(-2, keepdim=True)
    usual = magnitude.mean(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return 1 / (magnitude / usual).clamp(min=LEAST_UNIT)


def _better(first: Grid, second: Grid, first_loss: Tensor, second_loss: Tensor) -> Grid:
    """Group by group, the grid with the smaller loss; the first where they are equal."""
    assert first.zeros is not None
    assert second.zeros is not None
    better = second_loss < first_loss
    return Grid(torch.where(better, second.scales, first.scales), torch.where(better, second.zeros, first.zeros))


def shrink(error: Tensor, members: Tensor, p: float) -> Tensor:
    """The generalized soft threshold sign(e) max(|e| - |e|^(p-1) / β, 0) of sub-problem 1, in units of the root mean square of
    each group's error `[..., G, size]`; nothing for p = 2, where the squared error itself is the objective."""
    if p == 2:
        return torch.zeros_like(error)
    usual = (error.square().sum(-1, keepdim=True) / members.sum(-1, keepdim=True)).sqrt().clamp(min=1e-30)
    relative = (error / usual).abs()
    kept = (relative - relative.clamp(min=1e-6).pow(p - 1) / BETA).clamp(min=0)
    return torch.sign(error) * kept * usual
