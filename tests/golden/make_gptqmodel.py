"""A tiny Llama quantized by GPTQModel end to end, with the weights that its own loader computes: GPTQ v1 and v2, 2 to 8 bits,
symmetric and not, with and without desc_act; AWQ gemm.

pip install gptqmodel==7.7.0; GPTQMODEL_CPU_WORKERS=2 python tests/golden/make_gptqmodel.py

GPTQModel writes a log for each run into the working directory, which is therefore a temporary one here.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from store import store
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NARROW = {"intermediate_size": 96, "num_key_value_heads": 2}
WIDE = {"intermediate_size": 128, "num_key_value_heads": 4}  # GPTQModel's AWQ needs multiples of 64 rows
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CASES = {
    "v1-4bit-desc": {"bits": 4, "sym": True, "desc_act": True, "format": "gptq"},
    "v1-4bit-asym": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq"},
    "v2-4bit-asym-desc": {"bits": 4, "sym": False, "desc_act": True, "format": "gptq_v2"},
    "v2-8bit": {"bits": 8, "sym": True, "desc_act": False, "format": "gptq_v2"},
    "v1-3bit-asym-desc": {"bits": 3, "sym": False, "desc_act": True, "format": "gptq"},
    "v2-2bit-asym": {"bits": 2, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "awq": {"bits": 4, "sym": False, "method": "awq", "format": "gemm"},
}


def plain_model(target: Path, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **sizes)).to(torch.float16).save_pretrained(target)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2").save_pretrained(target)


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """`[N, K]`, as GPTQModel's plain torch kernel computes it. Its GPTQ kernel returns `[K, N]`."""
    kernel = model.get_submodule(name)
    if hasattr(kernel, "dequantize_weight"):
        return kernel.dequantize_weight().T
    return kernel(torch.eye(kernel.in_features, dtype=torch.float16)).T


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        plain_model(Path(folder) / "narrow", NARROW)
        plain_model(Path(folder) / "wide", WIDE)
        examples = [
            {"input_ids": row.tolist(), "attention_mask": [1] * 32} for row in torch.arange(512).view(16, 32) * 7 % 64
        ]
        for name, fields in CASES.items():
            config = QuantizeConfig(group_size=32, device="cpu", offload_to_disk=False, **fields)
            model = GPTQModel.load(f"{folder}/{'wide' if name == 'awq' else 'narrow'}", config)
            model.quantize(examples, batch_size=4)
            target = Path(folder) / name
            model.save(str(target))
            described = json.loads((target / "config.json").read_text())["quantization_config"]
            stored = load_file(target / "model.safetensors")
            tensors = {key: t for key, t in stored.items() if key.startswith(tuple(f"{m}." for m in MODULES))}
            backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.GPTQ_TORCH
            again = GPTQModel.load(str(target), device="cpu", backend=backend, dtype=torch.float16)
            weights = {module: weight_of(again.model, module) for module in MODULES}
            store(f"gptqmodel-{name}", tensors, weights, described, ("gptqmodel", "transformers"))


if __name__ == "__main__":
    main()
