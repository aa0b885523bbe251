"""LoRA adapters of PEFT itself on a model whose linear layers are QuantLinear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qkernels import QuantLinear
from qkernels.errors import ArgumentError
from qkernels.integrations.transformers import QKernelsConfig
from tests.checkpoints import logits, plain_checkpoint, train_adapters
from tests.strategies import same_weight

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model

from qkernels.integrations.peft import on_quantized

TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]  # "all-linear" means nn.Linear to PEFT


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return plain_checkpoint(tmp_path / "plain")


def quantized(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=QKernelsConfig("w4a16_g32"))


def frozen(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ten_steps_of_lora_and_the_adapter_comes_back(tmp_path: Path, plain: Path) -> None:
    model = quantized(plain)
    before = [layer.quant_tensor() for layer in frozen(model)]
    torch.manual_seed(0)
    adapted = get_peft_model(model, on_quantized(LoraConfig(r=4, target_modules=TARGETS)))
    assert len(before) == len(frozen(adapted)) == 14
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    train_adapters(adapted, [p for name, p in trained.items() if "lora_B" in name])
    assert all(map(same_weight, (layer.quant_tensor() for layer in frozen(adapted)), before))

    adapted.save_pretrained(tmp_path / "adapter")
    config = on_quantized(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(plain), tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), logits(adapted.eval()))
    with pytest.raises(ArgumentError, match="an adapter cannot be merged into quantized weights"):
        adapted.merge_and_unload()


def test_variants_that_need_the_float_weight_are_refused() -> None:
    with pytest.raises(ArgumentError, match="use_dora needs the weight in floating point"):
        on_quantized(LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ArgumentError, match="init_lora_weights='pissa' starts from the weight in floating point"):
        on_quantized(LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
