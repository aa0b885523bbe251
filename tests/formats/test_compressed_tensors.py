"""compressed-tensors to the bit: both packings, act-order, targets, files of the origin itself, broken tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkernels import QuantScheme
from qkernels.checkpoint.registry import detect
from qkernels.errors import CheckpointError
from qkernels.formats import Written
from qkernels.formats.compressed_tensors import INTEGERS
from qkernels.formats.compressed_writing import PACKED
from tests.formats.packers import compressed_config
from tests.strategies import random_weight, same_weight

GOLDEN = Path(__file__).parent.parent / "golden" / "compressed_tensors"


def padded_words(codes: Tensor, bits: int) -> Tensor:
    """[R, n] -> [R, words] as before 0.18: 32 // bits whole codes in a word, lowest first."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for i in range(codes.shape[1]):
        words[:, i // per_word] |= codes[:, i].long() << bits * (i % per_word)
    return words.int()


def dense_words(codes: Tensor, bits: int) -> Tensor:
    """[R, n] -> [R, words] as one long number a row."""
    rows = [sum(int(c) << bits * i for i, c in enumerate(row)) for row in codes.tolist()]
    count = -(-codes.shape[1] * bits // 32)
    return torch.tensor([[row >> 32 * w & 0xFFFFFFFF for w in range(count)] for row in rows]).int()


def golden() -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    tensors = load_file(GOLDEN / "layers.safetensors")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if not name.startswith("expected."):
            layers.setdefault(module, {})[suffix] = tensor
    expected = {name.removeprefix("expected."): t for name, t in tensors.items() if name.startswith("expected.")}
    return json.loads((GOLDEN / "config.json").read_text()), layers, expected


def test_files_of_compressed_tensors_itself() -> None:
    """Read to the weight that it computes, bit for bit, and written to its bytes."""
    fields, layers, expected = golden()
    assert detect(fields) is PACKED
    assert len(layers) == 18
    for module, tensors in layers.items():
        weight = PACKED.parse(module, tensors, fields).weight
        assert torch.equal(weight.dequantize(expected[module].dtype), expected[module]), module
        again = PACKED.write(weight)
        assert again.keys() == tensors.keys(), module
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), module
        assert PACKED.parse(module, tensors, fields).oddities == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_packings(bits: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits, 32, "none" if symmetric else "int")
    weight = random_weight(scheme, 20, 96, dtype=torch.bfloat16)
    fields = compressed_config(str(scheme))
    tensors = PACKED.write(weight)
    assert torch.equal(tensors["weight_packed"], dense_words(weight.codes, bits))
    older = tensors | {"weight_packed": padded_words(weight.codes, bits)}
    if weight.zeros is not None:
        assert torch.equal(tensors["weight_zero_point"], dense_words(weight.zeros.T, bits).T)
        older["weight_zero_point"] = padded_words(weight.zeros.T, bits).T.contiguous()
    assert same_weight(PACKED.parse("m", tensors, fields).weight, weight)
    assert same_weight(PACKED.parse("m", older, fields).weight, weight)
    odd = [oddity.kind for oddity in PACKED.parse("m", older, fields).oddities]
    assert odd == (["codes are packed as before version 0.18"] if 32 % bits else [])


def test_rows_too_short_to_tell_go_by_the_version() -> None:
    weight = random_weight("w3a16_channel", 8, 20)
    tensors = PACKED.write(weight)
    older = tensors | {"weight_packed": padded_words(weight.codes, 3)}
    assert older["weight_packed"].shape == tensors["weight_packed"].shape
    for version, stored in (("0.17.1", older), ("0.18.0", tensors), ("1.0.0a2", tensors)):
        assert same_weight(
            PACKED.parse("m", stored, compressed_config("w3a16_channel") | {"version": version}).weight, weight
        ), version


def test_act_order() -> None:
    weight = random_weight("w4a16_g32_asym", 16, 96, act_order=True)
    fields = PACKED.config_of(Written(weight.scheme, {}, act_order=True))
    assert fields["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    tensors = PACKED.write(weight)
    assert same_weight(PACKED.parse("m", tensors, fields).weight, weight)
    (oddity,) = PACKED.parse("m", tensors, compressed_config()).oddities
    assert oddity.kind == "weight_g_idx is there although actorder is not group"
    unset = PACKED.parse("m", tensors | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}, fields).weight
    assert unset.group_index is None
    natural = {name: t for name, t in tensors.items() if name != "weight_g_idx"}
    (oddity,) = PACKED.parse("m", natural, fields).oddities
    assert oddity.kind == "weight_g_idx is missing although actorder is group"


def test_zero_points_that_are_not_packed() -> None:
    weight = random_weight("w4a16_g32_asym", 16, 96)
    assert weight.zeros is not None
    plain = (weight.zeros.short() - 8).to(torch.int8)
    tensors = PACKED.write(weight) | {"weight_zero_point": plain}
    assert same_weight(PACKED.parse("m", tensors, compressed_config()).weight, weight)
    symmetric = random_weight("w4a16_g32", 16, 96)
    tensors = PACKED.write(symmetric) | {"weight_zero_point": torch.zeros(16, 3, dtype=torch.int8)}
    assert same_weight(PACKED.parse("m", tensors, compressed_config("w4a16_g32")).weight, symmetric)


def test_one_scale_for_the_whole_weight() -> None:
    weight = random_weight("w8a16_tensor", 16, 96)
    tensors = PACKED.write(weight)
    assert list(tensors["weight_scale"].shape) == [1]
    assert same_weight(PACKED.parse("m", tensors, compressed_config("w8a16_tensor")).weight, weight)


def test_a_name_comes_before_a_pattern_and_a_pattern_before_a_class() -> None:
    weights = {n: random_weight(f"w{b}a16_g32", 16, 96) for n, b in (("a.x", 4), ("a.y", 8), ("b.x", 3))}
    groups = {
        f"group_{i}": {"targets": targets, "weights": {"num_bits": bits, "group_size": 32}}
        for i, (targets, bits) in enumerate([(["Linear"], 3), (["re:a\\."], 8), (["a.x"], 4)])
    }
    fields = compressed_config() | {"config_groups": groups}
    for name, weight in weights.items():
        assert same_weight(PACKED.parse(name, PACKED.write(weight), fields).weight, weight), name
    del groups["group_0"]
    with pytest.raises(CheckpointError, match=r"^b\.x: none of the 2 config_groups targets it"):
        PACKED.parse("b.x", PACKED.write(weights["b.x"]), fields)


def test_modules_with_schemes_of_their_own_are_named() -> None:
    schemes = {"l.0.a": QuantScheme(4, 32), "l.0.b": QuantScheme(8, "channel"), "l.1.b": QuantScheme(8, "channel")}
    written = PACKED.config_of(Written(QuantScheme(4, 32), schemes, unquantized=("l.0.c",)))
    assert [group["targets"] for group in written["config_groups"].values()] == [["Linear"], ["l.0.b", "l.1.b"]]
    assert written["ignore"] == ["lm_head", "l.0.c"]
    for name, scheme in schemes.items():
        weight = random_weight(scheme, 16, 96)
        assert same_weight(PACKED.parse(name, PACKED.write(weight), written).weight, weight)
    assert PACKED.config_of(Written(QuantScheme(4, 32), {"lm_head": QuantScheme(4, 32)}))["ignore"] == []


W8A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_scale": None}, "input_scale is missing: .*input_activations"),
        ({"input_scale": torch.tensor([torch.nan])}, "input_scale must be positive and finite, got nan"),
        ({"input_scale": torch.tensor([torch.inf])}, "input_scale must be positive and finite, got inf"),
        ({"input_scale": torch.tensor([0.0])}, "input_scale must be positive and finite, got 0.0"),
        ({"input_scale": torch.tensor([-0.5])}, "input_scale must be positive"),
        ({"input_scale": torch.tensor([0.5, 0.5])}, r"input_scale must be .*one for all tokens, got \[2\]"),
        ({"input_scale": torch.tensor([5], dtype=torch.uint8)}, "input_scale must be "),
        ({"input_zero_point": None}, "input_zero_point is missing, although input_activations say symmetric: false"),
        ({"input_zero_point": torch.tensor([1.0])}, "input_zero_point must be int8"),
        ({"input_zero_point": torch.tensor([1, 2], dtype=torch.int8)}, "input_zero_point must be int8"),
    ],
)
def test_corrupt_static_activations(wrong: dict[str, torch.Tensor | None], said: str) -> None:
    weight = random_weight("w8a8sz_channel", 16, 96)
    fields = PACKED.config_of(Written(weight.scheme, {"m": weight.scheme}))
    good = PACKED.write(weight)
    assert good["input_zero_point"].tolist() == [7]
    assert same_weight(INTEGERS.parse("m", good, fields).weight, weight)
    bad = {name: t for name, t in (good | wrong).items() if t is not None}
    with pytest.raises(CheckpointError, match=f"^m: {said}"):
        INTEGERS.parse("m", bad, fields)
    fields["config_groups"]["group_0"]["input_activations"]["symmetric"] = True
    with pytest.raises(CheckpointError, match="input_zero_point must be absent or 0, because .* symmetric, got 7"):
        INTEGERS.parse("m", good, fields)


