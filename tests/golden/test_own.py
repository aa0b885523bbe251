"""Files that earlier versions of this library wrote load unchanged: native ones, and packed ones of every layout.

Written at commit a5b50a5 from a random Llama of two layers with weights of many schemes; `expected.json` has each weight's
scheme and the hash of what it dequantized to then.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qkernels import load
from qkernels.checkpoint import open_checkpoint
from qkernels.layouts import LAYOUTS

OWN = Path(__file__).parent / "own"
EXPECTED = json.loads((OWN / "expected.json").read_text())


def test_every_layout_of_a_kernel_has_a_file() -> None:
    assert {layout for layout in LAYOUTS if not layout.startswith("reference")} <= EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_are_read_as_they_were(name: str) -> None:
    checkpoint = open_checkpoint(OWN / name)
    read = {}
    for module in checkpoint.modules:
        weight, oddities = checkpoint.weight(module)
        assert oddities == ()
        values = weight.dequantize().numpy().tobytes()
        read[module] = {"scheme": str(weight.scheme), "sha256": hashlib.sha256(values).hexdigest()}
    assert read == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_models_load_with_all_their_weights(name: str) -> None:
    pytest.importorskip("transformers")
    model = load(OWN / name, on_unsupported="reference")
    for module, expected in EXPECTED[name].items():
        layer = model.get_submodule(module)
        assert str(layer.scheme) == expected["scheme"]
        assert hashlib.sha256(layer.dequantize(torch.float32).numpy().tobytes()).hexdigest() == expected["sha256"]
