"""AWQ gemv and gemv_fast: packers that follow the bit formulas one code at a time, and broken tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.errors import CheckpointError
from qkernels.formats.awq_gemv import GEMV, GEMV_FAST
from tests.formats.packers import gemv, gemv_config, gemv_fast
from tests.strategies import random_weight, same_weight

KINDS = pytest.mark.parametrize(("kind", "packer"), [(GEMV, gemv), (GEMV_FAST, gemv_fast)], ids=["gemv", "gemv_fast"])


@KINDS
@pytest.mark.parametrize(("scheme", "K"), [("w4a16_g128_asym", 256), ("w4a16_g64_asym", 192), ("w4a16_g32_asym", 320)])
def test_every_bit_is_where_it_belongs(kind: Any, packer: Any, scheme: str, K: int) -> None:
    weight = random_weight(scheme, 12, K)
    group_size = weight.scheme.group_length(K)
    assert same_weight(kind.parse("m", packer(weight), gemv_config(group_size)).weight, weight)


def test_every_zero_point_is_recovered() -> None:
    """All 16 zero points at scales from subnormal to large, negative and 0 among them."""
    scales = torch.tensor([3e-6, 1e-4, 0.0123, 1.0, 77.3, -0.0123]).half().repeat_interleave(16)[:, None]
    zeros = torch.arange(16, dtype=torch.uint8).repeat(6)[:, None]
    weight = random_weight("w4a16_channel_asym", 96, 64)
    weight = QuantTensor(weight.codes, scales, zeros, None, weight.scheme)
    read = GEMV_FAST.parse("m", gemv_fast(weight), gemv_config(-1)).weight
    assert same_weight(read, weight)


@KINDS
@pytest.mark.parametrize(
    ("changes", "group_size", "message"),
    [
        ({"qweight": torch.zeros(3)}, 64, "qweight must be "),
        ({"qweight": torch.zeros(4, 64)}, 64, r"qweight must be .*got float32"),
        ({}, 96, "K=128 must be a multiple of group_size 96 in an AWQ file"),
        ({}, 16, "group_size must be 32, 64, or 128 and more in a gemv file, got 16"),
        ({"scales": torch.zeros(3, 3)}, 64, r"scales must be float16 or bfloat16 or float32 \["),
    ],
)
def test_broken_files(kind: Any, packer: Any, changes: dict[str, Tensor], group_size: int, message: str) -> None:
    tensors = packer(random_weight("w4a16_g64_asym", 8, 128)) | changes
    with pytest.raises(CheckpointError, match=f"^m: .*({message})"):
        kind.parse("m", tensors, gemv_config(group_size))


@pytest.mark.parametrize(
    ("kind", "packer", "message"),
    [
        (GEMV, gemv, r"qzeros must be int32 \[8, 4\] \(N=8, K=128, group_size 32\), got int32 \[8, 2\]"),
        (
            GEMV_FAST,
            gemv_fast,
            r"scales must be float16 .* \[32, 8\] \(N=8, K=128, group_size 32\), got float16 \[16, 8\]",
        ),
    ],
    ids=["gemv", "gemv_fast"],
)
def test_another_group_size_than_the_config_says(kind: Any, packer: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: {message}"):
        kind.parse("m", packer(random_weight("w4a16_g64_asym", 8, 128)), gemv_config(32))


def test_zero_points_that_are_no_integers_are_refused() -> None:
    tensors = gemv_fast(random_weight("w4a16_g64_asym", 8, 128))
    tensors["qzeros"][0, 5] *= 1.02
    with pytest.raises(CheckpointError, match="qzeros must be -scale .* 1 of 16 are not, first row 5, group 0"):
        GEMV_FAST.parse("m", tensors, gemv_config(64))
    tensors["qzeros"][0, 5] = float("nan")
    with pytest.raises(CheckpointError, match="qzeros must be finite"):
        GEMV_FAST.parse("m", tensors, gemv_config(64))
