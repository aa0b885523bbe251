"""The grid of representable values: which scale and zero point a group of weights gets, and the nearest code on it.

Every quantizer goes through these functions, so that all of them agree on the same rules:

    symmetric    scale = 2 max|w| / (2^b - 1), zero = 2^(b-1).  Both signs count alike, also in a group with one sign only:
                 the largest magnitude lands half a step from its code.
    int zero     scale = (max - min) / (2^b - 1) over a range that always includes 0; zero = round(-min / scale).
    float zero   the same without rounding the zero point, over the group's own range; "offset" stores min itself.
    codebook     scale = max|w| / the largest entry; the code is the nearest one.
    e8m0 scales  the nearest power of two (MXFP4): one step less would clip, one more waste half of the range.
    blocks       (`rows`) scale and zero of the block's range.
    factors      each scale is rounded to the nearest product (`factored`); a product of 0 is a group of zeros.
    all zero     scale 1, code = zero: the weight stays exactly 0. Of a codebook without 0 (iq4nl), scale 0.

Scales (and float zeros) are rounded to the dtype they are stored in **before** any code is computed, so that a code is
the nearest one for the weight that inference will see. A scale that rounds to 0 is treated like an all-zero group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..factors import Factors
from ..scheme import CODEBOOKS, QuantScheme
from ..tensor import SCALE_DTYPES, QuantTensor
from ..text import dtype_name, dtype_named
from .factored import nearest_factors
from .native import clipped_grids, fits

Clip = Literal["none", "mse"]

# The clipping search tries shares of the full range, in steps of 0.02 down to the one for the bits. The least errors of a trained
# model's weights, of normal ones and of Student's t, in groups of 32 and 128, lie at 0.2 and more (2 symmetric bits), 0.4 (3) and
# 0.68 (4).
CLIP_LOWEST = {1: 0.2, 2: 0.2, 3: 0.3, 4: 0.5}
CLIP_LOWEST_WIDE = 0.7  # of 5 bits and more
# Of columns with a cost each (GPTQ), at any width: what stretches a range may cost next to nothing there. Ending at 0.5 takes
# GPTQ without order from 2.15e-2 to 2.28e-2 (KL, bundled model with its outlier channels, 4 bits, symmetric).
CLIP_LOWEST_WEIGHTED = 0.2
CLIP_STEP = 0.02


def clip_shares(bits: int, weighted: bool = False) -> list[float]:
    """The shares of the full range that "mse" tries, besides all of it; `weighted`: each column has a cost of its own."""
    lowest = CLIP_LOWEST_WEIGHTED if weighted else CLIP_LOWEST.get(bits, CLIP_LOWEST_WIDE)
    count = round((1 - lowest) / CLIP_STEP)
    return [1 - i * CLIP_STEP for i in range(1, count + 1)]


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of groups, in fp32 (or fp64) but holding exactly the values that will be stored.

    Shapes: `[..., N, G]`; zeros is None for symmetric schemes and codebooks. `factors`: what they are products of, if they are.
    """

    scales: Tensor
    zeros: Tensor | None
    factors: Factors | None = None

    def columns(self, length: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every column, `[..., N, count]`, of natural groups of `length` columns."""

        def spread(t: Tensor) -> Tensor:
            return t.repeat_interleave(length, -1)[..., :count]

        return spread(self.scales), None if self.zeros is None else spread(self.zeros)


def stored_dtype(weight: Tensor, scale_dtype: torch.dtype | None, scheme: QuantScheme) -> torch.dtype:
    """The dtype of the scales: as asked, else that of a 16-bit weight, else float16; float32 where that one loses a row.

    A checkpoint's loader casts scales to the model's dtype, so scales in another 16-bit type would be rounded a second
    time, after the codes were chosen. For fp32 weights float16 halves the scales' bytes, and its 11 bits cost nothing,
    because the codes are chosen for the rounded scale. That holds down to float16's smallest numbers alone: int8 codes of
    weights around 1e-6 lost 96 % of them.

    Args:
        weight: `[..., N, K]`; one on meta has no values, and gets the first choice.
        scale_dtype: what was asked for.
        scheme: how the weight is quantized.
    """
    if scale_dtype is None and scheme.codebook == "e2m1" and scheme.factors is None:
        return torch.float8_e8m0fnu  # MXFP4
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16
    return scale_dtype if _holds_scales(weight, scheme, scale_dtype) else torch.float32


def _holds_scales(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether the largest scale of every row is finite in `dtype`, and rounded by so little that the row's largest weight
    moves by at most half a step. What smaller groups of the row lose is less than that."""
    if dtype == torch.float32 or weight.is_meta or weight.numel() == 0:
        return True
    largest = (weight.flatten(-2) if scheme.group_size == "tensor" else weight).abs().amax(-1).float()
    steps = scheme.max_code / 2 if scheme.symmetric else scheme.max_code  # from 0 to the largest weight
    scales = largest[largest > 0] / (steps if scheme.codebook is None else largest_entry(scheme.codebook))
    limits = torch.finfo(dtype)
    least = steps * limits.smallest_normal * limits.eps  # a subnormal number is off by half of the smallest one
    return not bool(((scales < least) | (scales > limits.max / 2)).any())


def largest_entry(codebook: str) -> float:
    """The largest magnitude of a codebook's numbers."""
    return max(abs(value) for value in CODEBOOKS[codebook] if math.isfinite(value))


def checked_weight(weight: Tensor, name: str = "weight") -> Tensor:
    """The weight in fp32 (fp64 stays), `[..., N, K]`.

    Raises:
        ArgumentError: not a floating `[..., N, K]` tensor, empty along K, or with NaN or infinite entries.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() < 2 or weight.shape[-1] == 0:
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ArgumentError(f"{name} must be a floating-point tensor [..., N, K] with K > 0, got {got}")
    if weight.device.type != "meta":
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise ArgumentError(
                f"{name} {list(weight.shape)} has {bad} NaN or infinite entries and cannot be quantized; "
                f"repair the checkpoint, or leave this layer out with exclude"
            )
    return weight if weight.dtype == torch.float64 else weight.float()


def fit(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    clip: Clip = "none",
    importance: Tensor | None = None,
) -> Grid:
    """Choose scale and zero of every natural group of a weight `[..., N, K]`.

    Args:
        clip: "mse" also tries narrower ranges and keeps, per group, the one with the least squared error.
        importance: what "mse" measures. None: the error of the weights. `[K]`: the same, weighted per column. `[K, K]`,
            second moments of the inputs: the error of the group's share of the output, `d H d`. Not used with
            group_size="tensor" and blocks.

    Raises:
        ArgumentError: a scale overflows `scale_dtype`.
    """
    length = scheme.group_length(weight.shape[-1])
    if scheme.group_size == "tensor":
        flat = _fit_groups(weight.flatten(-2).unsqueeze(-2).unsqueeze(-2), scheme, scale_dtype, clip, None)
        shape = (*weight.shape[:-1], 1)
        return Grid(flat.scales.expand(shape), None if flat.zeros is None else flat.zeros.expand(shape))
    if scheme.rows > 1:
        return _fit_blocks(weight, scheme, scale_dtype, clip)
    whole = weight.shape[-1] // length * length
    parts = []
    for start, stop, size in ((0, whole, length), (whole, weight.shape[-1], weight.shape[-1] - whole)):
        if start < stop:  # the second part is the short last group
            groups = weight[..., start:stop].unflatten(-1, (-1, size))
            costs = None if importance is None else _cut_importance(importance, start, stop, size)
            parts.append(_fit_groups(groups, scheme, scale_dtype, clip, costs))
    zeros = [part.zeros for part in parts if part.zeros is not None]
    grid = Grid(torch.cat([part.scales for part in parts], -1), torch.cat(zeros, -1) if zeros else None)
    if scheme.factors is None:
        return grid
    factors = nearest_factors(grid.scales, grid.zeros, scheme)
    return Grid(factors.scales(scheme).to(weight.dtype), _as(factors.zeros(scheme), weight.dtype), factors)


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None else t.to(dtype)


def _fit_blocks(weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, clip: Clip) -> Grid:
    """One scale and zero for blocks of rows x group_size weights; those at the edges may be smaller."""
    rows, length = scheme.rows, scheme.group_length(weight.shape[-1])
    N, K = weight.shape[-2:]
    bands = []
    for top in range(0, N, rows):
        band = weight[..., top : top + rows, :]
        blocks = [band[..., left : left + length].flatten(-2)[..., None, None, :] for left in range(0, K, length)]
        grids = [_fit_groups(block, scheme, scale_dtype, clip, None) for block in blocks]
        height = band.shape[-2]
        scales = torch.cat([grid.scales for grid in grids], -1).expand(*band.shape[:-2], height, len(grids))
        zeros = [grid.zeros for grid in grids if grid.zeros is not None]
        bands.append((scales, torch.cat(zeros, -1).expand_as(scales) if zeros else None))
    found = [zeros for _, zeros in bands if zeros is not None]
    return Grid(torch.cat([scales for scales, _ in bands], -2), torch.cat(found, -2) if found else None)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The nearest code of every weight, as floating-point integers 0 … 2^bits - 1; scales and zeros broadcast."""
    if scheme.factors is not None or scheme.codebook is not None:  # a scale may be 0, whose codes all mean the same
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if scheme.codebook is not None:
        values, order = (t.to(weight.device) for t in _sorted_numbers(scheme.codebook, weight.dtype))
        # times the reciprocal, as bitsandbytes has it: a quotient in the middle between two values can round the other way
        relative = weight * (1 / scales)
        return order[torch.bucketize(relative.contiguous(), (values[1:] + values[:-1]) / 2)].to(weight.dtype)
    if scheme.zeros == "offset":
        assert zeros is not None
        codes = (weight - zeros).div_(scales).round_()
    elif scheme.zeros == "float":
        assert zeros is not None
        codes = (weight / scales).add_(zeros).round_()
    else:
        codes = (weight / scales).round_().add_(scheme.mid_code if zeros is None else zeros)
    return codes.clamp_(0, scheme.max_code)


def _sorted_numbers(codebook: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A codebook's numbers in rising order, without infinities and NaN, and their codes."""
    values, order = torch.sort(torch.tensor(CODEBOOKS[codebook], dtype=dtype), stable=True)
    finite = values.isfinite()
    return values[finite], order[finite]


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The weights that (floating-point) codes stand for; the same formula as `QuantTensor.dequantize`."""
    if scheme.codebook is not None:
        table = torch.tensor(CODEBOOKS[scheme.codebook], dtype=scales.dtype, device=scales.device)
        return table[codes.long()] * scales
    if scheme.zeros == "offset":
        assert zeros is not None
        return codes * scales + zeros
    return (codes - (scheme.mid_code if zeros is None else zeros)) * scales


def nearest(weight: Tensor, grid: Grid, scheme: QuantScheme) -> Tensor:
    """Codes of a whole weight `[..., N, K]` in natural groups."""
    count = weight.shape[-1]
    return encode(weight, *grid.columns(scheme.group_length(count), count), scheme)


def assemble(
    codes: Tensor, grid: Grid, scheme: QuantScheme, scale_dtype: torch.dtype, group_index: Tensor | None = None
) -> QuantTensor:
    """The `QuantTensor` of floating-point codes and a grid."""
    if grid.factors is not None:
        return QuantTensor.from_factors(codes.to(torch.uint8), grid.factors, scheme, group_index)
    zeros = grid.zeros
    if zeros is not None:
        zeros = zeros.to(torch.uint8 if scheme.zeros == "int" else scale_dtype).contiguous()
    return QuantTensor(codes.to(torch.uint8), grid.scales.to(scale_dtype).contiguous(), zeros, group_index, scheme)


def _fit_groups(
    groups: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, clip: Clip, importance: Tensor | None
) -> Grid:
    """The grid of weights `[..., G, size]`, reduced over the last dimension; importance `[G, size]` or `[G, size, size]`."""
    shares = clip_shares(scheme.bits, weighted=importance is not None and importance.dim() == 2)
    if clip != "none" and fits(groups, scheme, scale_dtype, importance):
        found = clipped_grids(groups, scheme, scale_dtype, shares, importance)
        if found is not None:
            return Grid(*found)
    low, high = groups.amin(-1), groups.amax(-1)
    if scheme.zeros in ("none", "int") or scheme.factors is not None:  # factors of offsets are not negative
        low, high = low.clamp(max=0), high.clamp(min=0)
    grid = _grid_of_range(low, high, scheme, scale_dtype)
    if clip == "none":
        return grid
    error = _group_error(groups, scheme, importance)
    best, least = grid, error(grid)
    for share in shares:
        trial = _grid_of_range(low * share, high * share, scheme, scale_dtype)
        loss = error(trial)
        better = loss < least  # strictly: an all-zero group keeps its scale of 1
        least = torch.where(better, loss, least)
        zeros = None
        if trial.zeros is not None and best.zeros is not None:
            zeros = torch.where(better, trial.zeros, best.zeros)
        best = Grid(torch.where(better, trial.scales, best.scales), zeros)
    return best


def _grid_of_range(low: Tensor, high: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> Grid:
    if scheme.codebook is not None:
        scales = torch.maximum(-low, high)
        rounded = _rounded_scale(scales / largest_entry(scheme.codebook), scale_dtype)
        return Grid(rounded if 0.0 in CODEBOOKS[scheme.codebook] else rounded.where(scales > 0, 0), None)
    if scheme.zeros == "none":
        return Grid(_rounded_scale(torch.maximum(-low, high) * (2 / scheme.max_code), scale_dtype), None)
    scales = _rounded_scale((high - low) / scheme.max_code, scale_dtype)
    if scheme.zeros == "offset":
        return Grid(scales, low.to(scale_dtype).to(low.dtype))
    zeros = -low / scales
    if scheme.zeros == "int":
        return Grid(scales, zeros.round().clamp(0, scheme.max_code))
    return Grid(scales, zeros.to(scale_dtype).to(low.dtype))


def _rounded_scale(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    stored = scales.to(scale_dtype).to(scales.dtype)
    if stored.device.type != "meta" and not bool(torch.isfinite(stored).all()):
        raise ArgumentError(
            f"a scale of {float(scales.max()):.3g} overflows {dtype_name(scale_dtype)} "
            f"(largest {torch.finfo(scale_dtype).max:.3g}); use scale_dtype=torch.float32, or smaller groups"
        )
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _group_error(groups: Tensor, scheme: QuantScheme, importance: Tensor | None) -> Callable[[Grid], Tensor]:
    def error(grid: Grid) -> Tensor:
        scales, zeros = grid.scales.unsqueeze(-1), None if grid.zeros is None else grid.zeros.unsqueeze(-1)
        difference = decode(encode(groups, scales, zeros, scheme), scales, zeros, scheme) - groups
        if importance is None:
            return difference.square().sum(-1)
        if importance.dim() == 2:
            return (difference.square() * importance).sum(-1)
        return (torch.einsum("...gi,gij->...gj", difference, importance) * difference).sum(-1)

    return error


def _cut_importance(importance: Tensor, start: int, stop: int, size: int) -> Tensor:
    """`[K]` -> `[groups, size]`; `[K, K]` -> `[groups, size, size]`, its blocks along the diagonal."""
    if importance.dim() == 1:
        return importance[start:stop].view(-1, size)
    blocks = importance[start:stop, start:stop].reshape((stop - start) // size, size, -1, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def checked_scale_dtype(scale_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, which may be given by name. Raises ArgumentError unless scales can be stored so."""
    found = dtype_named(scale_dtype) if isinstance(scale_dtype, str) else scale_dtype
    if scale_dtype is not None and found not in SCALE_DTYPES:
        raise ArgumentError(
            f"scale_dtype must be None (the weight's own 16-bit dtype, else float16), torch.float16, torch.bfloat16, "
            f"torch.float32, torch.float8_e8m0fnu or torch.float8_e4m3fn, got {scale_dtype!r}"
        )
    return found
