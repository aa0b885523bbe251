"""config.json out of the metadata of a GGUF file, for the architectures of `gguf_names.py`."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..storage.gguf import GgufSource
from .gguf_names import FOR_CONFIG, GgufArchitecture

# Keys under an architecture's name that say nothing that the config needs.
_NEUTRAL: Final = {
    "vocab_size", "expert_count", "expert_used_count", "tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned",
    "attention.causal",
}  # fmt: skip
_TOKENS: Final = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class _Keys:
    """Metadata of one architecture, with checks; notes what was asked for."""

    def __init__(self, source: GgufSource, architecture: str) -> None:
        self.source, self.architecture = source, architecture
        self.asked = set(_NEUTRAL)

    def raw(self, key: str) -> Any:
        self.asked.add(key)
        return self.source.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw(key)
        if isinstance(value, array) and len(set(value)) == 1:  # one for each layer, all alike
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value < 2**31:
            found = "one for each layer, which differ" if isinstance(value, array) else f"{value!r:.40}"
            raise self._error(key, f"an integer of {least} … 2^31 - 1", "no such key" if value is None else found)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < 3e38:
            raise self._error(key, "a positive number", "no such key" if value is None else f"{value!r:.40}")
        return _shortest(float(value))

    def _error(self, key: str, expected: str, got: str) -> CheckpointError:
        return CheckpointError(f"{self.source.path}: {self.architecture}.{key} must be {expected}, got {got}")

    def unread(self) -> list[str]:
        """Keys of this architecture that nobody asked for."""
        prefix = f"{self.architecture}."
        return sorted(
            key for key in self.source.metadata if key.startswith(prefix) and key[len(prefix) :] not in self.asked
        )


def config_of(source: GgufSource, architecture: GgufArchitecture) -> tuple[dict[str, Any], list[str]]:
    """What config.json of the model would say, and the metadata keys of the architecture that this does not understand.

    Raises:
        CheckpointError: a key is missing or makes no sense; or the model has something that its class in transformers has not.
    """
    keys = _Keys(source, architecture.name)
    if "token_embd.weight" not in source:
        raise CheckpointError(
            f"{source.path} has no token_embd.weight, which tied embeddings and heads need too: convert the model again"
        )
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": source.entry("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in source,
        "dtype": _dtype(source, architecture),
    }
    config |= (
        _latent(source, keys, heads) if architecture.latent else {"head_dim": _head_dim(source, keys, heads, hidden)}
    )
    config |= {field: _token_id(source, f"tokenizer.ggml.{name}_token_id") for field, name in _TOKENS.items()}
    turn_end = _token_id(source, "tokenizer.ggml.eot_token_id")
    if turn_end is not None and config["eos_token_id"] not in (None, turn_end):
        config["eos_token_id"] = [config["eos_token_id"], turn_end]
    config |= _OF_MODEL_TYPE[architecture.model_type](source, keys, config)
    return config, keys.unread()


def _head_dim(source: GgufSource, keys: _Keys, heads: int, hidden: int) -> int:
    """From the metadata, else from the rows of q, else as most models have it."""
    query = source.entries.get("blk.0.attn_q.weight")
    size = keys.integer("attention.key_length", query.shape[0] // heads if query is not None else hidden // heads)
    if not size:
        raise CheckpointError(f"{source.path} has {heads} heads, more than channels ({hidden})")
    values = keys.integer("attention.value_length", size)
    if values != size:
        raise CheckpointError(
            f"{source.path} has keys of {size} and values of {values} channels a head, expected the same"
        )
    return size


def _latent(source: GgufSource, keys: _Keys, heads: int) -> dict[str, Any]:
    """Widths of latent attention. Where keys lie as llama.cpp multiplies them, files say that all heads share one latent; those
    from before say the widths of heads at once."""
    shared = "_mla" if keys.raw("attention.key_length_mla") is not None else ""
    for key in ("attention.key_length", "attention.value_length"):
        keys.raw(key)
    width, rotated = keys.integer(f"attention.key_length{shared}"), keys.integer("rope.dimension_count")
    if width <= rotated:
        raise CheckpointError(
            f"{source.path} turns {rotated} of {width} channels a head by rope, which leaves none of keys"
        )
    low_rank = "blk.0.attn_q.weight" not in source
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "q_lora_rank": keys.integer("attention.q_lora_rank") if low_rank else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": width - rotated,
        "v_head_dim": keys.integer(f"attention.value_length{shared}"),
        "head_dim": rotated,
    }


def _dtype(source: GgufSource, architecture: GgufArchitecture) -> str:
    """In which a model is best computed: as it lies in the file, quantized ones in bfloat16, where nothing overflows. Gemma's
    activations leave float16."""
    types = {entry.type.name for entry in source.entries.values()}
    if types <= {"F32"}:
        return "float32"
    return "float16" if types <= {"F32", "F16"} and not architecture.unit_offset_norms else "bfloat16"


def _token_id(source: GgufSource, key: str) -> int | None:
    value = source.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < source.entry("token_embd.weight").shape[0]):
        raise CheckpointError(f"{source.path}: {key} must be the number of a token, got {value!r:.40}")
    return value


# --- rope -------------------------------------------------------------------------------------------------------------


def _rope(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters of a model that turns whole heads."""
    rotated = keys.integer("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise CheckpointError(
            f"{source.path} turns {rotated} of {config['head_dim']} channels a head by rope, which {config['model_type']} models "
            "of transformers do not"
        )
    theta = keys.number("rope.freq_base", 10000.0)
    scaling = _scaling(source, keys)
    if FOR_CONFIG[0] in source:
        if scaling["rope_type"] != "default":
            raise CheckpointError(f"{source.path} has {FOR_CONFIG[0]} and rope scaling {scaling['rope_type']} at once")
        scaling = llama3_rope(_factors(source, FOR_CONFIG[0], rotated), theta, str(source.path))
    return {"rope_theta": theta} | scaling


