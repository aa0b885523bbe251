"""Modules of a model: put one in another's place, count their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .packed import PackedModule

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def set_module(model: nn.Module, name: str, module: nn.Module, also: Sequence[str] = ()) -> None:
    """Put `module` where `name` stands in `model`, in the same training mode and with the hooks of what stood there.

    Args:
        also: other names of what stood there (`other_names`).
    """
    before = model.get_submodule(name)
    module.train(before.training)
    for hooks in _HOOKS:  # the dictionaries themselves: who registered a hook can still remove it
        setattr(module, hooks, getattr(before, hooks))
    if (hook := getattr(before, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
    for place in (name, *also):
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def names_of_modules(model: nn.Module) -> dict[int, list[str]]:
    """All names of every module, by its `id`; the first is that of `named_modules`."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """Of each module that is in a model under several names: the first, as `named_modules` has it -> the others."""
    return {first: others for first, *others in names_of_modules(model).values() if others}


def packed_bytes(layer: PackedModule) -> int:
    """Bytes of the buffers the kernel reads."""
    return sum(t.nbytes for t in layer.packed().values() if t is not None)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())
