"""A quantized linear layer of a checkpoint and its place in the model: what fits, and the `QuantLinear` that goes there."""

from __future__ import annotations

import difflib
import re
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats import Oddity
from ..models.building import assign
from ..models.linears import as_linear
from ..nn import QuantLinear
from ..reports import readable_size
from ..tensor import QuantTensor
from ..text import dtype_name
from .activations import Activations, as_it_runs, with_int8
from .source import Checkpoint

if TYPE_CHECKING:
    from ..kernels.catalogue import OnUnsupported


def packed_layer(
    linear: nn.Linear,
    module: str,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_unsupported: OnUnsupported = "raise",
    activations: Activations | None = None,
) -> tuple[QuantLinear, list[Oddity]]:
    """What takes the place of `linear`: a quantized module of a checkpoint, packed; and what is strange about it.

    Of a large one that can be read in parts, one part at a time lies unpacked in memory: a head alone would take several times
    what it is packed.

    Raises:
        CheckpointError: they differ in shape, or one of them has a bias and the other none; or the file is broken.
        UnsupportedProblem: no kernel takes it.
    """
    lying = None if activations == "int8" else checkpoint.ready(module)
    if lying is not None and (activations != "16bit" or lying.scheme.act is None):
        bias = bias_for(linear, checkpoint, module, lying.shape)
        layer = QuantLinear.from_buffers(*lying, bias, device, dtype, on_unsupported)
        if layer is not None:
            return layer, []
    parts = checkpoint.weight_in_parts(module)
    if parts is not None:
        shape = checkpoint.weight_shape(module)
        bias = bias_for(linear, checkpoint, module, shape)
        kept: tuple[Oddity, ...] = ()
        if activations == "int8":
            parts, kept = with_int8(parts, shape, device, dtype, on_unsupported)
        return QuantLinear.from_parts(parts, shape[0], device, dtype, on_unsupported, bias), [*kept]
    parsed = checkpoint.weight(module)
    weight, found = as_it_runs(parsed, checkpoint.format, device, dtype, on_unsupported, activations=activations)
    bias = bias_for(linear, checkpoint, module, (weight.N, weight.K))
    return QuantLinear.from_quant_tensor(weight, bias, device, dtype, on_unsupported), [*found]


def float_layer(
    linear: nn.Linear, module: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Linear, Oddity]:
    """As `packed_layer`, in floats: of a GGUF file, whose types nobody chose for this machine, all modules have to load.

    Raises:
        CheckpointError: as `packed_layer`.
    """
    weight = checkpoint.weight(module).weight
    bias = bias_for(linear, checkpoint, module, (weight.N, weight.K))
    layer = nn.Linear(weight.K, weight.N, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return layer, dequantized(weight, device, dtype)


def dequantized(weight: QuantTensor, device: torch.device, dtype: torch.dtype) -> Oddity:
    """What is said of a weight that `float_layer` or a stack of experts takes."""
    kind = f"{weight.scheme} has no kernel for {dtype_name(dtype)} on this {device.type} and is dequantized"
    return Oddity(kind, f"{readable_size(weight.nbytes)} become {readable_size(weight.codes.numel() * dtype.itemsize)}")


def linear_at(model: nn.Module, module: str, spelled: str | None = None) -> nn.Linear:
    """The linear layer that a quantized module of a checkpoint belongs to; `spelled` is its name in the files.

    Raises:
        CheckpointError: the model has none there.
    """
    what = f"the checkpoint has a quantized {spelled or module}"
    meant = "" if spelled in (None, module) else f" (as {module})"
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise CheckpointError(
            f"{what}, which {type(model).__name__} does not{meant}{_nearest(model, module)}"
        ) from None
    as_one = as_linear(linear)
    if as_one is None:
        raise CheckpointError(f"{what}, which is a {type(linear).__name__}, not a Linear{meant}")
    return as_one


def bias_for(linear: nn.Linear, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Tensor | None:
    """Check the shape `(N, K)` of a weight against its place in the model, and read its bias.

    Raises:
        CheckpointError: the shapes differ, or one of them has a bias and the other none.
    """
    if tuple(linear.weight.shape) != shape:
        raise CheckpointError(f"{module}: the model needs a weight {list(linear.weight.shape)}, got {list(shape)}")
    name = f"{module}.bias"
    bias = checkpoint.read(name) if name in checkpoint else None
    place = linear._parameters["bias"]
    if place is not None and (bias is None or bias.shape != place.shape):
        got = "none" if bias is None else list(bias.shape)
        raise CheckpointError(f"{name}: the model needs {list(place.shape)}, got {got}")
    if place is None and bias is not None:
        if bool(bias.any()):
            raise CheckpointError(f"{name}: the model has no bias there, got one that is not zero")
        return None  # AutoGPTQ gives every module a bias of zeros
    return bias


def dequantize_router(
    model: nn.Module, module: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, Oddity]]:
    """Put a router that a file quantized into its place as floats: a module of its own kind computes with it."""
    place = model.get_submodule(module)
    target: Any = place._parameters["weight"]
    weight, found = checkpoint.weight(module)
    if list(weight.codes.shape) != list(target.shape):
        raise CheckpointError(
            f"{module}: the model needs a weight {list(target.shape)}, got {list(weight.codes.shape)}"
        )
    parts: dict[str, Tensor] = {"weight": weight.dequantize(torch.float32)}
    if place._parameters.get("bias") is not None:
        if f"{module}.bias" not in checkpoint:
            raise CheckpointError(f"{module}.bias: the model needs one, and the files have none")
        parts["bias"] = checkpoint.read(f"{module}.bias")
    kept = {leaf: torch.float32 if kept_in_fp32(model, f"{module}.{leaf}", dtype) else dtype for leaf in parts}
    assign(model, {f"{module}.{leaf}": t.to(device, kept[leaf]) for leaf, t in parts.items()})
    oddity = Oddity("a router that the file quantized is dequantized", f"{weight.scheme} {list(weight.codes.shape)}")
    return [(module, oddity), *((module, other) for other in found)]


def dequantize_embedding(
    model: nn.Module, name: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, Oddity]]:
    """Put a packed embedding into its place as floats, and into those of what is tied to it."""
    place = model.get_parameter(name)
    weight = checkpoint.read(name)
    if weight.shape != place.shape:
        raise CheckpointError(f"{name}: the model needs a weight {list(place.shape)}, got {list(weight.shape)}")
    floats = nn.Parameter(weight.to(device, dtype), requires_grad=place.requires_grad)
    tied = [other for other, t in model.named_parameters(remove_duplicate=False) if t is place]
    assign(model, dict.fromkeys(tied, floats))
    return [(name, floated(name, checkpoint, dtype, "transformers resizes and ties them as floats"))]


def floated(name: str, checkpoint: Checkpoint, dtype: torch.dtype, why: str) -> Oddity:
    """What is said of an embedding that is packed in the files and floats in the model."""
    before, after = checkpoint.nbytes(name), prod(checkpoint.shape(name)) * dtype.itemsize
    grows = f"{readable_size(before)} of {checkpoint.stored_as(name)} become {readable_size(after)}: {why}"
    return Oddity("embeddings are dequantized while loading", grows)


def kept_in_fp32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Some models name modules that lose too much in fp16, or in any 16-bit dtype."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns)


def _nearest(model: nn.Module, module: str) -> str:
    linears = [name for name, found in model.named_modules() if as_linear(found) is not None]
    close = difflib.get_close_matches(module, linears, n=1)
    return f"; its nearest linear layer is {close[0]}" if close else ""
