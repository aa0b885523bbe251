"""`BlockGrid`: the scales of a column of blocks that are found already, for codes that are chosen one column after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ArgumentError
from .parts import Meaning, Parts, half_e8m0
from .quantizing import SearchName, gguf_blocks
from .types import block_type, blocks_of, parts_of


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """What the codes of N rows of n columns can mean. Make it with `BlockGrid.search`.

    Args:
        type: such as "Q4_K".
        parts: as `parts_of` has them; their codes are not looked at.
        step, low: float32 `[N, n / group]`: a value is step · v - low.
    """

    type: str
    parts: Parts
    step: Tensor
    low: Tensor

    @classmethod
    def search(
        cls, weight: Tensor, type: str, importance: Tensor | None = None, search: SearchName = "best"
    ) -> BlockGrid:
        """The scales that `gguf_blocks` finds for a weight `[N, n]`, n a multiple of the type's block.

        Raises:
            ArgumentError: as `gguf_blocks`.
        """
        parts, meaning = parts_of(gguf_blocks(weight, type, importance, search), type), _meaning(type)
        per = block_type(type).ggml.elements // meaning.group
        if meaning.scale_format == "e8m0":
            assert parts.scales is not None
            step = half_e8m0(parts.scales)
        else:
            assert parts.d is not None
            step = parts.d.float().repeat_interleave(per, -1)
            step = step if parts.scales is None else step * parts.scales.float()
        low = torch.zeros_like(step)
        if parts.dmin is not None:
            low = parts.dmin.float().repeat_interleave(per, -1)
            low = -low if parts.minima is None else low * parts.minima.float()
        return cls(type, parts, step, low)

    def round(self, column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Values `[N]` of one column to the nearest on the grid: codes as float32, and what they mean."""
        meaning = _meaning(self.type)
        step, low = self.step[:, index // meaning.group], self.low[:, index // meaning.group]
        inverse = torch.where(step != 0, 1 / step, 0.0)
        target = (column.float() + low) * inverse
        if meaning.table is None:
            codes = (target.round() + meaning.zero).clamp(0, 2**meaning.bits - 1)
            return codes, step * (codes - meaning.zero) - low
        values, order = torch.tensor(meaning.table, dtype=torch.float32, device=column.device).sort(stable=True)
        middle = (values[1:] + values[:-1]) / 2
        codes = order[torch.searchsorted(middle, target.contiguous(), right=True)]
        table = torch.tensor(meaning.table, dtype=torch.float32, device=column.device)
        return codes.float(), step * table[codes] - low

    def blocks(self, codes: Tensor) -> Tensor:
        """uint8 `[N, bytes of a row]` of codes `[N, n]`.

        Raises:
            ArgumentError: codes of another shape.
        """
        if codes.shape != self.parts.codes.shape:
            raise ArgumentError(f"codes must be {list(self.parts.codes.shape)}, got {list(codes.shape)}")
        return blocks_of(replace(self.parts, codes=codes.to(torch.uint8)), self.type)


def _meaning(type: str) -> Meaning:
    meaning = block_type(type).meaning
    assert meaning is not None
    return meaning
