"""Scales that are products: what is derived, what is refused, and what keeps the factors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from qkernels import RTN, QuantLinear, QuantScheme, QuantTensor
from qkernels.codebooks import CODEBOOKS
from qkernels.errors import ArgumentError, TensorError
from qkernels.factors import Factors
from qkernels.scheme import FACTORS
from tests.strategies import random_weight, same_weight

SPELLED = [spelling for kind in FACTORS.values() for spelling in kind.spelling]
spelled = pytest.mark.parametrize("scheme", SPELLED)


@spelled
def test_scales_and_zeros_are_the_products(scheme: str) -> None:
    """Each by hand, in float32: small times outer (or divided), one rounding; offsets are minus such products."""
    weight = random_weight(scheme, 5, 592)
    kind, factors = FACTORS[weight.scheme.factors or ""], weight.factors
    assert factors is not None
    per = 10**9 if kind.span is None else kind.span // kind.group_size
    for n in range(5):
        for g in range(weight.G):
            small, outer = factors.small[n, g].float(), factors.outer[n, g // per].float()
            assert weight.scales[n, g] == (small / outer if kind.divides else small * outer)
            if kind.zeros == "offset":
                assert factors.small_zeros is not None
                assert factors.outer_zeros is not None
                assert weight.zeros is not None
                assert weight.zeros[n, g] == -(
                    factors.small_zeros[n, g].float() * factors.outer_zeros[n, g // per].float()
                )
    codes = weight.codes.float()
    if weight.scheme.codebook:
        codes = torch.tensor(CODEBOOKS[weight.scheme.codebook])[weight.codes.long()]
    elif weight.zeros is None:
        codes = codes - weight.scheme.mid_code
    groups = torch.arange(592) // weight.scheme.group_length(592)
    expected = codes * weight.scales[:, groups] + (0 if weight.zeros is None else weight.zeros[:, groups])
    assert torch.equal(weight.dequantize(), expected)


@spelled
def test_factors_travel(scheme: str) -> None:
    weight = random_weight(scheme, 6, 1024)
    assert same_weight(QuantTensor.concat([weight.shard("N", 0, 2), weight.shard("N", 1, 2)]), weight)
    halves = [weight.shard("K", rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.dequantize() for half in halves], 1), weight.dequantize())
    assert all(half.factors is not None for half in halves)
    stacked = QuantTensor.stack([weight, weight])
    assert stacked.factors is not None
    assert torch.equal(stacked.dequantize()[1], weight.dequantize())
    meta = weight.to("meta")
    assert meta.factors is not None
    assert meta.factors.small.is_meta
    assert same_weight(QuantTensor.from_factors(weight.codes, weight.factors, weight.scheme), weight)  # type: ignore[arg-type]


def test_a_cut_through_an_outer_factor_is_refused() -> None:
    weight = random_weight("q4_k", 4, 768)
    with pytest.raises(
        ArgumentError, match="a shard of K=768 over 2 ranks has 384 columns and would cut a group of 256"
    ):
        weight.shard("K", 0, 2)


# bytes of a row of 256 weights, as in the file: ggml-common.h; NVFP4 with its float32 a row
@pytest.mark.parametrize(
    ("scheme", "nbytes"),
    [("q2_k", 84), ("q3_k", 110), ("q4_k", 144), ("q5_k", 176), ("q6_k", 210), ("iq4_xs", 136), ("nvfp4_g16", 148)],
)
def test_bytes_are_those_of_the_file(scheme: str, nbytes: int) -> None:
    dtype = torch.float32 if scheme == "nvfp4_g16" else torch.float16
    weight = random_weight(scheme, 1, 256, dtype=dtype)
    assert weight.nbytes == nbytes


def test_contradictions_are_refused() -> None:
    weight = random_weight("q4_k", 4, 512)
    assert weight.factors is not None
    with pytest.raises(TensorError, match=r"factors must be given \(QuantTensor.from_factors\) for q4_k"):
        replace(weight, factors=None)
    with pytest.raises(TensorError, match="scales and zeros of q4_k are the products of its factors"):
        replace(weight, scales=weight.scales * 2)
    plain = random_weight("w4a16_g32_offset", 4, 512)
    with pytest.raises(TensorError, match="factors must be None for w4a16_g32_offset"):
        replace(plain, factors=weight.factors)
    with pytest.raises(TensorError, match="factors make weights of schemes such as q4_k and nvfp4_g16, got w4a16_g32"):
        QuantTensor.from_factors(weight.codes, weight.factors, QuantScheme.parse("w4a16_g32"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"small": torch.zeros(4, 16, dtype=torch.int8)},
            "factors.small must be uint8 [4, 16] for q4_k, got int8 [4, 16]",
        ),
        (
            {"small": torch.zeros(4, 15, dtype=torch.uint8)},
            "factors.small must be uint8 [4, 16] for q4_k, got uint8 [4, 15]",
        ),
        ({"outer": torch.zeros(4, 1).half()}, "factors.outer must be float16 or bfloat16 or float32 [4, 2] for q4_k"),
        ({"outer": torch.full((4, 2), torch.nan)}, "factors.outer must be finite, got 8 NaN or infinite entries"),
        ({"small_zeros": None}, "factors.small_zeros must be uint8 [4, 16] for q4_k, got None"),
        ({"small": torch.full((4, 16), 64, dtype=torch.uint8)}, "factors.small must be 0 … 63 for q4_k, got 64 … 64"),
    ],
)
def test_wrong_factors_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    weight = random_weight("q4_k", 4, 512)
    assert weight.factors is not None
    with pytest.raises(TensorError, match=re.escape(message)):
        QuantTensor.from_factors(weight.codes, replace(weight.factors, **change), weight.scheme)  # type: ignore[arg-type]


def test_an_outer_factor_that_divides_is_not_zero() -> None:
    factors = Factors(torch.ones(1, 2).to(torch.float8_e4m3fn), torch.zeros(1, 1))
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    with pytest.raises(TensorError, match="factors.outer of nvfp4_g16 divides and must not be 0"):
        QuantTensor.from_factors(codes, factors, QuantScheme.parse("nvfp4_g16"))
    other = QuantTensor.from_factors(codes, factors, QuantScheme.parse("nvfp4m_g16"))
    assert not other.dequantize().any()


def test_codes_that_mean_nan_are_refused() -> None:
    codes = torch.tensor([[1, 0x7F, 0xFF, 3]], dtype=torch.uint8)
    with pytest.raises(TensorError, match="codes must be numbers of e4m3, got 2 that mean NaN or infinity"):
        QuantTensor(codes, torch.ones(1, 1), None, None, QuantScheme.parse("fp8_channel"))


def test_a_scale_byte_that_means_nan_is_refused() -> None:
    scales = torch.tensor([[255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(TensorError, match="scales must be finite, got 1 NaN"):
        QuantTensor(torch.zeros(1, 32, dtype=torch.uint8), scales, None, None, QuantScheme.parse("mxfp4_g32"))


def test_blocks_have_one_scale() -> None:
    weight = random_weight("fp8_block32", 70, 96)
    assert weight.scales.unique(dim=0).shape[0] <= 3
    broken = weight.scales.clone()
    broken[40, 1] *= 2
    with pytest.raises(
        TensorError, match="scales of fp8_block32 must be equal over blocks of 32 rows, those from row 32"
    ):
        replace(weight, scales=broken)
    assert weight.nbytes == 70 * 96 + 3 * 3 * 2
    assert weight.shard("N", 0, 2).scheme.rows == 1  # 35 rows: the cut goes through a block
    assert str(random_weight("fp8_block32", 64, 96).shard("N", 1, 2).scheme) == "fp8_block32"


@pytest.mark.parametrize("scheme", [*SPELLED, "mxfp4_g32", "iq4nl_g32", "fp8_channel", "fp8_block128", "e5m2_g64"])
def test_round_to_nearest_comes_close(scheme: str) -> None:
    """Relative RMSE on Gaussian rows, beside that of good searches (their files' readers, Q2_K .30 … Q6_K .019)."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    made = RTN().with_scheme(scheme).quantize(weight)
    error = float((made.dequantize() - weight).norm() / weight.norm())
    most = {2: 0.45, 3: 0.21, 4: 0.14, 5: 0.05, 6: 0.027, 8: 0.03 if made.scheme.codebook == "e4m3" else 0.06}
    assert error < most[made.scheme.bits], error
    assert made.scales.dtype == (torch.float8_e8m0fnu if scheme == "mxfp4_g32" else made.scales.dtype)


def test_zeros_stay_zeros() -> None:
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    weight[2], weight[:, :256] = 0, 0
    for scheme in (*SPELLED, "mxfp4_g32", "fp8_block128"):
        made = RTN().with_scheme(scheme).quantize(weight).dequantize()
        assert not made[2].any(), scheme
        assert not made[:, :256].any(), scheme


def test_a_layer_of_products_runs_on_the_reference() -> None:
    linear = torch.nn.Linear(256, 48)
    layer = QuantLinear.from_linear(linear, "q4_k", on_unsupported="reference")
    again = QuantLinear(256, 48, scheme="q4_k", on_unsupported="reference")
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), again(x))
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias)
    assert same_weight(layer.quant_tensor(), again.quant_tensor())
