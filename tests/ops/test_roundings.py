"""How x becomes int8 (`scheme.ACTIVATIONS`): to the bit what compressed-tensors and bitsandbytes make of the same rows
(tests/golden/activations/make.py), in the reference and on every instruction set; and what that adds to a product.

Bound of `test_products`: see test_int8.py; what is subtracted for zero points is a second product, with 3 roundings more (zero
point times scale, its product, the difference), and what is added for outliers has as many as there are columns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkernels import QuantLinear, QuantScheme, QuantTensor, replace_linear
from qkernels.errors import ArgumentError, SchemeError, TensorError, UnsupportedProblem
from qkernels.kernels.catalogue import Problem, select
from qkernels.ops import reference
from tests.ops.helpers import DTYPES, arguments
from tests.strategies import random_weight

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "activations" / "rows.safetensors")
LAYOUT = "cpu_tile_a8"
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def multiply(weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    result = torch.ops.qkernels.gemm_cpu_tile_a8(*arguments(weight, x, bias, LAYOUT))
    assert isinstance(result, Tensor)
    return result


def made(dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, and the codes and scales that the origin makes of it."""
    name = str(dtype).removeprefix("torch.")
    scale = "most" if kind == "outliers" else "scale"
    return GOLDEN[f"{name}.x"], *(GOLDEN[f"expected.{name}.{kind}.{part}"] for part in ("codes", scale))


def unit(act: str, static: Tensor | None = None) -> QuantTensor:
    """A weight of 1 on the diagonal, which shows what becomes of x."""
    codes = torch.full((96, 96), 128, dtype=torch.uint8) + torch.eye(96, dtype=torch.uint8)
    return QuantTensor(codes, torch.ones(96, 1), None, None, QuantScheme(8, "channel", act=act), x_static=static)


@dtypes
def test_wide_is_what_compressed_tensors_makes(isa: str, dtype: torch.dtype) -> None:
    x, codes, scales = made(dtype, "wide")
    assert codes.min() == -128  # the trap of byte products with a sign
    ours, of_rows = reference.quantize_rows_wide(x)
    assert torch.equal(ours, codes)
    assert torch.equal(of_rows[codes.any(1)], scales.float()[codes.any(1)])
    assert torch.equal(multiply(unit("int8_wide"), x), (codes.float() * of_rows).to(dtype))


@dtypes
def test_zero_points_are_what_compressed_tensors_makes(isa: str, dtype: torch.dtype) -> None:
    x, codes, scales = made(dtype, "zero")
    zeros = GOLDEN[f"expected.{str(dtype).removeprefix('torch.')}.zero.zero"]
    assert zeros.unique().numel() > 3
    ours, of_rows, of_zeros = reference.quantize_rows_zero(x)
    used = codes != zeros  # rows without a range have another zero, which means the same
    rows = used.any(1)
    assert torch.equal(ours[rows], codes[rows])
    assert torch.equal(of_zeros[rows], zeros.float()[rows])
    assert torch.equal(of_rows[rows], scales.float()[rows])
    right = ours.float() * of_rows - of_zeros * of_rows  # as the kernels add it up
    assert torch.equal(multiply(unit("int8_zero"), x), right.to(dtype))
    exact = (codes.double() - zeros.double()) * scales.double()
    assert (right.double() - exact).abs().le(2**-23 * (256 * scales.double())).all()


@dtypes
@pytest.mark.parametrize("kind", ["static", "static_zero"])
def test_static_is_what_compressed_tensors_makes(isa: str, dtype: torch.dtype, kind: str) -> None:
    x, codes, scale = made(dtype, kind)
    zero = GOLDEN[f"expected.{str(dtype).removeprefix('torch.')}.{kind}.zero"]
    static = torch.cat([scale.float(), zero.float()])
    assert bool(zero) == (kind == "static_zero")
    assert (codes.min(), codes.max()) == (-128, 127)  # noise of 5 and outliers are cut
    ours, of_rows, of_zeros = reference.quantize_rows_static(x, static)
    assert torch.equal(ours, codes)
    assert of_rows.tolist() == [[float(scale)]] * len(x)
    right = ours.float() * of_rows - of_zeros * of_rows
    assert torch.equal(multiply(unit(f"int8_{kind}", static), x), right.to(dtype))
    exact = (codes.double() - float(zero)) * scale.double()
    assert (right.double() - exact).abs().max() <= 2**-23 * 256 * scale.double()


