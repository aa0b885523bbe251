"""int8 activations (cpu_tile_a8): on every instruction set, against `reference.gemm_a8` and against exact integers.

Bound of `test_floating_scales`: both sides have the same integers. Each group's product (1 rounding, or none where it is fused)
and each addition round by at most u = 2^-24 of the sum of magnitudes S; so do the int32 sum's conversion (none below 2^24), the
token's scale and the bias: at most G + 4 roundings on either side, and the output's own half unit. Floating zeros and offsets add
a second product a group (its addition, and 3 roundings of rest and product; the sum of x is exact): 2 G + 7, of the magnitudes
that the two products have apart, |code - mid| |scale| + |rest| (`helpers.magnitudes`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels import QuantLinear, QuantScheme, QuantTensor
from qkernels.errors import ArgumentError, ConversionError
from qkernels.layouts import get_layout
from qkernels.ops import reference
from qkernels.scheme import ACTIVATIONS
from tests.ops.helpers import DTYPES, arguments, integers, magnitudes
from tests.strategies import random_weight

LAYOUT = "cpu_tile_a8"
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 63, 64, 65, 130]  # both sides of every block of rows
zeros = pytest.mark.parametrize("zeros", ["", "_asym", "_fzero", "_offset"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def multiply(weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    result = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(weight, x, bias, LAYOUT))
    assert isinstance(result, Tensor)
    return result


def whole_tokens(M: int, K: int, dtype: torch.dtype = torch.float32, most: int = 127) -> Tensor:
    """Whole numbers with max |x| = 127 in every row: int8 holds them as they are."""
    x = integers(M, K, dtype=dtype, most=most)
    x[:, K // 2] = 127
    return x


@pytest.mark.parametrize("scheme", [
    "w4a8_g32", "w4a8_channel", "w3a8_g8", "w8a8_channel", "w8a8_g64", "w5a8_g16",
    "w4a8_g32_asym", "w8a8_channel_asym", "w5a8_g16_asym", "w4a8_g8_fzero", "w8a8_g64_fzero", "w3a8_g32_offset",
    "w8a8_channel_offset",
])  # fmt: skip
@pytest.mark.parametrize(("N", "K"), [(70, 200), (1, 1), (33, 75), (96, 256)])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
def test_integers_are_exact(isa: str, poisoned_memory: None, scheme: str, N: int, K: int, act_order: bool) -> None:
    weight = random_weight(scheme, N, K, act_order=act_order, exact=True)
    for M in TOKENS:
        x, bias = whole_tokens(M, K, most=3), integers(N)
        expected = (x.double() @ weight.dequantize().double().T + bias.double()).float()
        assert torch.equal(multiply(weight, x, bias), expected), M
        assert torch.equal(reference.gemm_a8(x, weight, bias), expected), M


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("code", ["lowest", "highest"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes_do_not_saturate(isa: str, bits: int, code: str, sign: int) -> None:
    """Every product as large as it gets: where int16 sums would saturate, they would here."""
    N, K = 40, 512
    scheme = QuantScheme(bits, "channel", act="int8")
    codes = torch.full((N, K), 0 if code == "lowest" else scheme.max_code, dtype=torch.uint8)
    weight = QuantTensor(codes, torch.ones(N, 1), None, None, scheme)
    for M in (1, 3, 7):
        assert torch.equal(multiply(weight, torch.full((M, K), 127.0 * sign)), torch.full(
            (M, N), 127.0 * sign * K * (int(codes[0, 0]) - scheme.mid_code)
        ))  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_zero_points_do_not_saturate(isa: str, bits: int, zero: int, sign: int) -> None:
    """The largest |code - zero| that the bytes of a file can ask for, a zero of 255 for codes of 4 bits included: `QuantTensor`
    refuses such zeros, so they are put into the packed buffer. The sum fits an int32, although it may wrap on the way there.
    """
    N, K, group = 40, 4112, 4096
    scheme = QuantScheme(bits, group, "int", act="int8")
    code = scheme.max_code if zero == 0 else 0
    weight = QuantTensor(
        torch.full((N, K), code, dtype=torch.uint8),
        torch.ones(N, 2),
        torch.zeros(N, 2, dtype=torch.uint8),
        None,
        scheme,
    )
    for M in (1, 3, 7):
        x, qweight, scales, zeros, *rest = arguments(weight, torch.full((M, K), 127.0 * sign), None, LAYOUT)
        assert isinstance(zeros, Tensor)
        y = torch.ops.qkernels.gemm_cpu_tile_a8(x, qweight, scales, zeros.fill_(zero), *rest)
        sums = [127 * sign * columns * (code - zero) for columns in (group, K - group)]
        expected = sum(torch.tensor(value, dtype=torch.float32) for value in sums)
        assert torch.equal(y, torch.as_tensor(expected).expand(M, N)), M


@pytest.mark.parametrize("scheme", ["w8a8_channel_asym", "w8a8_channel", "w8a8w_channel_asym", "w8a8w_channel"])
def test_the_longest_groups_fit(isa: str, scheme: str) -> None:
    """The largest sum of all: 2^16 products of 127 (or -128) * 255, or 2^17 of 127 * 128, or one less of -128 * -128; one column
    more is refused."""
    parsed = QuantScheme.parse(scheme)
    lowest = ACTIVATIONS[parsed.act].lowest
    K, most = (1 << 16, 255) if parsed.zeros == "int" else ((1 << 17) - (lowest == -128), 128)
    assert -lowest * most * K < 2**31
    zeros = None if parsed.symmetric else torch.full((1, 1), 255, dtype=torch.uint8)
    weight = QuantTensor(torch.zeros(1, K, dtype=torch.uint8), torch.ones(1, 1), zeros, None, parsed)
    for sign in (-1, 1):
        code = lowest if sign < 0 else 127
        x = torch.full((1, K), 127.0 * sign) if lowest == -127 else torch.full((1, K), 127.5 * sign)
        expected = torch.tensor([[-code * most * K]], dtype=torch.float32)  # one rounding: above 2^24
        assert torch.equal(multiply(weight, x), expected)
        assert torch.equal(reference.gemm_a8(x, weight), expected)
    assert "could overflow an int32 sum" in get_layout(LAYOUT).reasons(1, K + 1, parsed)[0]
    x, *buffers = arguments(weight, torch.zeros(1, K), None, LAYOUT)
    K_longer = K + 8 if K % 8 == 0 else K + 1
    longer = [torch.zeros(1, K_longer * 32, dtype=torch.uint8), *buffers[1:-5], K_longer, False, 0, 0, buffers[-1]]
    with pytest.raises((RuntimeError, ArgumentError), match=f"groups must be at most {K} long"):
        torch.ops.qkernels.gemm_cpu_tile_a8(torch.zeros(1, K_longer), *longer)


@dtypes
@pytest.mark.parametrize("scheme", [
    "w4a8_g32", "w4a8_g128", "w8a8_channel", "w4a8_g32_asym", "w8a8_g128_asym", "w4a8_g128_fzero", "w8a8_channel_fzero",
    "w4a8_g32_offset",
])  # fmt: skip
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
def test_floating_scales(isa: str, dtype: torch.dtype, scheme: str, act_order: bool) -> None:
    N, K = 70, 296
    weight = random_weight(scheme, N, K, act_order=act_order)
    for M in (1, 4, 9, 66):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
        codes, scales = reference.quantize_rows(x)
        quantized = codes.double() * scales.double()
        exact = quantized @ weight.dequantize().double().T
        magnitude = quantized.abs() @ magnitudes(weight).T
        roundings = weight.scheme.num_groups(K) + 4
        if weight.scheme.zeros in ("float", "offset"):
            roundings += weight.scheme.num_groups(K) + 3
        bound = roundings * 2**-24 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-30
        for y in (multiply(weight, x), reference.gemm_a8(x, weight)):
            limit = bound + torch.finfo(dtype).eps * bound  # the half unit of the computed value, not of the exact one
            assert ((y.double() - exact).abs() <= limit + _subnormal(dtype)).all(), M
        wrong = QuantTensor(weight.codes ^ 1, weight.scales, weight.zeros, weight.group_index, weight.scheme)
        assert not ((multiply(wrong, x).double() - exact).abs() <= bound).all()


def _subnormal(dtype: torch.dtype) -> float:
    """Half of the smallest subnormal: the output's rounding below the normal range."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


