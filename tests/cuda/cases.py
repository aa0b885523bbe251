"""Small problems that together pass through every kernel and configuration, with numbers that make every sum exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from tests.ops.helpers import exact_product, integers
from tests.strategies import random_weight

from .calls import Config, decode, gemm, in_room, multiply_call
from .emulator import Call


def exact_weight(scheme_name: str, N: int, K: int, ordered: bool = False, seed: int = 1) -> QuantTensor:
    """Random codes; scales 1/4, 1/2, 1 and -1/2; zero points and offsets that are multiples of 1/8 of a scale's unit."""
    scheme = QuantScheme.parse(scheme_name)
    if scheme.factors is not None:
        return random_weight(scheme, N, K, seed, ordered, exact=True)
    generator = torch.Generator().manual_seed(seed)
    G, length = scheme.num_groups(K), scheme.group_length(K)
    codes = torch.randint(0, 2**scheme.bits, (N, K), generator=generator).to(torch.uint8)
    scales = torch.tensor([0.25, 0.5, 1.0, -0.5])[torch.randint(0, 4, (N, G), generator=generator)].half()
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, 2**scheme.bits, (N, G), generator=generator)
        zeros = zeros.to(torch.uint8) if scheme.zeros == "int" else zeros.half() / 2
    index = None
    if ordered:
        index = (torch.arange(K) // length)[torch.randperm(K, generator=generator)].int()
    return QuantTensor(codes, scales, zeros, index, scheme)


@dataclass(frozen=True)
class Case:
    scheme: str
    M: int
    N: int
    K: int
    config: Config
    dtype: torch.dtype = torch.float16
    ordered: bool = False
    bias: bool = False

    def __str__(self) -> str:
        c = self.config
        return f"{c.path}{c.tokens}-{self.scheme}-M{self.M}-{'ordered-' if self.ordered else ''}{c.splits}splits"

    def call(self) -> tuple[Call, Tensor]:
        """A fresh call and the right y."""
        weight = exact_weight(self.scheme, self.N, self.K, self.ordered)
        # fp16 accumulators hold 64 products of a code exactly as long as they stay below 2048.
        x = integers(self.M, self.K, dtype=self.dtype, most=1 if self.config.half_accumulate else 3)
        bias = integers(self.N, dtype=self.dtype) if self.bias else None
        return multiply_call(weight, in_room(x), self.config, bias), exact_product(weight, x, bias)


BF16 = torch.bfloat16
CASES = (
    Case("w4a16_g64", 3, 100, 160, decode(3, warps_n=2, splits=2), bias=True),
    Case("w4a16_g128", 8, 130, 512, decode(8, warps_n=1), BF16),
    Case("w8a16_g32_asym", 9, 70, 131, decode(9, warps_n=8), BF16),
    Case("w4a16_g16_fzero", 20, 192, 256, decode(20, warps_n=4, splits=2), ordered=True, bias=True),
    Case("w4a16_g16", 33, 130, 200, gemm(32, splits=2)),
    Case("w4a16_g64_asym", 65, 65, 576, gemm(64)),
    Case("w8a16_channel_asym", 40, 150, 130, gemm(64), BF16, ordered=True, bias=True),
    Case("w4a16_g128_offset", 130, 64, 640, gemm(128, splits=2), bias=True),
    Case("w8a16_g64_fzero", 20, 64, 448, gemm(128), BF16),
    Case("w4a16_g64", 40, 64, 256, gemm(64, half_accumulate=True)),
    Case("q4_k", 5, 70, 320, Config("decode", 8, 2, 4), BF16),
    Case("q6_k", 40, 65, 320, gemm(64), ordered=True),
)
