"""`gguf_blocks`: float weights to the blocks of a GGUF type, by an op in C++ on the CPU and by its PyTorch twin elsewhere."""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor
from torch.library import Library, register_fake

from ... import extension
from ...errors import ArgumentError
from ...storage.gguf_types import BY_ID, GGML_TYPES
from ...text import describe
from .better import BEST
from .search import PLAIN, WRITABLE_TYPES, blocks_searched
from .types import block_type

SearchName = Literal["plain", "best"]
_LEAST_IMPORTANCE: Final = 1e-5  # of the mean: a column that was silent on one text may speak on another
_SCHEMA: Final = "(Tensor weight, Tensor? importance, int type, bool best) -> (Tensor, Tensor)"
_LIBRARY: Final = Library("qkernels", "FRAGMENT")  # csrc/cpu/bindings_gguf.cpp implements it for the CPU


def gguf_blocks(weight: Tensor, type: str, importance: Tensor | None = None, search: SearchName = "plain") -> Tensor:
    """The weight in blocks of a GGUF type.

    Args:
        weight: `[..., N, K]` floating point, finite, K a multiple of the type's block; computed in float32.
        type: a key of `WRITABLE_TYPES`, such as "Q4_K".
        importance: None, or `[K]`, or `[E, K]` for experts `[E, N, K]`; not negative: how much the error of a column counts (mean
            square of that input). The plain searches of Q8_0 and MXFP4 make no use of it.
        search: "plain": with the bytes that llama.cpp's quantizer writes (but for weights below 2^-120, whose blocks are 0).
            "best": with less weighted error in the same format, in up to three times the time (docs/quality.md has a table).

    Returns:
        uint8 `[..., N, bytes of a row]`.

    Raises:
        ArgumentError: no such type, rows of another length, values that are not finite, or a scale that float16 cannot hold.

    >>> import torch
    >>> from qkernels.formats.gguf import dequantize, gguf_blocks
    >>> blocks = gguf_blocks(torch.linspace(-8, 7, 16).repeat(1, 2), "Q4_0")
    >>> dequantize(blocks, "Q4_0")[0, :3]
    tensor([-8., -7., -6.])
    """
    if search not in get_args(SearchName):
        raise ArgumentError(f'search must be "plain" or "best", got {search!r:.40}')
    if type not in WRITABLE_TYPES:
        raise ArgumentError(f"GGUF types that can be written are {', '.join(WRITABLE_TYPES)}, got {type!r:.40}")
    ggml = block_type(type).ggml
    if weight.dim() < 1 or not weight.is_floating_point() or weight.shape[-1] % ggml.elements:
        raise ArgumentError(
            f"weight for {type} must be floating point [..., a multiple of {ggml.elements}], got {describe(weight)}"
        )
    importance = _checked_importance(importance, weight)
    if importance is not None and importance.dim() == 2:
        return torch.stack([gguf_blocks(one, type, row, search) for one, row in zip(weight, importance, strict=True)])
    if importance is not None and search == "best":
        mean = importance.mean()
        importance = (importance / mean).clamp(min=_LEAST_IMPORTANCE) if mean > 0 else None
    columns = weight.shape[-1]
    rows = weight.reshape(-1, columns) if columns else weight.new_zeros(weight.shape[:-1].numel(), 0)
    if rows.dtype == torch.float64:
        rows = rows.float()
    extension.load()
    out, wrong = torch.ops.qkernels.gguf_blocks(rows.detach(), importance, GGML_TYPES[type].id, search == "best")
    for row, infinite in zip(wrong.flatten().tolist(), (False, True), strict=True):
        if row == len(rows):
            continue
        if not infinite:
            raise ArgumentError(f"weight for {type} must be finite; row {row} holds inf or NaN")
        raise ArgumentError(
            f"row {row} with weights up to {float(rows[row].abs().max()):.3g} gives {type} a scale that float16 cannot hold; "
            "use BF16 or F32"
        )
    blocks: Tensor = out
    return blocks.view(*weight.shape[:-1], blocks.shape[-1])


def _checked_importance(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    """In float32, on the weight's device."""
    if importance is None:
        return None
    shapes = [list(weight.shape[-1:])] + [[weight.shape[0], weight.shape[-1]]] * (weight.dim() == 3)
    if list(importance.shape) not in shapes or not importance.is_floating_point():
        expected = " or ".join(map(str, shapes))
        raise ArgumentError(f"importance must be floating point {expected}, got {describe(importance)}")
    importance = importance.to(weight.device, torch.float32)
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ArgumentError("importance must be finite and not negative; measure it again, or leave it out")
    return importance


def _twin(weight: Tensor, importance: Tensor | None, type: int, best: bool) -> tuple[Tensor, Tensor]:
    return blocks_searched(weight, BY_ID[type].name, importance, BEST if best else PLAIN)


def _fake(weight: Tensor, importance: Tensor | None, type: int, best: bool) -> tuple[Tensor, Tensor]:
    ggml, (rows, columns) = BY_ID[type], weight.shape
    blocks = weight.new_empty((rows, columns // ggml.elements * ggml.nbytes), dtype=torch.uint8)
    return blocks, weight.new_empty((1, 2), dtype=torch.int64)


_LIBRARY.define("gguf_blocks" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("gguf_blocks", _twin, "CompositeExplicitAutograd")
register_fake("qkernels::gguf_blocks", _fake, lib=_LIBRARY)