def _scaling(source: GgufSource, keys: _Keys) -> dict[str, Any]:
    kind, linear = keys.raw("rope.scaling.type"), keys.number("rope.scale_linear", 1.0)
    if kind == "none" or (kind is None and linear == 1.0):
        return {"rope_type": "default"}
    if kind in ("linear", None):
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor", linear)}
    if kind == "yarn":
        betas = {
            field: keys.number(f"rope.scaling.{key}")
            for field, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"))
            if keys.raw(f"rope.scaling.{key}") is not None
        }
        return {
            "rope_type": "yarn",
            "factor": keys.number("rope.scaling.factor"),
            "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        } | betas
    raise CheckpointError(
        f"{source.path} scales rope by {kind!r:.40}; none, linear and yarn are read (longrope for phi3); load the original "
        "checkpoint"
    )


def _factors(source: GgufSource, name: str, rotated: int) -> Tensor:
    """float32: by what the frequency of each pair of channels is divided."""
    factors = source.read(name)
    if factors.dtype != torch.float32 or list(factors.shape) != [rotated // 2] or not bool(_is_factor(factors).all()):
        raise CheckpointError(
            f"{source.path}: {name} must be {rotated // 2} positive F32 numbers, got {source.entry(name).type.name} "
            f"{list(factors.shape)}"
        )
    return factors


def _is_factor(factors: Tensor) -> Tensor:
    return (factors > 0) & (factors < 1e9)


def llama3_rope(factors: Tensor, theta: float, where: str = "rope_freqs.weight") -> dict[str, Any]:
    """The llama3 rope scaling whose factors are in a file: long waves are divided by `factor`, short ones are left, and between
    them 1 / factor is a line over 1 / wavelength. A line has two parameters and the config three, so low_freq_factor is 1.

    Raises:
        CheckpointError: no such scaling has these factors.
    """
    count = len(factors)
    frequencies = (1.0 / theta ** (torch.arange(count, dtype=torch.float64) / count)) / (2 * math.pi)
    factor = _shortest(float(factors.max()))
    between = (factors > 1) & (factors < factor * (1 - 1e-6))
    guesses = [
        {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    ]
    if int(between.sum()) >= 2:
        smooth = (1.0 / factors.double() - 1.0 / factor) / (1.0 - 1.0 / factor)
        first, last = (int(i) for i in between.nonzero().flatten()[[0, -1]])
        slope = float((smooth[first] - smooth[last]) / (frequencies[first] - frequencies[last]))  # old / (high - low)
        cut = float(slope * frequencies[first] - smooth[first])  # low / (high - low), low being 1
        if cut > 0 and 0 < slope < cut * 2**31:
            guesses.append(
                {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": _rounded(1 + 1 / cut),
                 "original_max_position_embeddings": round(slope / cut)}
            )  # fmt: skip
    for guess in guesses:
        if bool((llama3_factors(guess, frequencies) - factors.double()).abs().max() <= 1e-4 * factor):
            return {"rope_type": "llama3"} | guess
    raise CheckpointError(
        f"{where}: the rope factors in {FOR_CONFIG[0]} are not those of a llama3 scaling (they reach {factor:g}); load the "
        "original checkpoint"
    )


def llama3_factors(scaling: dict[str, Any], frequencies: Tensor) -> Tensor:
    """float64: by what each frequency (in turns a token) is divided."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] * frequencies - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    divided: Tensor = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    return divided


# --- what only one architecture has --------------------------------------------------------------------------------------------


def _llama(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in source
    found: dict[str, Any] = {"rope_parameters": _rope(source, keys, config), "attention_bias": bias}
    found["mlp_bias"] = "blk.0.ffn_up.bias" in source
    if keys.raw("attention.sliding_window") is None:
        return found
    if bias or found["mlp_bias"]:
        raise CheckpointError(
            f"{source.path} has a sliding window and biases, which no model of transformers has together"
        )
    window = keys.integer("attention.sliding_window")
    return {
        "rope_parameters": found["rope_parameters"], "sliding_window": window, "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
    }  # fmt: skip


def _qwen2(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    if keys.raw("attention.sliding_window"):
        raise CheckpointError(
            f"{source.path} has a sliding window but not the layers that it is for; load the original checkpoint"
        )
    return {"rope_parameters": _rope(source, keys, config), "use_sliding_window": False}


def _qwen3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return _qwen2(source, keys, config) | {"attention_bias": "blk.0.attn_q.bias" in source}


def _gemma(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": _rope(source, keys, config)}


def _gemma2(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": _rope(source, keys, config),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(source, keys, config, every=2),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }


def _gemma3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    local = keys.number("rope.freq_base_swa", 10000.0)
    found = {
        "rope_parameters": {
            "full_attention": _rope(source, keys, config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": _layer_types(source, keys, config, every=6),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[name] = None if keys.raw(name) is None else keys.number(name)
    return found


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """The largest models divide by the square root of another number than their heads' width; no key says so, and llama.cpp tells
    them by their number of layers too."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(source: GgufSource, keys: _Keys, config: dict[str, Any], every: int) -> list[str]:
    """Which layers have a sliding window: all but every so many-th, or as the file lists."""
    layers = config["num_hidden_layers"]
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, array):
        if len(pattern) != layers:
            raise CheckpointError(
                f"{source.path}: sliding_window_pattern has {len(pattern)} entries for {layers} layers"
            )
        sliding: Sequence[Any] = pattern
    else:
        every = every if pattern is None else keys.integer("attention.sliding_window_pattern")
        sliding = [(i + 1) % every for i in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _phi3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    rotated = keys.integer("rope.dimension_count", config["head_dim"])
    original = keys.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": rotated / config["head_dim"],
    }
    kind = keys.raw("rope.scaling.type")
    if FOR_CONFIG[1] in source or FOR_CONFIG[2] in source:
        rope |= {
            "rope_type": "longrope",
            "long_factor": [_shortest(x) for x in _factors(source, FOR_CONFIG[1], rotated).tolist()],
            "short_factor": [_shortest(x) for x in _factors(source, FOR_CONFIG[2], rotated).tolist()],
            "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        }
    elif kind not in (None, "none"):
        raise CheckpointError(f"{source.path} scales rope by {kind!r:.40}, but has no {FOR_CONFIG[1]}")
    window = keys.raw("attention.sliding_window")
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.integer("attention.sliding_window") if window else None,
    }


def _experts(keys: _Keys, count: str = "num_experts") -> dict[str, Any]:
    """Numbers of experts; under which name the model has them."""
    experts, used = keys.integer("expert_count"), keys.integer("expert_used_count")
    if used > experts:
        raise CheckpointError(f"{keys.source.path} sends a token to {used} experts of {experts}")
    return {count: experts, "num_experts_per_tok": used}


def _mixtral(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    window = keys.raw("attention.sliding_window")
    return _experts(keys, "num_local_experts") | {
        "rope_parameters": _rope(source, keys, config),
        "sliding_window": keys.integer("attention.sliding_window") if window else None,
    }


def _normed(keys: _Keys, default: bool) -> bool:
    """Whether the weights of the experts of a token are made to add up to 1; llama.cpp has it in its code."""
    value = keys.raw("expert_weights_norm")
    return default if value is None else value is True


def _qwen2_moe(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    found = _qwen2(source, keys, config) | _experts(keys)
    width = keys.integer("expert_feed_forward_length", config["intermediate_size"] // found["num_experts_per_tok"])
    return found | {
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": keys.integer(
            "expert_shared_feed_forward_length", config["intermediate_size"]
        ),
        "norm_topk_prob": _normed(keys, False),
        "qkv_bias": "blk.0.attn_q.bias" in source,
    }


def _qwen3_moe(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    found = _qwen3(source, keys, config) | _experts(keys)
    width = keys.integer("expert_feed_forward_length", config["intermediate_size"] // found["num_experts_per_tok"])
    return found | {"moe_intermediate_size": width, "norm_topk_prob": _normed(keys, True)}


def _olmoe(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    clamp = None if keys.raw("attention.clamp_kqv") is None else keys.number("attention.clamp_kqv")
    return _experts(keys) | {
        "rope_parameters": _rope(source, keys, config), "norm_topk_prob": _normed(keys, False), "clip_qkv": clamp,
        "attention_bias": "blk.0.attn_q.bias" in source,
    }  # fmt: skip


def _deepseek(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """What DeepSeek-V2 and V3 have in common."""
    for key, what in (
        ("nextn_predict_layers", "layers that predict further tokens"),
        ("attention.temperature_scale", "a temperature of attention by position"),
    ):
        if keys.raw(key):
            raise CheckpointError(f"{source.path} has {what}, which is not read; load the original checkpoint")
    keys.raw("expert_gating_func")
    rope = _rope(source, keys, config)
    if rope["rope_type"] == "yarn":
        # a tenth of what configs have; without it llama.cpp scales attention as no model of transformers does
        grows = _rounded(10 * keys.number("rope.scaling.yarn_log_multiplier"))
        rope |= {"mscale": grows, "mscale_all_dim": grows}
    return _experts(keys, "n_routed_experts") | {
        "rope_parameters": rope,
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0, least=0),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
    }


def _groups(keys: _Keys) -> dict[str, int]:
    """Of experts, and from how many of them a token takes its own; nothing in older files, where llama.cpp knows of none."""
    if keys.raw("expert_group_count") is None:
        return {}
    return {"n_group": keys.integer("expert_group_count"), "topk_group": keys.integer("expert_group_used_count")}


def _deepseek_v2(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Of groups those with the largest expert are taken, as DeepSeek's own code does; llama.cpp adds the two largest up."""
    if _normed(keys, False) or source.get(f"{keys.architecture}.expert_gating_func", 1) != 1:
        raise CheckpointError(
            f"{source.path} has a router that no model of transformers has for {keys.architecture} (expert_gating_func "
            f"{source.get(f'{keys.architecture}.expert_gating_func')}, expert_weights_norm "
            f"{source.get(f'{keys.architecture}.expert_weights_norm')}); load the original checkpoint"
        )
    groups = _groups(keys)
    method = "group_limited_greedy" if groups.get("n_group", 1) > 1 else "greedy"
    return _deepseek(source, keys, config) | groups | {"topk_method": method, "norm_topk_prob": False}


def _deepseek_v3(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    routed = {"n_group": 1, "topk_group": 1, "norm_topk_prob": _normed(keys, False)} | _groups(keys)
    return _deepseek(source, keys, config) | routed | {"num_nextn_predict_layers": 0, "rope_interleave": True}


def _gpt_oss(source: GgufSource, keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """The range that yarn corrects is not rounded to whole channels, as in the model's own code; llama.cpp rounds it, and no key
    says so."""
    rope = _rope(source, keys, config)
    return _experts(keys, "num_local_experts") | {
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        "intermediate_size": keys.integer("expert_feed_forward_length"),
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": _layer_types(source, keys, config, every=2),
        "attention_bias": "blk.0.attn_q.bias" in source,
    }


_OF_MODEL_TYPE: Final = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3,
    "phi3": _phi3, "mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss,
}  # fmt: skip


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: files have 1e-05 as 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _rounded(value: float) -> float:
    return round(value, 3)
