"""How the block types of GGUF are decoded: one table, one entry a type of `storage.gguf_types` that is no plain number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...storage.gguf_types import GGML_TYPES, GgmlType
from ...text import describe
from . import basic, iq, kquants
from .parts import E2M1_TABLE, IQ4_TABLE, Meaning, Parts

_SLICE: Final = 2**22  # weights that are decoded at once: 16 MiB, and a few times that for what comes between


@dataclass(frozen=True)
class BlockType:
    """How blocks of a type are decoded, and taken apart where that is possible.

    Args:
        ggml: name, id and size of a block.
        decode: uint8 `[n, bytes]` to float32 `[n, elements]`, bit for bit what llama.cpp computes.
        meaning: of the parts; None where a type does not split.
        split, join: blocks to `Parts` and back, without loss.
    """

    ggml: GgmlType
    decode: Callable[[Tensor], Tensor]
    meaning: Meaning | None = None
    split: Callable[[Tensor], Parts] | None = None
    join: Callable[[Parts], Tensor] | None = None


def _splitting(
    name: str, meaning: Meaning, split: Callable[[Tensor], Parts], join: Callable[[Parts], Tensor]
) -> BlockType:
    return BlockType(GGML_TYPES[name], lambda blocks: meaning.values(split(blocks)), meaning, split, join)


_TYPES: Final = (
    _splitting("Q4_0", Meaning(4, 32, zero=8), basic.split_q4_0, basic.join_q4_0),
    _splitting("Q4_1", Meaning(4, 32), basic.split_q4_1, basic.join_q4_1),
    _splitting("Q5_0", Meaning(5, 32, zero=16), basic.split_q5_0, basic.join_q5_0),
    _splitting("Q5_1", Meaning(5, 32), basic.split_q5_1, basic.join_q5_1),
    _splitting("Q8_0", Meaning(8, 32, zero=128), basic.split_q8_0, basic.join_q8_0),
    _splitting("Q2_K", Meaning(2, 16), kquants.split_q2_k, kquants.join_q2_k),
    _splitting("Q3_K", Meaning(3, 16, zero=4), kquants.split_q3_k, kquants.join_q3_k),
    _splitting("Q4_K", Meaning(4, 32), kquants.split_q4_k, kquants.join_q4_k),
    _splitting("Q5_K", Meaning(5, 32), kquants.split_q5_k, kquants.join_q5_k),
    _splitting("Q6_K", Meaning(6, 16, zero=32), kquants.split_q6_k, kquants.join_q6_k),
    _splitting("IQ4_NL", Meaning(4, 32, table=IQ4_TABLE), basic.split_q4_0, basic.join_q4_0),
    _splitting("IQ4_XS", Meaning(4, 32, table=IQ4_TABLE), kquants.split_iq4_xs, kquants.join_iq4_xs),
    _splitting("TQ2_0", Meaning(2, 256, zero=1), basic.split_tq2_0, basic.join_tq2_0),
    _splitting("MXFP4", Meaning(4, 32, table=E2M1_TABLE, scale_format="e8m0"), basic.split_mxfp4, basic.join_mxfp4),
    _splitting("NVFP4", Meaning(4, 16, table=E2M1_TABLE, scale_format="ue4m3"), basic.split_nvfp4, basic.join_nvfp4),
    _splitting("Q1_0", Meaning(1, 128, table=(-1, 1)), basic.split_q1_0, basic.join_q1_0),
    _splitting("Q2_0", Meaning(2, 64, zero=1), basic.split_q2_0, basic.join_q2_0),
    BlockType(GGML_TYPES["Q8_1"], basic.decode_q8_1),
    BlockType(GGML_TYPES["Q8_K"], kquants.decode_q8_k),
    BlockType(GGML_TYPES["TQ1_0"], kquants.decode_tq1_0),
    BlockType(GGML_TYPES["IQ1_S"], iq.decode_iq1_s),
    BlockType(GGML_TYPES["IQ1_M"], iq.decode_iq1_m),
    BlockType(GGML_TYPES["IQ2_XXS"], iq.decode_iq2_xxs),
    BlockType(GGML_TYPES["IQ2_XS"], iq.decode_iq2_xs),
    BlockType(GGML_TYPES["IQ2_S"], iq.decode_iq2_s),
    BlockType(GGML_TYPES["IQ3_XXS"], iq.decode_iq3_xxs),
    BlockType(GGML_TYPES["IQ3_S"], iq.decode_iq3_s),
)
BLOCK_TYPES: Final = {block.ggml.name: block for block in _TYPES}


def dequantize(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of GGUF blocks: computed in float32, bit for bit as llama.cpp does, then rounded once to `dtype`.

    Args:
        blocks: uint8 `[..., bytes of a row]`, a whole number of blocks a row.
        type: such as "Q4_K", a key of `BLOCK_TYPES`.

    Returns:
        `[..., weights of a row]`, in memory of its own.

    Raises:
        ArgumentError: no such type, or other rows.

    >>> import torch
    >>> from qkernels.formats.gguf import dequantize
    >>> block = torch.zeros(1, 18, dtype=torch.uint8)
    >>> block[0, 1] = 0x3C  # d = 1.0 as float16; 32 codes of 0 mean -8 each
    >>> dequantize(block, "Q4_0")[0, :4]
    tensor([-8., -8., -8., -8.])
    """
    found = block_type(type)
    _check_rows(blocks, found, type)
    size = found.ggml.nbytes
    flat = blocks.reshape(-1, size)
    out = torch.empty(len(flat), found.ggml.elements, dtype=dtype, device=blocks.device)
    step = _SLICE // found.ggml.elements
    for begin in range(0, len(flat), step):
        out[begin : begin + step] = found.decode(flat[begin : begin + step])
    return (
        out.view(*blocks.shape[:-1], -1)
        if blocks.numel()
        else out.view(*blocks.shape[:-1], blocks.shape[-1] // size * found.ggml.elements)
    )


def parts_of(blocks: Tensor, type: str) -> Parts:
    """The parts of a weight, without loss, by rows: codes `[..., K]`, small scales and minima `[..., K / group]`, outer ones
    `[..., K / elements of a block]`.

    Args:
        blocks: uint8 `[..., bytes of a row]`.

    Raises:
        ArgumentError: no such type, one that does not split, or other rows.
    """
    found = _split(type)
    _check_rows(blocks, found, type)
    assert found.split is not None
    return _shaped(found.split(blocks.reshape(-1, found.ggml.nbytes)), (*blocks.shape[:-1], -1))


def blocks_of(parts: Parts, type: str) -> Tensor:
    """uint8 `[..., bytes of a row]`: the way back from `parts_of`, to the same bytes.

    Raises:
        ArgumentError: no such type, or one that does not split.
    """
    found = _split(type)
    assert found.join is not None and found.meaning is not None
    elements, group = found.ggml.elements, found.meaning.group
    flat = Parts(
        parts.codes.reshape(-1, elements),
        None if parts.scales is None else parts.scales.reshape(-1, elements // group),
        None if parts.minima is None else parts.minima.reshape(-1, elements // group),
        None if parts.d is None else parts.d.reshape(-1, 1),
        None if parts.dmin is None else parts.dmin.reshape(-1, 1),
    )
    return found.join(flat).reshape(*parts.codes.shape[:-1], -1)


def _shaped(parts: Parts, shape: tuple[int, ...]) -> Parts:
    fields = (parts.codes, parts.scales, parts.minima, parts.d, parts.dmin)
    codes, *others = (None if part is None else part.reshape(shape) for part in fields)
    assert codes is not None
    return Parts(codes, *others)


def _split(type: str) -> BlockType:
    found = block_type(type)
    if found.split is None:
        splitting = ", ".join(name for name, block in BLOCK_TYPES.items() if block.split is not None)
        raise ArgumentError(f"GGUF block types that split are {splitting}, got {type}")
    return found


def _check_rows(blocks: Tensor, found: BlockType, type: str) -> None:
    size = found.ggml.nbytes
    if blocks.dtype != torch.uint8 or not blocks.dim() or blocks.shape[-1] % size:
        raise ArgumentError(f"blocks of {type} must be uint8 [..., a multiple of {size}], got {describe(blocks)}")


def block_type(type: str) -> BlockType:
    """The entry of a type.

    Raises:
        ArgumentError: there is none of that name.
    """
    if type not in BLOCK_TYPES:
        raise ArgumentError(f"GGUF block types are {', '.join(BLOCK_TYPES)}, got {type!r:.40}")
    return BLOCK_TYPES[type]
