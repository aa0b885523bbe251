"""Tiny random models of transformers' architectures, token windows for them, and `quantize` with settings that suit them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qkernels import quantize

VOCABULARY = 64


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
    if model_type == "opt":
        fields |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if model_type not in ("opt", "gpt_neox", "gpt2"):
        fields["num_key_value_heads"] = 2
    if model_type == "qwen3" or model_type.startswith("gemma"):
        fields["head_dim"] = 8
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
