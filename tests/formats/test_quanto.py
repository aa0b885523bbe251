"""optimum-quanto's files: a model that it saved (tests/golden/quanto), to the bit; what is refused and why."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkernels import QuantTensor, inspect, load
from qkernels.checkpoint import convert
from qkernels.errors import CheckpointError
from qkernels.formats import ACTIVATIONS, SHAPES
from qkernels.formats.quanto import FORMAT
from qkernels.storage import read_json

MODEL = Path(__file__).parent.parent / "golden" / "quanto"
EXPECTED = read_json(MODEL / "expected.json")


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()


def test_weights_and_logits_are_those_of_quanto() -> None:
    found = inspect(MODEL)
    assert found.format == "quanto"
    assert found.schemes == {
        "w4a16_g32_offset": 3, "w2a16_g32_offset": 1, "w8a16_channel": 1, "fp8_channel": 1, "w4a16_g128_offset": 1,
    }  # fmt: skip
    model = load(MODEL)
    for name, expected in EXPECTED["sha256"].items():
        assert digest(model.get_submodule(name).dequantize(torch.float32)) == expected, name
    with torch.inference_mode():
        logits = model(torch.arange(12)[None]).logits[0, -1]
    assert (logits - torch.tensor(EXPECTED["last_logits"])).abs().max() < 1e-5


def test_converted_it_needs_no_model(tmp_path: Path) -> None:
    convert(MODEL, tmp_path / "native")
    assert inspect(tmp_path / "native").schemes == inspect(MODEL).schemes


def test_without_its_map_it_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "out")
    (tmp_path / "out" / "quanto_qmap.json").unlink()
    with pytest.raises(CheckpointError, match="quanto_qmap.json, which says how it is packed, is not beside it"):
        inspect(tmp_path / "out")


def module(name: str) -> dict[str, Tensor]:
    full = f"model.layers.0.{name}."
    return {
        key.removeprefix(full): t for key, t in load_file(MODEL / "model.safetensors").items() if key.startswith(full)
    }


def config(weights: Any, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "quanto", "modules": {"m": {"weights": weights} | more}, SHAPES: lambda: {"m": (64, 160)},
    }  # fmt: skip


def test_integer_shifts_are_zero_points() -> None:
    tensors = module("self_attn.q_proj")
    shift = torch.randint(0, 16, tensors["weight._shift"].shape, generator=torch.Generator().manual_seed(0))
    weight = FORMAT.parse("m", tensors | {"weight._shift": shift.to(torch.uint8)}, config("qint4")).weight
    assert str(weight.scheme) == "w4a16_g32_asym"
    codes = FORMAT.parse("m", tensors, config("qint4")).weight.codes
    groups = codes.reshape(-1, 32).float() - shift
    assert torch.equal(weight.dequantize(torch.float32), (groups * tensors["weight._scale"]).reshape(64, 160))


def test_activations_stay_in_16_bits_and_it_is_said() -> None:
    (oddity,) = FORMAT.parse("m", module("self_attn.q_proj"), config("qint4", activations="qint8")).oddities
    assert oddity.kind == "quanto_qmap.json asks for qint8 activations"
    with pytest.raises(CheckpointError, match=r'^m: .* asks for qint8 activations, .* activations="16bit"'):
        FORMAT.parse("m", module("self_attn.q_proj"), config("qint4", activations="qint8") | {ACTIVATIONS: "file"})
    floats = config("qint4", activations="qfloat8_e4m3fn") | {ACTIVATIONS: "file"}
    assert FORMAT.parse("m", module("self_attn.q_proj"), floats).oddities


NAN = torch.full((320, 1), torch.nan)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({}, {"modules": {}}, "quanto_qmap.json has no entry for it"),
        ({}, {"modules": 5}, "quanto_qmap.json has no entry for it"),
        ({}, {SHAPES: dict}, "the model that config.json describes has no linear layer of that name"),
        ({}, {SHAPES: lambda: {"m": (64, 128)}}, r"weight._data._data must be uint8 \[128, 32\]"),
        ({}, {SHAPES: lambda: {"m": (64, 150)}}, "groups that divide K=150"),
        ({}, config("qint8"), "'qint8' needs weight._data, weight._scale, got weight._data._data"),
        ({}, config("qfloat8_e4m3fnuz"), "needs weight._data, weight._scale, got"),
        ({}, config("qint2"), r"weight._data._data must be uint8 \[80, 32\]"),
        ({"weight._scale": NAN}, {}, "scales must be finite"),
        ({"weight._shift": NAN}, {}, "weight._shift must be finite"),
        ({"weight._shift": torch.full((320, 1), 16, dtype=torch.uint8)}, {}, "weight._shift must be 0 … 15, got 16 … 16"),
        ({"weight._scale": torch.ones(320, 2)}, {}, "weight._scale must be"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Tensor], fields: dict[str, Any], message: str) -> None:
    tensors = module("self_attn.q_proj")
    assert isinstance(FORMAT.parse("m", tensors, config("qint4")).weight, QuantTensor)
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        FORMAT.parse("m", tensors | changes, config("qint4") | fields)
