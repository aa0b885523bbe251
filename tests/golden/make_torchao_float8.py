"""Models quantized to FP8 by torchao through transformers' TorchAoConfig and saved by `save_pretrained`: a scale a row, or one.

pip install torchao==0.18.0 transformers==5.24.0 accelerate; python tests/golden/make_torchao_float8.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from store import store
from torchao.quantization import Float8WeightOnlyConfig, PerTensor
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain, target = Path(folder) / "plain", Path(folder) / "float8"
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.bfloat16).save_pretrained(plain)
        config = TorchAoConfig(Float8WeightOnlyConfig())
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
        layer = model.get_submodule(MODULES[1])  # one scale for the whole of this one
        whole = Float8Tensor.from_hp(layer.weight.dequantize(), granularity=PerTensor())
        layer.weight = torch.nn.Parameter(whole, requires_grad=False)
        model.save_pretrained(target)
        described = json.loads((target / "config.json").read_text())["quantization_config"]
        with safe_open(target / "model.safetensors", "pt") as file:
            keys = [key for key in file.keys() if key.startswith(tuple(f"{m}." for m in MODULES))]  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in keys}
            metadata = {key: text for key, text in file.metadata().items() if key.startswith(MODULES)}
        print({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}, metadata)
        weights = {m: model.get_submodule(m).weight.dequantize(torch.float32) for m in MODULES}
        store("torchao_float8", tensors, weights, described, ("torchao", "transformers"), metadata)


if __name__ == "__main__":
    main()