@dtypes
def test_outliers_are_what_bitsandbytes_makes(isa: str, dtype: torch.dtype) -> None:
    x, codes, most = made(dtype, "outliers")
    columns = GOLDEN[f"expected.{str(dtype).removeprefix('torch.')}.outliers.columns"]
    ours, of_rows, marked = reference.quantize_rows_outliers(x)
    assert torch.equal(marked.nonzero()[:, 0], columns)
    assert 3 < len(columns) < 40
    assert torch.equal(ours, codes)
    assert torch.equal(of_rows[:, 0], most / 127)
    right = torch.where(marked, x.float(), codes.float() * of_rows)
    assert torch.equal(multiply(unit("int8_outliers"), x), right.to(dtype))


@pytest.mark.parametrize("act", ["8w", "8z", "8o6", "8s", "8sz"])
@pytest.mark.parametrize("scheme", [
    "w8a{}_channel", "w4a{}_g32", "w8a{}_g64_asym", "w4a{}_g32_fzero", "w8a{}_channel_offset", "w5a{}_g32", "w3a{}_channel",
    "w2a{}_g64", "w6a{}_channel", "iq4nl_g32_a{}", "q6_k_a{}", "q4_k_a{}", "iq4_xs_a{}",
])  # fmt: skip
def test_products(isa: str, poisoned_memory: None, scheme: str, act: str) -> None:
    K = 512 if "_k_" in scheme or "xs" in scheme else 200
    weight = random_weight(scheme.format(act), 70, K, seed=3, act_order="g" in scheme and "_g" in scheme)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1))
    for M, dtype in ((0, DTYPES[0]), (1, DTYPES[0]), (3, DTYPES[1]), (9, DTYPES[2]), (66, DTYPES[0])):
        x = torch.randn(K, M, generator=torch.Generator().manual_seed(M)).to(dtype).T * 2
        x[:, ::50] *= 2
        y, right = multiply(weight, x, bias), reference.gemm_a8(x, weight, bias, torch.float32)
        parts = x.float().abs() @ weight.dequantize().float().abs().T + bias.abs()
        if act.endswith("z"):
            parts = parts + x.float().abs().amax(1, keepdim=True) * weight.dequantize().float().abs().sum(1)
        bound = (2 * weight.scheme.num_groups(K) + 40) * 2**-24 * parts * 2
        assert ((y.float() - right).abs() <= bound + torch.finfo(dtype).eps * right.abs()).all(), M


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("code", ["lowest", "highest"])
@pytest.mark.parametrize("act", ["int8_wide", "int8_zero", "int8_static", "int8_static_zero"])
def test_minus_128_does_not_saturate(isa: str, bits: int, code: str, act: str) -> None:
    """-128 has no negative in a byte, and pairs of it with 8-bit codes are more than int16 holds."""
    N, K = 40, 512
    scheme = QuantScheme(bits, "channel", act=act)
    codes = torch.full((N, K), 0 if code == "lowest" else scheme.max_code, dtype=torch.uint8)
    static = torch.tensor([1.0, 0.0]) if "static" in act else None
    weight = QuantTensor(codes, torch.ones(N, 1), None, None, scheme, x_static=static)
    # A row from -127.5 to 0, so that scale is 1, or a half of it; and its negative.
    for sign in (-1.0, 1.0):
        for M in (1, 3, 7):
            x = torch.full((M, K), 127.5 * sign)
            one = 127.5 * sign if act == "int8_zero" else -128.0 if sign < 0 else 127.0
            expected = one * K * (int(codes[0, 0]) - scheme.mid_code)
            assert torch.equal(multiply(weight, x), torch.full((M, N), expected)), M


