"""torchao: packers from the formulas of the format, what its metadata must say, and what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.checkpoint.registry import WRITTEN, detect
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import METADATA
from qkernels.formats.torchao import FORMAT
from tests.formats.packers import torchao, torchao_block, torchao_config
from tests.strategies import random_weight, same_weight


def nibbles(weight: QuantTensor) -> dict[str, Tensor]:
    """Int4Tensor of an "offset" weight whose offsets are zero_point - 8 * scale."""
    assert weight.zeros is not None
    packed = [
        [((a - 8) & 15) | (((b - 8) & 15) << 4) for a, b in zip(row[::2], row[1::2], strict=True)]
        for row in weight.codes.tolist()
    ]
    zero = weight.zeros.float() + 8 * weight.scales.float()
    return {
        "_weight_qdata": torch.tensor(packed, dtype=torch.uint8).view(torch.int8),
        "_weight_scale": weight.scales.T.contiguous(),
        "_weight_zero_point": zero.T.contiguous(),
    }


def tiles(weight: QuantTensor) -> dict[str, Tensor]:
    """Int4TilePackedTo4dTensor, code by code, in the terms of the tensor-core instruction (reference: lane and register)."""
    rows, columns = -(-weight.N // 8) * 8, -(-weight.K // 1024) * 1024
    words = [[[[0] * 4 for _ in range(32)] for _ in range(columns // 128)] for _ in range(rows // 8)]
    for n, row in enumerate(weight.codes.tolist()):
        for k, code in enumerate(row):
            tile, r = k // 16 % 8, k % 16
            lane, m = 4 * (n % 8) + r % 8 // 2, 4 * (tile % 2) + 2 * (r // 8) + r % 2
            nibble = m // 2 if m % 2 == 0 else 4 + m // 2
            words[n // 8][k // 128][lane][tile // 2] |= code << 4 * nibble
    data = torch.tensor(words, dtype=torch.int64)
    group = weight.scheme.group_length(weight.K)
    both = torch.zeros(columns // group, rows, 2, dtype=torch.bfloat16)
    assert weight.zeros is not None
    both[: weight.G, : weight.N, 0] = weight.scales.T
    both[: weight.G, : weight.N, 1] = (weight.zeros.float() + 8 * weight.scales.float()).T
    return {"_weight_qdata": data.int(), "_weight_scale_and_zero": both}


def int4_weight(N: int, K: int) -> QuantTensor:
    """Offsets such that offset + 8 * scale, the stored zero, is exact in bf16: scales are powers of two."""
    made = random_weight("w4a16_g32_offset", N, K, dtype=torch.bfloat16, exact=True)
    assert made.zeros is not None
    return QuantTensor(made.codes, made.scales, made.zeros.float(), None, made.scheme)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["g32", "g32_asym", "channel", "tensor"])
def test_a_byte_a_code(bits: int, kind: str) -> None:
    weight = random_weight(f"w{bits}a16_{kind}", 12, 96, dtype=torch.bfloat16)
    target = {"_type": "torch.dtype", "_data": f"int{bits}"}
    fields = torchao_config(
        "IntxUnpackedToInt8Tensor", torchao_block(weight), target_dtype=target, activation_quantization=None
    )
    assert detect(fields) is FORMAT
    assert same_weight(FORMAT.parse("m", torchao(weight), fields).weight, weight)
    assert FORMAT.parse("m", torchao(weight), fields).oddities == ()
    if bits == 8:
        assert same_weight(
            FORMAT.parse("m", torchao(weight), torchao_config("Int8Tensor", torchao_block(weight))).weight, weight
        )


def test_float_zero_points_stay_floats() -> None:
    weight = random_weight("w4a16_g32_fzero", 12, 96)
    fields = torchao_config("IntxUnpackedToInt8Tensor", [1, 32], target_dtype={"_type": "torch.dtype", "_data": "int4"})
    read = FORMAT.parse("m", torchao(weight), fields).weight
    assert str(read.scheme) == "w4a16_g32_fzero"
    assert torch.equal(read.dequantize(), weight.dequantize())
    with pytest.raises(ConversionError, match="zero points must be integers"):
        WRITTEN["gptq"].write(read)


def test_nibbles() -> None:
    weight = int4_weight(12, 96)
    assert same_weight(
        FORMAT.parse("m", nibbles(weight), torchao_config("Int4Tensor", [1, 32], shape=[12, 96])).weight, weight
    )
    symmetric = nibbles(weight) | {"_weight_zero_point": torch.zeros(3, 12)}
    assert str(FORMAT.parse("m", symmetric, torchao_config("Int4Tensor", [1, 32])).weight.scheme) == "w4a16_g32"


@pytest.mark.parametrize(("N", "K"), [(8, 1024), (13, 96), (24, 1152)])
def test_tiles(N: int, K: int) -> None:
    weight = int4_weight(N, K)
    fields = torchao_config("Int4TilePackedTo4dTensor", [1, 32], shape=[N, K])
    assert same_weight(FORMAT.parse("m", tiles(weight), fields).weight, weight)


def test_quantized_activations_are_an_oddity() -> None:
    weight = random_weight("w8a16_channel", 12, 96)
    found = FORMAT.parse(
        "m", torchao(weight), torchao_config("Int8Tensor", [1, 96], act_quant_kwargs={"_type": "x"})
    ).oddities
    assert [oddity.kind for oddity in found] == ["torchao quantizes activations too"]


W = random_weight("w8a16_channel", 12, 96)
INT8 = torchao_config("Int8Tensor", [1, 96])


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"quant_method": "torchao"}, "the safetensors metadata has no entry m.weight"),
        ({}, INT8 | {METADATA: {"m.weight": "{"}}, "the metadata of m.weight must be JSON"),
        ({}, INT8 | {METADATA: {"m.weight": "[" * 3000}}, "the metadata of m.weight must be JSON"),
        ({}, INT8 | {METADATA: {"m.weight": "9" * 4000}}, "the metadata of m.weight (must be JSON|needs _type)"),
        (
            {},
            INT8 | {METADATA: {"m.weight": " " * 5000}},
            "the metadata of m.weight has 5000 characters, more than 4096",
        ),
        ({}, INT8 | {METADATA: {"m.weight": "[1]"}}, "needs _type and _data, got"),
        ({}, torchao_config("Float8Tensor", [1, 96]), r"qdata must be float8_e4m3fn \[12, 96\], got int8"),
        (
            {},
            torchao_config("Float7Tensor", [1, 96]),
            "its type is 'Float7Tensor', which is not read; read are Int8Tensor",
        ),
        ({}, torchao_config("Int4PlainInt32Tensor", [1, 32]), "its type is 'Int4PlainInt32Tensor'"),
        ({}, torchao_config("Int8Tensor", [1, 40]), r"block_size \[1, 40\] is no group along K=96"),
        ({}, torchao_config("Int8Tensor", [2, 96]), r"block_size \[2, 96\] is no group along K=96"),
        ({}, torchao_config("Int8Tensor", [1, 2**70]), "block_size must be two sizes of 1"),
        ({}, torchao_config("Int8Tensor", None), "block_size must be two sizes of 1 … 2.31 - 1, got None"),
        ({}, torchao_config("IntxUnpackedToInt8Tensor", [1, 96]), "target_dtype must be int2 to int8, got None"),
        (
            {},
            torchao_config("IntxUnpackedToInt8Tensor", [1, 96], target_dtype={"_data": "int4"}),
            "qdata must be -8 … 7 for 4 bits, got",
        ),
        ({}, torchao_config("Int4TilePackedTo4dTensor", [1, 32]), "shape is missing from its metadata"),
        (
            {"_weight_scale_and_zero": torch.zeros(1)},
            torchao_config("Int4TilePackedTo4dTensor", [1, 32], shape=[2**30, 2**30]),
            r"qdata must be int32 \[134217728, 8388608, 32, 4\] .* got int8",
        ),
        ({"_weight_act_pre_scale": torch.ones(96)}, INT8, "it has act_pre_scale, which multiplies the activations"),
        ({"_weight_scale": torch.full((12, 1), float("nan"))}, INT8, "scales must be finite, got 12 NaN"),
        ({"_weight_scale": torch.ones(12)}, INT8, r"scale must be float16 or bfloat16 or float32 \[12, 1\]"),
        ({"_weight_zero_point": torch.ones(12, 2, dtype=torch.int8)}, INT8, r"zero_point must be int8 or .* \[12, 1\]"),
        ({"_weight_qdata": torch.zeros(2, 12, 96, dtype=torch.int8)}, INT8, "stacked experts are not read"),
    ],
)
def test_refusals(changes: dict[str, Tensor], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", torchao(W) | changes, fields)


def test_zero_points_outside_the_codes() -> None:
    weight = random_weight("w4a16_g32_asym", 12, 96)
    fields = torchao_config("IntxUnpackedToInt8Tensor", [1, 32], target_dtype={"_data": "int4"})
    wide = torchao(weight) | {"_weight_zero_point": torch.full((12, 3), 9, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match="^m: zero_point must be -8 … 7 for 4 bits, got 9 … 9"):
        FORMAT.parse("m", wide, fields)


def test_a_missing_part_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^m: _weight_scale is missing \(it has qdata, zero_point\)"):
        FORMAT.parse("m", {k: t for k, t in torchao(W).items() if k != "_weight_scale"}, INT8)
