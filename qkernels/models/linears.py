"""What counts as a linear layer: `nn.Linear`, and transformers' `Conv1D`, which is one with its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, told by name and shape, for transformers need not be installed."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


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
