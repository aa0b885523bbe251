"""Tiny random models of transformers' architectures, token windows for them, and `quantize` with settings that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkernels import quantize

VOCABULARY = 64

_LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
KINDS = ["sliding_attention", "full_attention"]

# What an architecture calls sizes that others have no name for, or another name.
FIELDS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"ffn_hidden_size": 48},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere2": {"layer_types": KINDS},
    "olmo3": {"layer_types": KINDS},
    "exaone4": {"layer_types": KINDS},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 16},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    "qwen3_5_text": {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma3n_text": {
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        "layer_types": KINDS,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 8,
        "layer_types": KINDS,
    },
}


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of two layers, 4 heads of 8 channels and, where the architecture can, 2 key-value heads."""
    import transformers

    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type not in ("opt", "gpt_neox", "gpt2", "bloom", "falcon", "deepseek_v2", "deepseek_v3"):
        fields["num_key_value_heads"] = 2
    if model_type.startswith(("qwen3", "gemma", "glm", "llama4", "ministral3")):
        fields["head_dim"] = 8
    fields |= FIELDS.get(model_type, {})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **fields | changes)
    )
    stir(model)
    return model.eval()


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Norms and biases start as 1 and 0, which would hide a fold that forgets them, or a file that loses them."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn_like(parameter) * 0.2


def in_float64(model: Any) -> Any:
    """The model in float64, in place: with experts one by one, for the products of all at once know no float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.double()


def loud_model(model_type: str = "llama", **changes: Any) -> Any:
    """A tiny model in which a few channels are much louder than the others, as in models that were trained."""
    model = tiny_model(model_type, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter[::7] *= 8
    return model


def token_windows(windows: int = 24, seq_len: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, seq_len), generator=torch.Generator().manual_seed(seed))


def first_inputs(model: Any, ids: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    """The chain of a model's layers, as a run captures it: what each of them is called with."""
    from qkernels.layerwise.capturing import Progress, capture
    from qkernels.layerwise.running import Place

    place = Place(torch.device("cpu"), dtype)
    with torch.no_grad():
        return capture(
            model, Progress.of(model), [ids], dtype, place, lambda name, layer, x, call: call.run(layer, x, place)
        )


def run(model: Any, method: Any, **options: Any) -> Any:
    """`quantize` on `token_windows()`, with the reference where no kernel takes such small groups."""
    settings = {"calibration": token_windows(), "seq_len": 16, "on_unsupported": "reference", "progress": False}
    return quantize(model, method, **settings | options)


def divergence(model: Any, reference: Any) -> float:
    """KL of a model's next tokens from the reference's, nats a token, on random ids."""
    ids = token_windows(16, 16, seed=9)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(input_ids=ids).logits.float(), -1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())
