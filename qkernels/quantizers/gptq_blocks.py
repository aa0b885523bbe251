"""GPTQ for formats whose scales are found block by block by a search of their own: GGUF's types.

The sweep and its sources are those of `gptq.py`. A block's scales cannot be fitted column by column, so a search fits them: to
the columns as they are when the sweep reaches the block, which have then taken in the errors of all columns before; or to the
weight as it came, for all blocks beforehand, and the sweep goes by falling energy. Then rounds of coordinate descent follow
(for codes: Behdin et al. 2023, QuantEase): each group in turn takes the small scales and minima, and each column the codes, that
are best beside all others, which never raises the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from .gptq import (
    check_finite,
    check_hessian,
    column_importance,
    column_order,
    column_slices,
    inverse_factor,
    without_dead_columns,
)
from .grid import checked_weight

BlockOrder = Literal["natural", "energy"]


class Grid(Protocol):
    """The scales of some blocks side by side, of N rows and n columns."""

    def round(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes `[N]` and values `[N]` of column `index` of it."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        ...

    @property
    def shifts(self) -> Sequence[tuple[int, int]]:
        """How the scales of a group may be moved, not at all first; () where they may not."""
        ...

    def shifted(self, group: int, codes: Tensor, by: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """First, values `[group, N]` of codes `[group, N]` of a group with its scales moved."""
        ...

    def move(self, group: int, by: Tensor) -> None:
        """Move them, in place, by int64 `[2, N]`."""
        ...

    def blocks(self, codes: Tensor) -> Tensor:
        """uint8 `[N, bytes]` of codes `[N, n]`."""
        ...


# Columns `[N, n]`, and what a unit of squared error in each costs `[n]`, to the scales that suit them.
GridSearch = Callable[[Tensor, Tensor], Grid]


def gptq_blocks(
    weight: Tensor,
    hessian: Tensor,
    search: GridSearch,
    elements: int,
    order: BlockOrder = "energy",
    damping: float = 0.01,
    rounds: int = 3,
    name: str = "weight",
) -> Tensor:
    """Blocks of a weight `[N, K]`, given the Hessian `[K, K]` of its inputs (`InputStatistics.hessian`).

    Args:
        search: finds the scales of blocks.
        elements: columns of a block; K is a multiple.
        order: "natural": from left to right, each block searched when the sweep reaches it. "energy": by falling input energy,
            with all scales found beforehand.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        rounds: of coordinate descent.

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        ArgumentError: the weight or the Hessian has the wrong shape, dtype or values.
        CalibrationError: the Hessian is not positive definite with 100 times the damping.
    """
    if order not in get_args(BlockOrder):
        raise ArgumentError(f'order must be "natural" or "energy", got {order!r}')
    if rounds < 0:
        raise ArgumentError(f"rounds must be 0 or more, got {rounds}")
    values = checked_weight(weight, name).to(hessian.dtype)
    check_hessian(values, hessian, name)
    check_finite(hessian, name)
    count = values.shape[1]
    if elements < 1 or count % elements:
        raise ArgumentError(f"{name} must have a multiple of {elements} columns, got {count}")
    live = without_dead_columns(hessian)
    places = column_order(live.diagonal(), "none" if order == "natural" else "static")
    factor = inverse_factor(live[places][:, places], damping, name)
    grid = _Grids([], elements if order == "natural" else count)
    codes, rounded = _sweep(values, factor, places, search, order, grid)
    live = live + live.diagonal().mean() * damping * torch.eye(count, dtype=live.dtype, device=live.device)
    original = values.T.contiguous()
    for _ in range(rounds):
        moved = _refit(original, live, codes, rounded, grid)
        if not _descend(original, live, codes, rounded, grid) and not moved:
            break
    return grid.blocks(codes)


class _Grids:
    """Those of all columns, side by side, each of the same width."""

    def __init__(self, grids: list[Grid], width: int) -> None:
        self.grids, self.width = grids, width

    def round(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return self.grids[index // self.width].round(column, index % self.width)

    def blocks(self, codes: Tensor) -> Tensor:
        parts = codes.split(self.width)
        return torch.cat([grid.blocks(part.T) for grid, part in zip(self.grids, parts, strict=True)], dim=1)


def _sweep(
    values: Tensor, factor: Tensor, places: Tensor, search: GridSearch, order: BlockOrder, grid: _Grids
) -> tuple[Tensor, Tensor]:
    """Codes and values `[K, N]` in natural order; fills `grid`."""
    importance = column_importance(factor)
    columns = values.T[places].contiguous()  # [K, N]
    codes, found = torch.empty_like(columns), torch.empty_like(columns)
    if order == "energy":
        natural = torch.empty_like(importance)
        natural[places] = importance
        grid.grids.append(search(values, natural))
    at = places.tolist()
    for part in column_slices(len(columns), grid.width if order == "natural" else len(columns)):
        errors = torch.empty_like(columns[part])
        for i in range(part.start, part.stop):
            if order == "natural" and i % grid.width == 0:
                cut = slice(i, i + grid.width)
                grid.grids.append(search(columns[cut].T, importance[cut]))
            codes[at[i]], found[at[i]] = grid.round(columns[i], at[i])
            error = (columns[i] - found[at[i]]) / factor[i, i]
            columns[i + 1 : part.stop].addr_(factor[i, i + 1 : part.stop], error, alpha=-1)
            errors[i - part.start] = error
        columns[part.stop :].addmm_(factor[part, part.stop :].T, errors, alpha=-1)
    return codes, found


def _refit(values: Tensor, hessian: Tensor, codes: Tensor, found: Tensor, grid: _Grids) -> bool:
    """One round over all groups, in place: the small scales that are best for the codes; whether any moved."""
    changed = False
    for start, part in zip(range(0, len(values), grid.width), grid.grids, strict=True):
        for group in range(grid.width // part.group if part.shifts else 0):
            cut = slice(start + group * part.group, start + (group + 1) * part.group)
            slope, among = hessian[cut] @ (found - values), hessian[cut, cut]
            best, chosen = torch.zeros_like(slope[0]), torch.zeros_like(slope[0], dtype=torch.int64)
            for index, by in enumerate(part.shifts[1:], 1):
                step = part.shifted(group, codes[cut], by)[0].to(found.dtype) - found[cut]
                error = (step * (2 * slope + among @ step)).sum(0)
                chosen, best = torch.where(error < best, index, chosen), torch.where(error < best, error, best)
            if bool(chosen.any()):
                changed = True
                part.move(group, torch.tensor(part.shifts, device=chosen.device)[chosen].T)
                found[cut] = part.shifted(group, codes[cut], (0, 0))[0].to(found.dtype)
    return changed


def _descend(values: Tensor, hessian: Tensor, codes: Tensor, found: Tensor, grid: _Grids) -> bool:
    """One round over all columns, in place; whether any code changed."""
    changed = False
    for part in column_slices(len(values), len(values)):
        slope = hessian[part] @ (found - values)  # [columns of the part, N]
        for i in range(part.start, part.stop):
            at = i - part.start
            code, value = grid.round(found[i] - slope[at] / hessian[i, i], i)
            moved = value - found[i]
            slope.addr_(hessian[part, i], moved)
            changed |= bool(moved.any())
            codes[i], found[i] = code, value
    return changed
