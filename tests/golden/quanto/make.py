"""A tiny Llama quantized and saved by optimum-quanto: int4 in groups of 128 and 32 and of whole rows, int2, int8 and FP8; and
hashes of the fp32 weights that it computes from them.

pip install optimum-quanto==0.2.7 transformers==5.24.0 accelerate; python tests/golden/quanto/make.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch
from optimum.quanto import QuantizedModelForCausalLM, freeze, qfloat8, qint2, qint4, qint8, quantize
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
KINDS = {qint2: ["*k_proj"], qint8: ["*v_proj"], qfloat8: ["*o_proj"], qint4: ["*q_proj", "*.mlp.*"]}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=160, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for kind, names in KINDS.items():
        quantize(model, weights=kind, include=names)
        freeze(model)
    QuantizedModelForCausalLM(model).save_pretrained(HERE)
    for name in ("generation_config.json", "README.md"):
        (HERE / name).unlink(missing_ok=True)
    hashes = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = module.weight.dequantize().float().contiguous()
            hashes[name] = hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].tolist()
    tools = {tool: importlib.metadata.version(tool) for tool in ("optimum-quanto", "transformers", "torch")}
    made = {"made_by": tools, "sha256": hashes, "last_logits": logits}
    (HERE / "expected.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
