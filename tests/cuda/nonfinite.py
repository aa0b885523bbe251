"""Rows of x with infinities, NaN and numbers that overflow in a product with a code, for the emulator and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.strategies import random_weight

from .calls import DTYPES, Config
from .instances import ZEROS

INF, NAN = float("inf"), float("nan")
# Column: value. Both halves of K have some, so that parts of it do.
SPECIALS: tuple[dict[int, float], ...] = (
    {5: INF}, {5: -INF, 130: -INF}, {5: INF, 6: -INF}, {7: NAN, 5: INF}, {k: 1e36 for k in range(90)}, {3: 3e38},
    {3: -1e37, 70: 1e37}, {},
)  # fmt: skip
N, K = 71, 136


def rows(M: int, dtype: torch.dtype) -> Tensor:
    """x [M, K]: SPECIALS in turn. In fp16, which has no 1e36, its largest number."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    for m in range(M):
        for k, value in SPECIALS[m % len(SPECIALS)].items():
            x[m, k] = (
                value if dtype == torch.bfloat16 or abs(value) == INF or value != value else 6e4 if value > 0 else -6e4
            )
    return x.to(dtype)


def problems() -> Iterator[tuple[Config, QuantTensor, Tensor]]:
    """Each kernel and each kind of weight, with splits of K and an order of columns here and there."""
    kinds = [(bits, group, zeros) for bits in (4, 8) for group in ("g64", "g32") for zeros in ZEROS]
    configs = [
        Config("decode", 8, 1, 2), Config("decode", 16, 2, 1, splits=2), Config("decode", 32, 1, 2), Config("gemm", 32),
        Config("gemm", 64, splits=2), Config("gemm_sm90", 16), Config("gemm_sm90", 64, splits=2), Config("gemm_sm90", 256),
    ]  # fmt: skip
    for number, (bits, group, zeros) in enumerate(kinds):
        for config in configs:
            if config == Config("gemm_sm90", 16) and (group == "g32" or zeros in ("_fzero", "_offset")):
                continue  # no such tile scales fragments
            ordered = number % 3 == 0 and config.path == "decode"
            weight: QuantTensor = random_weight(f"w{bits}a16_{group}{zeros}", N, K, act_order=ordered, seed=number)
            yield config, weight, rows(8, DTYPES[number % 2 if config.tokens < 32 else 1])
