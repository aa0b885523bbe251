"""What tiled layouts share: rows in tiles, columns sorted and padded, scales beside each other. They differ in one permutation.

    qweight  uint8 [..., tiles, K_pad * rows * width / 8]   or [..., tiles, rows, K_pad * width / 8] where rows lie apart
    scales   [..., tiles, G_pad, rows]                      source dtype
    zeros    [..., tiles, G_pad, rows]                      uint8 for integer zero points, floating for the other kinds, or None
    k_order  int32 [K]                                      which column of x each stored column multiplies, or None

    outer_scales, outer_zeros  [..., tiles, S, rows]        or None; where they are there, scales and zeros are the small factors

Columns are stored in `k_order` (act-order: sorted by group). N is padded to whole tiles, K to K_pad, both with code 0; padded
rows and groups have scale 0 (of e8m0, which has none, 2^-127), and padded columns meet x = 0. `width` is what a code takes up:
4 or 8 bits, or in planes as many as it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import TensorError
from ..factors import as_bytes
from ..group_index import group_index_of
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from ..text import describe
from . import Buffers, Shapes
from .canonical import groups_of, weight_of

OUTER = ("outer_scales", "outer_zeros")
GROUPED = ("scales", "zeros", *OUTER)


def stored_bits(bits: int) -> int:
    """Bits that a code takes up in a tile without planes: 4 or 8."""
    return 4 if bits <= 4 else 8


# How many of a code's bits lie together, lowest first: 5 = 4 + 1, 6 = 4 + 2. 7 bits take a byte. 3 bits lie together on a CPU,
# in an order of their own: as 2 + 1, putting a code together costs more than the bytes that it saves (decision 0040).
Widths = Mapping[int, tuple[int, ...]]
PLANES: Widths = {2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}
GPU_PLANES: Widths = {**PLANES, 3: (2, 1)}  # a GPU has more arithmetic for each byte


def true_bits(bits: int) -> int:
    """Bits that a code takes up in planes."""
    return sum(PLANES[bits])


def split_planes(codes: Tensor, bits: int, planes: Widths = PLANES) -> list[tuple[int, Tensor]]:
    """Codes as (width, bits of that plane), lowest first."""
    low, found = 0, []
    for width in planes[bits]:
        found.append((width, (codes >> low) & ((1 << width) - 1)))
        low += width
    return found


def join_planes(parts: Sequence[Tensor], bits: int, planes: Widths = PLANES) -> Tensor:
    """The inverse of `split_planes`."""
    low, codes = 0, torch.zeros_like(parts[0])
    for width, plane in zip(planes[bits], parts, strict=True):
        codes = codes | (plane << low)
        low += width
    return codes


def place(fields: Tensor, width: int) -> Tensor:
    """[..., 8 / width fields of so many bits] -> bytes [...], the first lowest."""
    bytes_ = fields[..., 0]
    for i in range(1, 8 // width):
        bytes_ = bytes_ | (fields[..., i] << (width * i))
    return bytes_


def places(bytes_: Tensor, width: int) -> Tensor:
    """The inverse of `place`."""
    return torch.stack([(bytes_ >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)], dim=-1)


def rows_of(groups: Tensor) -> Tensor:
    """`[tiles, groups, rows]` -> `[tiles * rows, groups]`, contiguous: what lies for each group, without padding."""
    return as_bytes(groups).transpose(-1, -2).flatten(0, 1).contiguous().view(groups.dtype)


def num_groups(K: int, group_length: int) -> int:
    """G = ceil(K / group_length), at least 1."""
    return max(1, -(-K // group_length))


@dataclass(frozen=True)
class Tiles:
    """One order of a tile's codes, with everything around it.

    Args:
        rows: of the weight in a tile, the first dimension of every buffer.
        columns: bits of a code -> K is padded to a multiple of this.
        lay: (codes `[..., tiles, rows, K_pad]`, bits) -> the bytes of qweight, in their order.
        lift: its inverse: (qweight, K_pad, bits) -> the codes in their order.
        stored_bits: bits of a code -> how many it takes up.
        rows_apart: whether the bytes of a row are an axis of their own.
        row_order: row of the tile whose scale comes first, second, …; None: as they are.
        groups: (K, group_length) -> G_pad.
    """

    rows: int
    columns: Callable[[int], int]
    lay: Callable[[Tensor, int], Tensor]
    lift: Callable[[Tensor, int, int], Tensor]
    rows_apart: bool = False
    row_order: tuple[int, ...] | None = None
    groups: Callable[[int, int], int] = num_groups
    stored_bits: Callable[[int], int] = stored_bits

    def shapes(self, N: int, K: int, bits: int, group_length: int) -> Shapes:
        """See `Layout.shapes`."""
        tiles, columns, width = -(-N // self.rows), self._padded(K, bits), self.stored_bits(bits)
        codes = (self.rows, columns * width // 8) if self.rows_apart else (columns * self.rows * width // 8,)
        return {"qweight": (tiles, *codes), "scales": (tiles, self.groups(K, group_length), self.rows)}

    def _padded(self, K: int, bits: int) -> int:
        columns = self.columns(bits)
        return -(-K // columns) * columns

    def pack(self, weight: QuantTensor) -> dict[str, Tensor | None]:
        """See `Layout.arrange`; leading (expert) dimensions stay in front of qweight, scales and zeros."""
        N, K, scheme, k_order = weight.N, weight.K, weight.scheme, weight.k_order()
        shape = self.shapes(N, K, scheme.bits, scheme.group_length(K))["qweight"]
        codes = weight.codes if k_order is None else weight.codes[..., k_order.long()]
        codes = pad(codes, (0, self._padded(K, scheme.bits) - K, 0, -N % self.rows))
        lead = codes.shape[:-2]
        codes = codes.reshape(*lead, shape[0], self.rows, codes.shape[-1])
        groups = {
            name: None if t is None else self._pack_groups(t, name, weight) for name, t in groups_of(weight).items()
        }
        return {
            "qweight": self.lay(codes, scheme.bits).reshape(*lead, *shape).contiguous(),
            "k_order": k_order,
            "x_static": weight.x_static,
        } | groups

    def unpack(self, buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
        """See `Layout.unpack`."""
        qweight, scales, k_order = (buffers[name] for name in ("qweight", "scales", "k_order"))
        assert qweight is not None
        assert scales is not None
        *lead, tiles, _, rows = scales.shape
        columns = self._padded(K, scheme.bits)
        codes = self.lift(qweight, columns, scheme.bits)
        codes = codes.reshape(*lead, tiles * rows, columns)[..., :N, :K]
        if k_order is not None:
            codes = torch.empty_like(codes, memory_format=torch.contiguous_format).index_copy_(
                -1, k_order.long(), codes
            )
        groups = {
            name: None if (t := buffers[name]) is None else self._unpack_groups(t, name, N, K, scheme)
            for name in GROUPED
        }
        index = group_index_of(k_order, K, scheme)
        return weight_of(codes.contiguous(), groups, index, scheme, buffers.get("x_static"))

    def _pack_groups(self, values: Tensor, name: str, weight: QuantTensor) -> Tensor:
        """[..., N, G] -> [..., tiles, G_pad, rows]; outer factors [..., N, S] -> [..., tiles, S, rows]"""
        G = values.shape[-1]
        groups = G if name in OUTER else self.groups(weight.K, weight.scheme.group_length(weight.K))
        padded = pad(as_bytes(values), (0, groups - G, 0, -values.shape[-2] % self.rows))
        split = padded.reshape(*padded.shape[:-2], padded.shape[-2] // self.rows, self.rows, groups)
        if self.row_order is not None:
            split = split[..., list(self.row_order), :]
        # Not contiguous(): where there is one group it would leave the strides of the transpose.
        return split.transpose(-1, -2).clone(memory_format=torch.contiguous_format).view(values.dtype)

    def _unpack_groups(self, values: Tensor, name: str, N: int, K: int, scheme: QuantScheme) -> Tensor:
        """The inverse of `_pack_groups`."""
        count = values.shape[-2] if name in OUTER else scheme.num_groups(K)
        *lead, tiles, groups, rows = values.shape
        split = as_bytes(values).transpose(-1, -2)
        if self.row_order is not None:
            split = split[..., sorted(range(rows), key=self.row_order.__getitem__), :]
        found = split.reshape(*lead, tiles * rows, groups)[..., :N, :count]
        return found.clone(memory_format=torch.contiguous_format).view(values.dtype)  # see above


def upgrade_of(old: Tiles, new: Tiles) -> Callable[[Buffers, int, int, QuantScheme], Buffers]:
    """See `Layout.upgrades`: of codes that took more bits; those that take as many lie where they lay."""

    def upgrade(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> Buffers:
        if old.stored_bits(scheme.bits) == new.stored_bits(scheme.bits):
            return buffers
        check_shape(buffers.get("qweight"), old.shapes(N, K, scheme.bits, scheme.group_length(K))["qweight"])
        given = {"outer_scales": None, "outer_zeros": None, "zeros": None, "k_order": None, **buffers}
        return {**buffers, **new.pack(old.unpack(given, N, K, scheme))}

    return upgrade


def check_shape(qweight: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise TensorError unless codes from outside have their shape: what follows indexes them."""
    if qweight is None or qweight.dtype != torch.uint8 or qweight.shape[-len(shape) :] != shape:
        raise TensorError(f"qweight must be uint8 {list(shape)}, got {describe(qweight, 'absent')}")
