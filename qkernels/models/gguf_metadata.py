"""The metadata of a GGUF file out of a model's config: the way back from `gguf_config.py`, key by key what llama.cpp reads.

A config says more than the metadata can: `check_config` holds what a reader makes of them against it, so that a model of which
something would be lost (another activation, a bias, a scaling of rope) is refused and not written wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConversionError
from ..storage.gguf_header import MetaValue
from .gguf_config import llama3_factors
from .gguf_names import FOR_CONFIG, GgufArchitecture

QUANTIZATION_VERSION: Final = 2
# Fields that change nothing that a model computes, or that the tensors and the tokenizer say.
_NEUTRAL: Final = {
    "architectures", "dtype", "transformers_version", "_name_or_path", "model_type", "use_cache", "cache_implementation",
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "bos_token_id", "eos_token_id", "pad_token_id",
    "tie_word_embeddings", "pretraining_tp", "return_dict", "output_attentions", "output_hidden_states", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "max_window_layers", "use_sliding_window",
    "_sliding_window_pattern", "quantization_config", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise",
    "num_mtp_layers", "num_nextn_predict_layers",
}  # fmt: skip
_SAME: Final = 1e-6  # numbers are float32 in a file


def metadata_of(
    config: Mapping[str, Any], architecture: GgufArchitecture
) -> tuple[dict[str, MetaValue], dict[str, Tensor]]:
    """The keys of an architecture, and the float32 tensors that belong to the config (factors of rope).

    Args:
        config: of the model, with every field that its class has.

    Raises:
        ConversionError: rope is scaled in a way that files have no keys for.
    """
    name = architecture.name
    head = _head_dim(config)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    integers = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": rotated,
        "vocab_size": config["vocab_size"],
    }  # fmt: skip
    numbers = {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": rope["rope_theta"]}
    if config.get("sliding_window"):
        integers["attention.sliding_window"] = config["sliding_window"]
    found = {f"{name}.{key}": MetaValue("u32", int(value)) for key, value in integers.items()}
    found |= {f"{name}.{key}": MetaValue("f32", float(value)) for key, value in numbers.items()}
    scaling, tensors = _scaling(config, rope, rotated)
    own = _OF_MODEL_TYPE.get(architecture.model_type, _nothing)(config)
    return found | {f"{name}.{key}": value for key, value in {**scaling, **own}.items()}, tensors


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _scaling(
    config: Mapping[str, Any], rope: Mapping[str, Any], rotated: int
) -> tuple[dict[str, MetaValue], dict[str, Tensor]]:
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    if kind == "default":
        return {}, {}
    if kind == "llama3":
        count = rotated // 2
        exponents = torch.arange(count, dtype=torch.float64) / count
        frequencies = 1.0 / rope["rope_theta"] ** exponents / (2 * math.pi)
        return {}, {FOR_CONFIG[0]: llama3_factors(dict(rope), frequencies).float()}
    named = {"rope.scaling.type": MetaValue("string", kind), "rope.scaling.factor": MetaValue("f32", float(factor))}
    if kind == "linear":
        return named, {}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "yarn" and original:
        betas = {
            f"rope.scaling.yarn_{name}": MetaValue("f32", float(rope[name]))
            for name in ("beta_fast", "beta_slow")
            if rope.get(name) is not None
        }
        return named | {"rope.scaling.original_context_length": MetaValue("u32", int(original))} | betas, {}
    if kind == "longrope" and original:
        given = {
            "rope.scaling.original_context_length": MetaValue("u32", int(original)),
            "rope.scaling.attn_factor": MetaValue("f32", _long_attention(config, rope)),
        }
        lists = {FOR_CONFIG[1]: rope["long_factor"], FOR_CONFIG[2]: rope["short_factor"]}
        return given, {name: torch.tensor(values, dtype=torch.float32) for name, values in lists.items()}
    raise ConversionError(
        f"GGUF files have no keys for rope scaled by {kind!r} ({dict(rope)!r:.120}); default, linear, llama3, yarn and longrope "
        "are written"
    )


def _long_attention(config: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """By what longrope multiplies attention: as given, else as transformers computes it (LongRoPE, arXiv 2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    scale = rope.get("factor") or config["max_position_embeddings"] / original
    return 1.0 if scale <= 1.0 else math.sqrt(1 + math.log(scale) / math.log(original))


def _nothing(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    return {}


def _gemma2(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    found = {name: MetaValue("f32", float(config[name])) for name in caps if config[name] is not None}
    return found | _windows(config, every=2)


def _gemma3(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    if config["attn_logit_softcapping"] is not None:
        raise ConversionError("attn_logit_softcapping of a gemma3 model has no key in GGUF files that llama.cpp reads")
    local = config["rope_parameters"]["sliding_attention"]
    if local["rope_type"] != "default":
        raise ConversionError(f"GGUF files have no keys for scaled rope in sliding layers, got {local!r:.80}")
    found = {"rope.freq_base_swa": MetaValue("f32", float(local["rope_theta"]))}
    if config["final_logit_softcapping"] is not None:
        found["final_logit_softcapping"] = MetaValue("f32", float(config["final_logit_softcapping"]))
    return found | _windows(config, every=6)


def _windows(config: Mapping[str, Any], every: int) -> dict[str, MetaValue]:
    """Which layers have a sliding window; nothing where it is all but every so many-th, as both readers take it then."""
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    if sliding == [(i + 1) % every != 0 for i in range(len(sliding))]:
        return {}
    return {"attention.sliding_window_pattern": MetaValue("[bool]", sliding)}


def _experts(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    """Numbers and widths of experts. Whether their shares add up to 1 is in llama.cpp's code for each architecture."""
    counts = {
        "expert_count": experts_in(config), "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }  # fmt: skip
    return {key: MetaValue("u32", int(value)) for key, value in counts.items() if value is not None}


def experts_in(config: Mapping[str, Any]) -> int:
    """Experts a layer, under the names that configs have for it; 0 where there are none."""
    return int(config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0)


def _olmoe(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    clamp = config["clip_qkv"]
    return _experts(config) | ({} if clamp is None else {"attention.clamp_kqv": MetaValue("f32", float(clamp))})


def _deepseek(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    """Latents are said to be what all heads share: one head as wide as they are. See `gguf_config`."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    sigmoid = config["model_type"] == "deepseek_v3"
    counts = {
        "attention.head_count_kv": 1, "attention.key_length": rank + rotated, "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated, "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank, "attention.q_lora_rank": config["q_lora_rank"],
        "leading_dense_block_count": config["first_k_dense_replace"], "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"],
        "expert_gating_func": 2 if sigmoid else 1,
    }  # fmt: skip
    found = {key: MetaValue("u32", int(value)) for key, value in counts.items() if value is not None}
    found |= _experts(config) | {"expert_weights_scale": MetaValue("f32", float(config["routed_scaling_factor"]))}
    if sigmoid and config["norm_topk_prob"]:
        found["expert_weights_norm"] = MetaValue("bool", True)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        if not rope.get("mscale_all_dim"):
            raise ConversionError(
                "llama.cpp scales the attention of a deepseek2 file with yarn, which a model without mscale_all_dim does not"
            )
        found["rope.scaling.yarn_log_multiplier"] = MetaValue("f32", 0.1 * float(rope["mscale_all_dim"]))
    return found


def _gpt_oss(config: Mapping[str, Any]) -> dict[str, MetaValue]:
    width = {"expert_feed_forward_length": MetaValue("u32", int(config["intermediate_size"]))}
    return _experts(config) | width | _windows(config, every=2)


_OF_MODEL_TYPE: Final = {
    "gemma2": _gemma2, "gemma3_text": _gemma3, "mixtral": _experts, "qwen2_moe": _experts, "qwen3_moe": _experts, "olmoe": _olmoe,
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "gpt_oss": _gpt_oss,
}  # fmt: skip


def check_config(config: Mapping[str, Any], read: Mapping[str, Any], name: str) -> None:
    """Raise unless what a reader makes of the metadata describes the same model.

    Args:
        config: of the model.
        read: of the class that the reader chose, with every field. Fields that one of the two classes does not have do not count
            (Mistral's files are those of Llama).
        name: of the architecture.

    Raises:
        ConversionError: names the fields that differ.
    """
    differing = [
        f"{field} ({config[field]!r:.60}, read back as {read[field]!r:.60})"
        for field in sorted(config.keys() & read.keys() - _NEUTRAL)
        if not _alike(_plain(field, config), _plain(field, read))
    ]
    if differing:
        raise ConversionError(
            f"a GGUF file of architecture {name} has no way to say {'; '.join(differing)}, so that it would be another model"
        )


def _plain(field: str, config: Mapping[str, Any]) -> Any:
    """A field in a form in which equal models are alike."""
    value = config[field]
    if field == "head_dim":
        return _head_dim(config)
    if field != "rope_parameters":
        return value
    if "rope_type" not in value:
        return {kind: _plain_rope(config, rope) for kind, rope in value.items()}
    return _plain_rope(config, value)


def _plain_rope(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in rope.items() if value is not None}
    if (
        given["rope_type"] == "llama3"
    ):  # three numbers for a line: what they mean is in the factors, which the reader checked
        return {"rope_type": "llama3", "rope_theta": given["rope_theta"], "factor": given["factor"]}
    if given["rope_type"] == "longrope":
        given["attention_factor"] = _long_attention(config, rope)
        given.pop("factor", None)
        given.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return given | {"partial_rotary_factor": given.get("partial_rotary_factor", 1.0)}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=_SAME)
    return bool(a == b)
