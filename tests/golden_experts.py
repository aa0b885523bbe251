"""Experts that compressed-tensors itself compressed (tests/golden/experts), put into the files of a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.moe_models import tiny_moe

FILE: Final = Path(__file__).parent / "golden" / "experts" / "experts.safetensors"
EXPERTS = "model.layers.0.mlp.experts"
KINDS = {
    "int4": ("w4a16_g32", "w4a16_g32"),
    "int4_stacked": ("w4a16_g32", "w4a16_g32"),
    "int4_asym_stacked": ("w4a16_g32_asym", "w4a16_g32_asym"),
    "fp8_stacked": ("fp8_channel", "fp8_channel"),
    "fp8_block": ("fp8_g16", "fp8_block16"),  # gate's 24 rows end in the middle of a block: a scale for each row then
    "mxfp4": ("mxfp4_g32", "mxfp4_g32"),
    "nvfp4": ("nvfp4_g16", "nvfp4_g16"),
}


def golden(kind: str, directory: Path, **changes: Any) -> dict[str, Tensor]:
    """A model of one layer with these experts, as a directory; returns what the tool decompresses them to."""
    with safe_open(FILE, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        said: dict[str, str] = file.metadata()
    group = json.loads(said["config_groups"])[kind]
    expected = {
        key.removeprefix(f"expected.{kind}."): t for key, t in found.items() if key.startswith(f"expected.{kind}.")
    }
    experts = {
        key.replace(f"{kind}.experts", EXPERTS, 1): t for key, t in found.items() if key.startswith(f"{kind}.experts.")
    }
    width = expected["down_proj"].shape[-1]
    model = tiny_moe(
        "qwen3_moe", num_hidden_layers=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=width, **changes
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    write(directory, experts, {
        "quant_method": "compressed-tensors", "format": group["format"], "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "version": said["version"],
    })  # fmt: skip
    return expected


def write(directory: Path, experts: dict[str, Tensor], quantization: dict[str, Any], **metadata: str) -> None:
    """Put these in the place of a saved model's experts."""
    tensors = {name: t for name, t in load_file(directory / "model.safetensors").items() if ".experts." not in name}
    save_file(
        tensors | {name: t.contiguous() for name, t in experts.items()}, directory / "model.safetensors",
        {"format": "pt"} | metadata,
    )  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
