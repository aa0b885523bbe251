"""Activations that a file asks for: int8 where asked and there are kernels, 16 bits with a word, or an error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import inspect, load, quantize, replace_linear, save
from qkernels.errors import ArgumentError, CheckpointError
from qkernels.quantizers import RTN
from qkernels.storage import read_json, write_json
from tests.checkpoints import logits, plain_checkpoint, small_llama

TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
LAYER = "model.layers.0.mlp.up_proj"


def asking(path: Path, scheme: str, inputs: dict[str, Any] | None, outputs: dict[str, Any] | None = None) -> Path:
    """A model in pack-quantized whose config asks for quantized activations."""
    model = small_llama()
    replace_linear(model, scheme)
    save(model, path, format="compressed-tensors")
    config = read_json(path / "config.json")
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {"input_activations": inputs, "output_activations": outputs}
    write_json(path / "config.json", config)
    return path


def origin(x: Tensor, weight: Tensor) -> Tensor:
    """What compressed-tensors 0.20 computes in fp32 (calculate_qparams, _quantize_dequantize)."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return ((x / scale).clamp(-128, 127).round() * scale) @ weight.T


@pytest.mark.parametrize(
    ("scheme", "ours"),
    [("w8a16_channel", "w8a8_channel"), ("w4a16_g32", "w4a8_g32"), ("w4a16_g32_asym", "w4a8_g32_asym")],
)
def test_int8_where_it_is_asked(scheme: str, ours: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = asking(tmp_path / "ct", scheme, TOKEN)
    plain, asked = load(path), load(path, activations="file")
    assert str(plain.get_submodule(LAYER).scheme) == scheme
    layer = asked.get_submodule(LAYER)
    assert str(layer.scheme) == ours
    assert torch.equal(logits(load(path, activations="16bit")), logits(plain))
    assert not torch.equal(logits(asked), logits(plain))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    weight = layer.dequantize()
    # Half a step of either rounding; what is clamped at the largest entry is half a step, too. The rest is fp32's.
    bound = (x.abs().amax(-1, keepdim=True) / 127) @ weight.abs().sum(-1)[None] * 1.001
    found = layer(x)
    assert bool(((found - origin(x, weight)).abs() <= bound).all())
    assert "int8 by max |x| / 127 in fp32, where compressed-tensors has max |x| / 127.5" in caplog.text
    assert "the weights are used with 16-bit activations instead; activations=" in caplog.text


def test_inspect_says_it(tmp_path: Path) -> None:
    (line,) = inspect(asking(tmp_path / "ct", "w8a16_channel", TOKEN)).oddities
    assert line.startswith("the config asks for 8-bit int activations, quantized per token: 14 modules")
    assert "16-bit activations instead" in line


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (TOKEN | {"dynamic": False, "strategy": "tensor"}, None),
        (TOKEN | {"symmetric": False}, None),
        (TOKEN | {"strategy": "group", "group_size": 32}, None),
        (TOKEN | {"num_bits": 4}, None),
        (TOKEN, TOKEN),
    ],
)
def test_what_no_kernel_has(inputs: dict[str, Any], outputs: dict[str, Any] | None, tmp_path: Path) -> None:
    path = asking(tmp_path / "ct", "w8a16_channel", inputs, outputs)
    assert str(load(path).get_submodule(LAYER).scheme) == "w8a16_channel"
    with pytest.raises(CheckpointError, match=r'_proj: the config asks for .*; load it with activations="16bit"'):
        load(path, activations="file")


def test_a_file_of_ours_is_exact_and_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "out"
    quantize(plain_checkpoint(tmp_path / "plain"), RTN().with_scheme("w8a8_channel"), save_to=path, progress=False)
    with caplog.at_level(logging.WARNING):
        assert str(load(path).get_submodule(LAYER).scheme) == "w8a8_channel"
        assert torch.equal(logits(load(path, activations="file")), logits(load(path)))
    assert "activations" not in caplog.text
    assert str(load(path, activations="16bit").get_submodule(LAYER).scheme) == "w8a16_channel"


def test_a_key_of_ours_in_a_config_means_nothing(tmp_path: Path) -> None:
    path = asking(tmp_path / "ct", "w8a16_channel", TOKEN)
    config = read_json(path / "config.json")
    config["quantization_config"]["__activations__"] = "file"
    write_json(path / "config.json", config)
    assert str(load(path).get_submodule(LAYER).scheme) == "w8a16_channel"


def test_other_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='activations must be "file", "16bit" or None, got \'int8\''):
        load(tmp_path, activations="int8")  # type: ignore[arg-type]