def test_static_scales_of_any_shape_and_dtype() -> None:
    weight = random_weight("w8a8s_channel", 16, 96)
    fields, good = PACKED.config_of(Written(weight.scheme, {"m": weight.scheme})), PACKED.write(weight)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in ((), (1,), (1, 1)):
            scale = torch.full(shape, 0.03125, dtype=dtype)
            assert same_weight(INTEGERS.parse("m", good | {"input_scale": scale}, fields).weight, weight)
    odd = replace(weight, x_static=torch.tensor([0.1, 0.0]))  # no float16, which the weight's scales are
    assert same_weight(INTEGERS.parse("m", PACKED.write(odd), fields).weight, odd)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(symmetric: bool) -> None:
    weight = random_weight(QuantScheme(8, "channel", "none" if symmetric else "int"), 16, 96, dtype=torch.bfloat16)
    fields = compressed_config(str(weight.scheme)) | {"format": "int-quantized"}
    fields["config_groups"]["group_0"] |= {"format": "int-quantized", "input_activations": W8A8}
    tensors = {"weight": (weight.codes.short() - 128).to(torch.int8), "weight_scale": weight.scales}
    if weight.zeros is not None:
        tensors["weight_zero_point"] = (weight.zeros.short() - 128).to(torch.int8)
    assert detect(fields) is INTEGERS
    parsed = INTEGERS.parse("m", tensors, fields)
    assert same_weight(parsed.weight, replace(weight, scheme=replace(weight.scheme, act="int8_wide")))
    assert parsed.oddities == ()
    fields["config_groups"]["group_0"]["input_activations"] = W8A8 | {"dynamic": False, "strategy": "tensor"}
    with pytest.raises(CheckpointError, match="^m: input_scale is missing"):
        INTEGERS.parse("m", tensors, fields)
    tensors["input_scale"] = torch.tensor([0.5])
    parsed = INTEGERS.parse("m", tensors, fields)
    static = replace(weight, scheme=replace(weight.scheme, act="int8_static"), x_static=torch.tensor([0.5, 0.0]))
    assert same_weight(parsed.weight, static)
    assert parsed.oddities == ()
    narrow = compressed_config("w4a16_channel", symmetric=symmetric) | {"format": "int-quantized"}
    narrow["config_groups"]["group_0"]["format"] = None
    with pytest.raises(CheckpointError, match=r"^m: weight must be -8 … 7 for 4 bits"):
        INTEGERS.parse("m", tensors, narrow)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"num_bits": 1}, "num_bits must be 2 … 8, got 1"),
        ({}, {"num_bits": "4"}, "needs an integer num_bits, got '4'"),
        ({}, {"type": "float"}, "weights must be of type int, got 'float'"),
        ({}, {"strategy": "block"}, "the strategy must be group, channel or tensor, got 'block'"),
        ({}, {"strategy": "group", "group_size": None}, "the strategy is group, but there is no group_size"),
        (
            {},
            {"group_size": 64},
            r"weight_scale must be .* \[16, 2\] \(N=16, K=96, groups of 64\), got float16 \[16, 3\]",
        ),
        ({}, {"num_bits": 8}, r"weight_packed must be int32 \[16, 24\] \(8 bits, weight_shape \[16, 96\]\)"),
        (
            {},
            {"symmetric": True},
            "weight_zero_point must be absent or zero, because the config says symmetric",
        ),
        (
            {"weight_zero_point": None},
            {},
            "weight_zero_point is missing, although the config says symmetric: false",
        ),
        ({"weight_zero_point": torch.zeros(3, 3).int()}, {}, r"weight_zero_point must be int32 \[2, 3\]"),
        ({"weight_zero_point": torch.full((16, 3), 9, dtype=torch.int8)}, {}, "weight_zero_point must be -8 … 7"),
        ({"weight_zero_point": torch.zeros(16, 3)}, {}, r"weight_zero_point must be int8 \[16, 3\] \(not packed\)"),
        ({"weight_shape": torch.tensor([16, 97])}, {}, r"weight_packed must be int32 \[16, 13\]"),
        ({"weight_shape": torch.tensor([-1, 96])}, {}, "weight_shape must be int64 sizes"),
        ({"weight_shape": torch.tensor([16, 2**62])}, {}, r"weight_shape must be below 2\^31 and 2\^48 weights in all"),
        ({"weight_shape": torch.tensor([16, 2**30])}, {}, "weight_packed must be int32"),
        ({"weight_packed": torch.zeros(2, 16, 12).int()}, {}, "stacked experts are not read yet"),
        ({"weight_packed": torch.zeros(16, 12)}, {}, r"weight_packed must be int32 \[16, 12\] .*, got float32"),
        ({"weight_scale": torch.full((16, 3), float("nan"))}, {}, "scales must be finite, got 48 NaN or infinite"),
        ({"weight_g_idx": torch.full((96,), 3).int()}, {}, r"weight_g_idx must lie in 0 … 2 \(G=3\), got 3"),
        ({"weight_g_idx": torch.full((96,), -2).int()}, {}, r"weight_g_idx must lie in 0 … 2 \(G=3\), got -2"),
    ],
)
def test_broken_files(changes: dict[str, Tensor | None], fields: dict[str, Any], message: str) -> None:
    changed = PACKED.write(random_weight("w4a16_g32_asym", 16, 96)) | changes
    tensors = {name: t for name, t in changed.items() if t is not None}
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        PACKED.parse("m", tensors, compressed_config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config_groups": {}}, r"needs config_groups, got \{\}"),
        ({"config_groups": {"a": {"weights": None}}}, "needs weights with num_bits and strategy, got None"),
        ({"config_groups": {"a": {"targets": "Linear"}}}, "needs targets to be a list of names, got 'Linear'"),
        ({"config_groups": {"a": {"format": "int-quantized"}}}, "has the format 'int-quantized'"),
        (
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": 3}}},
            "must be an object or null, got 3",
        ),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, r"invalid pattern 're:\(' in targets or ignore"),
        ({"ignore": ["m"]}, "ignores it, but it has quantized tensors"),
    ],
)
def test_broken_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        PACKED.parse("m", PACKED.write(random_weight("w4a16_g32_asym", 16, 96)), compressed_config() | fields)
