"""Forced configurations that together reach every instance of every kernel, on the smallest problems that do.

What is chosen by itself for small problems is a fraction of what ships. The emulator's tests run each instance once
(test_instances.py); on a GPU all of these calls run (tests/gpu/test_cuda.py).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.codebooks import CODEBOOKS
from qkernels.layouts import Layout, get_layout
from tests.ops.helpers import exact_product, integers
from tests.strategies import random_weight

from . import calls, calls_a8, emulator
from .calls import DTYPES, Config, in_room
from .emulator import Call

SCALES = (torch.float16, torch.bfloat16, torch.float32)
ZEROS = ("", "_asym", "_fzero", "_offset")
WGMMA_TOKENS = (16, 32, 64, 128, 256)
FAMILIES = (
    "decode", "gemm", "gemm_wgmma", "gemm_a8", "gemm_a8_wgmma", "quantize_tokens", "quantize_as", "mark_columns", "list_marked",
    "finish_a8", "stage", "reduce", "dequantize_tiles", "dequantize_planes",
)  # fmt: skip


@dataclass(frozen=True)
class Forced:
    """One call: N of a strip and a bit, K of three steps, five tokens; odd K is copied before the products of GEMM kernels."""

    scheme: str
    config: Config
    dtype: torch.dtype
    scales: torch.dtype = torch.float16
    K: int = 136
    N: int = 71
    M: int = 5

    def __str__(self) -> str:
        c = self.config
        scales = str(self.scales).removeprefix("torch.")
        return (
            f"{c.path}-{c.tokens}-{self.scheme}-{str(self.dtype).removeprefix('torch.')}-{scales}-K{self.K}-{c.splits}"
        )

    @property
    def layout(self) -> Layout:
        return get_layout("mma_tile_a8" if "a8" in self.config.path else "mma_tile")

    def weight(self) -> QuantTensor:
        made: QuantTensor = random_weight(self.scheme, self.N, self.K, dtype=self.scales, exact=True)
        if made.scheme.bits == 8 and made.scheme.codebook is not None:  # floats whose sums are exact
            values = torch.tensor(CODEBOOKS[made.scheme.codebook])
            few = torch.nonzero((values.abs() <= 16) & (values * 8 == (values * 8).round())).flatten()
            made = replace(made, codes=few[made.codes.long() % len(few)].to(torch.uint8))
        return made

    def x(self) -> Tensor:
        if "a8" in self.config.path:
            x = calls_a8.noise(self.M, self.K, self.dtype)
            x[self.M // 2, 7] = 8.0  # an outlier, where there is such a thing
            return in_room(x)
        return in_room(integers(self.M, self.K, dtype=self.dtype, most=1))

    def call(self) -> Call:
        return calls.multiply_call(self.weight(), self.x(), self.config, None, self.layout)

    def expected(self) -> Tensor:
        """y bit for bit. Where fragments are scaled, of weights that are rounded once to x's type."""
        weight, x, config = self.weight(), self.x(), self.config
        if "a8" in config.path:
            return calls_a8.expected(weight, x, splits=config.splits)
        if weight.scheme.codebook is not None:
            values = rounded(weight, x.dtype)
            if calls.scales_fragments(weight, config):
                values = values.to(x.dtype).double()
            of_table: Tensor = (x.double() @ values.T).to(x.dtype)
            return of_table
        exact: Tensor = exact_product(weight, x)
        if calls.scales_fragments(weight, config):
            scaled: Tensor = (x.double() @ weight.dequantize().to(x.dtype).double().T).to(x.dtype)
            return scaled
        return exact


def rounded(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    """float64 [N, K]: what the tensor cores multiply of a codebook's weight, whose table is rounded to x's type."""
    assert weight.scheme.codebook is not None
    table = torch.tensor(CODEBOOKS[weight.scheme.codebook]).to(dtype).double()
    values: Tensor = table[weight.codes.long()] * weight.scales.double()[:, weight.column_groups()]
    return values


def forced() -> Iterator[Forced]:
    """Every combination that a launcher tells apart, the plainest first."""
    kinds = list(product(("g64", "g32", "g16"), ZEROS, SCALES))
    for bits, dtype, (group, zeros, scales) in product((4, 8), DTYPES, kinds):
        scheme = f"w{bits}a16_{group}{zeros}"
        for tokens in (8, 16, 32):
            yield Forced(scheme, Config("decode", tokens, 1, 2), dtype, scales)
        if group == "g16":  # the others have no instance of their own for it
            continue
        for tokens in (32, 64, 128):
            yield Forced(scheme, Config("gemm", tokens), dtype, scales)
        for tokens in WGMMA_TOKENS[group == "g32" or zeros in ("_fzero", "_offset") :]:  # 16 do not scale fragments
            yield Forced(scheme, Config("gemm_sm90", tokens), dtype, scales)
    for scheme, dtype in product(("nf4_g64", "iq4nl_g32", "mxfp4_g32", "fp8_g64", "fp8_g32"), DTYPES):
        for tokens in (8, 32):
            yield Forced(scheme, Config("decode", tokens, 1, 2), dtype)
        yield Forced(scheme, Config("gemm", 64), dtype)
        yield Forced(scheme, Config("gemm_sm90", 64), dtype)
    for scheme, dtype in product(("q2_k", "w3a16_g64", "q4_k", "q6_k", "w5a16_g64", "iq4_xs"), DTYPES):
        yield Forced(scheme, Config("decode", 8, 1, 2), dtype)
        yield Forced(scheme, Config("gemm", 64), dtype)
        yield Forced(scheme, Config("gemm_sm90", 64), dtype)
    for tokens in (64, 128):
        yield Forced("w4a16_g64", Config("gemm", tokens, half_accumulate=True), torch.float16)
    for bits, group, tokens in product((4, 8), ("g64", "g32"), (32, 64, 128)):
        yield Forced(f"w{bits}a8_{group}", Config("gemm_a8", tokens), torch.bfloat16)
        if tokens > 32:
            yield Forced(f"w{bits}a8_{group}", Config("gemm_a8_sm90", tokens), torch.bfloat16)
    for bits in (4, 8):
        yield Forced(f"w{bits}a8_channel", Config("gemm_a8_sm90", 256), torch.float16)
    for dtype in DTYPES:  # a copy of x and the sums of parts; and parts in a cluster
        yield Forced("w4a16_g64", Config("gemm", 32, splits=2), dtype, K=133)
        yield Forced("w4a16_g64", Config("gemm_sm90", 64, splits=2), dtype)
        yield Forced("w8a8_g64", Config("gemm_a8", 32, splits=2), dtype)
        for act, path in product(("8z", "8o6", "8s", "8sz"), ("gemm_a8", "gemm_a8_sm90")):
            yield Forced(f"w4a{act}_g64", Config(path, 64), dtype)


def shipped() -> set[str]:
    """The mangled name of each kernel that is in the host build, which is what nvcc compiles."""
    done = subprocess.run(
        ["nm", "--defined-only", emulator.build(calls.UNIT, "module")], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in done.stdout.splitlines() if not line.endswith(".cold")}
    found = {name: re.match(r"_ZN8qkernels4cuda(\d+)(\w+)", name) for name in names}
    return {name for name, match in found.items() if match and match[2][: int(match[1])] in FAMILIES}


def kernels_of(call: Call) -> list[str]:
    return [launch.kernel for launch in emulator.record(calls.UNIT, call)]
