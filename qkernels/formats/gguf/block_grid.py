"""`BlockGrid`: the scales of a column of blocks that are found already, for codes that are chosen one column after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ...errors import ArgumentError
from .parts import Meaning, Parts, half_e8m0
from .quantizing import SearchName, gguf_blocks
from .search import inverse_of
from .types import block_type, blocks_of, parts_of

# What small scales (and minima) can be.
SMALL_RANGES: Final = {
    "Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127), "IQ4_XS": (-32, 31),
}  # fmt: skip
_SHIFTS: Final = (0, -1, 1, -2, 2)


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
        target = (column.float() + low) * inverse_of(step)
        if meaning.table is None:
            codes = (target.round() + meaning.zero).clamp(0, 2**meaning.bits - 1)
            return codes, step * (codes - meaning.zero) - low
        values, order = torch.tensor(meaning.table, dtype=torch.float32, device=column.device).sort(stable=True)
        middle = (values[1:] + values[:-1]) / 2
        codes = order[torch.searchsorted(middle, target.contiguous(), right=True)]
        table = torch.tensor(meaning.table, dtype=torch.float32, device=column.device)
        return codes.float(), step * table[codes] - low

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return _meaning(self.type).group

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """By how much small scales and minima may be moved, (0, 0) first; () of types without (MXFP4's are exponents)."""
        if self.type not in SMALL_RANGES:
            return ()
        others = _SHIFTS if self.parts.minima is not None else (0,)
        return tuple((scale, minimum) for scale in _SHIFTS for minimum in others)

    def shifted(self, group: int, codes: Tensor, by: Tensor | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """What codes `[group, N]` of a group of columns would mean with its small scales and minima moved: float32 `[group, N]`;
        and the steps and lows `[N]` of that.

        Args:
            by: of all rows, or int64 `[2, N]`.
        """
        meaning = _meaning(self.type)
        small, minima = self._moved(group, by)
        block = group // (block_type(self.type).ggml.elements // meaning.group)
        assert self.parts.d is not None
        step = self.parts.d[:, block].float() * small
        low = torch.zeros_like(step)
        if minima is not None and self.parts.dmin is not None:
            low = self.parts.dmin[:, block].float() * minima
        if meaning.table is None:
            values = codes.float() - meaning.zero
        else:
            values = torch.tensor(meaning.table, dtype=torch.float32, device=codes.device)[codes.long()]
        return step * values - low, step, low

    def move(self, group: int, by: Tensor) -> None:
        """Move small scales and minima of a group by int64 `[2, N]`, in place."""
        small, minima = self._moved(group, by)
        _, self.step[:, group], self.low[:, group] = self.shifted(group, torch.zeros(1, len(self.step)), by)
        assert self.parts.scales is not None
        self.parts.scales[:, group] = small.to(self.parts.scales.dtype)
        if minima is not None and self.parts.minima is not None:
            self.parts.minima[:, group] = minima.to(torch.uint8)

    def _moved(self, group: int, by: Tensor | tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        assert self.parts.scales is not None
        least, most = SMALL_RANGES[self.type]
        small = (self.parts.scales[:, group].int() + by[0]).clamp(least, most).float()
        if self.parts.minima is None:
            return small, None
        return small, (self.parts.minima[:, group].int() + by[1]).clamp(least, most).float()

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
