"""A tiny Llama quantized by auto-round (without tuning steps), with the weights that its own inference modules compute: GPTQ
bodies of 4 bits, symmetric and not, and of 5, 6 and 7 (symmetric ones of these it refuses to write).

pip install auto-round==0.16.1 transformers==5.23.0; python tests/golden/make_autoround.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from store import store
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoRoundConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
CASES = {
    "4bit": (4, True),
    "4bit-asym": (4, False),
    "5bit-asym": (5, False),
    "6bit-asym": (6, False),
    "7bit-asym": (7, False),
}


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.float16).save_pretrained(plain)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(plain)
        for name, (bits, symmetric) in CASES.items():
            rounding = AutoRound(
                str(plain), bits=bits, group_size=32, sym=symmetric, iters=0, nsamples=4, seqlen=32, device_map="cpu",
                enable_torch_compile=False, disable_opt_rtn=True,
            )  # fmt: skip
            rounding.quantize_and_save(f"{folder}/{name}", format="auto_round")
            target = next(path.parent for path in Path(folder, name).rglob("config.json"))
            described = json.loads((target / "config.json").read_text())["quantization_config"]
            stored = load_file(target / "model.safetensors")
            tensors = {key: t for key, t in stored.items() if key.startswith(tuple(f"{m}." for m in MODULES))}
            config = AutoRoundConfig(backend="auto")
            model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float16, quantization_config=config)
            weights = {}
            for module in MODULES:
                kernel = model.get_submodule(module)
                weights[module] = kernel(torch.eye(kernel.infeatures, dtype=torch.float16)).T
                print(name, module, type(kernel).__module__)
            store(f"autoround-{name}", tensors, weights, described, ("auto-round", "transformers"))


if __name__ == "__main__":
    main()