@dtypes
def test_ties_and_tiny_tokens_are_quantized_as_the_reference_does(isa: str, dtype: torch.dtype) -> None:
    """x = max/127 * (n + 1/2) lies on a tie; a unit weight shows the codes themselves."""
    K = 64
    weight = QuantTensor(
        torch.full((K, K), 8, dtype=torch.uint8) + torch.eye(K, dtype=torch.uint8), torch.ones(K, 1), None, None,
        QuantScheme(4, "channel", act="int8"),
    )  # fmt: skip
    ties = torch.arange(K).to(dtype) - 31.5
    ties[0] = 127
    rows = [
        ties,
        -ties,
        torch.randn(K, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.zeros(K, dtype=dtype),
    ]
    if dtype != torch.float16:  # below 2^-121, where 127 / max |x| would be infinite
        rows.append(ties * 2.0**-130)
    x = torch.stack(rows)
    codes, scales = reference.quantize_rows(x)
    assert codes[0, 1:5].tolist() == [-30, -30, -28, -28]
    assert torch.equal(multiply(weight, x), (codes.float() * scales).to(dtype))


def test_a_wrong_zero_is_seen(isa: str) -> None:
    """Negative control of the comparisons above: one zero point of one group, off by one, changes every token of its row."""
    for scheme, step in (("w4a8_g32_asym", 1), ("w8a8_g32_fzero", 1), ("w4a8_g32_offset", 0.25)):
        weight = random_weight(scheme, 40, 96, exact=True)
        assert weight.zeros is not None
        other = weight.zeros.clone()
        other[17, 2] += step if other[17, 2] < weight.scheme.max_code else -step
        x = whole_tokens(7, 96, most=3) + 1  # no group of x sums to 0
        x[:, 48] = 127
        changed = QuantTensor(weight.codes, weight.scales, other, weight.group_index, weight.scheme)
        rows = (multiply(changed, x) != multiply(weight, x)).all(0).nonzero().flatten().tolist()
        assert rows == [17]
        assert torch.equal(multiply(changed, x), reference.gemm_a8(x, changed))


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_with_no_scale_is_nan_and_leaves_the_others_alone(isa: str, dtype: torch.dtype, value: float) -> None:
    weight = random_weight("w4a8_g32", 40, 96, exact=True)
    x = whole_tokens(7, 96, dtype, most=3)
    expected = multiply(weight, x)
    x[3, 95] = value
    expected[3] = torch.nan
    for y in (multiply(weight, x), reference.gemm_a8(x, weight)):
        assert torch.equal(y.nan_to_num(777.0), expected.nan_to_num(777.0))


@zeros
def test_rows_do_not_depend_on_their_number(isa: str, zeros: str) -> None:
    weight = random_weight(f"w4a8_g32{zeros}", 70, 200)
    x = torch.randn(130, 200, generator=torch.Generator().manual_seed(2))
    whole = multiply(weight, x)
    for M in TOKENS:
        assert torch.equal(multiply(weight, x[:M]), whole[:M]), M


@pytest.mark.parametrize("scheme", ["w5a8_g32_asym", "w6a8_g24", "w2a8_g64_offset", "q2_k_a8", "q5_k_a8", "q6_k_a8"])
def test_planes_that_many_rows_share_mean_the_same(isa: str, scheme: str) -> None:
    """Many rows meet codes that were taken apart once, 512 columns at a time, and totals that waited in memory."""
    weight = random_weight(scheme, 70, 1280)
    x = torch.randn(66, 1280, generator=torch.Generator().manual_seed(4))
    whole = multiply(weight, x)
    for M in (1, 3, 24, 25, 33):
        assert torch.equal(multiply(weight, x[:M]), whole[:M]), M


@zeros
def test_strides_and_empty_shapes(isa: str, zeros: str) -> None:
    weight = random_weight(f"w8a8_g32{zeros}", 40, 96, act_order=True)
    x = torch.randn(96, 9, generator=torch.Generator().manual_seed(3)).T
    assert torch.equal(multiply(weight, x), multiply(weight, x.contiguous()))
    assert multiply(random_weight(f"w4a8_g32{zeros}", 0, 96), x).shape == (9, 0)
    assert torch.equal(
        multiply(random_weight(f"w4a8_g32{zeros}", 40, 0), x[:, :0], integers(40)), integers(40).expand(9, 40)
    )


def test_what_it_refuses() -> None:
    layout = get_layout(LAYOUT)
    for scheme, K, why in [
        ("w4a16_g32", 64, "16-bit activations"),
        ("w4a8_g12", 64, "group_size 12 is not a multiple of 8"),
        ("w4a8_channel", (1 << 17) + 8, "could overflow an int32 sum"),
        ("w4a8_channel_fzero", (1 << 17) + 8, "could overflow an int32 sum: at most 131072"),
        ("w4a8_channel_asym", (1 << 16) + 8, "could overflow an int32 sum: at most 65536"),
    ]:
        assert why in layout.reasons(8, K, QuantScheme.parse(scheme))[0]
    with pytest.raises(ConversionError, match="16-bit activations"):
        layout.pack(random_weight("w4a16_g32", 8, 64))
    x, *buffers = arguments(random_weight("w4a8_g32", 40, 96), torch.ones(2, 96), None, LAYOUT)
    good = torch.zeros(2, 3, 32, dtype=torch.uint8)
    for zeros in (good[:1], good[..., :31], good.to(torch.int8), good.mT.contiguous().mT, good.float().flatten()):
        with pytest.raises((RuntimeError, ArgumentError), match="zeros must be contiguous uint8 or floating"):
            torch.ops.qkernels.gemm_cpu_tile_a8(x, *buffers[:2], zeros, *buffers[3:])
    with pytest.raises((RuntimeError, ArgumentError), match="zeros must be contiguous floating"):
        torch.ops.qkernels.gemm_cpu_tile_a8(x, *buffers[:2], good, *buffers[3:-4], True, 0, 0, 1)
    with pytest.raises((RuntimeError, ArgumentError), match="zeros must be given where zeros_are_offsets"):
        torch.ops.qkernels.gemm_cpu_tile_a8(x, *buffers[:-4], True, 0, 0, 1)


@pytest.mark.parametrize("N", [40, 130, 200])
def test_a_row_has_the_same_bits_with_a_bias_whatever_its_neighbours(N: int) -> None:
    """The compiler made scale and bias one FMA in the instantiation for one row, and not in others."""
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(torch.nn.Linear(88, N), "w4a8_g8")
    x = torch.randn(80, 88)
    with torch.no_grad():
        together = layer(x)
        for M in (1, 2, 3, 5, 8, 64):
            assert torch.equal(layer(x[:M]), together[:M])
