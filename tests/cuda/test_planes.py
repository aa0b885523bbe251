"""Weights as files hold them on the CUDA kernels: codes of 2, 3, 5 and 6 bits in planes, factors of k-quants and IQ4_XS."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.factors import Factors
from qkernels.scheme import FACTORS
from tests.ops.helpers import assert_like_a_float_layer, exact_product, integers
from tests.strategies import random_weight

from . import calls, emulator
from .bounds import bound
from .calls import DTYPES, Config, gemm, gemm_sm90, in_room, rounding_of_fragments
from .cards import CARDS, SHARED
from .emulator import SCHEDULES
from .test_codebooks import check as check_codebook
from .test_heuristics import choose, predict
from .units import in_full

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
PLAIN = (
    "w2a16_g64",
    "w3a16_g128_asym",
    "w3a16_g16",
    "w5a16_g32_offset",
    "w6a16_channel_fzero",
    "w5a16_g16_asym",
    "w2a16_g32",
)
OF_8 = Config("decode", 8, 2, 4)


def configs(M: int, splits: int = 1) -> list[Config]:
    """Decode of 8 tokens, gemm_sm80 of 64, and a tile of gemm_sm90, whose instances differ in nothing else."""
    return [gemm(64, splits), gemm_sm90(64, splits), *([Config("decode", 8, 2, 4, splits)] if M <= 8 else [])]


def product_of(weight: QuantTensor, x: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """Exact, of weights that are rounded once to x's type where fragments are scaled."""
    exact = exact_product(weight, x, bias)
    if not calls.scales_fragments(weight, config):
        return exact
    seen = weight.dequantize(torch.float32).to(x.dtype).double()
    rounded: Tensor = x.double() @ seen.T + (0 if bias is None else bias.double())
    return rounded.to(x.dtype)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_every_code_is_found_in_its_place(bits: int) -> None:
    """x has one column a token: y is the weight, code by code, of every row and column of a step."""
    for group, dtype in product((64, 32), DTYPES):  # one kernel each
        scheme = QuantScheme(bits, group)
        codes = torch.randint(0, 2**bits, (64, 64), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        weight = QuantTensor(codes, torch.ones(64, 64 // group), None, None, scheme)
        x, expected = torch.eye(64, dtype=dtype), (codes.to(dtype) - scheme.mid_code).T
        for config in (gemm(64), gemm_sm90(64)):
            assert torch.equal(calls.multiply(weight, in_room(x), config), expected), config
        for first in range(0, 64, 8):
            part = slice(first, first + 8)
            assert torch.equal(calls.multiply(weight, in_room(x[part]), OF_8), expected[part])


@pytest.mark.parametrize("scheme", [*K_QUANTS, *PLAIN])
def test_every_shape_is_exact(scheme: str) -> None:
    """Several outer factors a row, the last for a few columns; a warp without steps, splits, act-order, one short group alone."""
    for number, (N, K, M, splits, ordered) in enumerate(
        [(71, 256, 5, 1, False), (130, 584, 8, 2, True), (64, 320, 40, 2, False), (1, 16, 1, 1, False)]
    ):
        weight = random_weight(scheme, N, K, seed=number, act_order=ordered, exact=True)
        x = integers(M, K, dtype=DTYPES[number % 2], most=2)
        bias = integers(N, dtype=x.dtype) if number % 2 else None
        for config in configs(M, splits):
            y = calls.multiply(weight, in_room(x), config, bias, schedule=SCHEDULES[number])
            assert torch.equal(y, product_of(weight, x, bias, config)), (config, number)


@pytest.mark.parametrize(
    "scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "w3a16_g64", "w5a16_g32_offset", "w6a16_g128_asym"]
)
def test_random_inputs_stay_within_the_bound(scheme: str) -> None:
    for M, dtype in ((3, torch.bfloat16), (8, torch.float16), (33, torch.bfloat16)):
        weight = random_weight(scheme, 70, 328, seed=M, dtype=torch.float16)
        x = torch.randn(M, 328, generator=torch.Generator().manual_seed(M)).to(dtype)
        truth = x.double() @ weight.dequantize(torch.float32).double().T
        for config in configs(M):
            error = (calls.multiply(weight, in_room(x), config).double() - truth).abs()
            most = bound(weight, x, config.splits, max(config.warps_k, 1)) + rounding_of_fragments(weight, x, config)
            if config.path == "gemm_sm90":  # sums of 328 columns stay in the tensor cores
                most = most + 2 * 264 * 2.0**-24 * (
                    x.double().abs() @ weight.dequantize(torch.float32).double().abs().T
                )
            assert bool((error <= most).all()), config


def test_random_inputs_of_a_table_stay_within_the_bound() -> None:
    for M in (3, 33):
        weight = random_weight("iq4_xs", 70, 328, seed=M)
        x = torch.randn(M, 328, generator=torch.Generator().manual_seed(M)).half()
        for config in configs(M):
            check_codebook(weight, x, calls.multiply(weight, in_room(x), config), config=config)


@pytest.mark.parametrize("scheme", [*K_QUANTS, *PLAIN])
def test_dequantized_bit_for_bit(scheme: str) -> None:
    """Factors of every type; every type of result; the order of x, the stored order, padded, a slice of the strips."""
    for number, dtype in enumerate((torch.float32, *DTYPES)):
        outer = (torch.float16, torch.bfloat16, torch.float32)[(number + 1) % 3]
        weight = random_weight(scheme, 150, 520, act_order=True, dtype=outer)
        expected, order = weight.dequantize(dtype), weight.k_order()
        stored = expected if order is None else expected[:, order.long()]
        assert torch.equal(calls.dequantize(weight, dtype, 520, ordered=True), expected)
        assert torch.equal(calls.dequantize(weight, dtype, 576), torch.nn.functional.pad(stored, (0, 56)))
        assert torch.equal(calls.dequantize(weight, dtype, 520, first=1, count=1), stored[64:128])


@pytest.mark.parametrize(("scheme", "column"), [("q3_k", 5), ("q4_k", 40), ("q6_k", 300), ("iq4_xs", 300)])
def test_every_small_factor_under_outer_ones_of_every_type(scheme: str, column: int) -> None:
    """y is one column of the weight, whose scales are all small factors there are."""
    kind, parsed = FACTORS[QuantScheme.parse(scheme).factors or ""], QuantScheme.parse(scheme)
    values = torch.arange(kind.low, kind.high + 1).to(getattr(torch, kind.small))[:, None]
    for dtype, outer_dtype in product(DTYPES, (torch.float16, torch.bfloat16, torch.float32)):
        G, rows = 512 // parsed.group_size, len(values)  # type: ignore[operator]
        small, outer = values.expand(-1, G).contiguous(), torch.full((rows, 2), 0.25, dtype=outer_dtype)
        outer[:, 1] = 0.5
        zeros = small.flip(0) if kind.zeros == "offset" else None
        factors = Factors(small, outer, zeros, None if zeros is None else outer * 2)
        codes = torch.full((rows, 512), parsed.max_code, dtype=torch.uint8)
        weight = QuantTensor.from_factors(codes, factors, parsed)
        x = torch.zeros(2, 512, dtype=dtype)
        x[:, column] = 1
        expected = weight.dequantize(torch.float32)[:, column].to(dtype).expand(2, -1)
        for config in configs(2):
            assert torch.equal(calls.multiply(weight, in_room(x), config), expected), (config, outer_dtype)


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "iq4_xs", "w3a16_g64_asym", "w5a16_g32_offset"])
def test_infinities_and_overflow_are_those_of_a_float_layer(scheme: str) -> None:
    """What is not finite is summed again, weight by weight."""
    weight = random_weight(scheme, 70, 320, dtype=torch.float32)
    for M in (4, 40):
        x = torch.randn(M, 320, generator=torch.Generator().manual_seed(M)).bfloat16()
        x[0, 3], x[1, 5], x[2, 7] = math.inf, math.nan, 1e38
        for config in configs(M):
            assert_like_a_float_layer(calls.multiply(weight, in_room(x), config), weight, x)


@pytest.mark.parametrize("sm", CARDS)
def test_only_what_there_is_is_chosen(sm: int) -> None:
    """Decode up to 8 tokens, gemm_sm80 of 64, dequantize + mm; from 33 tokens on Hopper gemm_sm90, whatever the width."""
    reached = set()
    for bits, groups, group_bytes in ((4, 2, 512), (6, 4, 384), (3, 1, 128), (2, 4, 768), (5, 1, 192)):
        for M, (N, K) in product((1, 8, 9, 32, 33, 64, 300, 4096), ((256, 256), (4096, 14336))):
            config, ns, text = choose(
                M, N, K, sm, planes=1, bits=bits, groups_per_step=groups, steps_per_group=1 if groups > 1 else 2,
                groups=K // 64 * groups, group_bytes=group_bytes,
            )  # fmt: skip
            path, tokens, warps_n, warps_k, splits, _ = config
            assert (path, tokens) in {(0, 8), (1, 64), (2, 0)} or (path == 3 and sm == 90 and M > 32), text
            assert path == 3 or sm != 90 or M != 64 or N == 256, text
            if path == 3:
                continue
            assert path != 0 or tokens >= M
            assert path != 2 or M > 32
            assert 0 < ns < 1e12
            stage, steps = 512 * bits + group_bytes, -(-K // 64)
            decode = -(-steps // splits) * M * 128 + warps_n * warps_k * max(4 * stage, 8 * 68 * 4)
            tiles = (4 if bits <= 4 else 3) * (-(-2 * stage // 128) * 128 + 64 * 128)
            assert path == 2 or (decode if path == 0 else tiles) <= SHARED[sm] * 1024
            reached.add((path, tokens))
    assert reached == {(0, 8), (1, 64), (2, 0)}


def test_gemm_sm90_is_predicted_to_be_faster_than_what_there_was() -> None:
    """8192 x 8192 on an H200: from 64 to 512 tokens gemm_sm90, before gemm_sm80's tile and dequantize + mm (kernel-log.md)."""
    for bits, groups, group_bytes in ((4, 2, 512), (6, 4, 384), (3, 1, 128), (2, 4, 768)):
        kind = {
            "planes": 1, "bits": bits, "groups_per_step": groups, "steps_per_group": 1, "groups": 128 * groups,
            "group_bytes": group_bytes,
        }  # fmt: skip
        for M in (64, 128, 256, 512):
            config, ns, text = choose(M, 8192, 8192, 90, **kind)
            assert config[0] == 3, text
            others = [[1, 64, 0, 0, splits, 0] for splits in (1, 2, 3, 4, 6, 8)] + [[2, 0, 0, 0, 1, 0]]
            best = min(predict(M, 8192, 8192, 90, other, **kind) for other in others)
            assert ns < (1.1 if M != 128 else 1.4) ** -1 * best, text


def test_what_has_no_kernel_is_refused() -> None:
    x = in_room(torch.ones(4, 256).half())
    for scheme in ("q4_k", "w3a16_g64"):
        weight = random_weight(scheme, 64, 256)
        for config in (
            calls.decode(12),
            calls.decode(32),
            gemm(128),
            gemm(32),
            gemm(64, half_accumulate=True),
            gemm_sm90(24),
        ):
            with pytest.raises(RuntimeError, match="returned error 1"):
                calls.multiply(weight, x, config)


@in_full  # the loops are those that test_kernels.py runs under the same sanitizers
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize(("scheme", "M"), [("q4_k", 5), ("q2_k", 8), ("q6_k", 40), ("w5a16_g64_asym", 3)])
def test_sanitizers_find_nothing(flavour: emulator.Flavour, scheme: str, M: int) -> None:
    weight = random_weight(scheme, 70, 584, exact=True)
    x = integers(M, 584, dtype=torch.float16, most=2)
    for config in configs(M):
        done = emulator.replay(calls.UNIT, calls.multiply_call(weight, in_room(x), config), flavour, "random")
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], product_of(weight, x, None, config))


@pytest.mark.parametrize(
    ("bug", "scheme"),
    [
        pytest.param("WGMMA_OUTER_TOO_LATE", "q6_k", marks=in_full),
        ("WGMMA_WRONG_RUN", "q5_k"),
        pytest.param("WGMMA_LOST_MINIMA", "q2_k", marks=in_full),
        pytest.param("WGMMA_LOST_ROW_FACTORS", "nvfp4_g16", marks=in_full),
    ],
)
def test_bugs_that_are_planted_in_gemm_sm90_are_found(bug: str, scheme: str) -> None:
    weight = random_weight(scheme, 64, 584)  # whose outer factors differ
    call = calls.multiply_call(weight, in_room(integers(3, 584, dtype=torch.float16, most=2)), gemm_sm90(64))
    healthy, broken = (emulator.replay(calls.UNIT, call, "program", bug=one) for one in (None, bug))
    assert healthy.status == broken.status == 0, broken.report[-2000:]
    assert not torch.equal(healthy.buffers["y"], broken.buffers["y"])


@pytest.mark.parametrize(
    ("bug", "scheme"),
    [("PLANES_OUTER_TOO_LATE", "q4_k"), ("PLANES_WRONG_RUN", "w6a16_g64"), ("PLANES_LOST_REST", "q5_k")],
)
def test_planted_bugs_are_found(bug: str, scheme: str) -> None:
    weight = random_weight(scheme, 64, 584, exact=True)
    x = integers(3, 584, dtype=torch.float16, most=2)
    call = calls.multiply_call(weight, in_room(x), Config("decode", 8, 1, 1))
    done = emulator.replay(calls.UNIT, call, "program", bug=bug)
    assert done.status == 0, done.report[-2000:]
    assert not torch.equal(done.buffers["y"], exact_product(weight, x))
