"""Tiny models in GGUF files that gguf-py writes, each with the logits that transformers computes from its weights, and the ids
of a text.

Names come from gguf-py's map, blocks from its quantizers, the file from its writer. What llama.cpp's converter does besides
(rows of q and k in pairs, 1 added to Gemma's norms, rope factors as a tensor) is done here, from its description.

pip install gguf==0.19.0 xllamacpp==2026.10.11549 torch transformers==5.24.0; PYTHONPATH=. python tests/golden/gguf/make_models.py
"""

from __future__ import annotations

import ctypes
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.golden.gguf.make_ggml import library
from tests.tiny_models import tiny_model

FILES = Path(__file__).parent
TEXT = (
    "the cat sat on a mat and looked at the moon while rain fell over the quiet little town, 123 times; don't ask why"
)
TOKENS = 300
Q = gguf.GGMLQuantizationType
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.25],
    "long_factor": [2.0, 4.5], "original_max_position_embeddings": 8,
}  # fmt: skip
PHI3 = {"rope_parameters": LONG, "original_max_position_embeddings": 8, "sliding_window": None}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# file: (model_type, what its config has besides, architecture in the file, kind of tokenizer, types by the end of a name)
MIXED = {
    "attn_q": Q.Q4_0, "attn_k": Q.Q5_1, "attn_v": Q.Q8_0, "attn_output": Q.Q4_1, "ffn_gate": Q.Q5_0, "ffn_up": Q.MXFP4,
    "ffn_down": Q.BF16, "token_embd": Q.Q8_0, "output": Q.Q4_0,
}  # fmt: skip
K_QUANTS = {
    "attn_q": Q.Q4_K, "attn_k": Q.Q5_K, "attn_v": Q.Q6_K, "attn_output": Q.Q2_K, "ffn_gate": Q.Q3_K, "ffn_up": Q.IQ4_XS,
    "ffn_down": Q.IQ3_S, "token_embd": Q.Q4_K, "output": Q.Q6_K,
}  # fmt: skip
# An expert's down has rows of 256, the least that K-quants have.
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 1}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 1}
CASES: dict[str, tuple[str, dict[str, Any], str, str, dict[str, Q]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}, "llama", "gpt2", {}),
    "llama-mixed": ("llama", {}, "llama", "gpt2", MIXED),
    "llama-k": ("llama", WIDE, "llama", "gpt2", K_QUANTS),
    "mistral": ("mistral", {"sliding_window": 4}, "llama", "llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}, "qwen2", "gpt2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, "qwen3", "gpt2", {"attn_q": Q.Q8_0, "ffn_down": Q.Q8_0}),
    "gemma": ("gemma", {"head_dim": 16}, "gemma", "llama", {}),
    "gemma2": ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8, "head_dim": 8}, "gemma2", "llama", {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 4, "query_pre_attn_scalar": 8, "head_dim": 8, "num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE},
        "gemma3", "llama", {},
    ),
    "phi3": ("phi3", PHI3, "phi3", "llama", {}),
    "mixtral": (
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "llama", "llama",
        {"ffn_gate_exps": Q.Q4_0, "ffn_up_exps": Q.Q4_0, "ffn_down_exps": Q.Q5_1, "attn_q": Q.Q8_0},
    ),
    "qwen2moe": (
        "qwen2_moe", MIXTURE | {"shared_expert_intermediate_size": 64, "norm_topk_prob": False}, "qwen2moe", "gpt2",
        {"ffn_gate_exps": Q.MXFP4, "ffn_up_exps": Q.MXFP4, "ffn_down_exps": Q.Q4_K, "ffn_up_shexp": Q.Q8_0},
    ),
    "qwen3moe": (
        "qwen3_moe", MIXTURE | {"norm_topk_prob": True, "head_dim": 16}, "qwen3moe", "gpt2",
        {"ffn_gate_exps": Q.Q8_0, "ffn_up_exps": Q.Q8_0, "ffn_down_exps": Q.IQ3_S},
    ),
    "olmoe": (
        "olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "num_key_value_heads": 4}, "olmoe",
        "gpt2", {},
    ),
}  # fmt: skip


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp: each channel next to the one that rope turns with it."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def quantized(weight: np.ndarray, qtype: Q) -> np.ndarray:
    """Blocks by gguf-py, or by ggml for the types that gguf-py only reads."""
    if not qtype.name.endswith("_K") and not qtype.name.startswith("IQ"):
        return quantize(weight, qtype)
    elements, nbytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = np.zeros((weight.shape[0], weight.shape[1] // elements * nbytes), dtype=np.uint8)
    source = np.ascontiguousarray(weight, dtype=np.float32)
    rows, columns = map(ctypes.c_int64, weight.shape)
    pointers = (ctypes.c_void_p(data.ctypes.data) for data in (source, blocks))
    library().ggml_quantize_chunk(ctypes.c_int(qtype), *pointers, ctypes.c_int64(0), rows, columns, None)
    return blocks


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentencepiece(gemma: bool) -> Tokenizer:
    """Byte fallback, and words that begin with ▁."""
    base = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if gemma else "first")
    learned.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=TOKENS - len(base)))
    tokens = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    model = json.loads(learned.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate([*base, *tokens])}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, [tuple(m) for m in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    scheme = "never" if gemma else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, kind: str, gemma: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[unused{i}]" for i in range(TOKENS - len(tokens))]
    control = {"<s>", "</s>", "<pad>"}
    types = [
        3 if t in control else 2 if t == "<unk>" else 6 if t.startswith("<0x") else 5 if "unused" in t else 1
        for t in tokens
    ]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("gpt-2" if kind == "gpt2" else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_pad_token_id(vocabulary["<pad>"])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_add_bos_token(True)
        return
    rank = {"".join(merge): i for i, merge in enumerate(merges)}
    writer.add_token_scores([-float(rank.get(token, 1000 + i)) for i, token in enumerate(tokens)])
    writer.add_unk_token_id(vocabulary["<unk>"])
    writer.add_add_bos_token(True)
    if gemma:
        writer.add_add_space_prefix(False)


def add_config(writer: gguf.GGUFWriter, model: Any, arch: str) -> None:
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if (experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (
        arch in ("gemma", "gemma2", "gemma3", "qwen3", "qwen3moe")
        or head_dim * config.num_attention_heads != config.hidden_size
    ):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        writer.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))
        )
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_factors(writer: gguf.GGUFWriter, model: Any) -> None:
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "longrope":
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))
    if rope.get("rope_type") != "llama3":
        return
    factors = []
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(model.config.head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / model.config.head_dim)
        smooth = (old / wavelength - low) / (high - low)
        factors.append(
            1.0 if smooth > 1 else rope["factor"] if smooth < 0 else 1 / ((1 - smooth) / rope["factor"] + smooth)
        )
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


