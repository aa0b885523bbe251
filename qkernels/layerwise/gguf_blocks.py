"""GPTQ and AWQ in GGUF's types: the sweep of `quantizers.gptq_blocks` on the scales that `formats.gguf` searches, AWQ's scales
judged by blocks, and both as a method of a run, whose weights are those of the blocks bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, Literal

from torch import Tensor

from ..errors import ArgumentError
from ..formats.gguf import EXACT_SCHEMES, WRITABLE_TYPES, BlockGrid, block_type, dequantize, gguf_blocks, weight_of
from ..quantizers import AWQ, Options
from ..quantizers.gptq_blocks import BlockOrder, gptq_blocks
from ..quantizers.options import Needs, ScaleSearch
from ..scheme import QuantScheme
from ..tensor import QuantTensor

BlockMethod = Literal["gptq", "awq", "awq+gptq"]
_TYPE_OF: Final = {EXACT_SCHEMES[type]: type for type in WRITABLE_TYPES}


def gguf_gptq(
    weight: Tensor,
    hessian: Tensor,
    type: str,
    order: BlockOrder = "energy",
    damping: float = 0.01,
    rounds: int = 3,
    name: str = "weight",
) -> Tensor:
    """A weight `[N, K]` in blocks of a GGUF type, by GPTQ.

    Args:
        hessian: float32 or float64 `[K, K]`, `InputStatistics.hessian`.
        type: of `WRITABLE_TYPES`.
        order, damping, rounds: as of `gptq_blocks`; docs/quality.md compares the orders.

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        ArgumentError, CalibrationError: as `gptq_blocks` and `gguf_blocks`.

    >>> import torch
    >>> from qkernels.layerwise.gguf_blocks import gguf_gptq
    >>> gguf_gptq(torch.randn(8, 256), torch.eye(256), "Q4_K").shape
    torch.Size([8, 144])
    """
    if type not in WRITABLE_TYPES:
        raise ArgumentError(f"GGUF types that can be written are {', '.join(WRITABLE_TYPES)}, got {type!r:.40}")
    search = partial(BlockGrid.search, type=type)
    return gptq_blocks(
        weight, hessian, lambda columns, cost: search(columns, importance=cost), block_type(type).ggml.elements,
        order, damping, rounds, name,
    )  # fmt: skip


@dataclass(frozen=True)
class BlockSearch(Options):
    """Blocks of a GGUF type by the better search, every column counting alike. Options as in `Options`; the scheme is that of
    a type (`of_type`)."""

    @classmethod
    def of_type(cls, type: str) -> BlockSearch:
        """The method for one of `WRITABLE_TYPES`."""
        return cls().with_scheme(EXACT_SCHEMES[type])

    @property
    def name(self) -> str:
        """In reports."""
        return "search"

    @property
    def type(self) -> str:
        """The type in GGUF files."""
        return _TYPE_OF[self.scheme]

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """See `Options.quantize`; `moments` are not looked at."""
        return weight_of(gguf_blocks(weight, self.type, search="best"), self.type)


@dataclass(frozen=True)
class CalibratedBlocks(Options):
    """Blocks of a GGUF type by what goes into the layer. Options as in `Options`, and:

    Args:
        way: "gptq": `gguf_gptq`. "awq": AWQ's scales, judged by blocks of the plain search; then the better search by importance.
            "awq+gptq": those scales, then `gguf_gptq`.

    >>> from qkernels.layerwise.gguf_blocks import CalibratedBlocks
    >>> str(CalibratedBlocks.of_type("Q4_K", "gptq").scheme)
    'q4_k'
    """

    needs: ClassVar[Needs] = "moments"

    way: BlockMethod = "gptq"

    @classmethod
    def of_type(cls, type: str, way: BlockMethod) -> CalibratedBlocks:
        """The method for one of `WRITABLE_TYPES`."""
        return cls(way=way).with_scheme(EXACT_SCHEMES[type])

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.way

    @property
    def type(self) -> str:
        """The type in GGUF files."""
        return _TYPE_OF[self.scheme]

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """See `Options.quantize`."""
        if moments is None:
            raise ArgumentError(f"{name} is to be calibrated and needs the moments of its inputs [K, K], got None")
        if self.way != "awq":
            blocks = gguf_gptq(weight, moments, self.type, name=name)
        else:
            blocks = gguf_blocks(weight, self.type, moments.diagonal(), "best")
        return weight_of(blocks, self.type)

    def without_moments(self) -> BlockSearch:
        """Blocks all the same."""
        return BlockSearch.of_type(self.type)

    def scale_search(self) -> ScaleSearch | None:
        """AWQ's, but for "gptq" alone."""
        return None if self.way == "gptq" else _Scales(self.scheme, self.type)


@dataclass(frozen=True)
class _Scales:
    """AWQ's candidates, rounded to blocks."""

    scheme: QuantScheme
    type: str
    search_tokens: int = AWQ.search_tokens

    def candidates(self, input_magnitude: Tensor, weight_magnitude: Tensor) -> Sequence[Tensor]:
        return AWQ().candidates(input_magnitude, weight_magnitude)

    def rounded(self, weight: Tensor, scales: Tensor) -> Tensor:
        return dequantize(gguf_blocks(weight * scales, self.type), self.type).to(weight.dtype) / scales
