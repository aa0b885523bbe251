"""LoRA adapters of PEFT on top of `QuantLinear`.

PEFT knows a fixed list of layer types and takes others through the configuration, layer by layer
(https://huggingface.co/docs/peft/developer_guides/custom_models):

config = on_quantized(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))    # or "all-linear"
model = get_peft_model(model, config)
model = PeftModel.from_pretrained(model, "adapter/", config=on_quantized(LoraConfig.from_pretrained("adapter/")))

Tried with peft 0.21.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..errors import ArgumentError
from ..nn import QuantEmbedding, QuantLinear


class QuantLoraLinear(Linear):
    """y = layer(x) + scaling * B A x on a frozen `QuantLinear` (Hu et al. 2021)."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ArgumentError: always; the sum would have to be quantized again.
        """
        raise ArgumentError(
            "an adapter cannot be merged into quantized weights without quantizing them again; keep it beside them, or merge it "
            "into the original model and quantize the result"
        )


def on_quantized(config: LoraConfig) -> LoraConfig:
    """The same configuration, which from here on also puts adapters on `QuantLinear`. PEFT does not save that.

    Raises:
        ArgumentError: a variant that rewrites the weight itself (DoRA, or initialization from the weight).
    """
    if config.use_dora:
        raise ArgumentError("use_dora needs the weight in floating point; set it to False")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ArgumentError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the weight in floating point; use True or 'gaussian'"
        )
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    return config


def _naming_quantized(collect: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
    """PEFT's collection of what target_modules="all-linear" means, with the `QuantLinear` modules of a model among the names. It
    knows layers by their classes, and asks no configuration."""

    @functools.wraps(collect)
    def with_quantized(config: Any, model: nn.Module) -> Any:
        target = getattr(config, "target_modules", None)
        wanted = isinstance(target, str) and target.lower() == "all-linear"
        config = collect(config, model)
        if wanted and QuantLinear in (getattr(config, "_custom_modules", None) or {}):
            heads = {id(head) for head in _heads(model)}
            adapters = [f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
            config.target_modules = set(config.target_modules) | {
                name
                for name, m in model.named_modules()
                if isinstance(m, QuantLinear) and id(m) not in heads and not name.startswith(tuple(adapters))
            }
        return config

    return with_quantized


def _heads(model: Any) -> list[nn.Module]:
    """What PEFT leaves out: the output embedding, or the head of a classifier; and packed embeddings."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    named = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    tables = [module.table for module in model.modules() if isinstance(module, QuantEmbedding)]
    return [head for head in (output, *named, *tables) if head is not None]


tuners_utils._maybe_include_all_linear_layers = _naming_quantized(tuners_utils._maybe_include_all_linear_layers)
