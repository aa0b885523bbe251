"""Rounding errors of the CPU kernels on random inputs, against float64, within the bound of `numerics`."""

from __future__ import annotations

import pytest
import torch

from qkernels import QuantTensor, extension
from tests.ops.conftest import BF16_ISAS
from tests.ops.helpers import DTYPES, integers, multiply
from tests.ops.numerics import bound, errors, random
from tests.strategies import random_weight

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("zeros", ["", "_asym", "_fzero", "_offset"])
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g128", "w8a16_g64", "w3a16_channel", "w8a16_channel"])
def test_random_inputs_stay_within_the_bound(isa: str, scheme: str, zeros: str, dtype: torch.dtype) -> None:
    N, K = 70, 680
    weight = random_weight(scheme + zeros, N, K, seed=3, dtype=torch.float32, act_order=zeros == "_asym")
    bias = random(N, dtype=torch.float32, seed=4)
    for M in (1, 4, 7, 19):
        x = random(M, K, dtype=dtype, seed=M)
        assert (errors(weight, x, bias) <= bound(weight, x, bias)).all(), M


def test_the_bound_would_notice_rounded_activations(isa: str) -> None:
    """Negative control: fp32 activations cut to bf16 first, the tempting shortcut, break it by orders of magnitude."""
    weight = random_weight("w4a16_g32", 64, 256, dtype=torch.float32)
    x, bias = random(4, 256, dtype=torch.float32, seed=0), torch.zeros(64)
    exact = x.double() @ weight.dequantize().double().T
    wrong = (multiply(weight, x.bfloat16().float(), bias).double() - exact).abs()
    assert (wrong > bound(weight, x, bias)).float().mean() > 0.9


@dtypes
def test_a_row_depends_on_nothing_but_itself(isa: str, dtype: torch.dtype) -> None:
    """Bitwise: not on M, not on its place, not on the other rows."""
    for scheme in ("w4a16_g32", "w4a16_channel_asym", "w8a16_g24_offset"):
        weight = random_weight(scheme, 70, 296)
        x = random(75, 296, dtype=dtype, seed=5)
        whole = multiply(weight, x)
        for M in (1, 2, 3, 4, 5, 8, 9, 13, 64, 65):
            assert torch.equal(multiply(weight, x[-M:]), whole[-M:]), (scheme, M)


@dtypes
def test_the_number_of_threads_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    """Bitwise, with fewer threads than tiles and with more; and again, run after run."""
    before = torch.get_num_threads()
    weight = random_weight("w4a16_g32_offset", 100, 296, act_order=True)
    try:
        for M in (1, 6, 70):
            x = random(M, 296, dtype=dtype, seed=M)
            torch.set_num_threads(1)
            expected = multiply(weight, x)
            for threads in (2, 3, 11):
                torch.set_num_threads(threads)
                for _ in range(3):
                    assert torch.equal(multiply(weight, x), expected), (M, threads)
    finally:
        torch.set_num_threads(before)


def test_infinities_and_nans_reach_the_output(isa: str) -> None:
    weight = random_weight("w4a16_g32", 40, 96, exact=True)
    codes = weight.codes.clone()
    codes[:, 7] = 9  # not the zero point: infinity times 0 would be NaN
    weight = QuantTensor(codes, weight.scales, None, None, weight.scheme)
    for dtype in DTYPES:
        x = integers(3, 96, dtype=dtype)
        x[0, 7], x[1, 7] = float("inf"), float("nan")
        y, expected = multiply(weight, x), (x.float() @ weight.dequantize().T).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[0], expected[0])
        assert torch.equal(y[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_round_to_nearest_even_and_overflow_to_infinity(isa: str, dtype: torch.dtype) -> None:
    """One column of ones per row of x, scales with more bits than the output has: y is the rounded scale."""
    scales = (
        torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).double() * 2.0 ** torch.arange(-32, 32)[:, None]
    )
    scales = scales.float()
    scales[0], scales[1], scales[2], scales[3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11
    scales[4], scales[5], scales[6] = 65519.0, 65520.0, 3.4e38
    weight = QuantTensor(
        torch.full((64, 8), 9, dtype=torch.uint8), scales, None, None, random_weight("w4a16_g8", 1, 8).scheme
    )
    for M in (1, 9):
        x = torch.zeros(M, 8, dtype=dtype)
        x[:, 3] = 1
        assert torch.equal(multiply(weight, x), scales[:, 0].to(dtype).expand(M, -1))


def test_only_the_bf16_dot_product_flushes_subnormals(isa: str) -> None:
    """vdpbf16ps reads subnormal bf16 activations as 0; every other path multiplies them."""
    weight = random_weight("w4a16_g8", 8, 8, exact=True)
    codes = torch.full((8, 8), 12, dtype=torch.uint8)
    weight = QuantTensor(codes, torch.ones(8, 1), None, None, weight.scheme)
    x = torch.full((1, 8), 2.0**-130, dtype=torch.bfloat16)
    expected = 0.0 if extension.status().isa in BF16_ISAS else 32 * 2.0**-130
    assert multiply(weight, x).double().unique().tolist() == [expected]
    assert multiply(weight, x.float()).double().unique().tolist() == [32 * 2.0**-130]
