"""The modules of a model of transformers: which are ours, where one goes, and what transformers has to be told of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..nn import QuantExperts, QuantLinear, set_module

log = logging.getLogger(__name__)


def asked_in_place_of(modules: Iterable[str], conversions: Iterable[Any]) -> Iterator[str]:
    """The weights that transformers asks about in place of these modules: the first of those that it cuts from one tensor."""
    for conversion in conversions:
        first, *others = conversion.target_patterns
        for other in others:
            yield from (f"{m}.weight".replace(other, first) for m in modules if other in f"{m}.weight")


def belongs_to_a_head(module: str, model: Any, checkpoint: Checkpoint) -> bool:
    """Whether a quantized module is one that this class of model does not have, since another was saved: the base of a causal
    model lacks its head."""
    if type(model).__name__ in (checkpoint.config.get("architectures") or ()):
        return False
    inside = module.startswith(f"{model.base_model_prefix}.") or module in dict(model.named_modules())
    return not inside


def untie(model: Any, module: str) -> None:
    """A quantized head is not tied, whatever the config says."""
    table: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    mine = f"{module}.weight"
    for target, source in list(table.items()):
        if mine in (target, source):
            del table[target]
            log.warning(
                "%s and %s are tied by config.json, but one of them is quantized; they are not tied", target, source
            )
            model.config.tie_word_embeddings = False


def put(model: nn.Module, name: str, module: nn.Module, also: Mapping[str, list[str]]) -> None:
    """Put a module in a linear layer's place, and tell transformers to initialize neither it nor, as GPT-2's attention does,
    its weight through the module around it. That module has nothing else to initialize if no tensor is its own."""
    set_module(model, name, module, also.get(name, ()))
    module._is_hf_initialized = True  # type: ignore[assignment]
    around = model.get_submodule(name.rpartition(".")[0])
    if not (around._parameters or around._buffers):
        around._is_hf_initialized = True  # type: ignore[assignment]


def layers_of(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def experts_in(model: nn.Module) -> dict[str, QuantExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def device_near(model: nn.Module, module: str) -> torch.device:
    """Where the nearest loaded tensor is: a device map places whole layers."""
    path = module.split(".")
    for depth in range(len(path) - 1, -1, -1):
        parent = model.get_submodule(".".join(path[:depth]))
        for tensor in (*parent.parameters(), *parent.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")
