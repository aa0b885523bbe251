"""Codes that are no integers on the CUDA kernels: every value in every place, every shape, scales of 8 bits, NVFP4's factors."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.codebooks import CODEBOOK_NUMBERS, CODEBOOKS, width_of
from tests.ops.helpers import assert_like_a_float_layer
from tests.strategies import random_weight

from . import calls, emulator
from .calls import DTYPES, Config, decode, gemm, gemm_sm90, in_room, rounding_of_fragments
from .cards import CARDS, SHARED
from .instances import rounded
from .test_heuristics import choose, shared_bytes
from .units import in_full

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))

SCHEMES = ("nf4_g64", "fp4_g32", "nf4_g16", "e2m1_g64", "mxfp4_g32", "iq4nl_g32", "fp8_channel", "fp8_g32", "e5m2_g64",
           "fp8_block128", "nvfp4_g16", "nvfp4m_g16")  # fmt: skip
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
NO_WGMMA = gemm(64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def coded(M: int, splits: int = 1, warps_n: int = 4) -> Config:
    """The configuration whose tokens fit M best, of those that there are for codebooks."""
    return Config("decode", 8 if M <= 8 else 32, warps_n, 8 // warps_n, splits) if M <= 32 else gemm(64, splits)


def configs(M: int, splits: int = 1) -> tuple[Config, Config]:
    """That, and a tile of gemm_sm90, whose instances differ in nothing else."""
    return coded(M, splits), gemm_sm90(64, splits)


def check(weight: QuantTensor, x: Tensor, y: Tensor, bias: Tensor | None = None, config: Config = NO_WGMMA) -> None:
    """Within fp32's rounding of K sums and of the products with scales, and y's own rounding; where fragments are scaled, theirs.
    Those of NVFP4 are exact: its factors of rows come later."""
    w = rounded(weight, x.dtype)
    expected = x.double() @ w.T + (0 if bias is None else bias.double())
    size = x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    bound = (weight.K + 8) * 2.0**-24 * size + torch.finfo(x.dtype).eps / 2 * expected.abs() + 1e-30
    if "nvfp4" not in (weight.scheme.factors or ""):
        bound = bound + rounding_of_fragments(weight, x, config)
    assert bool(((y.double() - expected).abs() <= bound).all())


@dtypes
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_value_in_every_place(codebook: str, dtype: torch.dtype) -> None:
    """Row n of the weight has one number in all of its columns, x has one column a token."""
    numbers = [code for code, value in enumerate(CODEBOOKS[codebook]) if math.isfinite(value)]
    for group in (64, 32):  # one kernel each
        scheme = QuantScheme(width_of(codebook), group, codebook=codebook)
        codes = torch.tensor(numbers, dtype=torch.uint8)[:, None].expand(-1, 128).contiguous()
        weight = QuantTensor(codes, torch.ones(len(codes), 128 // group), None, None, scheme)
        expected = torch.tensor([CODEBOOKS[codebook][code] for code in numbers]).to(dtype)
        x = torch.eye(128, dtype=dtype)
        for first, config in ((0, coded(64)), (64, coded(64)), (40, coded(8)), (96, coded(32)), (32, gemm_sm90(64))):
            M = config.tokens
            y = calls.multiply(weight, in_room(x[first : first + M]), config)
            assert torch.equal(y, expected.expand(M, -1)), (group, config)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_shape(scheme: str) -> None:
    for number, (N, K, M, splits, ordered) in enumerate(
        [
            (71, 136, 5, 1, False),
            (130, 328, 20, 2, True),
            (64, 512, 70, 1, False),
            (65, 192, 33, 2, True),
            (1, 16, 1, 1, False),
        ]
    ):
        dtype = DTYPES[number % 2]
        weight = random_weight(scheme, N, K, seed=number, act_order=ordered, dtype=torch.bfloat16)
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(number)).to(dtype)
        bias = torch.randn(N, generator=torch.Generator().manual_seed(9)).to(dtype) if number % 2 else None
        for config in configs(M, splits):
            y = calls.multiply(weight, in_room(x), config, bias, schedule=("random", "warp_ahead")[number % 2])
            check(weight, x, y, bias, config)


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [
        ("mxfp4_g32", E8M0),
        ("fp8_g32", E8M0),
        ("nf4_g64", E4M3),
        ("fp8_channel", torch.float32),
        ("e2m1_g64", torch.float32),
    ],
)
def test_scales_of_every_type(scheme: str, scales: torch.dtype) -> None:
    for M in (3, 40):
        weight = random_weight(scheme, 100, 200, dtype=scales)
        x = torch.randn(M, 200, generator=torch.Generator().manual_seed(M)).half()
        for config in configs(M):
            check(weight, x, calls.multiply(weight, in_room(x), config), config=config)


@pytest.mark.parametrize("scales", [E8M0, E4M3], ids=str)
def test_every_scale_of_eight_bits(scales: torch.dtype) -> None:
    """All powers of two from 2^-127, which is no normal float, and all 8-bit floats with their subnormals; by both loads."""
    patterns = torch.arange(256, dtype=torch.uint8)
    values = patterns[patterns.view(scales).float().isfinite()].view(scales)
    for group in (64, 32):
        codes = torch.full((len(values), 64), 2, dtype=torch.uint8)  # e2m1: 1
        each = values[:, None].view(torch.uint8).expand(-1, 64 // group).contiguous().view(scales)
        weight = QuantTensor(codes, each, None, None, QuantScheme(4, group, codebook="e2m1"))
        x = torch.zeros(2, 64, dtype=torch.bfloat16)
        x[:, 5] = 1
        for config in configs(2):
            y = calls.multiply(weight, in_room(x), config)
            assert torch.equal(y, values.float().to(torch.bfloat16).expand(2, -1)), (group, config)
        assert torch.equal(calls.dequantize(weight, torch.float32, 64), weight.dequantize(torch.float32)), group


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_bit_for_bit(scheme: str) -> None:
    for N, K, ordered in ((70, 200, False), (64, 192, True)):
        weight = random_weight(scheme, N, K, act_order=ordered, dtype=torch.float32)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(calls.dequantize(weight, dtype, K, ordered), weight.dequantize(dtype))


@pytest.mark.parametrize("scheme", ["nvfp4_g16", "nvfp4m_g16", "nf4_g64", "fp8_g32"])
def test_infinities_and_overflow_are_those_of_a_float_layer(scheme: str) -> None:
    """What is not finite is summed again, with the factors of rows, which then must not be applied twice."""
    weight = random_weight(scheme, 70, 128, dtype=torch.float32)
    for M in (4, 40):
        x = torch.randn(M, 128, generator=torch.Generator().manual_seed(M)).bfloat16()
        x[0, 3], x[1, 5], x[2, 7] = math.inf, math.nan, 1e38
        for config in configs(M):
            assert_like_a_float_layer(calls.multiply(weight, in_room(x), config), weight, x)


@pytest.mark.parametrize("sm", CARDS)
def test_only_what_there_is_is_chosen(sm: int) -> None:
    """Decode of 8 or 32 tokens, gemm_sm80 of 64, dequantize + mm; from 33 tokens on Hopper gemm_sm90. Each has shared memory
    enough."""
    reached = set()
    for codebook, bits in (("nf4", 4), ("e2m1", 4), ("e4m3", 8)):
        for groups, group_bytes in ((1, 128), (2, 128), (4, 256)):
            for M, (N, K) in product((1, 8, 9, 16, 17, 32, 33, 64, 300, 4096), ((256, 256), (4096, 14336))):
                config, ns, _ = choose(
                    M, N, K, sm, codebook=CODEBOOK_NUMBERS[codebook], bits=bits, groups_per_step=groups,
                    steps_per_group=1, groups=K // 64 * groups, group_bytes=group_bytes,
                )  # fmt: skip
                path, tokens = config[:2]
                assert (path, tokens) in {(0, 8), (0, 32), (1, 64), (2, 0)} or (path == 3 and sm == 90 and M > 32), (
                    config
                )
                assert path == 3 or sm != 90 or M != 64 or N == 256, config
                assert path != 0 or tokens >= M
                assert shared_bytes(M, K, config, bits, group_bytes) <= SHARED[sm] * 1024 or path == 2
                assert 0 < ns < 1e12
                reached.add((path, tokens))
    assert reached >= {(0, 8), (0, 32), (2, 0)}


@in_full  # the loops are those that test_kernels.py runs under the same sanitizers
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize(
    ("scheme", "scales", "M"),
    [("mxfp4_g32", E8M0, 5), ("nvfp4_g16", torch.float32, 20), ("fp8_g32", E4M3, 40), ("nf4_g64", torch.bfloat16, 70)],
)
def test_sanitizers_find_nothing(flavour: emulator.Flavour, scheme: str, scales: torch.dtype, M: int) -> None:
    weight = random_weight(scheme, 70, 200, dtype=scales)
    x = torch.randn(M, 200, generator=torch.Generator().manual_seed(M)).half()
    done = emulator.replay(calls.UNIT, calls.multiply_call(weight, x, coded(M)), flavour, "random")
    assert done.status == 0, done.report[-2000:]
    check(weight, x, done.buffers["y"])


def test_what_has_no_kernel_is_refused() -> None:
    weight = random_weight("mxfp4_g32", 64, 128)
    x = in_room(torch.ones(4, 128).half())
    for config in (decode(12), gemm(128), gemm(32), gemm(64, half_accumulate=True), gemm_sm90(24)):
        with pytest.raises(RuntimeError, match="returned error 1"):
            calls.multiply(weight, x, config)
