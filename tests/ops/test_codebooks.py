"""Codebooks, small scales and scales that are products on the CPU kernels, on every instruction set: each value of each table, as
C++ has it, through every path; random inputs within the bound of `numerics` with what a table in bf16 adds; products bit for
bit as plain scales.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from re import search

import pytest
import torch

from qkernels import QuantScheme, QuantTensor, extension
from qkernels.codebooks import CODEBOOK_NUMBERS, CODEBOOKS, INTEGER_STEPS, width_of
from qkernels.ops import reference
from qkernels.scheme import FACTOR_NUMBERS, FACTORS
from tests.ops.conftest import BF16_ISAS
from tests.ops.helpers import DTYPES, arguments, exact_product, integers, magnitudes, multiply
from tests.ops.numerics import bound, errors, random
from tests.strategies import random_weight

TYPES_H = Path(__file__).parent.parent.parent / "csrc" / "types.h"
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Whose int8 activations meet the factors of a span in integers (csrc/cpu/avx2_words.h)
SPANS_OF_INTEGERS = ("avx2", "avx512")
# Not exact in bf16: with bf16 activations and AVX512-BF16 products, the table is rounded to bf16 once.
ROUNDED = ("nf4", "fp4")


def numbers_of(codebook: str) -> list[int]:
    return [code for code, value in enumerate(CODEBOOKS[codebook]) if math.isfinite(value)]


def every_value(codebook: str, act: str | None = None) -> QuantTensor:
    """[N, 8]: row n has the codebook's number n in each of its columns, so that every place of an octet looks every value up."""
    codes = torch.tensor(numbers_of(codebook), dtype=torch.uint8)[:, None].expand(-1, 8).contiguous()
    scheme = QuantScheme(width_of(codebook), 8, act=act, codebook=codebook)
    return QuantTensor(codes, torch.ones(len(codes), 1), None, None, scheme)


def test_cpp_has_the_same_numbers() -> None:
    text = TYPES_H.read_text()
    for name, numbers in (("Codebook", CODEBOOK_NUMBERS), ("Factors", FACTOR_NUMBERS)):
        found = search(rf"enum class {name} : int {{ (.*?), kCount }}", text)
        assert found
        names = [entry.removeprefix("k").lower() for entry in found[1].split(", ")]
        assert names == [{None: "integers" if name == "Codebook" else "none"}.get(key, key) for key in numbers]


@dtypes
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_value_in_every_place(isa: str, codebook: str, dtype: torch.dtype) -> None:
    weight = every_value(codebook)
    table = torch.tensor([CODEBOOKS[codebook][code] for code in numbers_of(codebook)])
    expected = table.to(dtype).repeat(8, 1)
    assert expected.isfinite().all()
    x = torch.eye(8, dtype=dtype)
    assert torch.equal(multiply(weight, x), expected)
    for place in range(8):
        assert torch.equal(multiply(weight, x[place : place + 1]), expected[:1]), place
    assert torch.equal(multiply(weight, x.repeat(9, 1)), expected.repeat(9, 1))  # 72 rows: a panel where there is one


@pytest.mark.parametrize("codebook", INTEGER_STEPS)
def test_every_integer_meets_int8(isa: str, codebook: str) -> None:
    weight = every_value(codebook, act="int8")
    table = torch.tensor(CODEBOOKS[codebook])
    for M in (1, 3, 17):
        x = torch.randint(-127, 128, (M, 8), generator=torch.Generator().manual_seed(M)).float()
        x[:, 0] = 127  # quantized to themselves
        expected = x.sum(1, keepdim=True) * table
        assert torch.equal(
            torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(weight, x, layout="cpu_tile_a8")), expected
        ), M
        assert torch.equal(reference.gemm_a8(x, weight), expected)


@pytest.mark.parametrize("scheme", ["iq4nl_g32_a8", "mxfp4_g32_a8"])
def test_int8_sums_are_exact_whatever_the_shape(isa: str, scheme: str) -> None:
    """The worst sums, too: 127 in every column against the largest entries of a table."""
    for N, K, M in ((33, 299, 1), (70, 96, 5), (97, 408, 20)):
        weight = random_weight(scheme, N, K, exact=True, act_order=M == 5)
        x = integers(M, K, most=3)
        x[:, 7] = 127
        y = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(weight, x, layout="cpu_tile_a8"))
        assert torch.equal(y, (x.double() @ weight.dequantize().double().T).float())
    codes = torch.zeros(32, 96, dtype=torch.uint8)  # iq4nl: -127
    worst = QuantTensor(codes, torch.ones(32, 3), None, None, QuantScheme.parse("iq4nl_g32_a8"))
    x = torch.full((2, 96), 127.0)
    y = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(worst, x, layout="cpu_tile_a8"))
    assert torch.equal(y, torch.full((2, 32), -127.0 * 127 * 96))


