"""Checkpoints packed for the CPU's kernels with int8 activations: there and back, another version, another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkernels import QuantLinear, UnsupportedProblem, load, replace_linear, save
from qkernels.checkpoint import convert, open_checkpoint
from qkernels.errors import CheckpointError, ConversionError
from qkernels.kernels import catalogue
from qkernels.storage import read_json
from tests.checkpoints import edit_json, logits, plain_checkpoint
from tests.strategies import same_weight

SCHEMES = ["w4a8_g32", "w8a8_channel", "w4a8_g32_asym", "w8a8_channel_fzero"]
LAYOUT = "cpu_tile_a8"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, Path]]:
    """Scheme -> (model, where it is saved as its kernel reads it)."""
    root = tmp_path_factory.mktemp("packed")
    plain = plain_checkpoint(root / "plain")
    made = {}
    for scheme in SCHEMES:
        model = load(plain)
        replace_linear(model, scheme, progress=False)
        save(model, root / scheme, LAYOUT)
        made[scheme] = (model, root / scheme)
    return made


def layers_of(model: object) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_packed_comes_back(models: dict[str, tuple[object, Path]], scheme: str) -> None:
    model, directory = models[scheme]
    stored = open_checkpoint(directory)
    back = load(directory)
    assert len(layers_of(back)) == 14
    for name, layer in layers_of(model).items():
        assert layer.layout == LAYOUT
        assert torch.equal(stored.source.read(f"{name}.qweight"), layer.qweight)  # the kernel's own bytes
        assert same_weight(layers_of(back)[name].quant_tensor(), layer.quant_tensor())
        assert torch.equal(layers_of(back)[name].qweight, layer.qweight)
    assert torch.equal(logits(back), logits(model))


def test_another_version_is_refused(models: dict[str, tuple[object, Path]], tmp_path: Path) -> None:
    _, directory = models["w4a8_g32"]
    convert(directory, tmp_path / "out", LAYOUT)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["layout_version"] == 3
    edit_json(tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(layout_version=4))
    with pytest.raises(
        CheckpointError, match=r"version 4 of layout cpu_tile_a8, this qkernels reads version\s+3; pack"
    ):
        load(tmp_path / "out")


def test_a_machine_without_that_kernel(models: dict[str, tuple[object, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to allow the plain-PyTorch kernel by name, and then has the same weights in that kernel's layout."""
    model, directory = models["w4a8_g32"]
    monkeypatch.setattr(catalogue, "KERNELS", tuple(k for k in catalogue.KERNELS if k.layout != LAYOUT))
    with pytest.raises(UnsupportedProblem, match="cpu_tile_a16  8-bit activations"):
        load(directory)
    foreign = load(directory, on_unsupported="reference")
    for name, layer in layers_of(foreign).items():
        assert layer.layout == "reference_a8"
        assert same_weight(layer.quant_tensor(), layers_of(model)[name].quant_tensor())


def test_packed_on_a_machine_with_another_layout(models: dict[str, tuple[object, Path]], tmp_path: Path) -> None:
    """What was packed for CUDA is laid out again here; and what CUDA's layout cannot hold is refused when it is packed."""
    model, directory = models["w4a8_g32"]
    convert(directory, tmp_path / "cuda", "mma_tile_a8")
    back = load(tmp_path / "cuda")
    assert {layer.layout for layer in layers_of(back).values()} == {LAYOUT}
    assert torch.equal(logits(back), logits(model))
    with pytest.raises(ConversionError, match="cpu_tile_a16 cannot hold"):
        convert(directory, tmp_path / "a16", "cpu_tile_a16")
