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
from .native import round_columns, takes
from .options import Needs, Options, Rounding, ScaleSearch

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
        check_hessian(checked_weight(weight, name), moments, name)
        return self.for_inputs(moments, name=name)(weight, name)

    def for_inputs(self, moments: Tensor, cross: Tensor | None = None, name: str = "weight") -> Rounding:
        """See `Options.for_inputs`: the Hessian is factored once.

        Raises:
            CalibrationError: as for `quantize`.
        """
        prepared, towards = self.prepared(moments, name), cross if self.aims else None

        def rounding(weight: Tensor, name: str) -> QuantTensor:
            values = checked_weight(weight, name).to(moments.dtype)
            scale_dtype = stored_dtype(weight, self.scale_dtype, self.scheme)
            return self._rounded(
                aimed(values, prepared, towards) if towards is not None else values, prepared, scale_dtype
            )

        return rounding

    def prepared(self, moments: Tensor, name: str = "weight") -> Prepared:
        """What hangs on the Hessian alone.

        Raises:
            CalibrationError: the Hessian is not positive definite with 100 times the damping, or not finite.
        """
        check_finite(moments, name)
        live = without_dead_columns(moments)
        order = column_order(live.diagonal(), self.act_order)
        return Prepared(order, triangle(live, order, self.damping, name))

    def _rounded(self, values: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> QuantTensor:
        scheme, order, factor = self.scheme, prepared.order, prepared.factor
        columns = values.T.index_select(0, order)  # [K, N]: a column of the weight is contiguous
        if self.fixes_groups:
            grid, groups = self._fixed_grid(values, prepared, scale_dtype)
            codes = _sweep(columns, factor, scheme, grid, groups[order])
        else:
            codes, grid = _sweep_fitting(columns, factor, scheme, scale_dtype, self.clip)
            groups = torch.empty_like(order)
            groups[order] = torch.arange(len(order), device=order.device) // scheme.group_length(len(order))
        natural = torch.empty_like(codes)
        natural[order] = codes
        group_index = validated_group_index(groups.int(), len(order), scheme)
        return assemble(natural.T.contiguous(), grid, scheme, scale_dtype, group_index)

    def _fixed_grid(self, values: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> tuple[Grid, Tensor]:
        """The grid of natural groups of the weight as it came, and the group of every column."""
        order, importance = prepared.order, torch.empty_like(prepared.factor.diagonal())
        importance[order] = prepared.factor.diagonal().square()
        grid = fit(values, self.scheme, scale_dtype, self.clip, importance)
        groups = torch.arange(len(order), device=order.device) // self.scheme.group_length(len(order))
        return grid, groups


@dataclass(frozen=True)
class Prepared:
    """What GPTQ takes from a Hessian H.

    Args:
        order: int64 `[K]`, the columns in the order in which they are quantized.
        factor: `[K, K]`, upper triangular R with `H + λI = R Rᵀ` in that order. `R⁻¹` is what the paper calls Cholesky(H⁻¹)ᵀ
            (section 4, step 3); a column's diagonal squared is what a unit of squared error in it costs once the columns after
            it have made up for it (equation 1).
    """

    order: Tensor
    factor: Tensor


def triangle(hessian: Tensor, order: Tensor, damping: float, name: str = "weight") -> Tensor:
    """`Prepared.factor`: the Cholesky factor of H read from the last row and column.

    Raises:
        CalibrationError: H is not positive definite with 100 times the damping.
    """
    backwards = order.flip(0)
    damped = hessian.index_select(0, backwards).index_select(1, backwards)
    diagonal = damped.diagonal().clone()
    mean = hessian.diagonal().mean()
    for step in DAMPING_STEPS:
        damped.diagonal().copy_(diagonal + mean * min(damping * step, 1.0))
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            if step > 1:
                log.warning("%s: the Hessian needed a damping of %.3g instead of %.3g", name, damping * step, damping)
            factor: Tensor = lower.flip(0, 1)
            return factor
    raise CalibrationError(
        f"the Hessian of {name} is not positive definite with a damping of {min(damping * DAMPING_STEPS[-1], 1.0):g}; "
        f"give more or other calibration text, a larger damping, or use RTN for this layer"
    )


def aimed(weight: Tensor, prepared: Prepared, cross: Tensor) -> Tensor:
    """`W + W C (H + λI)⁻¹`, with C `cross`: of all real W' the one with the least `‖W' x̂ - W x‖²` over the tokens. What GPTQ then
    minimizes for it, `‖(Ŵ - W') x̂‖²`, differs from `‖Ŵ x̂ - W x‖²` by a constant (but for the damping λ)."""
    order, factor = prepared.order, prepared.factor
    moved = (weight.to(cross.dtype) @ cross)[:, order]
    moved = torch.linalg.solve_triangular(factor.T, moved, upper=False, left=False)
    result = weight.to(cross.dtype, copy=True)
    result[:, order] += torch.linalg.solve_triangular(factor, moved, upper=True, left=False)
    return result


def inverse_factor(hessian: Tensor, damping: float, name: str = "weight") -> Tensor:
    """Upper triangular U `[K, K]` with `Uᵀ U = (H + λI)⁻¹`: section 4, step 3.

    The paper inverts H and factors the inverse. `U = R⁻¹` (`Prepared.factor`) is the same from one factorization: less work, and
    only H itself has to be positive definite, not its rounded inverse.

    Raises:
        CalibrationError: as for `triangle`.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    return _inverse(triangle(hessian, order, damping, name))


def _inverse(factor: Tensor) -> Tensor:
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse


def _sweep(columns: Tensor, factor: Tensor, scheme: QuantScheme, grid: Grid, groups: Tensor) -> Tensor:
    """Codes `[K, N]` of columns in processing order, on a grid that is fixed; groups `[K]`: the group of each column. Leaves in
    `columns` what they lost."""
    scales = grid.scales.T.contiguous()  # [G, N]
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for part in column_slices(len(columns), len(columns)):
        inverse = _inverse(factor[part, part])
        turned = _made_up(columns, factor, inverse, part)
        codes[part], values, _ = rounded_columns(turned, inverse, scheme, scales, zeros, groups[part])
        columns[part] -= values
    return codes


def _sweep_fitting(
    columns: Tensor, factor: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, clip: Clip
) -> tuple[Tensor, Grid]:
    """The same, fitting the grid of a group to its columns as they are when its turn comes (section 4, "Additional
    considerations": grouping)."""
    length = scheme.group_length(len(columns))
    importance = factor.diagonal().square()
    codes = torch.empty_like(columns, dtype=torch.uint8)
    grids: list[Grid] = []
    for span in group_spans(len(columns), length):
        inverse = _inverse(factor[span, span])
        turned = _made_up(columns, factor, inverse, span)
        for start in range(0, len(turned), length):
            members = slice(start, min(start + length, len(turned)))
            grids.append(fit(turned[members].T, scheme, scale_dtype, clip, importance[span][members]))
            scales, zeros = (None if t is None else t.T for t in (grids[-1].scales, grids[-1].zeros))
            assert scales is not None
            for first in range(members.start, members.stop, BLOCK_COLUMNS):
                part = slice(first, min(first + BLOCK_COLUMNS, members.stop))
                same = torch.zeros(part.stop - first, dtype=torch.int64, device=columns.device)
                here = slice(span.start + first, span.start + part.stop)
                codes[here], values, errors = rounded_columns(
                    turned[part], inverse[part, part], scheme, scales, zeros, same
                )
                columns[here] -= values
                turned[part.stop :].addmm_(inverse[part, part.stop :].T, errors, alpha=-1)
    all_zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return codes, Grid(torch.cat([grid.scales for grid in grids], 1), torch.cat(all_zeros, 1) if all_zeros else None)


def _made_up(columns: Tensor, factor: Tensor, inverse: Tensor, span: slice) -> Tensor:
    """Columns `[n, N]` as the errors of all before them leave them (section 3.1, equation 2).

    With Δ what the columns before lost, `‖Δ R‖²` is the error, and of the columns of R that belong to the span those before it
    have left `Δ R[:start, span]`, which the span makes up for by that times `R[span, span]⁻¹`. So no inverse of the whole of R is
    wanted, whose K³ operations took a quarter of the time (2048 x 5632).
    """
    if span.start == 0:
        return columns[span].clone()
    left = factor[: span.start, span].T @ columns[: span.start]
    return torch.addmm(columns[span], inverse.T, left)


def rounded_columns(
    columns: Tensor, factor: Tensor, scheme: QuantScheme, scales: Tensor, zeros: Tensor | None, groups: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns one by one and take the error of each out of those after it (section 3.1, equation 2).

    Args:
        columns: `[n, N]`.
        factor: U `[n, n]`, upper triangular.
        scales, zeros: `[G, N]`.
        groups: int64 `[n]`.

    Returns:
        codes uint8, what they mean, and errors in units of U_ii, which is what columns after these still have to be told, each
        `[n, N]`.
    """
    if takes(columns, scheme):
        return round_columns(columns, factor, scales, zeros, groups, scheme.bits)
    columns, codes = columns.clone(), torch.empty_like(columns, dtype=torch.uint8)
    values, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, group in enumerate(groups.tolist()):
        zero = None if zeros is None else zeros[group]
        code = encode(columns[i], scales[group], zero, scheme)
        codes[i], values[i] = code, decode(code, scales[group], zero, scheme)
        errors[i] = (columns[i] - values[i]) / factor[i, i]
        columns[i + 1 :].sub_(torch.outer(factor[i, i + 1 :], errors[i]))  # not addr_, which rounds in one or two steps
    return codes, values, errors


def group_spans(columns: int, group_length: int) -> Iterator[slice]:
    """Cut the columns into whole groups, of `BLOCK_COLUMNS` or one group that is longer."""
    step = max(BLOCK_COLUMNS // group_length * group_length, group_length)
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


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
    """Raises ArgumentError where they do not belong together."""
    K = weight.shape[-1]
    if weight.dim() != 2:
        raise ArgumentError(f"GPTQ takes a weight [N, K], got {name} {list(weight.shape)}; quantize experts one by one")
    if list(hessian.shape) != [K, K] or hessian.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(
            f"the Hessian of {name} must be float32 or float64 [K, K] = {[K, K]}, got {hessian.dtype} {list(hessian.shape)}"
        )


def check_finite(hessian: Tensor, name: str) -> None:
    """Raises CalibrationError."""
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            f"the Hessian of {name} has NaN or infinite entries; check the activations of this layer"
        )
