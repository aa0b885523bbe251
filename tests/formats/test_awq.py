"""AWQ to the bit: the order of the nibbles, symmetric weights, what its files cannot hold, broken tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import Written
from qkernels.formats.awq import GEMM
from tests.strategies import random_weight, same_weight


def config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | fields


def test_eight_rows_are_interleaved_in_a_word() -> None:
    """Nibble i of a word holds row (0, 2, 4, 6, 1, 3, 5, 7)[i]: with row n all n, the word spells that order."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32).contiguous()
    zeros = torch.tensor([15, 14, 13, 12, 11, 10, 9, 8], dtype=torch.uint8)[:, None]
    weight = QuantTensor(codes, torch.ones(8, 1, dtype=torch.float16), zeros, None, QuantScheme(4, 32, "int"))
    tensors = GEMM.write(weight)
    assert tensors["qweight"].tolist() == [[0x75316420]] * 32
    assert [int(word) & 0xFFFFFFFF for word in tensors["qzeros"].flatten()] == [0x8ACE9BDF]
    assert list(tensors["scales"].shape) == [1, 8]


def test_words_of_an_independent_packer() -> None:
    weight = random_weight("w4a16_g32_asym", 24, 64)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = torch.zeros(64, 3, dtype=torch.int64)
    for k in range(64):
        for c in range(3):
            for i in range(8):
                expected[k, c] |= int(weight.codes[8 * c + order[i], k]) << (4 * i)
    assert torch.equal(GEMM.write(weight)["qweight"], expected.int())


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_channel"])
def test_a_symmetric_weight_has_zero_points_of_8(scheme: str) -> None:
    weight = random_weight(scheme, 16, 64)
    tensors, written = GEMM.write(weight), GEMM.config_of(Written(weight.scheme, {}))
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    assert written["zero_point"] is True
    assert same_weight(GEMM.parse("m", tensors, written).weight, weight)
    foreign = GEMM.parse("m", tensors, {k: v for k, v in written.items() if k != "sym"}).weight
    assert foreign.scheme.zeros == "int"
    assert torch.equal(foreign.dequantize(), weight.dequantize())


def test_symmetric_and_asymmetric_modules_in_one_file_stay_equal() -> None:
    schemes = {"a": QuantScheme(4, 32), "b": QuantScheme(4, 32, "int")}
    written = GEMM.config_of(Written(schemes["a"], schemes))
    assert written["sym"] is False
    for name, scheme in schemes.items():
        weight = random_weight(scheme, 16, 64)
        assert torch.equal(GEMM.parse(name, GEMM.write(weight), written).weight.dequantize(), weight.dequantize())


def test_the_keys_of_autoawq() -> None:
    weight = random_weight("w4a16_g32_asym", 16, 64)
    fields = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert same_weight(GEMM.parse("m", GEMM.write(weight), fields).weight, weight)


def test_a_config_without_zero_points_is_odd() -> None:
    tensors = GEMM.write(random_weight("w4a16_g32_asym", 16, 64))
    (oddity,) = GEMM.parse("m", tensors, config(zero_point=False)).oddities
    assert oddity.kind == "zero_point is false, which no AWQ packer writes"
    assert GEMM.parse("m", tensors, config()).oddities == ()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (
            random_weight("w4a16_g32", 16, 64, act_order=True),
            "its columns are in act-order, and AWQ has no group index",
        ),
        (random_weight("w4a16_g32", 12, 64), "N=12 is not a multiple of 8"),
        (random_weight("w4a16_g32", 16, 40), "K=40 is not a multiple of group_size 32"),
        (random_weight("w3a16_g32", 16, 64), "bits must be 4, got 3"),
    ],
)
def test_what_it_cannot_hold(weight: QuantTensor, reason: str) -> None:
    with pytest.raises(ConversionError, match=f"awq cannot store this weight: .*{reason}"):
        GEMM.write(weight)


def test_what_one_file_cannot_hold() -> None:
    default = QuantScheme(4, 128)
    with pytest.raises(ConversionError, match=r"one file has one group size, got w4a16_g128 and w4a16_g64 \(x.b\)"):
        GEMM.config_of(Written(default, {"x.a": default, "x.b": QuantScheme(4, 64)}))
    with pytest.raises(ConversionError, match="bits must be 4, got 8"):
        GEMM.config_of(Written(default, {"x.b": QuantScheme(8, 128)}))
    with pytest.raises(ConversionError, match="columns are in act-order"):
        GEMM.config_of(Written(default, {}, act_order=True))


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"bits": 8}, "bits must be 4 in an AWQ file, got 8"),
        ({}, {"group_size": 48}, "K=64 must be a multiple of group_size 48 in an AWQ file"),
        ({}, {"group_size": 64}, r"qzeros must be int32 \[1, 2\] \(K=64, N=16, group_size 64\), got int32 \[2, 2\]"),
        ({}, {"sym": 1}, "needs sym to be true or false, got 1"),
        ({"qweight": torch.zeros(64, 2)}, {}, r"qweight must be int32 \[64, 2\], got float32 \[64, 2\]"),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, {}, r"qweight must be \[K, N / 8\], got \[8\]"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, {}, r"qzeros must be int32 \[2, 2\]"),
        ({"scales": torch.ones(2, 15)}, {}, r"scales must be float16 or bfloat16 or float32 \[2, 16\]"),
        (
            {"scales": torch.full((2, 16), float("inf"))},
            {},
            "scales must be finite, got 32 NaN or infinite entries of 32",
        ),
        ({"scales": torch.zeros(2, 16)}, {}, "scales must not all be zero"),
    ],
)
def test_broken_files(changes: dict[str, Tensor], fields: dict[str, Any], message: str) -> None:
    tensors = GEMM.write(random_weight("w4a16_g32_asym", 16, 64)) | changes
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        GEMM.parse("m", tensors, config(**fields))
