"""`QuantTensor`: the canonical form of a quantized weight, and the only definition of what it means.

Formats read files into it, quantizers make it from float weights, layouts pack it for a kernel. Every kernel is tested
against `QuantTensor.dequantize()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .errors import ArgumentError, TensorError
from .factors import Factors, as_bytes, kind_of
from .group_index import natural_group_index, validated_group_index
from .scheme import ACTIVATIONS, CODEBOOKS, QuantScheme
from .text import describe, dtype_name, dtype_named

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# e8m0 (MXFP4, MXFP8) is a power of two and has no 0; e4m3 (one level of it, as the files of some tools have).
SMALL_FLOATS = (torch.float8_e8m0fnu, torch.float8_e4m3fn)
SCALE_DTYPES = FLOAT_DTYPES + SMALL_FLOATS


def as_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """A dtype, which may be given by its name ("bfloat16", "torch.bfloat16").

    Args:
        name: how the error calls it.

    Raises:
        ArgumentError: torch has no such dtype.
    """
    found = dtype_named(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"{name} must be a torch.dtype or the name of one, such as 'bfloat16', got {dtype!r}")
    return found


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A quantized `[N, K]` weight (leading dimensions are experts), unpacked: one byte a code.

    Shapes: N out_features, K in_features, G = ceil(K / group_size) groups.

    Args:
        codes: uint8 `[..., N, K]`, each 0 … 2^bits - 1.
        scales: fp16, bf16, fp32, float8_e8m0fnu or float8_e4m3fn `[..., N, G]`, finite; may be 0 or negative where the dtype
            has that. The dtype is that of the source, so that a file round-trips; arithmetic is fp32.
        zeros: None, or `[..., N, G]`: uint8 **true** zero points for `zeros="int"`, floating for "float" and "offset".
        group_index: None where column k is in group k // group_size; else int32 `[K]` (act-order), or `[E, K]` where experts
            differ in it. Groups 0 … G - 2 have exactly group_size members, the last has the rest.
        scheme: what the codes mean.
        factors: what scales and zeros are products of, where `scheme.factors` names a kind; made by `from_factors`.
        x_static: fp32 `[2]`, scale and zero point of the activations, where those of the scheme are static; else None. The
            scale is positive, the zero point a whole number from -128 to 127, and 0 where the activations have none.

    Raises:
        TensorError: naming the field, what was expected and what came.

    >>> import torch
    >>> from qkernels import QuantScheme, QuantTensor
    >>> codes = torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8)  # [N, K] = [1, 4]
    >>> scales = torch.tensor([[0.5, 2.0]])  # [N, G]: two groups of two columns
    >>> weight = QuantTensor(codes, scales, None, None, QuantScheme(bits=4, group_size=2))
    >>> weight.dequantize()  # (codes - 8) * scales
    tensor([[-4.,  0., 14.,  2.]])
    >>> weight.shard("K", rank=1, world=2).dequantize()
    tensor([[14.,  2.]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_index: Tensor | None
    scheme: QuantScheme
    factors: Factors | None = None
    x_static: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        if self.codes.device.type != "meta":
            _check_values(self)

    @classmethod
    def from_factors(
        cls,
        codes: Tensor,
        factors: Factors,
        scheme: QuantScheme,
        group_index: Tensor | None = None,
        x_static: Tensor | None = None,
    ) -> QuantTensor:
        """A weight whose scales (and zeros) are products: fp32, derived here, so that there is nothing to contradict.

        Args:
            codes: uint8 `[..., N, K]`.
            factors: see `Factors`; shapes and dtypes are those of `FACTORS[scheme.factors]`.
            scheme: one with `factors`.

        Raises:
            TensorError: naming the field, what was expected and what came.

        >>> import torch
        >>> from qkernels import QuantScheme, QuantTensor
        >>> from qkernels.factors import Factors
        >>> six = Factors(torch.full((1, 16), 3, dtype=torch.int8), torch.tensor([[0.5]], dtype=torch.float16))
        >>> codes = torch.full((1, 256), 33, dtype=torch.uint8)
        >>> QuantTensor.from_factors(codes, six, QuantScheme.parse("q6_k")).dequantize()[0, :3]  # (33 - 32) * 3 * 0.5
        tensor([1.5000, 1.5000, 1.5000])
        """
        if scheme.factors is None:
            raise TensorError(f"factors make weights of schemes such as q4_k and nvfp4_g16, got {scheme}")
        if codes.dim() < 2:
            raise TensorError(f"codes must be uint8 [..., N, K], got {describe(codes)}")
        factors.check(codes.shape[:-1], scheme.num_groups(codes.shape[-1]), scheme)
        return cls(codes, factors.scales(scheme), factors.zeros(scheme), group_index, scheme, factors, x_static)

    @property
    def N(self) -> int:
        """out_features"""
        return self.codes.shape[-2]

    @property
    def K(self) -> int:
        """in_features"""
        return self.codes.shape[-1]

    @property
    def G(self) -> int:
        """Groups along K."""
        return self.scales.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the information held: codes at their true width, scales (one a block where the scheme has `rows`) or factors,
        zero points (integer ones at `bits` wide), the group index and x_static. Not the bytes of this unpacked form."""
        bits = self.codes.numel() * self.scheme.bits
        if self.factors is not None:
            bits += self.factors.nbits(self.scheme)
        else:
            rows = -(-self.N // self.scheme.rows) if self.scheme.rows > 1 else self.N
            bits += self.scales.numel() // max(self.N, 1) * rows * self.scales.element_size() * 8
        if self.zeros is not None and self.factors is None:
            bits += self.zeros.numel() * (
                self.scheme.bits if self.scheme.zeros == "int" else self.zeros.element_size() * 8
            )
        if self.group_index is not None:
            bits += self.group_index.numel() * 32
        if self.x_static is not None:
            bits += self.x_static.numel() * 32
        return -(-bits // 8)

    def column_groups(self) -> Tensor:
        """int64 `[K]`, or `[E, K]` where experts differ: the group of each column, natural or not."""
        if self.group_index is not None:
            return self.group_index.long()
        return natural_group_index(self.K, self.scheme, self.device).long()

    def k_order(self) -> Tensor | None:
        """int32 `[K]` (`[E, K]` where experts differ): the columns sorted by group (stable), or None where they already are.
        Kernels store columns in this order and read x through it."""
        if self.group_index is None:
            return None
        return torch.argsort(self.group_index, dim=-1, stable=True).int()

    def __getitem__(self, expert: int) -> QuantTensor:
        """One expert of a stack, `[..., N, K]` of `[E, ..., N, K]`; nothing is copied.

        Raises:
            ArgumentError: the weight is of no experts.
            IndexError: there is no such expert.

        >>> import torch
        >>> from qkernels import RTN, QuantTensor
        >>> experts = QuantTensor.stack([RTN().quantize(torch.randn(8, 128)) for _ in range(4)])
        >>> experts.codes.shape, experts[3].codes.shape
        (torch.Size([4, 8, 128]), torch.Size([8, 128]))
        """
        if self.codes.dim() < 3:
            raise ArgumentError(f"only stacked experts [E, N, K] have parts, got codes {list(self.codes.shape)}")
        zeros = None if self.zeros is None else self.zeros[expert]
        index, factors = self.group_index, self.factors
        if index is not None and index.dim() > 1:
            index = validated_group_index(index[expert], self.K, self.scheme) if not index.is_meta else index[expert]
        factors = None if factors is None else factors.of_expert(expert)
        return QuantTensor(self.codes[expert], self.scales[expert], zeros, index, self.scheme, factors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[..., N, K]`: `(codes - zeros) * scales`, in fp32, then rounded once to `dtype`.

        A symmetric scheme has its zero at 2^(bits-1); "offset" means `codes * scales + zeros`; a codebook means
        `codebook[codes] * scales`.
        """
        scales = self._of_columns(self.scales)
        if self.scheme.codebook is not None:
            table = torch.tensor(CODEBOOKS[self.scheme.codebook], dtype=torch.float32, device=self.device)
            return (table[self.codes.long()] * scales).to(dtype)
        codes = self.codes.float()
        if self.zeros is None:
            return ((codes - self.scheme.mid_code) * scales).to(dtype)
        zeros = self._of_columns(self.zeros)
        if self.scheme.zeros == "offset":
            return (codes * scales + zeros).to(dtype)
        return ((codes - zeros) * scales).to(dtype)

    def _of_columns(self, of_groups: Tensor) -> Tensor:
        """fp32 `[..., N, K]`: for each column what its group has."""
        if self.group_index is None:  # a tenth of the time that indexing takes
            return of_groups.float().repeat_interleave(self.scheme.group_length(self.K), -1)[..., : self.K]
        groups = self.column_groups()
        if groups.dim() == 1:
            return of_groups.float()[..., groups]
        return torch.gather(of_groups.float(), -1, groups.unsqueeze(-2).expand(*of_groups.shape[:-1], self.K))

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same tensor on another device; dtypes stay."""
        parts = (self.codes, self.scales, self.zeros, self.group_index, self.x_static)
        codes, scales, zeros, group_index, x_static = [t if t is None else t.to(device) for t in parts]
        assert codes is not None and scales is not None
        factors = None if self.factors is None else self.factors.to(device)
        return QuantTensor(codes, scales, zeros, group_index, self.scheme, factors, x_static)

    def shard(self, dim: Literal["N", "K"], rank: int, world: int) -> QuantTensor:
        """Part `rank` of `world` for tensor parallelism: rows ("N", column-parallel layers) or columns ("K").

        Per-channel and per-tensor scales are repeated in every part, which keeps each part exact.

        Raises:
            ArgumentError: the cut is not even, would split a group, or the columns are in act-order ("K" only).
        """
        if dim not in ("N", "K"):
            raise ArgumentError(f'dim must be "N" (out_features) or "K" (in_features), got {dim!r}')
        if not (isinstance(world, int) and world > 0 and isinstance(rank, int) and 0 <= rank < world):
            raise ArgumentError(f"rank must be in 0 … world - 1 with world > 0, got rank={rank!r}, world={world!r}")
        size = self.N if dim == "N" else self.K
        if size % world:
            raise ArgumentError(
                f"{dim}={size} does not divide into {world} equal parts; pad the layer or choose another world"
            )
        part = slice(rank * (size // world), (rank + 1) * (size // world))
        if dim == "N":
            zeros = None if self.zeros is None else self.zeros[..., part, :]
            scheme = self.scheme
            if scheme.rows > 1 and (size // world) % scheme.rows and world > 1:
                scheme = replace(scheme, rows=1)  # the cut goes through blocks, which keep their scale on both sides
            factors = None if self.factors is None else self.factors.rows(part)
            return QuantTensor(
                self.codes[..., part, :], self.scales[..., part, :], zeros, self.group_index, scheme, factors,
                self.x_static,
            )  # fmt: skip
        if self.group_index is not None:
            raise ArgumentError(
                "cannot cut K of an act-order weight: its groups are spread over all columns; cut N instead"
            )
        if not isinstance(self.scheme.group_size, int):
            return replace(self, codes=self.codes[..., part])
        per = 1 if self.factors is None else kind_of(self.scheme).groups_per_outer or 1
        group = self.scheme.group_size * per
        if (size // world) % group and world > 1:
            raise ArgumentError(
                f"a shard of K={size} over {world} ranks has {size // world} columns and would cut a group of {group}; "
                f"use a group_size that divides {size // world}, or fewer ranks"
            )
        group = self.scheme.group_size
        first, last = part.start // group, -(-part.stop // group)
        zeros = None if self.zeros is None else self.zeros[..., first:last]
        factors = None if self.factors is None else self.factors.groups(first, last, self.scheme)
        return QuantTensor(
            self.codes[..., part], self.scales[..., first:last], zeros, None, self.scheme, factors, self.x_static
        )

    @classmethod
    def concat(cls, parts: Sequence[QuantTensor]) -> QuantTensor:
        """Weights that read the same input as one, their rows one after another: q, k, v or gate, up of one layer.

        Exact: each row keeps its codes, scales and zeros. Per-tensor scales become one a channel.

        Args:
            parts: `[..., N_i, K]` weights of one scheme, K and dtypes.

        Returns:
            `[..., ΣN_i, K]`.

        Raises:
            ArgumentError: there are no parts, or they differ in what a weight has once: names it and the two values.

        >>> import torch
        >>> from qkernels import RTN, QuantTensor
        >>> q, k = (RTN().quantize(torch.randn(rows, 128)) for rows in (64, 16))
        >>> QuantTensor.concat([q, k]).codes.shape
        torch.Size([80, 128])
        """
        _check_alike(parts, "experts and K", lambda weight: [*weight.codes.shape[:-2], weight.K])
        scheme = parts[0].scheme
        if scheme.group_size == "tensor" and len(parts) > 1:
            scheme = replace(scheme, group_size="channel")
        if scheme.rows > 1 and any(part.N % scheme.rows for part in parts[:-1]):
            scheme = replace(scheme, rows=1)  # blocks of later parts begin elsewhere
        return _joined(parts, lambda tensors: torch.cat(tensors, dim=-2), scheme, parts[0].group_index)

    @classmethod
    def stack(cls, parts: Sequence[QuantTensor]) -> QuantTensor:
        """Weights of one shape as the experts of one weight: `[..., N, K]` each, `[E, ..., N, K]` together.

        Orders of columns (act-order) may differ from expert to expert; the stack then has one for each, `[E, K]`.

        Raises:
            ArgumentError: there are no parts, or they differ in shape or in what a weight has once: names it and the two values.
        """
        _check_alike(parts, "shape", lambda weight: list(weight.codes.shape), orders=True)
        index, rank = parts[0].group_index, parts[0].codes.dim() if parts else 0
        given = [part.group_index for part in parts]
        if any(i is not None for i in given) and not _one_order(given):
            if rank != 2:
                raise ArgumentError(
                    f"stacks of weights with orders of their own are of weights [N, K], got {rank} dimensions"
                )
            index = torch.stack([part.column_groups().int() for part in parts])
        return _joined(parts, torch.stack, parts[0].scheme, index)


def _one_order(indices: Sequence[Tensor | None]) -> bool:
    """Whether all weights have the order of columns of the first; of those on meta only whether they have one is known."""
    first, *others = indices
    for other in others:
        if first is None or other is None:
            if first is not other:
                return False
        elif not first.is_meta and not torch.equal(first, other):
            return False
    return True


def _check_alike(
    parts: Sequence[QuantTensor], shape: str, shape_of: Callable[[QuantTensor], list[int]], orders: bool = False
) -> None:
    """Raise unless weights can be joined: everything that a weight has once is the same in all of them (`orders`: apart from
    the order of its columns)."""
    if not parts:
        raise ArgumentError("there must be at least one weight to join, got none")

    def once(weight: QuantTensor) -> dict[str, object]:
        zeros = None if weight.zeros is None else dtype_name(weight.zeros.dtype)
        return {
            "scheme": str(weight.scheme), shape: shape_of(weight), "dtype of scales": dtype_name(weight.scales.dtype),
            "dtype of zeros": zeros, "device": str(weight.device),
            "order of columns": not orders and weight.group_index is not None,
            "dtype of outer factors": None if weight.factors is None else dtype_name(weight.factors.outer.dtype),
        }  # fmt: skip

    expected = once(parts[0])
    for index, part in enumerate(parts[1:], 1):
        for what, got in once(part).items():
            if got != expected[what]:
                raise ArgumentError(
                    f"weights that are joined need one {what}, got {expected[what]} (the first) and {got} (number {index})"
                )
        a, b = parts[0].x_static, part.x_static
        if a is not None and b is not None and not a.is_meta and not torch.equal(a, b):
            raise ArgumentError(
                f"weights that are joined need one x_static, got {a.tolist()} and {b.tolist()} (number {index})"
            )
        a, b = parts[0].group_index, part.group_index
        if not orders and not _one_order([a, b]):
            raise ArgumentError(f"weights that are joined need one group_index (act-order), number {index} has another")


def _joined(
    parts: Sequence[QuantTensor], join: Callable[[list[Tensor]], Tensor], scheme: QuantScheme, index: Tensor | None
) -> QuantTensor:
    zeros = [part.zeros for part in parts if part.zeros is not None]
    factors = [part.factors for part in parts if part.factors is not None]
    if factors:
        codes = join([part.codes for part in parts])
        return QuantTensor.from_factors(codes, Factors.joined(factors, join), scheme, index, parts[0].x_static)
    return QuantTensor(
        join([part.codes for part in parts]),
        join([as_bytes(part.scales) for part in parts]).view(parts[0].scales.dtype),
        join(zeros) if zeros else None,
        index,
        scheme,
        x_static=parts[0].x_static,
    )


def _check_shapes(qt: QuantTensor) -> None:
    codes, scheme = qt.codes, qt.scheme
    if codes.dtype != torch.uint8 or codes.dim() < 2:
        raise TensorError(f"codes must be uint8 [..., N, K], got {describe(codes)}")
    K = codes.shape[-1]
    shape = [*codes.shape[:-1], scheme.num_groups(K)]
    if qt.scales.dtype not in SCALE_DTYPES or list(qt.scales.shape) != shape:
        raise TensorError(
            f"scales must be float16, bfloat16 or float32 (or float8_e8m0fnu, float8_e4m3fn) [..., N, G] = {shape} for {scheme} "
            f"and K={K}, got {describe(qt.scales)}"
        )
    if (qt.factors is None) != (scheme.factors is None):
        raise TensorError(
            f"factors must be {'None' if scheme.factors is None else 'given (QuantTensor.from_factors)'} for {scheme}, got "
            f"{'None' if qt.factors is None else 'some'}"
        )
    if (qt.zeros is None) != (scheme.zeros == "none"):
        raise TensorError(
            f"zeros must {'be None' if scheme.symmetric else 'be given'} for {scheme}, got {describe(qt.zeros)}"
        )
    if qt.zeros is not None:
        wanted = (torch.uint8,) if scheme.zeros == "int" else FLOAT_DTYPES
        if qt.zeros.dtype not in wanted or list(qt.zeros.shape) != shape:
            raise TensorError(
                f"zeros must be {' or '.join(map(dtype_name, wanted))} [..., N, G] = {shape} for {scheme}, "
                f"got {describe(qt.zeros)}"
            )
    index, experts = qt.group_index, [*codes.shape[:-2], K]
    if index is not None and (index.dtype != torch.int32 or list(index.shape) not in ([K], experts) or index.dim() > 2):
        either = f" or [E, K] = {experts}" if codes.dim() == 3 else ""
        raise TensorError(f"group_index must be int32 [K] = [{K}]{either}, got {describe(index)}")
    _check_static(qt)
    devices = {t.device for t in (codes, qt.scales, qt.zeros, qt.group_index, qt.x_static) if t is not None}
    if len(devices) > 1:
        raise TensorError(
            f"codes, scales, zeros, group_index and x_static must be on one device, got {sorted(map(str, devices))}"
        )


def _check_static(qt: QuantTensor) -> None:
    """Raise unless scale and zero point of x are there where they are wanted."""
    wanted, given = ACTIVATIONS[qt.scheme.act].static, qt.x_static
    fits = not wanted if given is None else wanted and (given.dtype, list(given.shape)) == (torch.float32, [2])
    if not fits:
        raise TensorError(
            f"x_static must be {'float32 [2]: scale and zero point of x' if wanted else 'None'} for {qt.scheme}, got "
            f"{describe(given)}"
        )
    if wanted and qt.codes.dim() > 2:
        raise TensorError(f"static activations are of one weight [N, K], got codes {list(qt.codes.shape)}")


def _check_static_values(x_static: Tensor, zero_points: bool) -> None:
    scale, zero = x_static.tolist()
    if not (math.isfinite(scale) and scale > 0):
        raise TensorError(f"the scale of x must be positive and finite, got {scale}")
    if not (-128 <= zero <= 127 and zero == int(zero)):
        raise TensorError(f"the zero point of x must be a whole number from -128 to 127, got {zero}")
    if zero and not zero_points:
        raise TensorError(f"the zero point of x must be 0 where activations have none, got {zero:g}")


def _check_values(qt: QuantTensor) -> None:
    scheme = qt.scheme
    for name, values in (("codes", qt.codes), ("zeros", qt.zeros if scheme.zeros == "int" else None)):
        if values is not None and scheme.bits < 8 and values.numel() and int(values.max()) > scheme.max_code:
            raise TensorError(f"{name} must be 0 … {scheme.max_code} for {scheme}, got {int(values.max())}")
    for name, values in (("scales", qt.scales), ("zeros", None if scheme.zeros == "int" else qt.zeros)):
        if values is not None and not bool((finite := torch.isfinite(values.float())).all()):
            raise TensorError(f"{name} must be finite, got {int((~finite).sum())} NaN or infinite entries")
    if scheme.codebook is not None and len(special := _specials(scheme.codebook)):
        wrong = torch.isin(qt.codes, special.to(qt.codes.device))
        if bool(wrong.any()):
            raise TensorError(
                f"codes must be numbers of {scheme.codebook}, got {int(wrong.sum())} that mean NaN or infinity"
            )
    if qt.x_static is not None:
        _check_static_values(qt.x_static, ACTIVATIONS[scheme.act].zero_points)
    if scheme.rows > 1:
        _check_blocks(qt)
    if qt.factors is not None:
        _check_derived(qt)
    if scheme.group_size == "tensor" and qt.scales.numel() and bool((qt.scales != qt.scales[..., :1, :1]).any()):
        raise TensorError(f"scales of {scheme} must all be equal: one scale for the whole matrix")
    if qt.group_index is not None:
        for index in qt.group_index.view(-1, qt.K):
            validated_group_index(index, qt.K, scheme)


def _specials(codebook: str) -> Tensor:
    """uint8: the codes of a codebook that are no numbers."""
    return torch.tensor(
        [code for code, value in enumerate(CODEBOOKS[codebook]) if not math.isfinite(value)], dtype=torch.uint8
    )


def _check_blocks(qt: QuantTensor) -> None:
    """Raise unless rows of a block have one scale."""
    rows, scales = qt.scheme.rows, qt.scales.float()
    for first in range(0, qt.N, rows):
        if bool((scales[..., first : first + rows, :] != scales[..., first : first + 1, :]).any()):
            raise TensorError(
                f"scales of {qt.scheme} must be equal over blocks of {rows} rows, those from row {first} on differ"
            )


def _check_derived(qt: QuantTensor) -> None:
    """Raise unless scales and zeros are what the factors make."""
    factors = qt.factors
    assert factors is not None
    factors.check(qt.codes.shape[:-1], qt.G, qt.scheme)
    zeros = factors.zeros(qt.scheme)
    same = torch.equal(qt.scales, factors.scales(qt.scheme))
    if not same or (zeros is not None and (qt.zeros is None or not torch.equal(qt.zeros, zeros))):
        raise TensorError(
            f"scales and zeros of {qt.scheme} are the products of its factors; make it by QuantTensor.from_factors"
        )
