"""HQQ: packers from the formulas of the format, what is refused and why, and that nothing is evaluated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import Written
from qkernels.formats.hqq import FORMAT
from tests.strategies import random_weight, same_weight

SHIFTS = {"8bit_u8": [0], "4bit_u8": [4, 0], "3bit_32": [27, 24, 21, 18, 15, 12, 9, 6, 3, 0], "2bit_u8": [6, 4, 2, 0]}
PACKINGS = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


def text(value: str) -> Tensor:
    return torch.tensor([ord(c) for c in value], dtype=torch.uint8)


def packed(weight: QuantTensor, **changes: Tensor) -> dict[str, Tensor]:
    assert weight.zeros is not None
    size, packing = weight.scheme.group_length(weight.K), PACKINGS[weight.scheme.bits]
    rows, shifts = weight.codes.reshape(-1, size).tolist(), SHIFTS[packing]
    rows += [[0] * size] * (-len(rows) % len(shifts))
    step = len(rows) // len(shifts)
    words = [
        [sum(rows[i + part * step][j] << shift for part, shift in enumerate(shifts)) for j in range(size)]
        for i in range(step)
    ]
    number = {"nbits": weight.scheme.bits, "group_size": size, "axis": 1}
    flags = {name: 0 for name in ("view_as_float", "quant_scale", "quant_zero")}
    return {
        "W_q": torch.tensor(words, dtype=torch.int32 if packing == "3bit_32" else torch.uint8),
        "scale": weight.scales.reshape(-1, 1),
        "zero": weight.zeros.reshape(-1, 1),
        "shape": torch.tensor([weight.N, weight.K]),
        "packing": text(packing),
        "compute_dtype": text("__import__('os').abort()"),
        "unpack_view_dtype": text("torch.uint8"),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in number.items()},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
        **changes,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 64])
def test_every_bit_is_where_it_belongs(bits: int, size: int) -> None:
    weight = random_weight(f"w{bits}a16_g{size}_fzero", 12, 128)
    assert same_weight(FORMAT.parse("m", packed(weight), {}).weight, weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_words_declared_as_floats(bits: int) -> None:
    weight = random_weight(f"w{bits}a16_g64_fzero", 12, 128)
    tensors = packed(weight)
    tensors |= {"W_q": tensors["W_q"].view(torch.float16), "view_as_float": torch.tensor(1, dtype=torch.uint8)}
    assert same_weight(FORMAT.parse("m", tensors, {}).weight, weight)


@pytest.mark.parametrize("nbits", [torch.tensor(1.58), torch.tensor(1, dtype=torch.int32)])
def test_ternary_codes_are_two_bits_wide(nbits: Tensor) -> None:
    weight = random_weight("w2a16_g64_fzero", 12, 128)
    assert same_weight(FORMAT.parse("m", packed(weight, nbits=nbits), {}).weight, weight)


def test_float_zero_points_are_not_squeezed_into_integers() -> None:
    weight = FORMAT.parse("m", packed(random_weight("w4a16_g64_fzero", 12, 128)), {}).weight
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
        ({"packing": text("1bit_u8")}, "packing must be one of .*, got '1bit_u8'"),
        ({"packing": torch.zeros(100, dtype=torch.uint8)}, "packing must be ASCII"),
        ({"packing": text("2bit_u8")}, r"nbits must be 2 for 2bit_u8, got 4\.0"),
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
        FORMAT.parse("m", packed(random_weight("w4a16_g64_fzero", 12, 128), **changes), {})


def test_codes_that_are_too_wide() -> None:
    tensors = packed(random_weight("w8a16_g64_fzero", 12, 128), nbits=torch.tensor(5))
    with pytest.raises(CheckpointError, match="W_q must be 0 … 31 for 5 bits, got"):
        FORMAT.parse("m", tensors, {})
