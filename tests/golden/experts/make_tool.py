"""Tiny mixtures of one layer that a tool quantized end to end, as the tool wrote them, with the weights of experts and of
attention that the tool itself computes from its files.

pip install llmcompressor==0.14.0.1; python tests/golden/experts/make_tool.py llmcompressor
pip install auto-round==0.16.1; python tests/golden/experts/make_tool.py auto_round
pip install --no-deps gptqmodel==7.7.0 (with what it needs beside torch); python tests/golden/experts/make_tool.py gptqmodel

GPTQModel asks for torch 2.14.1 and runs with 2.13.0, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent.resolve()
COMMON = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
GROUP = 32


def plain_models(folder: Path) -> dict[str, Path]:
    """fp16 models of random weights."""
    qwen3 = Qwen3MoeConfig(**COMMON, intermediate_size=64, moe_intermediate_size=32, num_experts=4)
    mixtral = MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=4)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    found = {}
    for name, model in (("qwen3_moe", Qwen3MoeForCausalLM(qwen3)), ("mixtral", MixtralForCausalLM(mixtral))):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, 0, 0.1)
        model.to(torch.float16).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2").save_pretrained(
            folder / name
        )
        found[name] = folder / name
    return found


def examples() -> list[dict[str, list[int]]]:
    rows = torch.arange(512).view(16, 32) * 7 % 64
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 32} for row in rows]


def with_gptqmodel(source: Path, out: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True, desc_act=False, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(source), config)
    model.quantize(examples(), batch_size=4)
    model.save(str(out))


def with_auto_round(source: Path, out: Path) -> None:
    from auto_round import AutoRound

    rounding = AutoRound(
        str(source), bits=4, group_size=GROUP, sym=True, iters=0, nsamples=4, seqlen=32, device_map="cpu",
        enable_torch_compile=False, disable_opt_rtn=True,
    )  # fmt: skip
    rounding.quantize_and_save(str(out), format="auto_round")


def with_llmcompressor(source: Path, out: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    data = Dataset.from_list(examples())
    oneshot(
        model=model, dataset=data, recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head", "re:.*gate$"])],
        max_seq_length=32, num_calibration_samples=len(data), processor=AutoTokenizer.from_pretrained(source),
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)


def meaning_of_gptqmodel(directory: Path, modules: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What its loader makes of the files, fp16: its plain torch kernel's weights are `[K, N]`."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(directory), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    kernels = {name.rpartition("layers.")[2]: m for name, m in model.named_modules() if hasattr(m, "dequantize_weight")}
    found = {}
    for name in modules:  # Mixtral's are called otherwise in memory than in the file
        leaf = name.rpartition("layers.")[2]
        for old, new in (("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            leaf = leaf if leaf in kernels else leaf.replace(old, new)
        found[name] = kernels[leaf].dequantize_weight().T
    return found


def meaning_of_auto_round(directory: Path, modules: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What its inference module for the packing that it wrote (auto_round:auto_gptq, zero points less 1) makes of each module's
    tensors, fp16."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    found = {}
    for name, parts in modules.items():
        K, N = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
        kernel = QuantLinear(4, GROUP, K, N, bias=False)
        kernel.load_state_dict(parts, strict=False)
        kernel.post_init()
        found[name] = kernel(torch.eye(K, dtype=torch.float16)).T
    return found


def meaning_of_llmcompressor(directory: Path, modules: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What compressed-tensors decompresses, bf16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return {name: compressor.decompress(dict(parts), scheme)["weight"] for name, parts in modules.items()}


def main() -> None:
    tool = sys.argv[1]
    families = sys.argv[2:] or ["qwen3_moe", "mixtral"]
    packed = "weight_packed" if tool == "llmcompressor" else "qweight"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sources = plain_models(Path(folder))
        for family in families:
            made, out = Path(folder) / f"{family}-made", HERE / f"{tool}-{family}"
            here: dict[str, Any] = globals()
            here[f"with_{tool}"](sources[family], made)
            made = next(path.parent for path in made.rglob("config.json"))
            (file,) = made.glob("*.safetensors")
            tensors = load_file(file)
            modules = {name.rpartition(".")[0]: {} for name in tensors if name.endswith(f".{packed}")}
            for name, tensor in tensors.items():
                if name.rpartition(".")[0] in modules:
                    modules[name.rpartition(".")[0]][name.rpartition(".")[2]] = tensor
            weights = here[f"meaning_of_{tool}"](made, modules)
            out.mkdir(exist_ok=True)
            shutil.copy(file, out / "model.safetensors")
            config = json.loads((made / "config.json").read_text())
            (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            versions = ", ".join(
                f"{name} {version(name)}" for name in (tool.replace("_", "-"), "transformers", "torch")
            )
            expected = {name: weight.detach().contiguous().clone() for name, weight in weights.items()}
            save_file(expected, out / "expected.safetensors", {"made_by": versions})
            print(f"{tool}-{family}: {len(expected)} weights ({versions})")


if __name__ == "__main__":
    main()
