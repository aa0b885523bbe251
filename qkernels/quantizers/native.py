"""The loops that GPTQ and every search for clipped ranges spend their time in, as ops in C++ on the CPU.

`round_columns` has the bits of `gptq.rounded_columns` without it; `clipped_grids` those of `grid.fit`, but that it adds up the
squared errors of a group in their order, which decides between ranges that are as good as each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .. import extension
from ..scheme import QuantScheme

MOST_COLUMNS: Final = 128  # of one call of `round_columns` (csrc/cpu/rounding.h)
MOST_MEMBERS: Final = 1024  # of a group of `clipped_grids`
_SCALE_TYPES: Final = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
)  # by their numbers in csrc/cpu/bindings_rounding.cpp
_LIBRARY: Final = Library("qkernels", "FRAGMENT")


def takes(values: Tensor, scheme: QuantScheme) -> bool:
    """Whether the ops compute this: float32 on the CPU, integer codes with zero points that are integers or all the same, and the
    extension is there."""
    plain = scheme.codebook is None and scheme.factors is None and scheme.zeros in ("none", "int")
    return plain and values.dtype == torch.float32 and values.device.type == "cpu" and extension.status().loaded


def round_columns(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns one by one, each error taken out of those after it. See `gptq.rounded_columns`.

    Args:
        columns: float32 `[n, N]`, n up to `MOST_COLUMNS`; a column of the weight is a row.
        factor: float32 `[n, n]`, upper triangular.
        scales, zeros: float32 `[G, N]`.
        groups: int64 `[n]`, the group of each column.

    Returns:
        codes uint8, what they mean, and errors in units of the factor's diagonal, each `[n, N]`.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.qkernels.round_columns(
        columns, factor, scales, zeros, groups, bits
    )
    return found


def fits(groups: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None) -> bool:
    """Whether `clipped_grids` takes groups `[..., G, size]`."""
    return (
        takes(groups, scheme)
        and scale_dtype in _SCALE_TYPES
        and 0 < groups.shape[-1] <= MOST_MEMBERS
        and (importance is None or (importance.dim() == 2 and importance.dtype == torch.float32))
    )


def clipped_grids(
    groups: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, shares: Sequence[float], importance: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """Scales and zeros `[..., G]` of groups `[..., G, size]`, each of the share of its range with the least squared error,
    weighted by importance `[G, size]`; None where a value is not finite, or a scale overflows its dtype."""
    rows = groups.reshape(-1, groups.shape[-1])
    zeros_too = scheme.zeros == "int"
    scales, zeros, wrong = torch.ops.qkernels.clipped_grids(
        rows, importance, torch.tensor(shares), scheme.bits, zeros_too, _SCALE_TYPES.index(scale_dtype)
    )
    if int(wrong) < len(rows):
        return None
    shape = groups.shape[:-1]
    return scales.view(shape), zeros.view(shape) if zeros_too else None


def _fake_columns(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns), torch.empty_like(columns)


def _fake_grids(
    groups: Tensor, importance: Tensor | None, shares: Tensor, bits: int, zeros_too: bool, scale_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(groups)
    return (
        groups.new_empty(1, rows),
        groups.new_empty(int(zeros_too), rows),
        groups.new_empty((1, 1), dtype=torch.int64),
    )


_LIBRARY.define(
    "round_columns(Tensor columns, Tensor factor, Tensor scales, Tensor? zeros, Tensor groups, int bits) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "clipped_grids(Tensor groups, Tensor? importance, Tensor shares, int bits, bool zeros_too, int scale_type) "
    "-> (Tensor, Tensor, Tensor)"
)
register_fake("qkernels::round_columns", _fake_columns, lib=_LIBRARY)
register_fake("qkernels::clipped_grids", _fake_grids, lib=_LIBRARY)
