"""GPTQModel's planar files (`checkpoint_format: gptq_p`), read only: the tensors of `gptq` v2, whose codes lie in bit planes.

32 codes take `bits` int32 words, plane after plane, the lowest bits first. The planes of 3, 5, 6 and 7 bits are 2 + 1, 4 + 1,
4 + 2 and 4 + 2 + 1 wide; of 2, 4 and 8 bits there is one, which is a stream. In a plane of width w word i holds the codes from
i * (32 / w) on, each in w bits, lowest first. qweight is packed so down K and qzeros along N, both whole multiples of 32. Zero
points are true ones, as in v2. (GPTQModel 7.7, its page "GPTQ planar".)

The tensors of 3, 5, 6 and 7 bits have the shapes that a stream would give them: the name alone tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import Config, Format, Parsed, gptq
from .bitstream import pack
from .validation import first_of, naming

NAME: Final = "gptq_p"
WIDTHS: Final = (2, 3, 4, 5, 6, 7, 8)
PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
BLOCK: Final = 32


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        bits = gptq.bits_of(module, config, WIDTHS)
        streams = {
            "qweight": _stream("qweight", tensors["qweight"].transpose(0, -1), bits).T,
            "qzeros": _stream("qzeros", tensors["qzeros"], bits),
        }
    return gptq.parse(2, module, {**tensors, **streams}, config, WIDTHS)


def _stream(field: str, words: Tensor, bits: int) -> Tensor:
    """The same codes as a stream."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[-1] % bits:
        raise CheckpointError(
            f"{field} must be int32, {bits} words for each {BLOCK} codes of {bits} bits, got {words.dtype} "
            f"{list(words.shape)} (codes last)"
        )
    return words if len(PLANES[bits]) == 1 else pack(unpack(words, bits), bits)


def unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., 32 n]` of planar int32 words `[..., bits n]`."""
    blocks, first = words.unflatten(-1, (-1, bits)), 0
    codes = torch.zeros(*blocks.shape[:-1], BLOCK, dtype=torch.uint8, device=words.device)
    for width in PLANES[bits]:
        plane = blocks[..., first : first + width]
        shifts = width * torch.arange(BLOCK // width, dtype=torch.int32, device=words.device)
        codes |= (plane.unsqueeze(-1) >> shifts & (1 << width) - 1).flatten(-2).to(torch.uint8) << first
        first += width
    return codes.flatten(-2)


FORMAT: Format = Format(
    name=f"planar {NAME}",
    required=("qweight", "qzeros", "scales"),
    optional=("g_idx",),
    matches=lambda config: (
        first_of(config, "quant_method", "method") == "gptq"
        and first_of(config, "checkpoint_format", "format", default="gptq") == NAME
    ),
    parse=parse,
)
