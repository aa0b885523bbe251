"""What counts as a linear layer: `nn.Linear`, and transformers' `Conv1D`, which is one with its weight transposed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..errors import ConversionError
from ..text import describe


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, told by name and shape, for transformers need not be installed."""
    if type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight `[N, K]` of a linear layer as its module stores it, a view; and the other way round."""
    return weight.T if is_conv1d(module) else weight


def as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear layer, or transformers' `Conv1D` (GPT-2: `y = x W + b`, W `[K, N]`) as the one that computes the same; None
    for other modules. The weight of the latter is a transposed view, and the bias is shared."""
    if isinstance(module, nn.Linear):
        return module
    if not is_conv1d(module):
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name; a `Conv1D` as one whose weight `[N, K]` is a view."""
    linear = as_linear(layer.get_submodule(name))
    assert linear is not None
    return linear


def set_weight(layer: nn.Module, name: str, weight: Tensor) -> None:
    """Overwrite a linear layer's weight, in its own dtype and place."""
    linear_of(layer, name).weight.data.copy_(weight)


def why_not_plain(module: nn.Module) -> str | None:
    """Why a linear layer cannot give way to one that has its weight and bias and nothing else, or None if it can.

    A subclass of `nn.Linear` with a forward of its own can if a small twin of it, with random weights, computes what `nn.Linear`
    does (Falcon's `x @ W.T + b`).
    """
    kind, state = type(module).__name__, {**module._parameters, **module._buffers}
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"its {names} is parametrized (torch.nn.utils.parametrize); call remove_parametrizations first"
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return f"{kind} has no weight before its first forward; run the model once"
    for leaf in ("weight", "bias"):
        value = getattr(module, leaf, None)
        if leaf not in module._parameters and (leaf == "weight" or value is not None):
            made_of = ", ".join(name for name in state if name.startswith(leaf)) or "something else"
            return f"its {leaf} is computed from {made_of} (weight_norm, spectral_norm, pruning); remove that first"
    if more := [*(name for name in state if name not in ("weight", "bias")), *module._modules]:
        return f"{kind} has {', '.join(more)} beside weight and bias"
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    if not weight.is_floating_point():
        return f"its weight is {describe(weight)}, not floating point"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if any(map(_is_of_others, (hook for name in _STATE_HOOKS for hook in getattr(module, name, {}).values()))):
        return "it has hooks on its state dict, which know its weight"
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and (weight.is_meta or getattr(hook, "offload", False)):
        return "accelerate keeps its weight elsewhere; remove_hook_from_submodules brings it back"
    if hook is None and "forward" in vars(module):
        return "its forward was replaced on the object"
    if kind == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight instead of calling it"
    if type(module) is not nn.Linear and not is_conv1d(module) and not _computes_linear(module):
        return f"{kind} is a subclass of nn.Linear with a forward of its own"
    return None


_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


# Linear layers whose weight the module around them writes to, by the class of that module, below its list of blocks.
_SCALED_IN_PLACE = {"RwkvModel": ("blocks", ("attention.output", "feed_forward.value"))}


def scaled_in_place(model: nn.Module) -> dict[str, str]:
    """Linear layers whose weight is not what they compute with, by name, with the reason: the first pass scales it in place."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        blocks, leaves = _SCALED_IN_PLACE.get(kind, ("", ()))
        for index in range(len(getattr(module, blocks, ()))):
            for leaf in leaves:
                full = f"{name}.{blocks}.{index}.{leaf}".lstrip(".")
                found[full] = f"{kind} scales its weight in place when it first runs"
    return found


def check_unscaled(model: nn.Module) -> None:
    """Raise where a model's weights are not those that belong into files, since its first pass has scaled them.

    Raises:
        ConversionError: names the layer and the way out.
    """
    for name, module in model.named_modules():
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        blocks, (leaf, *_) = _SCALED_IN_PLACE.get(type(module).__name__, ("", ("",)))
        if blocks and getattr(module, "layers_are_rescaled", False) and 0 < every < len(getattr(module, blocks)):
            layer = f"{name}.{blocks}.{every}.{leaf}".lstrip(".")
            raise ConversionError(
                f"{layer} was scaled in place when {type(module).__name__} first ran, and files hold it as it was: save the "
                f"model before it runs, or after a pass in training mode (model.train()), which scales it back"
            )


def _is_of_others(hook: Any) -> bool:
    """Whether it is none of those that torch's own parametrizations leave behind when they are removed."""
    return not str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.nn.utils")


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass's forward is that of `nn.Linear`, training or not, by running both on small random numbers."""
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    # on the CPU, also where transformers builds a model inside of `torch.device("meta")`
    shapes = (2, 3, 8), (16, 8), (16,)
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    twin = copy.copy(module)  # shares what it does not replace
    parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias) if module.bias is not None else None}
    twin.__dict__ |= {"in_features": 8, "out_features": 16, "_parameters": parameters}
    expected = nn.functional.linear(x, weight, parameters["bias"])
    try:
        with torch.inference_mode(False), torch.no_grad():
            for training in (False, True):
                twin.__dict__["training"] = training
                y = twin.forward(x)
                if not isinstance(y, Tensor) or y.shape != expected.shape or not torch.allclose(y, expected, atol=1e-5):
                    return False
    except Exception:  # whatever it needs, it is not what nn.Linear needs
        return False
    return True