def test_bytes_of_every_sign_meet_minus_128(isa: str) -> None:
    """Each code of 8 bits against rows that hold -128 in some columns alone."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1)
    weight = QuantTensor(codes, torch.ones(40, 1), None, None, QuantScheme(8, "channel", act="int8_wide"))
    for seed in range(3):
        x = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(seed)).float()
        x[:, seed::3] = -127.5
        right = x.clone()
        right[:, seed::3] = -128
        assert torch.equal(multiply(weight, x), right @ weight.dequantize().T)


def test_a_neighbour_marks_a_column(isa: str) -> None:
    """As in bitsandbytes: what one token marks is multiplied in floats for all of them."""
    weight = random_weight("w8a8o6_channel", 40, 64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5] = 7
    alone, beside = multiply(weight, x[:1]), multiply(weight, x)[:1]
    assert not torch.equal(alone, beside)
    x[1, 5] = 5.99
    assert torch.equal(alone, multiply(weight, x)[:1])


def test_more_outliers_than_16_bits_hold(isa: str) -> None:
    """Beyond 65504 bitsandbytes has infinities on a GPU in fp16; here x is what it is."""
    weight = random_weight("w8a8o6_channel", 40, 64)
    x = torch.zeros(1, 64)
    x[0, 7] = 1e6
    assert torch.allclose(multiply(weight, x), x @ weight.dequantize().float().T, rtol=1e-6)


@pytest.mark.parametrize("act", ["int8_wide", "int8_zero", "int8_outliers"])
def test_what_is_not_finite_is_not_hidden(isa: str, act: str) -> None:
    weight, x = random_weight("w8a8_channel", 40, 64), torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    weight = QuantTensor(weight.codes, weight.scales, None, None, QuantScheme(8, "channel", act=act))
    x[1, 9] = torch.nan
    y = multiply(weight, x)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()
    x[1, 9] = torch.inf
    y = multiply(weight, x)
    if act == "int8_outliers":  # a column of floats: its infinities are those of a float layer
        right = x[1] @ weight.dequantize().float().T
        assert torch.equal(y[1].isnan(), right.isnan())
        assert torch.equal(y[1].isinf(), right.isinf())
    else:
        assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for scheme in ("w8a8o6_channel", "w4a8z_g32", "w4a8sz_g32"):
            weight, x = random_weight(scheme, 600, 512), torch.randn(200, 512) * 2
            found = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(multiply(weight, x))
            assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


def test_stacked_experts_have_no_static_scale() -> None:
    for act in ("8w", "8z", "8o6"):
        assert select(Problem(64, 64, f"w8a{act}_channel", torch.float32, experts=2)).layout == LAYOUT  # type: ignore[arg-type]
    for act in ("8s", "8sz"):
        with pytest.raises(UnsupportedProblem, match=r"one scale .*from the file.*: not for stacked experts"):
            select(Problem(64, 64, f"w8a{act}_channel", torch.float32, experts=2))  # type: ignore[arg-type]


def test_wrong_numbers_are_refused() -> None:
    weight, x = random_weight("w8a8_channel", 40, 64), torch.zeros(1, 64)
    for layout, number in ((LAYOUT, 0), (LAYOUT, 7), ("reference_a8", -1)):
        *front, _ = arguments(weight, x, None, layout)
        with pytest.raises((RuntimeError, ArgumentError, SchemeError), match="act must be"):
            getattr(torch.ops.qkernels, f"gemm_{layout}")(*front, number)


def test_a_static_scale_is_there_where_it_is_wanted() -> None:
    x, static = torch.zeros(1, 64), torch.tensor([0.5, 3.0])
    for scheme, given, wanted in (
        ("w8a8s_channel", None, "contiguous float32"), ("w8a8_channel", static, "None"),
        ("w8a8sz_channel", static.double(), "contiguous float32"), ("w8a8sz_channel", static[:1], "contiguous float32"),
    ):  # fmt: skip
        values = list(arguments(random_weight(scheme, 40, 64), x, None, LAYOUT))
        values[7] = given
        with pytest.raises(RuntimeError, match=f"x_static must be {wanted}"):
            torch.ops.qkernels.gemm_cpu_tile_a8(*values)
        with pytest.raises((ArgumentError, RuntimeError), match="x_static must be"):
            torch.ops.qkernels.gemm_cpu_tile_a8(*(v.to("meta") if isinstance(v, Tensor) else v for v in values))


def test_a_static_scale_that_is_no_number_reads_nothing_wild(isa: str) -> None:
    """Values of buffers are not looked at before: NaN, infinities and 0 give NaN or 0, and no undefined conversion."""
    x = torch.randn(3, 96)
    for scale, zero in ((torch.nan, 0), (torch.inf, 0), (1.0, torch.nan), (1.0, 1e30), (0.0, 5), (1e-45, 5), (-1.0, 3)):
        packed = list(arguments(unit("int8_static_zero", torch.tensor([1.0, 2.0])), x, None, LAYOUT))
        packed[7] = torch.tensor([scale, zero])
        for M in (1, 3):
            y = torch.ops.qkernels.gemm_cpu_tile_a8(x[:M], *packed[1:])
            assert y.shape == (M, 96)
            assert scale != 0 or not y.any()
    small = unit("int8_static", torch.tensor([1e-9, 0.0]))  # 0 in float16
    assert not multiply(small, x.half()).any()
    assert not reference.gemm_a8(x.half(), small).any()


@pytest.mark.parametrize("act", ["int8_static", "int8_static_zero"])
def test_static_cuts_what_is_not_finite(isa: str, act: str) -> None:
    """An infinity is the largest code, as in compressed-tensors; a row with a NaN is NaN, as there."""
    zero = 7.0 if act.endswith("zero") else 0.0
    weight, x = unit(act, torch.tensor([0.5, zero])), torch.zeros(3, 96)
    x[1, 4], x[1, 5], x[2, 6] = torch.inf, -torch.inf, torch.nan
    y = multiply(weight, x)
    assert not y[0].any()
    assert y[1].nonzero()[:, 0].tolist() == [4, 5]
    assert y[1, 4:6].tolist() == [0.5 * (127 - zero), 0.5 * (-128 - zero)]
    assert y[2].isnan().all()
    assert torch.equal(reference.gemm_a8(x, weight).nan_to_num(9e9), y.nan_to_num(9e9))


def test_static_weights_keep_their_scale() -> None:
    a, b = (random_weight("w8a8sz_channel", 40, 64, seed=seed) for seed in (1, 2))
    assert a.x_static is not None
    whole = QuantTensor.concat([a, b])
    for weight in (whole, whole.shard("N", 1, 2), whole.shard("K", 0, 2), whole.to("cpu")):
        assert weight.x_static is not None
        assert weight.x_static.tolist() == [0.03125, 7.0]
    other = replace(b, x_static=torch.tensor([0.5, 7.0]))
    with pytest.raises(ArgumentError, match="weights that are joined need one x_static"):
        QuantTensor.concat([a, other])
    with pytest.raises(TensorError, match="static activations are of one weight"):
        QuantTensor.stack([a, b])


@pytest.mark.parametrize(
    ("static", "said"),
    [
        (None, r"x_static must be float32 \[2\].*got None"),
        (torch.tensor([0.5]), r"x_static must be float32 \[2\]"),
        (torch.tensor([torch.nan, 0.0]), "scale of x must be positive and finite, got nan"),
        (torch.tensor([-0.5, 0.0]), "scale of x must be positive"),
        (torch.tensor([0.5, 200.0]), "zero point of x must be a whole number from -128 to 127, got 200"),
        (torch.tensor([0.5, 3.0]), "zero point of x must be 0 where activations have none, got 3"),
    ],
)
def test_a_wrong_static_scale_is_refused(static: Tensor | None, said: str) -> None:
    with pytest.raises(TensorError, match=said):
        unit("int8_static", static)
    with pytest.raises(TensorError, match="x_static must be None"):
        unit("int8_wide", torch.tensor([0.5, 0.0]))


def test_no_quantizer_makes_static_scales() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 40))
    with pytest.raises(SchemeError, match=r"scale of its activations from a file .* such as w8a8w_channel"):
        replace_linear(model, "w8a8s_channel", exclude=())


def test_replace_linear_makes_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)) * 3
    right = model(x)
    replace_linear(model, "w8a8o6_channel", exclude=())
    assert isinstance(model[0], QuantLinear)
    assert str(model[0].scheme) == "w8a8o6_channel"
    assert (model(x) - right).abs().max() < 0.02 * right.abs().max()
    model(x.requires_grad_()).sum().backward()  # straight through
    assert x.grad is not None
