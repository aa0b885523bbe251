"""Modules of a model: put one in another's place, count their bytes."""

from __future__ import annotations

from torch import nn

from .linear import QuantLinear


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands in `model`, in the same training mode."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)


def packed_bytes(layer: QuantLinear) -> int:
    """Bytes of the buffers the kernel reads."""
    return sum(t.nbytes for t in layer.buffers())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())
