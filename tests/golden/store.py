"""One golden file: tensors as a tool wrote them, and the weights that the tool computes from them.

The header says who made it and under which quantization_config: the test needs nothing beside the file.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILES = Path(__file__).parent / "files"


def store(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    tools: tuple[str, ...],
    metadata: Mapping[str, str] | None = None,
    originals: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """`weights`: by module, `[N, K]`, in the dtype that the tool computes them in. `originals`: what the tool quantized, where
    our quantizer is to find the same codes."""
    versions = ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in (*tools, "torch"))
    header = {**(metadata or {}), "made_by": versions, "quantization_config": json.dumps(config)}
    expected = {f"expected.{module}": weight for module, weight in weights.items()}
    given = {f"original.{module}": weight for module, weight in (originals or {}).items()}
    held = {key: tensor.detach().contiguous().clone() for key, tensor in {**tensors, **expected, **given}.items()}
    FILES.mkdir(exist_ok=True)
    save_file(held, FILES / f"{name}.safetensors", header)
    print(f"{name}: {len(tensors)} tensors, {len(weights)} weights ({versions})")
