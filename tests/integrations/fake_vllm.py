"""What stands for vLLM where it is not installed: its classes and functions as far as the plug-in asks for them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from qkernels.checkpoint import open_checkpoint

MODULES = ("vllm", "vllm_experts")


class LinearBase(nn.Module):
    """What the plug-in may know of one of vLLM's layers."""


class RowParallelLinear(LinearBase):
    pass


class ParallelLMHead(nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


@dataclass
class Mapper:
    orig_to_new_suffix: Mapping[str, str] = field(default_factory=dict)

    def map(self, name: str) -> str:
        for old, new in self.orig_to_new_suffix.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def apply_list(self, names: Sequence[str]) -> list[str]:
        return [name.replace("language_model.", "") for name in names]


class Config:
    def __init__(self) -> None:
        self.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }


class RoutedExperts(nn.Module):
    """Experts of a layer as vLLM describes them before it asks for a method."""

    def __init__(
        self, experts: int, width: int, rank: int = 0, world: int = 1, activation: str = "silu",
        expert_map: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        parallel = SimpleNamespace(tp_rank=rank, tp_size=world)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, has_bias=False)
        self.global_num_experts, self.width = experts, width
        self.activation = SimpleNamespace(value=activation)
        self.expert_map, self.swiglu_limit, self.apply_router_weight_on_input = expert_map, None, False


class FusedMoEMethodBase:
    def __init__(self, moe: Any) -> None:
        self.moe = moe


class EngineArgs:
    """What a command line says of an engine."""

    def __init__(self, model: str, quantization: str | None = None) -> None:
        self.model, self.quantization = model, quantization

    def create_engine_config(self, usage_context: Any = None) -> str:
        return f"an engine of {self.model} for {usage_context}"


def headers(model: str, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """Tensors of a local directory as the headers of its files have them."""
    found: dict[str, dict[str, Any]] = {}
    for path in Path(model).glob("*.safetensors"):
        content = path.read_bytes()
        found |= json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: values for name, values in found.items() if name != "__metadata__"}


def plugin_beside(monkeypatch: pytest.MonkeyPatch, ranks: SimpleNamespace) -> Any:
    """The plug-in, imported beside a vLLM that is not there."""
    registered: dict[str, type] = {}

    def register_quantization_config(name: str) -> Any:
        return lambda made: registered.setdefault(name, made)

    contents: dict[str, dict[str, Any]] = {
        "distributed": {
            "get_tensor_model_parallel_rank": lambda: ranks.rank,
            "get_tensor_model_parallel_world_size": lambda: ranks.world,
        },
        "engine": {},
        "engine.arg_utils": {"EngineArgs": type("EngineArgs", (EngineArgs,), {})},
        "model_executor": {},
        "model_executor.layers": {},
        "model_executor.layers.fused_moe": {"FusedMoEMethodBase": FusedMoEMethodBase, "RoutedExperts": RoutedExperts},
        "model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "RowParallelLinear": RowParallelLinear,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": ["gptq", "fp8"],
            "register_quantization_config": register_quantization_config,
        },
        "model_executor.layers.quantization.base_config": {"QuantizationConfig": Config},
        "model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "model_executor.models": {},
        "model_executor.models.utils": {"WeightsMapper": Mapper},
        "transformers_utils": {},
        "transformers_utils.config": {"get_safetensors_params_metadata": headers},
    }
    for name, values in {"": {}, **contents}.items():
        module = ModuleType(f"vllm.{name}".rstrip("."))
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    forget()
    loaded = importlib.import_module("qkernels.integrations.vllm")
    loaded.registered = registered  # type: ignore[attr-defined]
    return loaded


def forget() -> None:
    for name in MODULES:
        sys.modules.pop(f"qkernels.integrations.{name}", None)


def config_of(plugin: Any, directory: Path) -> Any:
    made = plugin.VllmConfig.from_config(dict(open_checkpoint(directory).quantization))
    made.maybe_update_config(str(directory))
    return made
