"""Stacked experts in formats that hold one `[N, K]` matrix a module: the same tensors with E in front, read expert by expert.

| origin             | tensors of a stack such as `mlp.experts.gate_up_proj`                                              |
|--------------------|----------------------------------------------------------------------------------------------------|
| compressed-tensors | gate_up_proj_packed, gate_up_proj_scale, gate_up_proj_shape ([E, N, K]), …; or as of a module:     |
|                    | gate_up_proj.weight_packed, …                                                                      |
| fp8 (transformers) | gate_up_proj, gate_up_proj_scale_inv                                                               |
| torchao            | _gate_up_proj_qdata, _gate_up_proj_scale, …                                                        |

So a parameter stands where a module's suffix has `weight`. compressed-tensors packs each slice by itself (`pack_to_int32` of
version 0.20), and so do the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from ..errors import CheckpointError
from ..scheme import ACTIVATIONS as ACTS
from ..text import describe
from . import ACTIVATIONS, Config, Format, Oddity, Parsed

PROJECTIONS: Final = ("gate_up_proj", "up_proj", "down_proj")
_SHAPE: Final = "weight_shape"


def stack_and_suffix(name: str, found: Format) -> tuple[str, str] | None:
    """(stack, suffix) of a tensor that is named after a parameter; None where it is none such.

    >>> from qkernels.formats import FORMATS
    >>> from qkernels.formats.stacks import stack_and_suffix
    >>> stack_and_suffix("mlp.experts.down_proj_scale", FORMATS["compressed-tensors"])
    ('mlp.experts.down_proj', 'weight_scale')
    """
    parent, _, leaf = name.rpartition(".")
    for suffix in found.suffixes if found.sliced and "_proj" in leaf else ():
        for projection in PROJECTIONS:
            named = suffix.replace("weight", projection, 1) if "weight" in suffix else f"{projection}_{suffix}"
            if leaf == named:
                return f"{parent}.{projection}", suffix
    return None


def experts_in(tensors: Mapping[str, Tensor], found: Format) -> int | None:
    """E, where these are the tensors of stacked experts in such a format; None where they are of one matrix."""
    first = tensors.get(next((suffix for suffix in found.codes if suffix in tensors), ""))
    return first.shape[0] if found.sliced and first is not None and first.dim() == 3 else None


def parsed_experts(found: Format, stack: str, tensors: Mapping[str, Tensor], config: Config) -> Iterator[Parsed]:
    """The experts of a stack, one after the other.

    Raises:
        CheckpointError: as `Format.parse`; or a tensor has not as many experts as the codes.
    """
    count = experts_in(tensors, found)
    assert count is not None
    for expert in range(count):
        one = {suffix: _of_expert(stack, suffix, tensor, expert, count) for suffix, tensor in tensors.items()}
        yield for_experts(found.parse(stack, one, config), config)


def for_experts(parsed: Parsed, config: Config) -> Parsed:
    """An expert that is joined with others, whose activations would have one scale for all of them: in 16 bits where the file has
    one for each.

    Raises:
        CheckpointError: the activations were asked for (`load(…, activations="file")`).
    """
    weight = parsed.weight
    if weight.x_static is None:
        return parsed
    asked = f"the file has {ACTS[weight.scheme.act]} for each expert"
    if config.get(ACTIVATIONS) == "file":
        raise CheckpointError(f'{asked}, which stacked experts have not; load it with activations="16bit"')
    plain = replace(weight, scheme=replace(weight.scheme, act=None), x_static=None)
    return Parsed(plain, (Oddity(asked, "16-bit activations are used instead"), *parsed.oddities))


def _of_expert(stack: str, suffix: str, tensor: Tensor, expert: int, count: int) -> Tensor:
    if suffix == _SHAPE and tensor.dim() == 1:  # once, of the whole
        if tensor.numel() != 3 or int(tensor[0]) != count:
            raise CheckpointError(f"{stack}: {suffix} must be [E, N, K] with E = {count}, got {tensor.tolist()}")
        return tensor[1:]
    if tensor.dim() == 0 or tensor.shape[0] != count:
        raise CheckpointError(f"{stack}: {suffix} must have {count} experts in front, got {describe(tensor)}")
    return tensor[expert]
