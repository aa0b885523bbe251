"""HQQ files, read only: groups along K (axis 1) with floating-point zero points.

| tensor            | dtype          | shape           | content                                                       |
|-------------------|----------------|-----------------|---------------------------------------------------------------|
| W_q               | uint8 or int32 | [words, g]      | codes of M `[R, g]`, packed along its rows                    |
| scale, zero       | float          | [R, 1]          | w = (code - zero) * scale                                     |
| shape             | integer        | [2]             | [N, K]                                                        |
| nbits, group_size, axis, view_as_float, quant_scale, quant_zero | number | [] | booleans as 0 and 1                            |
| packing           | uint8          |                 | its name in ASCII                                             |

M is the weight with its rows cut into groups, `weight.reshape(-1, g)`, R = N * K / g. Its rows are packed far apart, so
that unpacking needs no shuffle: with s = 32 // bits or 8 // bits codes in a word, word row i holds rows i, i + R/s, i + 2R/s, …

| packing | word  | a word row holds                                                         |
|---------|-------|--------------------------------------------------------------------------|
| 8bit_u8 | uint8 | one row; also of 5 and 6 bits                                            |
| 4bit_u8 | uint8 | half i in the high nibble, then the low one                              |
| 3bit_32 | int32 | tenths of the rows (padded to a multiple of 10) at bits 27, 24, …, 0     |
| 2bit_u8 | uint8 | quarters at bits 6, 4, 2, 0                                              |

With `view_as_float` the same bytes are declared as a float dtype. The file holds names of dtypes, which the origin evaluates
as code; nothing of the file is evaluated here, and none of those names is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import describe, dtype_name
from . import Config, Format, Parsed
from .validation import check_float, check_scales, naming

METHOD = "hqq"
_PACKINGS = {  # name: dtype of a word, bits of a field, fields in a word
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "3bit_32": (torch.int32, 3, 10),
    "2bit_u8": (torch.uint8, 2, 4),
}
_BITS = {"8bit_u8": (5, 6, 8), "4bit_u8": (4,), "3bit_32": (3,), "2bit_u8": (2,)}


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field; also where groups run along N (axis 0) or cross rows.
    """
    with naming(module):
        N, K = _shape(tensors["shape"])
        if _number("axis", tensors) != 1:
            raise CheckpointError(
                f"axis is {_number('axis', tensors)}: its groups run along N, and kernels need them along K; quantize the "
                "model again with axis=1"
            )
        for name in ("quant_scale", "quant_zero"):
            if _number(name, tensors, 0):
                raise CheckpointError(
                    f"{name} is set: scales or zero points that are quantized themselves are not read"
                )
        packing = _text("packing", tensors["packing"])
        if packing not in _PACKINGS:
            raise CheckpointError(f"packing must be one of {', '.join(_PACKINGS)}, got {packing!r:.40}")
        bits = _bits(tensors.get("nbits"), packing)
        size = _number("group_size", tensors, K)
        if size < 1 or K % size:
            raise CheckpointError(f"group_size {size} does not divide K={K}, so that groups cross rows")
        rows = N * (K // size)
        codes = _unpack(_words(tensors, packing, rows, size), packing, rows).reshape(N, K)
        if codes.numel() and int(codes.max()) >= 2**bits:
            raise CheckpointError(f"W_q must be 0 … {2**bits - 1} for {bits} bits, got {int(codes.max())}")
        parts = []
        for name in ("scale", "zero"):
            check_float(name, tensors[name], (rows, 1), f"N={N}, K={K}, group_size {size}")
            parts.append(tensors[name].reshape(N, K // size))
        check_scales(parts[0])
        scheme = QuantScheme(bits, "channel" if "group_size" not in tensors else size, "float")
        return Parsed(QuantTensor(codes, parts[0], parts[1], None, scheme))


def _words(tensors: Mapping[str, Tensor], packing: str, rows: int, size: int) -> Tensor:
    """W_q as integers [words, group_size], checked."""
    stored, (dtype, _, fields) = tensors["W_q"], _PACKINGS[packing]
    if fields < 10 and rows % fields:
        raise CheckpointError(f"{packing} needs the number of groups to be a multiple of {fields}, got {rows}")
    if _number("view_as_float", tensors, 0) and stored.dtype in FLOAT_DTYPES and stored.dim() == 2:
        width = stored.shape[1] * stored.element_size()
        if width % dtype.itemsize == 0 and stored.numel():
            stored = stored.contiguous().view(dtype)
    if stored.dtype != dtype or list(stored.shape) != [-(-rows // fields), size]:
        wanted = f"{dtype_name(dtype)} {[-(-rows // fields), size]}"
        raise CheckpointError(f"W_q must be {wanted} ({packing}, {rows} groups of {size}), got {describe(stored)}")
    return stored


def _unpack(words: Tensor, packing: str, rows: int) -> Tensor:
    """Codes of M, uint8 [rows, group_size]."""
    _, bits, fields = _PACKINGS[packing]
    parts = [words >> bits * (fields - 1 - i) & (2**bits - 1) for i in range(fields)]
    return torch.cat(parts).to(torch.uint8)[:rows]


def _bits(nbits: Tensor | None, packing: str) -> int:
    if nbits is None:
        return _BITS[packing][-1]
    value = float(nbits) if nbits.numel() == 1 else -1.0
    if value in (1.0, 1.58) or (nbits.is_floating_point() and abs(value - 1.58) < 0.01):
        value = 2.0  # ternary codes are packed as 2-bit ones; so is what an older writer truncated to 1
    if value not in _BITS[packing]:
        allowed = " or ".join(map(str, _BITS[packing]))
        raise CheckpointError(
            f"nbits must be {allowed} for {packing}, got {float(nbits.flatten()[0]) if nbits.numel() else None}"
        )
    return int(value)


def _shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_floating_point() or tensor.dim() != 1 or tensor.numel() != 2 or bool((tensor.long() < 0).any()):
        raise CheckpointError(
            f"shape must be [N, K] of an integer dtype, got {tensor.dtype} {tensor.flatten()[:4].tolist()}"
        )
    N, K = (int(size) for size in tensor)
    if max(N, K) >= 2**31:
        raise CheckpointError(f"shape must be below 2^31, got {[N, K]}")
    return N, K


def _number(name: str, tensors: Mapping[str, Tensor], default: int | None = None) -> int:
    tensor = tensors.get(name)
    if tensor is None and default is not None:
        return default
    if tensor is None or tensor.is_floating_point() or tensor.is_complex() or tensor.numel() != 1:
        raise CheckpointError(f"{name} must be one integer, got {'none' if tensor is None else list(tensor.shape)}")
    return int(tensor)


def _text(name: str, tensor: Tensor) -> str:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > 64:
        raise CheckpointError(f"{name} must be ASCII in a uint8 tensor of at most 64 bytes, got {tensor.dtype}")
    return bytes(tensor.tolist()).decode("ascii", "replace")


FORMAT: Format = Format(
    name="hqq",
    required=("W_q", "scale", "zero", "shape", "axis", "packing"),
    optional=(
        "nbits", "group_size", "view_as_float", "quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero",
        "compute_dtype", "unpack_view_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    ),
    matches=lambda config: config.get("quant_method") == METHOD,
    parse=parse,
)  # fmt: skip
