"""GPTQModel's planar files, packed here code by code from their description; what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.checkpoint.registry import WRITTEN, detect
from qkernels.errors import CheckpointError
from qkernels.formats.gptq_planar import FORMAT, unpack
from tests.formats.packers import planar_config, planar_tensors
from tests.strategies import random_weight, same_weight


@pytest.mark.parametrize("zeros", ["", "_asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_read_as_packed(bits: int, zeros: str) -> None:
    weight = random_weight(f"w{bits}a16_g32{zeros}", 64, 96, act_order=bits == 5)
    fields = planar_config(weight)
    assert detect(fields) is FORMAT
    found = FORMAT.parse("m", planar_tensors(weight), fields)
    assert same_weight(found.weight, weight)
    assert found.oddities == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_plane_is_the_stream_of_version_2(bits: int) -> None:
    weight = random_weight(f"w{bits}a16_g32_asym", 64, 96)
    written = WRITTEN["gptq_v2"].write(weight)
    for name, tensor in planar_tensors(weight).items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planes_are_no_stream(bits: int) -> None:
    """The trap: shapes are the same, and a stream of these words would be fluent nonsense."""
    weight = random_weight(f"w{bits}a16_g32", 64, 96)
    words = planar_tensors(weight)["qweight"].T
    assert torch.equal(unpack(words, bits), weight.codes)
    from qkernels.formats import bitstream

    assert not torch.equal(bitstream.unpack(words.contiguous(), bits, 96), weight.codes)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"qweight": torch.zeros(16, 64, dtype=torch.int32)}, {}, "qweight must be int32, 5 words for each 32 codes"),
        ({"qzeros": torch.zeros(3, 11, dtype=torch.int32)}, {}, "qzeros must be int32, 5 words for each 32 codes"),
        ({"qweight": torch.zeros(15, 64)}, {}, "qweight must be int32"),
        ({"scales": torch.full((3, 64), torch.nan)}, {}, "scales must be finite"),
        ({}, {"bits": 9}, "bits must be 2, 3, 4, 5, 6, 7 or 8 in a GPTQ file, got 9"),
        ({}, {"group_size": 16}, "scales must be"),
    ],
)
def test_refused(changes: dict[str, Tensor], fields: dict[str, Any], message: str) -> None:
    weight = random_weight("w5a16_g32_asym", 64, 96)
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", planar_tensors(weight) | changes, planar_config(weight) | fields)