@dtypes
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
def test_every_scale_of_eight_bits(isa: str, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All powers of two from 2^-127, which is no normal float, and all 8-bit floats, -0 and subnormals included."""
    patterns = torch.arange(256, dtype=torch.uint8)
    scales = patterns[patterns.view(scale_dtype).float().isfinite()].view(scale_dtype)
    codes = torch.full((len(scales), 8), 9, dtype=torch.uint8)  # (9 - 8) * scale
    weight = QuantTensor(codes, scales[:, None], None, None, QuantScheme(4, 8))
    x = torch.zeros(3, 8, dtype=dtype)
    x[:, 2] = 1
    expected = scales.float().to(dtype).expand(3, -1)
    got = multiply(weight, x)
    finite = expected.isfinite()
    assert torch.equal(got[finite], expected[finite])
    assert got[~finite].isinf().all()  # fp16 ends at 65504


@dtypes
@pytest.mark.parametrize(
    "scheme", ["nf4_g64", "fp4_g32", "mxfp4_g32", "iq4nl_g32", "fp8_channel", "e5m2_g64", "fp8_block128"]
)
def test_random_inputs_stay_within_the_bound(isa: str, scheme: str, dtype: torch.dtype) -> None:
    """`bound` of `numerics`; a table rounded to bf16 adds half of bf16's step of each weight (2^-9)."""
    N, K = 70, 680
    scales = torch.float8_e8m0fnu if scheme.startswith("mx") else torch.float32
    weight = random_weight(scheme, N, K, seed=3, dtype=scales, act_order=scheme == "nf4_g64")
    bias = random(N, dtype=torch.float32, seed=4)
    rounded = weight.scheme.codebook in ROUNDED and dtype == torch.bfloat16 and isa in BF16_ISAS
    for M in (1, 4, 7, 19, 70):
        x = random(M, K, dtype=dtype, seed=M)
        allowed = bound(weight, x, bias)
        if rounded:
            allowed = allowed + 2**-9 * (x.double().abs() @ weight.dequantize().double().abs().T)
        assert (errors(weight, x, bias) <= allowed).all(), M


def test_infinities_and_huge_values_are_those_of_a_float_layer(isa: str) -> None:
    for scheme in ("nf4_g32", "mxfp4_g32", "fp8_channel"):
        weight = random_weight(scheme, 40, 96, dtype=torch.float32)
        x = torch.ones(2, 96)
        x[0, 3], x[1, 5] = torch.inf, 1e36
        expected = x.double() @ weight.dequantize().double().T
        assert torch.equal(multiply(weight, x)[0].sign(), expected[0].float().sign()) or bool(expected[0].isnan().any())
        torch.testing.assert_close(multiply(weight, x)[1].double(), expected[1], rtol=1e-5, atol=0)


# --- scales that are products -----------------------------------------------------------------------------------------------

FACTORED = [spelling for kind in FACTORS.values() for spelling in kind.spelling]


def flattened(weight: QuantTensor) -> QuantTensor:
    """The same weight with its products as plain float32 scales and zeros."""
    return replace(weight, scheme=replace(weight.scheme, factors=None), factors=None)


@dtypes
@pytest.mark.parametrize("scheme", FACTORED)
def test_products_stay_within_the_bound(isa: str, scheme: str, dtype: torch.dtype) -> None:
    """That of `numerics`; and a row of y does not depend on M, bit for bit."""
    for (N, K), outer in itertools.product([(70, 600), (33, 256), (1, 24)], [torch.float16, torch.float32]):
        weight = random_weight(scheme, N, K, seed=K, dtype=outer, act_order=K == 600)
        bias = random(N, dtype=torch.float32, seed=4)
        x = random(70, K, dtype=dtype, seed=N)
        whole = multiply(weight, x, bias)
        assert (errors(weight, x, bias) <= bound(weight, x, bias)).all(), (N, K)
        for M in (1, 2, 3, 4, 9, 19):
            assert torch.equal(multiply(weight, x[-M:], bias), whole[-M:]), (N, K, M)


@pytest.mark.parametrize("scheme", [text for text in FACTORED if not text.startswith("nv")])
def test_products_of_integers_are_exact(isa: str, scheme: str) -> None:
    """Spans that are not whole, groups that are not, every number of tokens that has loops of its own."""
    for N, K, dtype in (
        (70, 600, torch.bfloat16),
        (130, 512, torch.bfloat16),
        (130, 512, torch.float32),
        (1, 24, torch.float16),
    ):
        weight = random_weight(scheme, N, K, seed=K, exact=True, act_order=K == 600)
        x = integers(70, K, dtype=dtype, most=1)
        for M in (1, 2, 3, 4, 5, 8, 9, 70):
            assert torch.equal(multiply(weight, x[:M]), exact_product(weight, x[:M])), (N, K, M)


@pytest.mark.parametrize("scheme", [text for text in FACTORED if not text.startswith("nv")])
def test_products_meet_int8(isa: str, scheme: str) -> None:
    """The same with int8 activations; exact where all is an integer times a power of two.

    AVX2 sums a span as an integer, which becomes a float (1 rounding), meets its outer factor and is added (1, fused), and so do
    its offsets; then the token's scale (1). The weight that it is compared with has two products of factors and two of its
    own. All by at most 2^-24 of the magnitudes.
    """
    for N, K, M in ((70, 600, 1), (33, 512, 5), (97, 256, 20)):
        weight = random_weight(f"{scheme}_a8", N, K, seed=K, act_order=M == 5)
        x = random(M, K, dtype=torch.float32, seed=M)
        y = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(weight, x, layout="cpu_tile_a8"))
        plain = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(flattened(weight), x, layout="cpu_tile_a8"))
        if isa in SPANS_OF_INTEGERS:
            codes, scales = reference.quantize_rows(x)
            quantized = codes.double() * scales.double()
            roundings = 4 * math.ceil(K / 256) + 5
            allowed = roundings * 2**-24 * (quantized.abs() @ magnitudes(weight).T)
            assert ((y.double() - quantized @ weight.dequantize().double().T).abs() <= allowed).all(), (N, K, M)
        else:
            assert torch.equal(y, plain), (N, K, M)
        exact = random_weight(f"{scheme}_a8", N, K, seed=K, exact=True)
        x = integers(M, K, most=3)
        x[:, 7] = 127
        y = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(exact, x, layout="cpu_tile_a8"))
        assert torch.equal(y, (x.double() @ exact.dequantize().double().T).float())


