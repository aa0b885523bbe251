"""Tiny random models of any class that transformers has, and inputs for them.

`config_of` gives every field of a config that is a size a small value, whatever it is called there, so that most
architectures need no more than their name.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from ..tiny_models import VOCABULARY, stir

LAYERS, HEADS, WIDTH, INNER, POSITIONS, HEAD, EXPERTS = 2, 2, 32, 64, 64, 16, 4
IMAGE_TOKEN = 60  # of multimodal models; those behind it are for videos and for where an image begins and ends

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "embedding_dim", "d_embed", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size", "d_inner"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), POSITIONS),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), WIDTH),
    "shared_expert_intermediate_size": WIDTH,
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "attention_window"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    **dict.fromkeys(("initializer_range", "init_std"), WIDTH**-0.5),  # layers that matter: what they get wrong is seen
    "image_size": 16, "patch_size": 8, "num_mel_bins": 8,
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN),
    **dict.fromkeys(("video_token_id", "video_token_index"), IMAGE_TOKEN + 1),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_index"), IMAGE_TOKEN + 2),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_index"), IMAGE_TOKEN + 3),
}  # fmt: skip


def config_of(config_class: Any, fields: Mapping[str, Any]) -> Any:
    """A config of tiny sizes.

    Args:
        fields: those that differ. What is a config of its own (`text_config`, …) is a dict, whose "of" names its class
            where the whole leaves that open.
    """
    if dataclasses.is_dataclass(config_class):
        known = {field.name for field in dataclasses.fields(config_class)}
    else:  # before transformers made dataclasses of its configs
        known = set(inspect.signature(config_class.__init__).parameters)
    values = {name: size for name, size in SIZES.items() if name in known} | dict(fields)
    for name, part_class in getattr(config_class, "sub_configs", {}).items():
        part = dict(fields.get(name) or {})
        if "of" in part:
            part_class = getattr(tf, part.pop("of"))
        if part_class is not tf.AutoConfig:
            values[name] = config_of(part_class, part)
    return config_class(**values)


def tiny(name: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """A random model of a class of transformers, in which norms and biases are neither 1 nor 0: that would hide one that is
    lost."""
    torch.manual_seed(seed)
    model_class = getattr(tf, name)
    model = model_class(config_of(model_class.config_class, fields)).eval()
    stir(model)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token ids that mean no image, no padding and no end."""
    return torch.randint(3, IMAGE_TOKEN, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def inputs_of(model: Any) -> dict[str, Tensor]:
    """What a model of text, of pixels or of sound takes; one of several, text."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    size = getattr(config, "image_size", None)
    found: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        found["input_ids"] = tokens(2, 9)
    elif "pixel_values" in parameters:
        found["pixel_values"] = noise(2, 3, size, size)
    elif "input_features" in parameters:
        found["input_features"] = noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        found["input_values"] = noise(2, 400)
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = tokens(2, 5, seed=3)
    return found


@torch.no_grad()
def answers(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All float tensors at the top of a model's output, by name."""
    output = model(**inputs)
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
