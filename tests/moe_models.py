"""Tiny mixtures of experts of every family that `QuantExperts` covers, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 16},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2,
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2,
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        _LATENT | {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _LATENT
        | {
            "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "n_group": 2, "topk_group": 1, "intermediate_size": 48,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "head_dim": 16, "intermediate_size": 48, "n_group": 1, "topk_group": 1,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": (
        "NemotronH",
        {
            "intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40, "head_dim": 16, "mamba_num_heads": 2, "mamba_head_dim": 16,
            "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "layers_block_type": ["attention", "moe"], "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    ),
    "llama4": (
        "Llama4Text",
        {
            "intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "head_dim": 16, "interleave_moe_layer_step": 1,
        },
    ),
}  # fmt: skip
_CONFIG = {"qwen3_5_moe": "Qwen3_5MoeTextConfig"}  # the other one is of a model that sees pictures
_CAUSAL = {"llama4": "Llama4ForCausalLM"}


def tiny_moe(family: str, **changes: Any) -> Any:
    """A model in fp32 and eval mode, the same every time."""
    prefix, fields = FAMILIES[family]
    config = getattr(transformers, _CONFIG.get(family, f"{prefix}Config"))(**(COMMON | fields | changes))
    torch.manual_seed(7)
    model = getattr(transformers, _CAUSAL.get(family, f"{prefix}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expert" in name or "gate" in name or "router" in name:
                parameter.normal_(0, 0.1)
    return model


def edited(directory: Path, edit: Any) -> None:
    """Change the tensors of a directory of one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shipped(directory: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss as openai ships it; returns the float parameters that transformers' own reader makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_moe("gpt_oss", intermediate_size=64)
    model.save_pretrained(directory)
    torch.manual_seed(11)
    floats: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            E, K, N = tensors.pop(name).shape
            blocks = torch.randint(256, (E, N, K // 32, 16)).byte()
            scales = torch.randint(118, 126, (E, N, K // 32)).byte()
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)

    edited(directory, pack)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return floats


def lively(family: str) -> Any:
    """Experts loud enough to be heard."""
    model = tiny_moe(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(0, 0.4)
    return model
