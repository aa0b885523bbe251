"""Tensors of a model that lie in a GGUF file in parts: how a file's parts become the model's tensor, and back.

| tensor of the model                     | parts in the file                | joined                                 |
|-----------------------------------------|----------------------------------|----------------------------------------|
| gate_up_proj of experts `[E, 2 I, H]`   | gate, up, each `[E, I, H]`       | one after the other                    |
| the same of gpt-oss, `[E, H, 2 I]`      | the same                         | rows take turns, then transposed       |
| gate_up_proj_bias of gpt-oss `[E, 2 I]` | gate, up, each `[E, I]`          | numbers take turns                     |
| kv_b_proj of DeepSeek `[h (n + v), L]`  | k_b `[h, L, n]`, v_b `[h, v, L]` | a head's keys, transposed, then values |

llama.cpp multiplies queries by a head's keys before attention, so that all heads share the latents (DeepSeek-V2, arXiv
2405.04434, section 2.1.2); hence the parts of kv_b_proj.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_names import Place

Shape = tuple[int, ...]


def joined(place: Place, parts: Sequence[Tensor]) -> Tensor:
    """The tensor of a model.

    Args:
        place: of the first part.
        parts: as many as `place.parts`, in order.
    """
    if place.kind == "latent":
        keys, values = parts
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)
    if not place.turned:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-2)
    if place.kind == "experts":
        rows = parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=-2).flatten(-3, -2)
        return rows.transpose(-1, -2).contiguous()
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=-1).flatten(-2)


def joined_shape(place: Place, shapes: Sequence[Shape], spelled: str) -> Shape:
    """The shape of the tensor of a model.

    Raises:
        CheckpointError: the parts do not fit each other, or are of other sizes than the config says; `spelled` names the first.
    """
    first = shapes[0]
    if len(shapes) != place.parts:
        raise CheckpointError(f"{place.name} needs {place.parts} tensors such as {spelled}, got {len(shapes)}")
    if place.kind == "latent":
        heads, keys, values = place.latent
        rank = first[1] if len(first) == 3 else 0
        if [*shapes] != [(heads, rank, keys), (heads, values, rank)]:
            raise CheckpointError(
                f"{spelled} and what belongs to it must be [{heads}, L, {keys}] and [{heads}, {values}, L] (heads, "
                f"rank of latents, channels of a head), got {', '.join(str(list(shape)) for shape in shapes)}"
            )
        return heads * (keys + values), rank
    if any(shape != first for shape in shapes):
        raise CheckpointError(
            f"{spelled} and what belongs to it must be of one shape, got {', '.join(str(list(shape)) for shape in shapes)}"
        )
    if place.kind == "experts":
        E, N, K = first
        return (E, K, N * len(shapes)) if place.turned else (E, N * len(shapes), K)
    return (*first[:-1], first[-1] * len(shapes)) if len(shapes) > 1 else first


def part_of(place: Place, tensor: Tensor) -> Tensor:
    """The way back from `joined`: the part of a tensor that belongs to a place."""
    if place.kind == "latent":
        heads, keys, _ = place.latent
        of_heads = tensor.view(heads, -1, tensor.shape[1])
        return (of_heads[:, keys:] if place.part else of_heads[:, :keys].transpose(1, 2)).contiguous()
    if not place.turned:
        return tensor if place.parts == 1 else tensor.chunk(place.parts, dim=-2)[place.part].contiguous()
    if place.kind == "experts":
        return tensor[..., place.part :: place.parts].transpose(-1, -2).contiguous()
    return tensor[..., place.part :: place.parts].contiguous()


def part_shape(place: Place, shape: Shape) -> Shape:
    """Of the part of a tensor that belongs to a place."""
    return tuple(part_of(place, torch.empty(shape, device="meta")).shape)
