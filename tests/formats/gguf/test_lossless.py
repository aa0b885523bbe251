"""Weights of other formats in GGUF blocks: equal bit for bit, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import RTN, QuantScheme, QuantTensor
from qkernels.errors import ConversionError
from qkernels.formats.gguf import EXACT_SCHEMES, WRITABLE_TYPES, dequantize, exact_blocks, gguf_blocks, weight_of
from tests.gguf_weights import made_weight


def quantized(scheme: str) -> QuantTensor:
    return RTN().with_scheme(QuantScheme.parse(scheme)).quantize(made_weight()[9:, :256])


@pytest.mark.parametrize(
    ("scheme", "type"),
    [
        ("w4a16_g32", "Q4_0"), ("w4a16_g128", "Q4_0"), ("w4a16_channel", "Q4_0"), ("w3a16_g64", "Q4_0"), ("w2a16_g64", "Q2_0"),
        ("w2a16_g32", "Q4_0"), ("w4a16_g128_asym", "Q5_0"), ("w5a16_g32", "Q5_0"), ("w6a16_g64", "Q8_0"), ("w8a16_g32", "Q8_0"),
        ("w4a16_g32_offset", "Q4_1"), ("w3a16_g64_offset", "Q4_1"), ("w5a16_g32_offset", "Q5_1"), ("iq4nl_g32", "IQ4_NL"),
        ("mxfp4_g32", "MXFP4"),
    ],
)  # fmt: skip
def test_integers_fit_the_smallest_type_that_holds_them(scheme: str, type: str) -> None:
    weight = quantized(scheme)
    found, blocks = exact_blocks(weight)
    assert found == type
    assert torch.equal(dequantize(blocks, found), weight.dequantize(torch.float32))
    assert torch.equal(exact_blocks(weight, type)[1], blocks)


@pytest.mark.parametrize("type", sorted({*WRITABLE_TYPES} & EXACT_SCHEMES.keys()))
def test_what_was_read_is_written_back_to_the_same_bytes(type: str) -> None:
    blocks = gguf_blocks(made_weight()[:8], type)
    found, again = exact_blocks(weight_of(blocks, type), type)
    assert found == type
    assert torch.equal(again, blocks)


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([32, 64, 128]))
def test_zero_points_of_any_kind_never_lose_anything(seed: int, bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, 128), generator=draw, dtype=torch.uint8)
    scales = torch.randn(3, 128 // group, generator=draw).half()
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=draw, dtype=torch.uint8)
    weight = QuantTensor(codes, scales, zeros, None, QuantScheme.parse(f"w{bits}a16_g{group}_asym"))
    type, blocks = exact_blocks(weight)
    assert torch.equal(dequantize(blocks, type), weight.dequantize(torch.float32))


def test_products_that_float16_holds_have_a_minimum() -> None:
    """Zero points times scales of few bits: 4.5 and 5 bits a weight before 5.5."""
    codes = torch.arange(64, dtype=torch.uint8).remainder(16)[None]
    scales = torch.tensor([[0.5, 0.25]], dtype=torch.float16)
    scheme = QuantScheme.parse("w4a16_g32_asym")
    for zero, type in ((8, "Q4_0"), (3, "Q4_1")):
        zeros = torch.full((1, 2), zero, dtype=torch.uint8)
        assert exact_blocks(QuantTensor(codes, scales, zeros, None, scheme))[0] == type


def test_what_no_block_holds_is_refused_with_the_reason() -> None:
    order, ones = torch.arange(256).remainder(2).int(), torch.ones(1, 32, dtype=torch.uint8)
    weight = quantized("w4a16_g128")
    with pytest.raises(ConversionError, match="grouped in the order of their activations .act-order."):
        exact_blocks(QuantTensor(weight.codes, weight.scales, None, order, weight.scheme))
    with pytest.raises(ConversionError, match="w4a16_g16 without loss .*groups of 16 do not hold whole blocks of 32"):
        exact_blocks(quantized("w4a16_g16"))
    with pytest.raises(ConversionError, match="Q8_0 has -128 … 127"):
        exact_blocks(
            QuantTensor(ones * 255, ones[:, :1].half(), ones[:, :1] * 0, None, QuantScheme.parse("w8a16_g32_asym"))
        )
    with pytest.raises(ConversionError, match="rows of 80 are no multiple of the 32 of a block"):
        exact_blocks(RTN(bits=4, group_size=80).quantize(torch.randn(2, 80)))
    with pytest.raises(ConversionError, match="do not fit float16 as Q4_0 has them"):
        exact_blocks(RTN(bits=4, group_size=32, scale_dtype=torch.float32).quantize(torch.randn(2, 64)))
    with pytest.raises(ConversionError, match="Q4_1 holds a weight of w4a16_g32 without loss"):
        exact_blocks(quantized("w4a16_g32"), "Q4_1")
    with pytest.raises(ConversionError, match="no GGUF type holds a weight of nf4_g64 without loss"):
        exact_blocks(quantized("nf4_g64"))
    with pytest.raises(ConversionError, match=r"one .N, K. weight"):
        exact_blocks(QuantTensor.stack([quantized("w4a16_g32")] * 2))
