"""bitsandbytes: a packer from the format's description, double quantization, and files that lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import ACTIVATIONS, Written
from qkernels.formats.bitsandbytes import FOUR_BIT, INT8
from qkernels.scheme import CODEBOOKS
from tests.formats.packers import BITSANDBYTES_STATE, bitsandbytes, json_bytes
from tests.strategies import random_weight, same_weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64])
def test_every_bit_is_where_it_belongs(kind: str, block: int) -> None:
    weight = random_weight(f"{kind}_g{block}", 12, 128, dtype=torch.float32)
    tensors = bitsandbytes(weight, kind)
    assert same_weight(FOUR_BIT.parse("m", tensors, {}).weight, weight)
    viewed = tensors | {"weight": tensors["weight"].flatten().view(torch.bfloat16)[:, None]}
    assert same_weight(FOUR_BIT.parse("m", viewed, {}).weight, weight)


def test_the_tables() -> None:
    """FP4: sign, two bits of exponent, one of mantissa; the smallest is a subnormal of 1 / 192."""
    values = [v * 12 for v in CODEBOOKS["fp4"]]
    assert values[:8] == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3])
    assert values[8:] == [-v for v in values[:8]]


def test_double_quantization() -> None:
    """1200 blocks of 64: absmax is a table entry times the block's fp32 factor, plus the offset."""
    g = torch.Generator().manual_seed(3)
    weight = random_weight("nf4_g64", 300, 256, dtype=torch.float32)
    index = torch.randint(0, 256, (1200,), generator=g).to(torch.uint8)
    table, nested = torch.linspace(-1, 1, 256), torch.rand(5, generator=g)
    tensors = bitsandbytes(weight, nested_blocksize=256, nested_dtype="float32", nested_offset=0.37)
    tensors |= {"weight.absmax": index, "weight.nested_quant_map": table, "weight.nested_absmax": nested}
    scales = [float(table[int(c)] * nested[i // 256] + 0.37) for i, c in enumerate(index)]
    read = FOUR_BIT.parse("m", tensors, {}).weight
    assert torch.equal(read.scales.flatten(), torch.tensor(scales))
    del tensors["weight.nested_absmax"]
    with pytest.raises(CheckpointError, match=r"absmax is uint8, but weight\.nested_absmax or .* is missing"):
        FOUR_BIT.parse("m", tensors, {})


def test_a_codebook_goes_into_the_native_format_only() -> None:
    weight = FOUR_BIT.parse("m", bitsandbytes(random_weight("fp4_g64", 8, 128, dtype=torch.float32), "fp4"), {}).weight
    native = WRITTEN["native"]
    assert same_weight(
        native.parse("m", native.write(weight), native.config_of(Written(weight.scheme, {}))).weight, weight
    )
    with pytest.raises(ConversionError, match="fp4_g64 has a codebook"):
        WRITTEN["gptq"].write(weight)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"shape": [16, 64]}, None),
        ({}, {"shape": [32, 32]}, r"cross its rows of K=32, so that they are no groups"),
        ({}, {"shape": [8, 256]}, r"weight as bytes must be uint8 \[1024\]"),
        ({}, {"shape": [8]}, r"needs a shape \[N, K\], got \[8\]"),
        ({}, {"shape": [8, 2**40]}, r"needs a shape \[N, K\]"),
        ({}, {"quant_type": "fp4"}, "named nf4 but its quant_type is 'fp4'"),
        ({}, {"blocksize": 48}, "blocksize to be a power of two up to 4096, got 48"),
        ({}, {"nested_offset": float("inf")}, "finite nested_offset"),
        ({"weight.absmax": torch.ones(15)}, {}, r"weight\.absmax must be float32 or uint8 \[16\]"),
        ({"weight.absmax": torch.full((16,), float("nan"))}, {}, "scales must be finite"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, {}, "quant_map must be the table of nf4"),
        ({"weight": torch.zeros(512, 1).int()}, {}, "weight must be uint8 or a float dtype"),
        ({f"{BITSANDBYTES_STATE}nf4": torch.zeros(5000, dtype=torch.uint8)}, {}, "at most 4096 bytes"),
        ({f"{BITSANDBYTES_STATE}nf4": torch.tensor([200], dtype=torch.uint8)}, {}, "must be JSON"),
        ({f"{BITSANDBYTES_STATE}nf4": json_bytes([1])}, {}, r"must be a JSON object, got \[1\]"),
        ({f"{BITSANDBYTES_STATE}fp4": json_bytes({})}, {}, "exactly one .* got 2"),
    ],
)
def test_broken_files(changes: dict[str, Tensor], fields: dict[str, Any], message: str | None) -> None:
    tensors = bitsandbytes(random_weight("nf4_g64", 8, 128, dtype=torch.float32), **fields) | changes
    if message is None:  # the same bytes as another shape are sound
        assert FOUR_BIT.parse("m", tensors, {}).weight.N == 16
        return
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FOUR_BIT.parse("m", tensors, {})


def test_int8() -> None:
    g = torch.Generator().manual_seed(0)
    stored = torch.randint(-128, 128, (16, 40), generator=g).to(torch.int8)
    largest = torch.rand(16, generator=g) + 0.1
    tensors = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    weight = INT8.parse("m", tensors, {}).weight
    exact = stored.double() * largest.double()[:, None] / 127
    assert (weight.dequantize().double() - exact).abs().le(exact.abs() * 2**-23).all()  # two roundings of 2^-24
    gptq = WRITTEN["gptq"]
    assert str(weight.scheme) == "w8a8o6_channel"
    stated = INT8.parse("m", tensors, {"llm_int8_threshold": 6.0})
    assert same_weight(stated.weight, weight)
    assert stated.oddities == ()
    other = INT8.parse("m", tensors, {"llm_int8_threshold": 4.5})
    assert other.oddities[0].kind == "the config asks for int8 activations with llm_int8_threshold 4.5"
    weight = other.weight
    assert str(weight.scheme) == "w8a16_channel"
    with pytest.raises(CheckpointError, match=r'^m: .*threshold 4.5; kernels here have 6.0; .*activations="16bit"'):
        INT8.parse("m", tensors, {"llm_int8_threshold": 4.5, ACTIVATIONS: "file"})
    with pytest.raises(CheckpointError, match="^m: llm_int8_threshold must be a number, got '6'"):
        INT8.parse("m", tensors, {"llm_int8_threshold": "6"})
    again = gptq.parse("m", gptq.write(weight), gptq.config_of(Written(weight.scheme, {}))).weight
    assert torch.equal(again.dequantize(), weight.dequantize())
    for changes, message in (
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, r"weight_format must be 0 \(rows\), got \[1\]"),
        ({"SCB": torch.ones(15)}, r"SCB must be float32 \[16\]"),
        ({"weight": torch.zeros(16, 40)}, "weight must be int8"),
        ({"SCB": torch.full((16,), float("inf"))}, "scales must be finite"),
    ):
        with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
            INT8.parse("m", tensors | changes, {})
