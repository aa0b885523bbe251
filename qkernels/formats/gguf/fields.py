"""Fields of blocks: halves, nibbles, 2-bit fields and single bits, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def half(blocks: Tensor, at: int) -> Tensor:
    """float16 `[n, 1]`: the number at a byte of each block, bit for bit."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def raw(numbers: Tensor) -> Tensor:
    """uint8: the bytes of what `half` reads."""
    # Not contiguous(): where there is one number a row it would leave the strides of a transpose.
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def words(data: Tensor, width: int) -> Tensor:
    """int64 `[n, bytes / width]`: unsigned little-endian numbers of 2 or 4 bytes."""
    parts = data.reshape(len(data), -1, width).long()
    return sum((parts[..., i] << (8 * i) for i in range(width)), torch.zeros_like(parts[..., 0]))


def shifted(data: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """`[n, S, W]` of `[n, W]`: each number at several shifts, masked."""
    by = torch.tensor(shifts, dtype=data.dtype, device=data.device)
    return (data[:, None, :] >> by[:, None]) & mask


def gathered(fields: Tensor, shifts: Sequence[int]) -> Tensor:
    """`[n, W]` of `[n, S, W]`: the way back from `shifted`."""
    by = torch.tensor(shifts, dtype=fields.dtype, device=fields.device)
    parts = (fields << by[:, None]).unbind(1)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole


def low_high(nibbles: Tensor) -> Tensor:
    """uint8 `[n, 2 W]` of `[n, W]`: all low nibbles, then all high ones."""
    return torch.cat([nibbles & 15, nibbles >> 4], dim=1)


def from_low_high(codes: Tensor) -> Tensor:
    """The way back from `low_high`; bits above the fourth are dropped."""
    low, high = (codes & 15).chunk(2, dim=1)
    return low | (high << 4)
