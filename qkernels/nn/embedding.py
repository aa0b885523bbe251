"""`QuantEmbedding`: rows of a packed weight by token id."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from ..layouts import get_layout
from ..ops.rows import ROWS
from ..ops.rows import rows as rows_of
from ..reports import readable_size
from .linear import QuantLinear
from .modules import names_of_modules, set_module

log = logging.getLogger(__name__)

# Tiles that are decoded together: 1 MiB of 32 rows of 2048 in 16 bits. What comes between takes a dozen times that: 97 MB for 64
# tiles, 6 for 8 (128 tokens of 32000 x 2048 in q4_k), where a file of 676 MB has to run in little more.
_AT_ONCE: Final = 8


class QuantEmbedding(nn.Module):
    """`weight[ids]` (times a factor) of a weight `[vocabulary, K]` that lies packed, in the layout of a linear layer.

    Only tiles of rows that are asked for are decoded (32 rows on CPUs, 16 on CUDA), and the bits are those of
    `table.dequantize(dtype)[ids]`. A head with the same weight is `table` itself: there is one copy. There is no
    gradient.

    Args:
        table: the weight; its `dtype` is that of what comes out.
        scale: a number that multiplies rows in that dtype (Gemma).

    >>> import torch
    >>> from qkernels import QuantLinear
    >>> from qkernels.nn import QuantEmbedding
    >>> table = QuantLinear.from_linear(torch.nn.Linear(64, 100, bias=False), "w4a16_g32")
    >>> rows = QuantEmbedding(table)(torch.tensor([[3, 99]]))
    >>> torch.equal(rows[0, 1], table.dequantize()[99])
    True
    """

    scale: Tensor | None

    def __init__(self, table: QuantLinear, scale: Tensor | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.table = table
        self.register_buffer("scale", scale, persistent=False)

    @property
    def weight(self) -> Tensor:
        """As of `QuantLinear`: read-only, dequantized for each use."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers `[...]` -> `[..., K]`.

        Raises:
            ArgumentError, RuntimeError (when compiled, or on a GPU): an id is not in the vocabulary.
        """
        flat = ids.reshape(-1).to(self.table.qweight.device, torch.int64)
        if self.table.layout in ROWS and not torch.compiler.is_compiling() and type(flat) is Tensor:
            return self._scaled(self._found(flat.contiguous()).view(*ids.shape, self.embedding_dim))
        self._check(flat)
        rows = get_layout(self.table.layout).rows_per_tile
        if len(flat) == 1 or torch.compiler.is_compiling() or flat.is_cuda or flat.is_meta:
            found = self._rows(flat // rows, torch.arange(len(flat), device=flat.device) * rows + flat % rows)
        else:
            tiles, where = (flat // rows).unique(return_inverse=True)
            found = flat.new_empty((len(flat), self.embedding_dim), dtype=self.table.dtype)
            for start in range(0, len(tiles), _AT_ONCE):
                at = ((where >= start) & (where < start + _AT_ONCE)).nonzero().squeeze(1)
                places = (where[at] - start) * rows + flat[at] % rows
                found[at] = self._rows(tiles[start : start + _AT_ONCE], places)
        return self._scaled(found.view(*ids.shape, self.embedding_dim))

    def _scaled(self, found: Tensor) -> Tensor:
        return found if self.scale is None else found * self.scale.to(found.dtype)

    def _found(self, flat: Tensor) -> Tensor:
        """Rows by the op that looks them up one by one: 20 us for one of 2048 where `_rows` takes a millisecond."""
        layout, table = get_layout(self.table.layout), self.table
        buffers = [table._buffers[buffer.name] for buffer in layout.buffers]
        try:
            with torch._C._AutoDispatchBelowAutograd():  # there is no gradient to anything
                return rows_of(layout, flat, buffers, table.in_features, table._numbers, table.dtype)
        except RuntimeError:
            self._check(flat)
            raise

    def _rows(self, tiles: Tensor, places: Tensor) -> Tensor:
        """Rows at `places` of these tiles, one after the other."""
        layout, table = get_layout(self.table.layout), self.table
        buffers = {b.name: (table._buffers[b.name], b.tiled) for b in layout.buffers}
        cut = {n: _picked(t, tiles) if tiled and t is not None else t for n, (t, tiled) in buffers.items()}
        values = ops.dequantize(
            table.layout, **cut, in_features=table.in_features, out_features=len(tiles) * layout.rows_per_tile,
            scheme=table.scheme, dtype=table.dtype,
        )  # fmt: skip
        return values[places]

    def _check(self, flat: Tensor) -> None:
        inside = ((flat >= 0) & (flat < self.num_embeddings)).all()
        if torch.compiler.is_compiling() or flat.is_cuda:
            torch._assert_async(inside, f"token ids must be 0 … {self.num_embeddings - 1}")
        elif not flat.is_meta and not bool(inside):
            raise ArgumentError(
                f"token ids must be 0 … {self.num_embeddings - 1}, got {int(flat.min())} … {int(flat.max())}"
            )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def scale_of(module: nn.Module) -> Tensor | None:
    """What multiplies the rows of an embedding, found by running it on another weight.

    Raises:
        ArgumentError: it computes something else, too.
    """
    probe: Any = copy.copy(module)
    made = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    probe._parameters = {"weight": nn.Parameter(made, requires_grad=False)}
    probe.num_embeddings, probe.embedding_dim, probe.padding_idx = 4, 8, None
    with torch.no_grad():
        found = probe(torch.arange(4))
    if torch.equal(found, made):
        return None
    scale: Tensor | None = module._buffers.get("embed_scale")
    if scale is None or not torch.equal(found, made * scale.to(made.dtype)):
        raise ArgumentError(f"a {type(module).__name__} computes more than rows of its weight")
    return scale


@contextmanager
def plain_embeddings(model: nn.Module) -> Iterator[None]:
    """For a while, packed embeddings (and heads that are one with them) are floats in the dtype of the model, as files of other
    formats have them, which a warning says."""
    names = names_of_modules(model)
    swapped: dict[str, nn.Module] = {}
    sizes: dict[str, int] = {}
    try:
        for name, module in [*model.named_modules()]:
            if not isinstance(module, QuantEmbedding):
                continue
            weight = nn.Parameter(module.table.dequantize(), requires_grad=False)
            sizes[name] = weight.nbytes
            N, K = weight.shape
            floats = nn.Embedding(N, K, device="meta")
            floats.weight = weight
            for other in names[id(module.table)]:
                if not other.startswith(f"{name}."):
                    head = nn.Linear(K, N, bias=False, device="meta")
                    head.weight, swapped[other] = weight, module.table
                    set_module(model, other, head)
            swapped[name] = module
            set_module(model, name, floats)
        if sizes:
            named = ", ".join(f"{name} ({readable_size(size)})" for name, size in sizes.items())
            log.warning("packed embeddings are written as floats: %s", named)
        yield
    finally:
        for name, module in swapped.items():
            set_module(model, name, module)


def _picked(t: Tensor, tiles: Tensor) -> Tensor:
    """Entries of the first dimension; of one-byte floats, which torch does not pick, by their bytes."""
    if t.element_size() == 1 and t.is_floating_point():
        return t.view(torch.uint8)[tiles].view(t.dtype)
    return t[tiles]
