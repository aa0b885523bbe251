"""auto-round: which body a packing_format means, schemes of single layers, negative scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkernels import QuantTensor
from qkernels.checkpoint.registry import WRITTEN, detect
from qkernels.errors import CheckpointError
from qkernels.formats.auto_round import FORMAT
from tests.strategies import random_weight, same_weight

BODIES = {
    "auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_awq": "awq",
}  # fmt: skip


def config(packing: str, **fields: Any) -> dict[str, Any]:
    made = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False}
    return made | fields


def stored(weight: QuantTensor, packing: str) -> dict[str, torch.Tensor]:
    tensors = WRITTEN[BODIES[packing]].write(weight)
    return tensors if packing == "auto_round:gptqmodel" else {k: t for k, t in tensors.items() if k != "g_idx"}


@pytest.mark.parametrize("packing", BODIES)
def test_bodies(packing: str) -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96)
    zeros = weight.zeros
    assert zeros is not None
    weight = QuantTensor(weight.codes, -weight.scales, zeros.clamp(1, 15), None, weight.scheme)  # negative scales
    fields = config(packing)
    assert detect(fields) is FORMAT
    assert same_weight(FORMAT.parse("m", stored(weight, packing), fields).weight, weight)
    assert FORMAT.parse("m", stored(weight, packing), fields).oddities == ()


def test_the_two_gptq_bodies_differ_by_one() -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96)
    assert weight.zeros is not None
    weight = QuantTensor(weight.codes, weight.scales, weight.zeros.clamp(1, 14), None, weight.scheme)
    read = FORMAT.parse("m", stored(weight, "auto_round"), config("auto_round:auto_gptq")).weight
    assert read.zeros is not None
    assert torch.equal(read.zeros, weight.zeros + 1)


def test_act_order() -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96, act_order=True)
    assert same_weight(
        FORMAT.parse("m", stored(weight, "auto_round:gptqmodel"), config("auto_round:gptqmodel")).weight, weight
    )


def test_layers_with_schemes_of_their_own() -> None:
    extra = {"l.0.a": {"bits": 8}, ".*\\.b$": {"bits": 2, "group_size": -1, "sym": True}, "l.0.c": {"bits": 16}}
    fields = config("auto_round", extra_config=extra)
    for name, scheme in {"l.0.a": "w8a16_g32_asym", "l.1.b": "w2a16_channel", "l.1.a": "w4a16_g32_asym"}.items():
        weight = random_weight(scheme, 64, 96)
        assert same_weight(FORMAT.parse(name, stored(weight, "auto_round"), fields).weight, weight), name
    with pytest.raises(CheckpointError, match=r"^l\.0\.c: bits must be 2, 3, 4, 5, 6, 7 or 8 in a GPTQ file, got 16"):
        FORMAT.parse("l.0.c", stored(random_weight("w4a16_g32_asym", 64, 96), "auto_round"), fields)
    with pytest.raises(CheckpointError, match="^m: .*extra_config to map names to fields"):
        FORMAT.parse("m", {}, config("auto_round", extra_config={"m": 4}))
    with pytest.raises(CheckpointError, match=r"^m: .*invalid pattern '\(' in extra_config"):
        FORMAT.parse("m", {}, config("auto_round", extra_config={"(": {}}))


def test_other_bodies_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'packing_format': 'auto_round:gguf'}, a kind that is not read yet"):
        detect(config("auto_round:gguf"))