def add_experts(
    writer: gguf.GGUFWriter, names: Any, hf_name: str, tensor: torch.Tensor, types: dict[str, Q]
) -> torch.Tensor:
    """Stacked experts: gate and up apart. Returns what is read back."""
    read = []
    parts = tensor.chunk(2, dim=1) if hf_name.endswith("gate_up_proj") else (tensor,)
    for part, leaf in zip(parts, ("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",)):
        ours = names.get_name(f"{hf_name.rpartition('.')[0]}.{leaf}")
        qtype = types.get(ours.rpartition(".")[2], Q.F16)
        rows = part.float().flatten(0, 1).contiguous().numpy()
        blocks = quantized(rows, qtype)
        writer.add_tensor(f"{ours}.weight", blocks.reshape(*part.shape[:2], -1), raw_dtype=qtype)
        read.append(torch.from_numpy(dequantize(blocks, qtype).copy()).view(part.shape))
    return torch.cat(read, dim=1)


def make(name: str) -> tuple[torch.Tensor, list[int]]:
    """Write the file; the logits of its weights, and the ids of the text."""
    model_type, fields, arch, kind, types = CASES[name]
    model = tiny_model(model_type, **{"intermediate_size": 64, "vocab_size": TOKENS} | fields)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mlp.gate.weight"):
            parameter.data *= 15  # so that no rounding of activations changes whom a token is sent to
        elif ".experts." in parameter_name:
            parameter.data *= 8  # so that they count
    gemma = arch.startswith("gemma")
    writer = gguf.GGUFWriter(FILES / f"{name}.gguf", arch)
    writer.add_name("tiny")  # llama.cpp takes names with "phi" in them for more than a name
    writer.add_file_type(7 if types else 1)
    add_config(writer, model, arch)
    tokenizer = byte_level() if kind == "gpt2" else sentencepiece(gemma)
    add_tokenizer(writer, tokenizer, kind, gemma)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], model.config.num_hidden_layers)
    stored = {}
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if ".experts." in hf_name:
            stored[hf_name] = add_experts(writer, names, hf_name, tensor, types)
            continue
        module, _, leaf = hf_name.rpartition(".")
        ours = names.get_name(module)
        assert ours is not None, hf_name
        routes = ours.rpartition(".")[2].startswith("ffn_gate_inp")
        qtype = Q.F32 if tensor.dim() == 1 or routes else types.get(ours.rpartition(".")[2], Q.F16)
        weight = tensor.float().numpy()
        heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}.get(
            ours.rpartition(".")[2], 0
        )
        heads = heads if arch == "llama" else 0
        weight = paired(weight, heads) if heads else weight
        weight = weight + 1 if gemma and "norm" in ours else weight
        blocks = quantized(weight, qtype)
        writer.add_tensor(f"{ours}.{leaf}", blocks.squeeze() if routes else blocks, raw_dtype=qtype)
        read = dequantize(blocks, qtype).reshape(weight.shape)
        read = read - 1 if gemma and "norm" in ours else read
        stored[hf_name] = torch.from_numpy((unpaired(read, heads) if heads else read).copy())
    add_factors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(stored, strict=not model.config.tie_word_embeddings)
    ids = torch.arange(12)[None] * 7 % 64
    with torch.no_grad():
        return model(ids).logits, [tokenizer.token_to_id("<s>"), *tokenizer.encode(TEXT).ids]


def main() -> None:
    logits, texts = {}, {}
    for name in CASES:
        logits[name], texts[name] = make(name)
    made_by = ", ".join(f"{tool} {version(tool)}" for tool in ("gguf", "transformers", "torch", "tokenizers"))
    header = {"made_by": made_by, "text": TEXT, "ids": json.dumps(texts)}
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, FILES / "logits.safetensors", header)


if __name__ == "__main__":
    main()
