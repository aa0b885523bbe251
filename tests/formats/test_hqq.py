"""HQQ: packers from the formulas of the format, what is refused and why, and that nothing is evaluated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import Written
from qkernels.formats.hqq import FORMAT
from tests.formats.packers import as_text, hqq
from tests.strategies import random_weight, same_weight


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 64])
def test_every_bit_is_where_it_belongs(bits: int, size: int) -> None:
    weight = random_weight(f"w{bits}a16_g{size}_fzero", 12, 128)
    assert same_weight(FORMAT.parse("m", hqq(weight), {}).weight, weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_words_declared_as_floats(bits: int) -> None:
    weight = random_weight(f"w{bits}a16_g64_fzero", 12, 128)
    tensors = hqq(weight)
    tensors |= {"W_q": tensors["W_q"].view(torch.float16), "view_as_float": torch.tensor(1, dtype=torch.uint8)}
    assert same_weight(FORMAT.parse("m", tensors, {}).weight, weight)


@pytest.mark.parametrize("nbits", [torch.tensor(1.58), torch.tensor(1, dtype=torch.int32)])
def test_ternary_codes_are_two_bits_wide(nbits: Tensor) -> None:
    weight = random_weight("w2a16_g64_fzero", 12, 128)
    assert same_weight(FORMAT.parse("m", hqq(weight, nbits=nbits), {}).weight, weight)


def test_float_zero_points_are_not_squeezed_into_integers() -> None:
    weight = FORMAT.parse("m", hqq(random_weight("w4a16_g64_fzero", 12, 128)), {}).weight
    for name in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(ConversionError, match="zero points must be integers"):
            WRITTEN[name].write(weight)
    native = WRITTEN["native"]
    assert same_weight(
        native.parse("m", native.write(weight), native.config_of(Written(weight.scheme, {}))).weight, weight
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": torch.tensor(0)}, "axis is 0: its groups run along N, and kernels need them along K"),
        ({"axis": torch.tensor([1, 1])}, r"axis must be one integer, got \[2\]"),
        ({"quant_zero": torch.tensor(1)}, "quant_zero is set"),
        ({"packing": as_text("1bit_u8")}, "packing must be one of .*, got '1bit_u8'"),
        ({"packing": torch.zeros(100, dtype=torch.uint8)}, "packing must be ASCII"),
        ({"packing": as_text("2bit_u8")}, r"nbits must be 2 for 2bit_u8, got 4\.0"),
        ({"nbits": torch.tensor(5)}, r"nbits must be 4 for 4bit_u8, got 5\.0"),
        ({"group_size": torch.tensor(48)}, "group_size 48 does not divide K=128"),
        ({"group_size": torch.tensor(0)}, "group_size 0 does not divide K=128"),
        ({"group_size": torch.tensor(32)}, r"W_q must be uint8 \[24, 32\] \(4bit_u8, 48 groups of 32\)"),
        ({"shape": torch.tensor([12, -1])}, r"shape must be \[N, K\]"),
        ({"shape": torch.tensor([2**40, 128])}, "shape must be below"),
        ({"scale": torch.ones(23, 1)}, r"scale must be .* \[24, 1\]"),
        ({"zero": torch.ones(24)}, r"zero must be .* \[24, 1\]"),
        ({"zero": torch.full((24, 1), float("nan"))}, "zeros must be finite"),
        ({"W_q": torch.zeros(12, 64)}, "W_q must be uint8"),
    ],
)
def test_broken_files(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", hqq(random_weight("w4a16_g64_fzero", 12, 128), **changes), {})


def test_codes_that_are_too_wide() -> None:
    tensors = hqq(random_weight("w8a16_g64_fzero", 12, 128), nbits=torch.tensor(5))
    with pytest.raises(CheckpointError, match="W_q must be 0 … 31 for 5 bits, got"):
        FORMAT.parse("m", tensors, {})
