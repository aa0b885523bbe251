"""The native format: true bytes, its config, broken tensors. That it loses nothing is in test_round_trips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme
from qkernels.checkpoint.packed import PACKED
from qkernels.errors import CheckpointError
from qkernels.formats import Format, Written
from qkernels.formats.native import FORMAT
from tests.strategies import random_weight, same_weight


def config(scheme: str = "w4a16_g32_asym", **fields: Any) -> dict[str, Any]:
    return {"quant_method": "qkernels", "version": 1, "scheme": scheme, "modules": {}} | fields


@pytest.mark.parametrize(
    "scheme", ["w3a16_g32_asym", "w4a16_g32", "w8a16_channel", "nf4_g64", "w5a16_g16_fzero", "w8a8s_channel"]
)
def test_no_byte_is_wasted(scheme: str) -> None:
    weight = random_weight(scheme, 64, 256)
    tensors = FORMAT.write(weight)
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "weight_shape")
    assert stored == weight.nbytes


def test_the_config_names_only_what_differs() -> None:
    default, other = QuantScheme(4, 32), QuantScheme.parse("nf4_g64")
    written = FORMAT.config_of(Written(default, {"a": default, "b": other}))
    assert written == config("w4a16_g32", modules={"b": "nf4_g64"})
    for name, scheme in (("a", default), ("b", other)):
        weight = random_weight(scheme, 16, 64)
        assert same_weight(FORMAT.parse(name, FORMAT.write(weight), written).weight, weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "the checkpoint has version 2 of this format, this qkernels reads 1"),
        ({"version": None}, "needs an integer version, got None"),
        ({"scheme": None}, "needs a scheme and modules with schemes, got None"),
        ({"scheme": "w4"}, "a scheme looks like w4a16_g128.*got 'w4'"),
        ({"modules": []}, "needs a scheme and modules with schemes"),
        ({"scheme": "w4a16_g32"}, "zeros must be absent for w4a16_g32"),
        ({"scheme": "w4a16_g16_asym"}, r"scales must be .* \[16, 4\] \(w4a16_g16_asym, K=64\), got float16 \[16, 2\]"),
        ({"scheme": "w8a16_g32_asym"}, r"qweight must be uint8 \[16, 64\] .*got uint8 \[16, 32\]"),
        ({"scheme": "w4a16_g32_fzero"}, r"zeros must be float16 or bfloat16 or float32 \[16, 2\]"),
    ],
)
def test_configs_that_contradict_the_data(fields: dict[str, Any], message: str) -> None:
    tensors = FORMAT.write(random_weight("w4a16_g32_asym", 16, 64))
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", tensors, config(**fields))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_shape": torch.tensor([16.0, 64.0])},
            r"weight_shape must be int64 sizes \[..., N, K\], got torch.float32",
        ),
        ({"weight_shape": torch.tensor([64])}, "weight_shape must be int64 sizes"),
        ({"weight_shape": torch.tensor([16, -64])}, "weight_shape must be int64 sizes"),
        (
            {"weight_shape": torch.tensor([16, 2**62])},
            r"weight_shape must be below 2\^31 and 2\^48 weights in all, got",
        ),
        (
            {"weight_shape": torch.tensor([2**30, 2**30])},
            r"weight_shape must be below 2\^31 and 2\^48 weights in all, got",
        ),
        ({"weight_shape": torch.tensor([16, 2**30])}, "qweight must be uint8"),
        (
            {"weight_shape": torch.tensor([17, 64])},
            r"qweight must be uint8 \[17, 32\] \(w4a16_g32_asym, weight_shape \[17, 64\]\)",
        ),
        ({"scales": torch.full((16, 2), float("nan"))}, "scales must be finite, got 32 NaN"),
        ({"zeros": torch.zeros(16, 2, dtype=torch.uint8)}, r"zeros must be uint8 \[16, 1\] .*got uint8 \[16, 2\]"),
        ({"group_index": torch.zeros(64, dtype=torch.int32)}, "group_index gives group 0 64 members, expected 32"),
    ],
)
def test_broken_tensors(changes: dict[str, Tensor], message: str) -> None:
    tensors = FORMAT.write(random_weight("w4a16_g32_asym", 16, 64)) | changes
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", tensors, config())


def test_codes_beyond_a_codebook_scheme_cannot_be_spelled() -> None:
    """4-bit fields hold 0 … 15, so nothing out of range can be read; the last byte's spare bits mean nothing."""
    weight = random_weight("w3a16_channel", 2, 3)
    tensors = FORMAT.write(weight)
    tensors["qweight"] = tensors["qweight"].clone()
    tensors["qweight"][:, -1] |= 0x80
    assert same_weight(FORMAT.parse("m", tensors, config("w3a16_channel")).weight, weight)


@pytest.mark.parametrize("fmt", [FORMAT, PACKED["cpu_tile_a8"]], ids=["native", "packed"])
def test_static_activations_that_contradict_their_scheme(fmt: Format) -> None:
    weight = random_weight("w8a8sz_channel", 16, 64)
    tensors, fields = fmt.write(weight), fmt.config_of(Written(weight.scheme, {"m": weight.scheme}))
    assert same_weight(fmt.parse("m", tensors, fields).weight, weight)
    for wrong, said in (
        (None, "x_static must be "), (torch.tensor([0.5]), "x_static must be float32"),
        (torch.tensor([0.5, 3.0]).half(), "x_static must be float32"),
        (torch.tensor([torch.nan, 0.0]), "scale of x must be positive"),
        (torch.tensor([0.5, 0.25]), "zero point of x must be a whole number"),
    ):  # fmt: skip
        changed = {name: t for name, t in (tensors | {"x_static": wrong}).items() if t is not None}
        with pytest.raises(CheckpointError, match=f"^m: .*{said}"):
            fmt.parse("m", changed, fields)
    other = random_weight("w8a8w_channel", 16, 64)
    fields = fmt.config_of(Written(other.scheme, {"m": other.scheme}))
    with pytest.raises(CheckpointError, match="^m: .*x_static must be absent"):
        fmt.parse("m", fmt.write(other) | {"x_static": torch.tensor([0.5, 0.0])}, fields)
