"""GPTQModel's planar files, packed here code by code from their description; what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.checkpoint.registry import WRITTEN, detect
from qkernels.errors import CheckpointError
from qkernels.formats.gptq_planar import FORMAT, unpack
from tests.strategies import random_weight, same_weight

# By themselves, not from the reader: which planes a code of so many bits has, the lowest first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planar(codes: Tensor, bits: int) -> Tensor:
    """int32 `[..., bits n]` of codes `[..., 32 n]`: word by word, bit by bit."""
    rows = codes.reshape(-1, codes.shape[-1])
    words = torch.zeros(rows.shape[0], rows.shape[1] // 32 * bits, dtype=torch.int64)
    for row in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            first, code = k // 32 * bits, int(rows[row, k])
            for width in PLANES[bits]:
                place, lane = divmod(k % 32, 32 // width)
                words[row, first + place] |= (code & (1 << width) - 1) << width * lane
                code >>= width
                first += width
    return torch.where(words >= 2**31, words - 2**32, words).int().reshape(*codes.shape[:-1], -1)


def stored(weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of a module, with true zero points."""
    bits = weight.scheme.bits
    zeros = weight.zeros if weight.zeros is not None else torch.full_like(weight.scales, weight.scheme.mid_code).byte()
    tensors = {
        "qweight": planar(weight.codes, bits).T.contiguous(), "qzeros": planar(zeros.T, bits),
        "scales": weight.scales.T.contiguous(),
    }  # fmt: skip
    return tensors | ({} if weight.group_index is None else {"g_idx": weight.group_index})


def config(weight: QuantTensor) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq_p", "bits": weight.scheme.bits, "sym": weight.scheme.symmetric,
        "group_size": weight.scheme.group_size, "desc_act": weight.group_index is not None,
    }  # fmt: skip


@pytest.mark.parametrize("zeros", ["", "_asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_read_as_packed(bits: int, zeros: str) -> None:
    weight = random_weight(f"w{bits}a16_g32{zeros}", 64, 96, act_order=bits == 5)
    fields = config(weight)
    assert detect(fields) is FORMAT
    found = FORMAT.parse("m", stored(weight), fields)
    assert same_weight(found.weight, weight)
    assert found.oddities == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_plane_is_the_stream_of_version_2(bits: int) -> None:
    weight = random_weight(f"w{bits}a16_g32_asym", 64, 96)
    written = WRITTEN["gptq_v2"].write(weight)
    for name, tensor in stored(weight).items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planes_are_no_stream(bits: int) -> None:
    """The trap: shapes are the same, and a stream of these words would be fluent nonsense."""
    weight = random_weight(f"w{bits}a16_g32", 64, 96)
    words = stored(weight)["qweight"].T
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
        FORMAT.parse("m", stored(weight) | changes, config(weight) | fields)
