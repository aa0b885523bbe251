"""The tiny model that files of int8 activations are made of, and what is kept of a run of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

MODELS = Path(__file__).parent


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
        model.model.layers[0].input_layernorm.weight[[3, 17]] = 12.0  # outliers
    return model


def watched(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and what goes into and comes out of each quantized layer."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        found.update({f"{name}.x": x[0], f"{name}.y": y[0]})

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _, inputs, y, name=name: keep(name, inputs[0], y))
    return {"logits": model.eval()(ids).logits, **found}
