"""LoRA adapters of PEFT on top of `QuantLinear`.

PEFT knows a fixed list of layer types and takes others through the configuration, layer by layer
(https://huggingface.co/docs/peft/developer_guides/custom_models):

config = on_quantized(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
model = get_peft_model(model, config)
model = PeftModel.from_pretrained(model, "adapter/", config=on_quantized(LoraConfig.from_pretrained("adapter/")))

Tried with peft 0.21.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from ..errors import ArgumentError
from ..nn import QuantLinear


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