def test_a_wrong_factor_is_noticed(isa: str) -> None:
    """Negative control: one small factor of one group, and one outer factor."""
    weight = random_weight("q4_k", 33, 512, exact=True)
    assert weight.factors is not None
    x = integers(2, 512)
    for name in ("small", "outer", "small_zeros", "outer_zeros"):
        values = getattr(weight.factors, name).clone()
        values[32, -1] += 1
        changed = QuantTensor.from_factors(weight.codes, replace(weight.factors, **{name: values}), weight.scheme)
        assert (multiply(changed, x)[:, :32] == multiply(weight, x)[:, :32]).all()
        assert (multiply(changed, x)[:, 32] != multiply(weight, x)[:, 32]).all(), name


@pytest.mark.skipif(not extension.status().loaded, reason="the extension is not loaded")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {2: torch.zeros(2, 8, 32, dtype=torch.int8)},
            "scales must be contiguous uint8 .* with these factors, got int8",
        ),
        ({3: None}, "zeros must be given with these factors"),
        ({5: None}, "outer_scales must be given with these factors"),
        ({5: torch.zeros(2, 2, 32)}, "outer_scales must be contiguous floating .2, 1, 32. with these factors"),
        ({6: torch.zeros(2, 1, 32)}, "outer_zeros must be contiguous like outer_scales .2, 1, 32. with these factors"),
        ({13: 9}, "factors must be 0 to 7, got 9"),
        ({13: 4}, "zeros_are_offsets must be 0 with these factors"),
        ({13: 0}, "scales must be contiguous floating"),
    ],
)
def test_the_compiled_op_checks_factors_for_itself(change: dict[int, object], message: str) -> None:
    args = list(arguments(random_weight("q4_k", 40, 256), torch.zeros(3, 256)))
    for position, value in change.items():
        args[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.qkernels.gemm_cpu_tile_a16(*args)
