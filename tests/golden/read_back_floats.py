"""Floating-point weights that we write as compressed-tensors, decompressed by compressed-tensors itself.

python -m tests.golden.read_back_floats write DIR
python tests/golden/read_back_floats.py read DIR     (pip install compressed-tensors==0.20.0)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MIXED = {"*.down_proj": "fp8_channel", "*.up_proj": "w4a16_g32", "*.k_proj": "mxfp4_g32"}
CASES = ("mxfp4_g32", "nvfp4_g16", "fp8_channel", "fp8_tensor", "fp8_block32", "fp8_block128", "mixed")


def write(folder: Path) -> None:
    """A tiny Llama in every scheme, beside the weights that it means."""
    from qkernels import QuantLinear, replace_linear, save
    from tests.checkpoints import small_llama

    for case in CASES:
        model = small_llama().to(torch.bfloat16)
        replace_linear(model, "nvfp4_g16" if case == "mixed" else case, overrides=MIXED if case == "mixed" else {})
        save(model, folder / case, format="compressed-tensors")
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        save_file({name: layer.dequantize() for name, layer in layers.items()}, folder / f"{case}.meant")


def read(folder: Path) -> bool:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    equal = True
    for case in CASES:
        fields = json.loads((folder / case / "config.json").read_text())["quantization_config"]
        config = QuantizationConfig.model_validate({k: v for k, v in fields.items() if k != "quant_method"})
        stored, meant = load_file(folder / case / "model.safetensors"), load_file(folder / f"{case}.meant")
        right = 0
        for module, weight in meant.items():
            groups = config.config_groups.values()
            group = next((g for g in groups if module in g.targets), config.config_groups["group_0"])
            tensors = {name[len(module) + 1 :]: t for name, t in stored.items() if name.startswith(f"{module}.")}
            found = BaseCompressor.get_value_from_registry(group.format).decompress(tensors, group)["weight"]
            right += torch.equal(found, weight.to(found.dtype))
        print(f"{case}: {right} of {len(meant)} weights equal")
        equal &= right == len(meant) > 0
    return equal


if __name__ == "__main__":
    what, directory = sys.argv[1], Path(sys.argv[2])
    sys.exit(0 if (write(directory) if what == "write" else read(directory)) in (None, True) else 1)
