"""Models quantized by torchao through transformers' TorchAoConfig and saved by `save_pretrained`: int8 per row, 2 to 8 bits in
groups, and int4 in its plain packing (Int4Tensor). The other int4 type, Int4TilePackedTo4dTensor, is made on a GPU only.

Int4Tensor takes its rounding and packing from MSLK, whose wheel is for CUDA; these two functions are Python, and run without
its library:

pip install torchao==0.18.0 transformers==5.23.0 accelerate
pip install --no-deps mslk-cuda==1.1.0 triton==3.7.0   (which it imports, and does not run)
MSLK_PYTHON_ONLY=1 python tests/golden/make_torchao.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from mslk.quantize.shuffle import int4_row_quantize_zp
from safetensors import safe_open
from store import store
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CASES = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int4-g32": IntxWeightOnlyConfig(torch.int4, PerGroup(32), version=2),
    "int3-g32-asym": IntxWeightOnlyConfig(torch.int3, PerGroup(32), MappingType.ASYMMETRIC, version=2),
    "int6-channel": IntxWeightOnlyConfig(torch.int6, PerAxis(0), version=2),
    "int4-plain-g32": Int4WeightOnlyConfig(group_size=32),
}


def meant(quantized: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The weight as the tool computes it. Int4Tensor is only ever multiplied, by a CUDA kernel: there it is q * scale + zero of
    the codes that MSLK finds, before they are packed, in fp32 with scale and zero as they are stored."""
    if type(quantized).__name__ != "Int4Tensor":
        return quantized.dequantize()
    codes, scale, zero = int4_row_quantize_zp(original, 32)
    scale, zero = (t.to(original.dtype).float().T.repeat_interleave(32, 1) for t in (scale, zero))
    return codes * scale + zero


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        original = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.bfloat16)
        original.save_pretrained(plain)
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
            pairs = {m: (model.get_submodule(m).weight, original.get_submodule(m).weight.data) for m in MODULES}
            weights = {module: meant(*pair) for module, pair in pairs.items()}
            tools = ("torchao", "transformers", *(("mslk-cuda",) if "plain" in name else ()))
            store(f"torchao-{name}", tensors, weights, described, tools, metadata)


if __name__ == "__main__":
    main()
