"""Models quantized by torchao through transformers' TorchAoConfig and saved by `save_pretrained`: int8 per row, and 2 to 8
bits in groups. The int4 types need a GPU (Int4TilePackedTo4dTensor, and Int4Tensor through MSLK) to be made at all.

pip install torchao==0.18.0 transformers==5.23.0 accelerate; python tests/golden/make_torchao.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from store import store
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CASES = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int4-g32": IntxWeightOnlyConfig(torch.int4, PerGroup(32), version=2),
    "int3-g32-asym": IntxWeightOnlyConfig(torch.int3, PerGroup(32), MappingType.ASYMMETRIC, version=2),
    "int6-channel": IntxWeightOnlyConfig(torch.int6, PerAxis(0), version=2),
}


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.bfloat16).save_pretrained(plain)
        for name, how in CASES.items():
            config = TorchAoConfig(how)
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
            target = Path(folder) / name
            model.save_pretrained(target)
            described = json.loads((target / "config.json").read_text())["quantization_config"]
            with safe_open(target / "model.safetensors", "pt") as file:
                keys = [key for key in file.keys() if key.startswith(tuple(f"{m}." for m in MODULES))]  # noqa: SIM118
                tensors = {key: file.get_tensor(key) for key in keys}
                metadata = {key: text for key, text in file.metadata().items() if key.startswith(MODULES)}
            weights = {module: model.get_submodule(module).weight.dequantize() for module in MODULES}
            store(f"torchao-{name}", tensors, weights, described, ("torchao", "transformers"), metadata)


if __name__ == "__main__":
    main()
