"""Calls of the lab's own kernel with integers, so that every sum is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from ..emulator import Call

COLUMNS = 32


def sample_call(M: int = 21, K: int = 128) -> tuple[Call, Tensor]:
    """The call and the right y; y starts as NaN, so that an element nobody writes shows."""
    generator = torch.Generator().manual_seed(1000 * M + K)
    x = torch.randint(-8, 8, (M, K), generator=generator).half()
    w = torch.randint(-8, 8, (COLUMNS, K), generator=generator).half()
    y = torch.full((M, COLUMNS), float("nan"))
    return Call("sample", {"x": x, "w": w, "y": y}, {"M": M, "K": K}), x.float() @ w.float().T


def wrappers_call(rounds: int = 200) -> Call:
    """Random inputs for every wrapper; `out` starts full of ones. See wrappers.cuh for what the inputs are."""
    generator = torch.Generator().manual_seed(7)
    anything = torch.randint(-(2**31), 2**31, (rounds, 3, 32), generator=generator).int()
    # An exponent of ones (infinity, NaN) in either half, of fp16 or of bf16, loses a bit of it.
    for shift in (0, 16):
        exponent = (anything >> shift) & 0x7C00
        anything = torch.where(exponent == 0x7C00, anything & ~(0x4000 << shift), anything)
    small = torch.randint(-8, 9, (rounds, 6, 32, 2), generator=generator).half().view(torch.int32)[..., 0]
    inputs = torch.cat([anything, small], dim=1).contiguous()
    return Call(
        "wrappers", {"in": inputs, "out": torch.full((rounds, 48, 32), -1, dtype=torch.int32)}, {"rounds": rounds}
    )
