"""A static W8A8 file as llm-compressor itself makes one (`oneshot`: SmoothQuant, then round to nearest under scales that it
calibrates for activations): the model with what goes into and comes out of each layer, codes and logits.

pip install llmcompressor==0.14.0.1; python tests/golden/activations/make_llmcompressor.py
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import save_file
from tiny import MODELS, tiny, watched
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

NAME = "llmcompressor_w8a8_static"
OUT: Path = MODELS / NAME


def recipe() -> list[object]:
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    inputs = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=True, dynamic=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    ]


def codes_of(model: nn.Module, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """int8, of what goes into each layer, by compressed-tensors' own `quantize`."""
    codes = {}
    for name, module in model.named_modules():
        if f"{name}.x" in found:
            args = module.quantization_scheme.input_activations
            zero = getattr(module, "input_zero_point", None)
            codes[f"{name}.codes"] = quantize(found[f"{name}.x"], module.input_scale, zero, args, dtype=torch.int8)
    return codes


def main() -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 64, (16, 24), generator=g).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 24] * 16})
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"": 0}, "")), pad_token=""
    )  # asked for, not used
    with TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        words.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        oneshot(
            model=model, processor=words, dataset=data, recipe=recipe(), max_seq_length=24, num_calibration_samples=16,
            pipeline="basic",
        )  # fmt: skip
        asked = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found = watched(model, asked)
            found |= codes_of(model, found)
        model.save_pretrained(OUT, save_compressed=True)
    for path in OUT.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    tools = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    versions = ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in tools)
    made = {f"expected.{key}": tensor.detach().contiguous().clone() for key, tensor in found.items()}
    save_file({"ids": asked, **made}, MODELS / f"{NAME}.safetensors", {"made_by": versions})


if __name__ == "__main__":
    main()
