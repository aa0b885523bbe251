"""auto-round: which body a packing_format means, schemes of single layers, negative scales."""

from __future__ import annotations

import pytest
import torch

from qkernels import QuantTensor
from qkernels.checkpoint.registry import detect
from qkernels.errors import CheckpointError
from qkernels.formats.auto_round import FORMAT
from tests.formats.packers import AUTO_ROUND_BODIES, auto_round, auto_round_config
from tests.strategies import random_weight, same_weight


@pytest.mark.parametrize("packing", AUTO_ROUND_BODIES)
def test_bodies(packing: str) -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96)
    zeros = weight.zeros
    assert zeros is not None
    weight = QuantTensor(weight.codes, -weight.scales, zeros.clamp(1, 15), None, weight.scheme)  # negative scales
    fields = auto_round_config(packing)
    assert detect(fields) is FORMAT
    assert same_weight(FORMAT.parse("m", auto_round(weight, packing), fields).weight, weight)
    assert FORMAT.parse("m", auto_round(weight, packing), fields).oddities == ()


def test_the_two_gptq_bodies_differ_by_one() -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96)
    assert weight.zeros is not None
    weight = QuantTensor(weight.codes, weight.scales, weight.zeros.clamp(1, 14), None, weight.scheme)
    read = FORMAT.parse("m", auto_round(weight, "auto_round"), auto_round_config("auto_round:auto_gptq")).weight
    assert read.zeros is not None
    assert torch.equal(read.zeros, weight.zeros + 1)


def test_act_order() -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96, act_order=True)
    assert same_weight(
        FORMAT.parse("m", auto_round(weight, "auto_round:gptqmodel"), auto_round_config("auto_round:gptqmodel")).weight,
        weight,
    )


def test_layers_with_schemes_of_their_own() -> None:
    extra = {"l.0.a": {"bits": 8}, ".*\\.b$": {"bits": 2, "group_size": -1, "sym": True}, "l.0.c": {"bits": 16}}
    fields = auto_round_config("auto_round", extra_config=extra)
    for name, scheme in {"l.0.a": "w8a16_g32_asym", "l.1.b": "w2a16_channel", "l.1.a": "w4a16_g32_asym"}.items():
        weight = random_weight(scheme, 64, 96)
        assert same_weight(FORMAT.parse(name, auto_round(weight, "auto_round"), fields).weight, weight), name
    with pytest.raises(CheckpointError, match=r"^l\.0\.c: bits must be 2, 3, 4, 5, 6, 7 or 8 in a GPTQ file, got 16"):
        FORMAT.parse("l.0.c", auto_round(random_weight("w4a16_g32_asym", 64, 96), "auto_round"), fields)
    with pytest.raises(CheckpointError, match="^m: .*extra_config to map names to fields"):
        FORMAT.parse("m", {}, auto_round_config("auto_round", extra_config={"m": 4}))
    with pytest.raises(CheckpointError, match=r"^m: .*invalid pattern '\(' in extra_config"):
        FORMAT.parse("m", {}, auto_round_config("auto_round", extra_config={"(": {}}))


def test_other_bodies_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'packing_format': 'auto_round:gguf'}, a kind that is not read yet"):
        detect(auto_round_config("auto_round:gguf"))
