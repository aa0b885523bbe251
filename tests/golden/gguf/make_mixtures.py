"""Tiny mixtures in GGUF files that llama.cpp's own converter writes: DeepSeek-V2, DeepSeek-V3 and gpt-oss as openai ships it; the
logits of their weights go to `logits.safetensors`, beside those of `make_models.py`, which is run before.

Weights fit the types of the files exactly, so that logits are those of the model that was converted. The converter knows
tokenizers by hashes of what they make of a text, which a tiny one has not; it is told their names.

pip install torch transformers==5.24.0 pyyaml tqdm requests
NO_LOCAL_GGUF=1 PYTHONPATH=.:LLAMA_CPP:LLAMA_CPP/gguf-py python tests/golden/gguf/make_mixtures.py
(the sources in xllamacpp 2026.10.11549)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from conversion import TextModel, get_model_class
from safetensors.torch import load_file, safe_open, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qkernels.models.gguf_tokenizer import SPLITS_IN_TURN, converter
from tests.golden.gguf.make_models import FILES, TEXT, TOKENS
from tests.tiny_models import tiny_model

SPECIAL = {
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
    "gpt": ("<|startoftext|>", "<|return|>", "<|endoftext|>"),
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 8,
}
EXPERTS = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "hidden_size": 32}
V3_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707,
    "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
# The range that is corrected ends so near to a whole channel that it does not matter whether it is rounded (2 of 8).
OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 672.792, "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False,
}  # fmt: skip
OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "head_dim": 16,
    "sliding_window": 4,
    "hidden_size": 32,
}
# file: (model_type, fields, how text is split, type)
CASES: dict[str, tuple[str, dict[str, Any], str, gguf.LlamaFileType]] = {
    "deepseek2": (
        "deepseek_v2",
        LATENT | EXPERTS | {"n_shared_experts": 2, "n_group": None, "topk_group": None, "routed_scaling_factor": 1.5},
        "deepseek-llm", gguf.LlamaFileType.MOSTLY_F16,
    ),
    "deepseek3": (
        "deepseek_v3",
        LATENT | EXPERTS | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "rope_parameters": V3_ROPE,
                            "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
        "deepseek-v3", gguf.LlamaFileType.MOSTLY_Q8_0,
    ),
    "gpt-oss": ("gpt_oss", OSS | {"rope_parameters": OSS_ROPE}, "gpt-4o", gguf.LlamaFileType.MOSTLY_F16),
}  # fmt: skip


def tokenizer_of(pre: str) -> PreTrainedTokenizerFast:
    _, splits = converter()
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS_IN_TURN.get(pre) or (splits[pre],)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL["deepseek" if "deepseek" in pre else "gpt"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet)
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=True,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        **names,
    )


def in_eight_bits(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Numbers that Q8_0 holds as they are, whether rows or columns are blocks: each 32 have one of the largest size."""
    numbers = torch.randint(-127, 128, shape, generator=generator).float()
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    return torch.where((rows - columns) % 32 == 0, 127.0, numbers) / 1024


@torch.no_grad()
def model_of(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model, and tensors of its files that are not in its state: experts in MXFP4."""
    model_type, fields, _, kind = CASES[name]
    model = tiny_model(model_type, vocab_size=TOKENS, **fields)
    generator = torch.Generator().manual_seed(5)
    packed: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        routes = key.endswith(("mlp.gate.weight", "mlp.router.weight"))
        if routes:
            tensor.normal_(0, 2.0, generator=generator)  # so that no rounding changes whom a token is sent to
        elif key.endswith(("bias", "sinks")):
            tensor.normal_(0, 0.3, generator=generator)
        elif kind == gguf.LlamaFileType.MOSTLY_Q8_0 and tensor.dim() > 1:
            tensor.copy_(in_eight_bits(tensor.shape, generator))
        elif ".experts." in key and model_type == "gpt_oss":
            E, K, N = tensor.shape
            packed[f"{key}_blocks"] = torch.randint(256, (E, N, K // 32, 16), generator=generator).byte()
            packed[f"{key}_scales"] = torch.randint(121, 125, (E, N, K // 32), generator=generator).byte()
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            tensor.copy_(
                convert_moe_packed_tensors(packed[f"{key}_blocks"], packed[f"{key}_scales"], dtype=torch.float32)
            )
        elif ".experts." in key:
            tensor.mul_(8)
        if tensor.dim() > 1 and not routes:
            tensor.copy_(tensor.half())
    return model, packed


def make(name: str) -> tuple[torch.Tensor, list[int]]:
    """Write the file; the logits of its weights, and the ids of the text."""
    _, _, pre, kind = CASES[name]
    model, packed = model_of(name)
    tokenizer = tokenizer_of(pre)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        if packed:
            tensors = load_file(path / "model.safetensors")
            kept = {key: value for key, value in tensors.items() if f"{key}_blocks" not in packed}
            save_file(kept | packed, path / "model.safetensors", {"format": "pt"})
            config |= {"quantization_config": {"quant_method": "mxfp4"}}
        if "deepseek" in name:  # as their own configs say, which transformers does not know
            config |= {"scoring_func": "sigmoid" if name == "deepseek3" else "softmax"}
        (path / "config.json").write_text(json.dumps(config))
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre  # type: ignore[method-assign]
        architecture = type(model).__name__
        with torch.inference_mode():
            written = get_model_class(architecture)(path, kind, FILES / f"{name}.gguf", model_name="tiny")
            written.write()
    ids = torch.arange(12)[None] * 7 % 64
    with torch.no_grad():
        return model(ids).logits, tokenizer(TEXT)["input_ids"]


def main() -> None:
    path = FILES / "logits.safetensors"
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    logits, texts = load_file(path), json.loads(header["ids"])
    for name in CASES:
        logits[name], texts[name] = make(name)
    save_file({name: t.contiguous() for name, t in logits.items()}, path, header | {"ids": json.dumps(texts)})


if __name__ == "__main__":
    main()
