"""GPTQ: quantize column by column, and let the columns still to come make up for each rounding error.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022). Section numbers below are that paper's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError, CalibrationError
from ..group_index import validated_group_index
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from .awq import AWQ
from .grid import Clip, Grid, assemble, checked_weight, decode, encode, fit, stored_dtype
from .options import Needs, Options, ScaleSearch

ActOrder = Literal["none", "group", "static"]
Scales = Literal["none", "awq"]
Aim = Literal["layer", "model"]

# Columns whose updates of everything to their right are applied in one matrix product (section 4, step 2: B = 128).
BLOCK_COLUMNS = 128

# The first damping that makes the Hessian positive definite is used: the asked one, then 10 and 100 times as much.
DAMPING_STEPS = (1, 10, 100)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQ(Options):
    """GPTQ. Options as in `Options`, and:

    Args:
        act_order: in which order columns are quantized, and what the groups are.
            "none": from left to right.
            "group": by falling input energy, and groups are formed in that order: columns of like energy share a scale.
            The result has a `group_index`.
            "static": by falling input energy, in natural groups whose grid is fixed beforehand; "group" means that for
            floats of 4 and 8 bits, blocks and products (`fixes_groups`).
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        clip: "mse" (the default) weights each column's error by what it costs after the later columns have made up for it.
        scales: "awq" first scales the input channels that matter up, as `AWQ` does, and folds the scales into the norm or linear
            layer before: the least error of all methods here (docs/decisions/0032), in the time of both.
        aim: "layer": each linear layer shall put out what its float weight makes of its inputs as the quantized layers before
            it leave them. "model": what the model as it came puts out there, so that later layers make up for earlier ones
            (Li, Zhang, Cao et al.: "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025,
            section 4; here in closed form, see `aimed`). Linear layers that see some tokens only, and blocks that pass on more
            than hidden states, aim at the layer either way. Twice the activations, one more pass through the model.

    Raises:
        SchemeError, ArgumentError: an option is out of range.

    >>> from qkernels import GPTQ
    >>> method = GPTQ(bits=3, group_size=64, act_order="static")
    >>> str(method.scheme)
    'w3a16_g64'
    >>> # quantize(model, method, calibration=[text], save_to="out/")
    >>> best = GPTQ(symmetric=False, scales="awq")
    """

    needs: ClassVar[Needs] = "moments"

    clip: Clip = "mse"
    act_order: ActOrder = "group"
    damping: float = 0.01
    scales: Scales = "none"
    aim: Aim = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_order not in get_args(ActOrder):
            raise ArgumentError(f'act_order must be "none", "group" or "static", got {self.act_order!r}')
        if self.scales not in get_args(Scales):
            raise ArgumentError(f'scales must be "none" or "awq", got {self.scales!r}')
        if self.aim not in get_args(Aim):
            raise ArgumentError(f'aim must be "layer" or "model", got {self.aim!r}')
        if not (isinstance(self.damping, (int, float)) and 0 < self.damping <= 1):
            raise ArgumentError(
                f"damping is a share of the Hessian's mean diagonal and must be in (0, 1], got {self.damping!r}"
            )

    def scale_search(self) -> ScaleSearch | None:
        """AWQ's, for scales="awq"."""
        return AWQ(scale_dtype=self.scale_dtype).with_scheme(self.scheme) if self.scales == "awq" else None

    @property
    def aims(self) -> bool:
        """With aim="model"."""
        return self.aim == "model"

    def aimed(self, weight: Tensor, moments: Tensor, cross: Tensor, name: str = "weight") -> Tensor:
        """`W + W C (H + λI)⁻¹`, with C `cross` and H `moments`: of all real W' the one with the least `‖W' x̂ - W x‖²` over the
        tokens. What GPTQ then minimizes for it, `‖(Ŵ - W') x̂‖²`, differs from `‖Ŵ x̂ - W x‖²` by a constant (but for the
        damping λ).

        Raises:
            CalibrationError: as for `quantize`.
        """
        factor = inverse_factor(without_dead_columns(moments), self.damping, name)
        return weight + weight.to(cross.dtype) @ cross @ factor.T @ factor

    def with_one_order(self) -> GPTQ:
        """See `Options.with_one_order`: groups that are static need no order of columns in what is stored."""
        return replace(self, act_order="static") if self.orders_columns else self

    @property
    def fixes_groups(self) -> bool:
        """Whether groups are natural ones whose grid is fixed before any column is rounded: act_order="static"; one group; floats
        (e2m1, e4m3), which no file of others has in another order of columns; blocks and products, whose scales belong to
        neighbours that have their turn at other times."""
        scheme = self.scheme
        shared = scheme.rows > 1 or scheme.factors is not None or scheme.codebook in ("e2m1", "e4m3")
        return self.act_order == "static" or not isinstance(scheme.group_size, int) or shared

    @property
    def orders_columns(self) -> bool:
        """With act_order="group", but where groups are fixed."""
        return self.act_order == "group" and not self.fixes_groups

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[N, K]` given the Hessian of its inputs, their second moments `[K, K]`
        (`InputStatistics.hessian`).

        The arithmetic is that of the Hessian's dtype (fp32 or fp64). A column whose input was 0 for every token is rounded
        to nearest: nothing says that it stays silent on other text.

        Raises:
            ArgumentError: the weight or the Hessian has the wrong shape, dtype or values.
            CalibrationError: the Hessian is not positive definite with 100 times the damping.
        """
        if moments is None:
            raise ArgumentError(
                f"GPTQ needs the Hessian of {name}'s inputs, [K, K] (InputStatistics.hessian), got None; RTN needs none"
            )
        hessian = moments
        values = checked_weight(weight, name).to(hessian.dtype)
        check_hessian(values, hessian, name)
        scheme, scale_dtype = self.scheme, stored_dtype(weight, self.scale_dtype, self.scheme)
        live = without_dead_columns(hessian)
        order = column_order(live.diagonal(), self.act_order)
        factor = inverse_factor(live[order][:, order], self.damping, name)

        columns = values.T[order].contiguous()  # [K, N]: a column of the weight is contiguous
        if self.fixes_groups:
            grid, groups = self._fixed_grid(values, factor, order, scale_dtype)
            codes = _sweep(columns, factor, scheme, grid, groups[order])
        else:
            codes, grid = _sweep_fitting(columns, factor, scheme, scale_dtype, self.clip)
            groups = torch.empty_like(order)
            groups[order] = torch.arange(len(order), device=order.device) // scheme.group_length(len(order))
        natural = torch.empty_like(codes)
        natural[order] = codes
        group_index = validated_group_index(groups.int(), len(order), scheme)
        return assemble(natural.T.contiguous(), grid, scheme, scale_dtype, group_index)

    def _fixed_grid(
        self, values: Tensor, factor: Tensor, order: Tensor, scale_dtype: torch.dtype
    ) -> tuple[Grid, Tensor]:
        """The grid of natural groups of the weight as it came, and the group of every column."""
        importance = torch.empty_like(factor.diagonal())
        importance[order] = column_importance(factor)
        grid = fit(values, self.scheme, scale_dtype, self.clip, importance)
        groups = torch.arange(len(order), device=order.device) // self.scheme.group_length(len(order))
        return grid, groups


def inverse_factor(hessian: Tensor, damping: float, name: str = "weight") -> Tensor:
    """Upper triangular U `[K, K]` with `Uᵀ U = (H + λI)⁻¹`: section 4, step 3.

    The paper inverts H and factors the inverse. The same U comes from one factorization: with `H = R Rᵀ`, R upper
    triangular (the Cholesky factor of H read from the last row and column), `U = R⁻¹`. That is half the work, and only H
    itself has to be positive definite, not its rounded inverse.

    Raises:
        CalibrationError: H is not positive definite with 100 times the damping.
    """
    mean = hessian.diagonal().mean()
    for step in DAMPING_STEPS:
        damped = hessian.clone()
        damped.diagonal().add_(mean * min(damping * step, 1.0))
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            if step > 1:
                log.warning("%s: the Hessian needed a damping of %.3g instead of %.3g", name, damping * step, damping)
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor
    raise CalibrationError(
        f"the Hessian of {name} is not positive definite with a damping of {min(damping * DAMPING_STEPS[-1], 1.0):g}; "
        f"give more or other calibration text, a larger damping, or use RTN for this layer"
    )


def _sweep(columns: Tensor, factor: Tensor, scheme: QuantScheme, grid: Grid, groups: Tensor) -> Tensor:
    """Codes `[K, N]` of columns in processing order, on a grid that is fixed; groups `[K]`: the group of each column."""
    scales = grid.scales.T.contiguous()  # [G, N]
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    codes = torch.empty_like(columns)
    for block in column_slices(len(columns), len(columns)):
        errors = torch.empty_like(columns[block])
        for i, group in zip(range(block.start, block.stop), groups[block].tolist(), strict=True):
            zero = None if zeros is None else zeros[group]
            errors[i - block.start] = _quantize_column(
                columns, codes, factor, scheme, scales[group], zero, i, block.stop
            )
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return codes


def _sweep_fitting(
    columns: Tensor, factor: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, clip: Clip
) -> tuple[Tensor, Grid]:
    """The same, fitting the grid of a group to its columns as they are when its turn comes (section 4, "Additional
    considerations": grouping)."""
    length = scheme.group_length(len(columns))
    importance = column_importance(factor)
    codes = torch.empty_like(columns)
    grids: list[Grid] = []
    scales, zeros = columns[:0], None
    for block in column_slices(len(columns), length):
        errors = torch.empty_like(columns[block])
        for i in range(block.start, block.stop):
            if i % length == 0:
                members = columns[i : i + length].T
                grids.append(fit(members, scheme, scale_dtype, clip, importance[i : i + length]))
                scales = grids[-1].scales[:, 0].contiguous()
                zeros = None if grids[-1].zeros is None else grids[-1].zeros[:, 0].contiguous()
            errors[i - block.start] = _quantize_column(columns, codes, factor, scheme, scales, zeros, i, block.stop)
        columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    all_zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return codes, Grid(torch.cat([grid.scales for grid in grids], 1), torch.cat(all_zeros, 1) if all_zeros else None)


def _quantize_column(
    columns: Tensor,
    codes: Tensor,
    factor: Tensor,
    scheme: QuantScheme,
    scales: Tensor,
    zeros: Tensor | None,
    i: int,
    stop: int,
) -> Tensor:
    """Round column i and take its error out of the columns up to `stop` (section 3.1, equation 2); returns the error `[N]`
    in units of U_ii, which is what the columns after `stop` still have to be told."""
    column = columns[i]
    codes[i] = encode(column, scales, zeros, scheme)
    error = (column - decode(codes[i], scales, zeros, scheme)) / factor[i, i]
    columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
    return error


def column_slices(columns: int, group_length: int) -> Iterator[slice]:
    """Cut the columns so that a group starts only where every earlier update has arrived: a block is a whole number of
    groups or lies within one."""
    step = BLOCK_COLUMNS // group_length * group_length if group_length <= BLOCK_COLUMNS else group_length
    for outer in range(0, columns, step):
        for start in range(outer, min(outer + step, columns), BLOCK_COLUMNS):
            yield slice(start, min(start + BLOCK_COLUMNS, outer + step, columns))


def column_importance(factor: Tensor) -> Tensor:
    """`[K]`: what a unit of squared error in a column costs once the columns after it have made up for it (equation 1)."""
    return factor.diagonal().square().reciprocal()


def column_order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def without_dead_columns(hessian: Tensor) -> Tensor:
    """An input that was always 0 has a zero row and column. With a positive diagonal it takes part in nothing."""
    dead = hessian.diagonal() == 0
    if not bool(dead.any()):
        return hessian
    live = hessian.clone()
    mean = hessian.diagonal()[~dead].mean() if not bool(dead.all()) else torch.ones_like(hessian[0, 0])
    live.diagonal()[dead] = mean  # the mean: the damping, a share of the mean diagonal, stays what it was
    return live


def check_hessian(weight: Tensor, hessian: Tensor, name: str) -> None:
    K = weight.shape[-1]
    if weight.dim() != 2:
        raise ArgumentError(f"GPTQ takes a weight [N, K], got {name} {list(weight.shape)}; quantize experts one by one")
    if list(hessian.shape) != [K, K] or hessian.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(
            f"the Hessian of {name} must be float32 or float64 [K, K] = {[K, K]}, got {hessian.dtype} {list(hessian.shape)}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            f"the Hessian of {name} has NaN or infinite entries; check the activations of this layer"
        )
