"""Whole tiny mixtures that llm-compressor, GPTQModel and auto-round quantized (tests/golden/experts/<tool>-<family>), read to the
weights that each tool computes from its own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qkernels import inspect, load
from qkernels.integrations.transformers import enable
from qkernels.nn import QuantExperts

MADE: Final = sorted(
    path.parent for path in (Path(__file__).parent / "golden" / "experts").glob("*/expected.safetensors")
)
EXPERT: Final = re.compile(r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
ROWS: Final = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


def weight_of(model: Any, name: str, dtype: torch.dtype) -> Tensor:
    """What a model computes with in the place of a module of the file."""
    matched = EXPERT.fullmatch(name)
    if matched is None:
        weight: Tensor = model.get_submodule(name).dequantize(dtype)
        return weight
    layer, expert, part = matched.groups()
    experts = model.get_submodule(f"{layer}.mlp.experts")
    assert isinstance(experts, QuantExperts)
    if part not in ROWS:
        return experts.dequantize(dtype)["down_proj"][int(expert)]
    return experts.dequantize(dtype)["gate_up_proj"][int(expert)].chunk(2)[ROWS[part]]


def test_every_tool_made_both_families() -> None:
    tools, families = ("auto_round", "gptqmodel", "llmcompressor"), ("mixtral", "qwen3_moe")
    assert [path.name for path in MADE] == [f"{tool}-{family}" for tool in tools for family in families]


@pytest.mark.parametrize("directory", MADE, ids=[path.name for path in MADE])
def test_read_to_the_weights_of_the_tool(directory: Path) -> None:
    expected = load_file(directory / "expected.safetensors")
    assert len(expected) == 4 + 4 * 3  # attention; four experts
    stored = load_file(directory / "model.safetensors")
    router = next(t for name, t in stored.items() if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")))
    enable()
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        model = loader(directory)
        for name, weight in expected.items():
            assert torch.equal(weight_of(model, name, weight.dtype), weight), name
        assert torch.equal(model.model.layers[0].mlp.gate.weight.detach().to(router.dtype), router)
    assert sum(layer.weights for layer in inspect(directory).layers) == sum(t.numel() for t in expected.values())
