"""`group_index`: which group each column of a weight is in, where groups are not neighbours (act-order).

Members of a group share scale and zero; each group has `group_size` of them, the last one the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import TensorError
from .scheme import QuantScheme
from .text import describe


def group_index_of(k_order: Tensor | None, in_features: int, scheme: QuantScheme) -> Tensor | None:
    """The int32 `[K]` group index (`[E, K]`) whose columns, sorted by group, come in `k_order` (the inverse of
    `QuantTensor.k_order`)."""
    if k_order is None:
        return None
    natural = natural_group_index(in_features, scheme, k_order.device).expand(k_order.shape)
    return torch.empty_like(k_order).scatter_(-1, k_order.long(), natural)


def natural_group_index(in_features: int, scheme: QuantScheme, device: torch.device | str = "cpu") -> Tensor:
    """int32 `[K]`: k // group_size."""
    return torch.arange(in_features, device=device, dtype=torch.int32) // scheme.group_length(in_features)


def validated_group_index(
    group_index: Tensor, in_features: int, scheme: QuantScheme, name: str = "group_index"
) -> Tensor | None:
    """Check a group index that came from outside; returns it as int32, or None where it is the natural one.

    Raises:
        TensorError: wrong dtype or shape, an entry outside 0 … G - 1, or a group with the wrong number of members.
    """
    groups = scheme.num_groups(in_features)
    if group_index.dtype not in (torch.int32, torch.int64) or tuple(group_index.shape) != (in_features,):
        raise TensorError(f"{name} must be int32 [K] = [{in_features}], got {describe(group_index)}")
    if in_features == 0:
        return None
    low, high = int(group_index.min()), int(group_index.max())
    if low < 0 or high >= groups:
        raise TensorError(f"{name} must lie in 0 … {groups - 1} (G={groups}), got {low if low < 0 else high}")
    length = scheme.group_length(in_features)
    counts = torch.bincount(group_index.long(), minlength=groups)
    expected = torch.full_like(counts, length)
    expected[-1] = in_features - length * (groups - 1)
    wrong = (counts != expected).nonzero().flatten()
    if len(wrong):
        g = int(wrong[0])
        raise TensorError(f"{name} gives group {g} {int(counts[g])} members, expected {int(expected[g])}")
    natural = natural_group_index(in_features, scheme, group_index.device)
    return None if torch.equal(group_index.int(), natural) else group_index.int()
