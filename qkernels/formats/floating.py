"""Weights of floating-point codes as the files of several origins hold them: FP8 under scales of a tensor, rows, groups or
blocks, and 4-bit floats in pairs. What differs between the origins (names, whether a factor divides) is their format's own.

A scale of float8_e8m0fnu is a power of two that most files keep as uint8. Read as a number, the byte 120 is 120 instead of
2^-7 and a model becomes fluent nonsense without an error, so every scale is taken by its dtype: bytes only where a format says
e8m0, numbers only where it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..factors import Factors, as_bytes
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import describe
from .validation import check_scales, expect

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
MXFP4, MXFP8 = QuantScheme(4, 32, codebook="e2m1"), QuantScheme(8, 32, codebook="e4m3")
FP8_TENSOR, FP8_CHANNEL = (QuantScheme(8, size, codebook="e4m3") for size in ("tensor", "channel"))
NVFP4 = QuantScheme(4, 16, codebook="e2m1", factors="nvfp4")
NVFP4_MULTIPLIED = QuantScheme(4, 16, codebook="e2m1", factors="nvfp4m")


def matrix(field: str, stored: Tensor, *dtypes: torch.dtype) -> None:
    """Check that a tensor is a matrix of one of these dtypes.

    Raises:
        CheckpointError: it is not.
    """
    if stored.dim() != 2:
        raise CheckpointError(f"{field} must hold one [N, K] weight, got {describe(stored)}")
    expect(field, stored, dtypes, tuple(stored.shape))


def fp8(stored: Tensor, scale: Tensor, scheme: QuantScheme, field: str = "weight_scale") -> QuantTensor:
    """FP8 codes with the scales of a file.

    Args:
        stored: float8_e4m3fn `[N, K]`.
        scale: `[1]` or `[]` (a tensor), `[N, 1]` or `[N]` (rows), `[N, G]` (groups), `[ceil(N / rows), G]` (blocks, of which the
            last may be short: never rows divided evenly); float, or float8_e8m0fnu.
        scheme: one of codebook e4m3.

    Raises:
        CheckpointError: naming the field.
    """
    matrix("weight", stored, E4M3)
    N, K = stored.shape
    G = scheme.num_groups(K)
    if scheme.group_size == "tensor" and scale.numel() == 1 and scale.dim() <= 2:
        scale = scale.reshape(1, 1)
    elif scheme.group_size == "channel" and scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    bands = 1 if scheme.group_size == "tensor" else -(-N // scheme.rows)
    expect(field, scale, (*FLOAT_DTYPES, E8M0), (bands, G), f"{scheme}, N={N}, K={K}")
    check_scales(scale.float())
    spread = N if scheme.group_size == "tensor" else scheme.rows
    rows = as_bytes(scale).repeat_interleave(spread, dim=0)[:N].contiguous().view(scale.dtype)
    return QuantTensor(as_bytes(stored), rows, None, None, scheme)


def mxfp8(stored: Tensor, scale: Tensor) -> QuantTensor:
    """FP8 codes under a power of two for each 32 columns.

    Raises:
        CheckpointError: naming the field.
    """
    return fp8(stored, powers_of_two(scale), MXFP8)


def mxfp4(
    packed: Tensor, scale: Tensor, field: str = "weight_packed", scale_field: str = "weight_scale"
) -> QuantTensor:
    """4-bit floats `[N, K / 2]`, the even column in the low half, under a power of two for each 32.

    Raises:
        CheckpointError: naming the field.
    """
    codes = pairs(field, packed)
    N, K = codes.shape
    scale = powers_of_two(scale, scale_field)
    expect(scale_field, scale, (E8M0,), (N, MXFP4.num_groups(K)), f"N={N}, K={K}, groups of 32")
    check_scales(scale.float())
    return QuantTensor(codes, scale, None, None, MXFP4)


def nvfp4(
    packed: Tensor, scale: Tensor, outer: Tensor, scheme: QuantScheme, field: str, outer_field: str
) -> QuantTensor:
    """4-bit floats in pairs under e4m3 scales for each 16, all of them under one number.

    Args:
        packed: uint8 `[N, K / 2]`.
        scale: float8_e4m3fn `[N, K / 16]`.
        outer: float32 `[]` or `[1]`.
        scheme: `NVFP4` where it divides, `NVFP4_MULTIPLIED` where it multiplies.

    Raises:
        CheckpointError: naming the field.
    """
    codes = pairs(field, packed)
    N, K = codes.shape
    expect("weight_scale", scale, (E4M3,), (N, scheme.num_groups(K)), f"N={N}, K={K}, groups of 16")
    check_scales(scale.float())
    if outer.dtype != torch.float32 or outer.numel() != 1 or outer.dim() > 1:
        raise CheckpointError(f"{outer_field} must be one float32 for the whole weight, got {describe(outer)}")
    if not bool(outer.isfinite().all()) or not float(outer) > 0:
        raise CheckpointError(f"{outer_field} must be a positive number, got {float(outer)}")
    return QuantTensor.from_factors(codes, Factors(scale, outer.reshape(1, 1).repeat(N, 1)), scheme)


def pairs(field: str, packed: Tensor, *dtypes: torch.dtype) -> Tensor:
    """uint8 `[N, K]`: the codes of `[N, K / 2]` bytes, the low half first.

    Raises:
        CheckpointError: it is no matrix of bytes.
    """
    matrix(field, packed, *(dtypes or (torch.uint8,)))
    return halves(packed.view(torch.uint8))


def halves(both: Tensor) -> Tensor:
    """uint8 `[…, 2 n]`: the codes of `[…, n]` bytes, the low half first."""
    return torch.stack([both & 15, both >> 4], -1).flatten(-2)


def square(field: str, sides: object) -> QuantScheme:
    """FP8 in square blocks.

    Args:
        field: whose value `sides` is.
        sides: two equal lengths.

    Raises:
        CheckpointError: they are not; names the field.
    """
    two = sides if isinstance(sides, list) and len(sides) == 2 else [None, None]
    if type(two[0]) is not int or two[0] != two[1] or not 0 < two[0] < 2**31:
        raise CheckpointError(f"{field} must be two equal sides such as [128, 128], got {sides!r:.40}")
    return QuantScheme(8, two[0], codebook="e4m3", rows=two[0])


def powers_of_two(scale: Tensor, field: str = "weight_scale") -> Tensor:
    """Bytes as the powers of two that they stand for.

    Raises:
        CheckpointError: they are numbers.
    """
    if scale.dtype not in (torch.uint8, E8M0):
        raise CheckpointError(
            f"{field} must be bytes that are powers of two (uint8 or float8_e8m0fnu), got {describe(scale)}"
        )
    return scale.contiguous().view(E8M0)
