"""torchao files, read only: int8, 2- to 8-bit and int4 weights, as `save_pretrained` of transformers writes them.

A quantized `<module>.weight` is stored as `<module>._weight_<name>`. What it is stands in the metadata of the safetensors
header: `{"<module>.weight": JSON of {"_type", "_data", "_tensor_data_names"}}`, where `_data` has `block_size` [1, group]
(or [N, K] for one scale per tensor) and, of a padded layout, the `shape` [N, K].

| _type                    | qdata                             | scale, zero_point                | weight                   |
|--------------------------|-----------------------------------|----------------------------------|--------------------------|
| Int8Tensor               | int8 [N, K]                       | [N, G]; zero_point int8, absent  | (q - zero_point) * scale |
| IntxUnpackedToInt8Tensor | int8 [N, K], of target_dtype      | [N, G]; zero_point int8 or float | (q - zero_point) * scale |
| Int4Tensor               | int8 [N, K / 2], even k low       | [G, N]; zero_point float         | q * scale + zero_point   |
| Float8Tensor             | float8_e4m3fn [N, K]              | [N, G], [1, 1], blocks           | q * scale                |
| Int4TilePackedTo4dTensor | int32 [N' / 8, K' / 128, 32, 4]   | scale_and_zero bf16 [G', N', 2]  | (q - 8) * scale + zero   |

Tiles are padded: N' is a multiple of 8, K' of 1024. With k' = k mod 128, code (n, k) lies in word
[n // 8, k // 128, 4 * (n % 8) + (k' % 8) // 2, k' // 32], in nibble 4 * (k' % 2) + (k' // 8) % 4
(PyTorch, `_convert_weight_to_int4pack` with inner_k_tiles = 8).

The two int4 types add a float after scaling. For unsigned codes it becomes zero - 8 * scale, in fp32: the sum of two bf16
numbers, exact unless they lie more than 2^13 apart. Symmetric zeros, all 0, are dropped.

Of a Float8Tensor `block_size` may have as many rows as columns, which are blocks then.

Refused by name: types of other hardware (Int4PlainInt32Tensor of XPU and NPU), floats of 4 bits (MXTensor, NVFP4Tensor:
prototypes in 0.18), and weights with `act_pre_scale`, which multiplies the activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from . import METADATA, Config, Format, Oddity, Parsed
from .floating import E4M3, fp8, matrix, square
from .validation import check_float, check_scales, expect, naming

METHOD = "torchao"
MAX_ENTRY = 4096  # characters of the JSON of one weight
_PREFIX = "_weight_"
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
_WITHOUT = Oddity("torchao quantizes activations too", "the weights are used with 16-bit activations instead")


class _Entry(NamedTuple):
    """What the metadata says of a weight. `shape`: only where the tensors do not tell it."""

    kind: str
    block: tuple[int, int]
    shape: tuple[int, int] | None
    fields: Mapping[str, Any]


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        entry = _entry(module, config)
        parts = {suffix.removeprefix(_PREFIX): tensor for suffix, tensor in tensors.items()}
        if "act_pre_scale" in parts:
            raise CheckpointError("it has act_pre_scale, which multiplies the activations; such weights are not read")
        if entry.kind not in _READERS:
            raise CheckpointError(
                f"its type is {entry.kind!r:.60}, which is not read; read are {', '.join(_READERS)}. Dequantize it with torchao "
                "and quantize the model again"
            )
        quantizes_activations = any(entry.fields.get(key) is not None for key in _ACTIVATIONS)
        return Parsed(_READERS[entry.kind](entry, parts), (_WITHOUT,) if quantizes_activations else ())


def _entry(module: str, config: Config) -> _Entry:
    """The JSON of one weight in the metadata, checked."""
    metadata: Mapping[str, str] = config.get(METADATA) or {}
    text = metadata.get(f"{module}.weight", metadata.get(module))
    if text is None:
        raise CheckpointError(f"the safetensors metadata has no entry {module}.weight, which says what its tensors are")
    if len(text) > MAX_ENTRY:
        raise CheckpointError(f"the metadata of {module}.weight has {len(text)} characters, more than {MAX_ENTRY}")
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise CheckpointError(f"the metadata of {module}.weight must be JSON: {error}") from None
    fields = found.get("_data") if isinstance(found, dict) else None
    if not isinstance(fields, dict):
        raise CheckpointError(f"the metadata of {module}.weight needs _type and _data, got {found!r:.60}")
    block, shape = fields.get("block_size"), fields.get("shape")
    if isinstance(block, list) and len(block) == 3 and block[0] == 1:  # of stacked experts, here one of them
        block, shape = block[1:], shape[1:] if isinstance(shape, list) else shape
    size = None if shape is None else _pair("shape", shape)
    return _Entry(str(found.get("_type")), _pair("block_size", block), size, fields)


def _pair(key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in value):
        raise CheckpointError(f"{key} must be two sizes of 1 … 2^31 - 1, got {value!r:.60}")
    return value[0], value[1]


def _scheme(entry: _Entry, bits: int, N: int, K: int) -> QuantScheme:
    """Symmetric; the group size that `block_size` means."""
    rows, columns = entry.block
    if entry.block == (N, K) and N > 1:
        return QuantScheme(bits, "tensor")
    if rows != 1 or K % columns:
        raise CheckpointError(
            f"block_size {list(entry.block)} is no group along K={K}, nor the whole weight [{N}, {K}]"
        )
    return QuantScheme(bits, "channel" if columns == K else columns)


def _signed(entry: _Entry, parts: Mapping[str, Tensor], bits: int) -> QuantTensor:
    """Int8Tensor and IntxUnpackedToInt8Tensor: a byte a code, two's complement."""
    stored = _part("qdata", parts)
    if stored.dim() != 2:
        raise CheckpointError(f"qdata must be int8 [N, K], got {list(stored.shape)}; stacked experts are not read")
    N, K = stored.shape
    expect("qdata", stored, (torch.int8,), (N, K))
    low, middle = -(2 ** (bits - 1)), 2 ** (bits - 1)
    scheme = _scheme(entry, bits, N, K)
    G = scheme.num_groups(K)
    blocks = (1, 1) if scheme.group_size == "tensor" else (N, G)
    scale, zero = _part("scale", parts), parts.get("zero_point")
    check_float("scale", scale, blocks, f"block_size {list(entry.block)}")
    check_scales(scale)
    if stored.numel() and (int(stored.min()) < low or int(stored.max()) >= middle):
        raise CheckpointError(
            f"qdata must be {low} … {middle - 1} for {bits} bits, got {int(stored.min())} … {int(stored.max())}"
        )
    codes = (stored.short() + middle).to(torch.uint8)
    scales = scale.expand(N, G).contiguous()
    if zero is None or (
        zero.dtype in (torch.int8, *FLOAT_DTYPES) and list(zero.shape) == list(blocks) and not zero.any()
    ):
        return QuantTensor(codes, scales, None, None, scheme)
    expect("zero_point", zero, (torch.int8, *FLOAT_DTYPES), blocks, f"block_size {list(entry.block)}")
    zeros = zero.expand(N, G).float() + middle
    if zero.dtype != torch.int8:
        return QuantTensor(codes, scales, zeros, None, QuantScheme(bits, scheme.group_size, "float"))
    if not bool(((zeros >= 0) & (zeros < 2 * middle)).all()):
        raise CheckpointError(
            f"zero_point must be {low} … {middle - 1} for {bits} bits, got {int(zero.min())} … {int(zero.max())}"
        )
    return QuantTensor(codes, scales, zeros.to(torch.uint8), None, QuantScheme(bits, scheme.group_size, "int"))


def _int8(entry: _Entry, parts: Mapping[str, Tensor]) -> QuantTensor:
    return _signed(entry, parts, 8)


def _intx(entry: _Entry, parts: Mapping[str, Tensor]) -> QuantTensor:
    target = entry.fields.get("target_dtype")
    name = target.get("_data") if isinstance(target, dict) else None
    bits = {f"int{width}": width for width in range(2, 9)}.get(str(name))
    if bits is None:
        raise CheckpointError(f"target_dtype must be int2 to int8, got {target!r:.60}")
    return _signed(entry, parts, bits)


def _int4(entry: _Entry, parts: Mapping[str, Tensor]) -> QuantTensor:
    """Int4Tensor: signed nibbles."""
    stored = _part("qdata", parts)
    if stored.dim() != 2:
        raise CheckpointError(f"qdata must be int8 [N, K / 2], got {list(stored.shape)}; stacked experts are not read")
    N, K = stored.shape[0], 2 * stored.shape[1]
    expect("qdata", stored, (torch.int8, torch.uint8), (N, K // 2))
    if entry.shape is not None and entry.shape != (N, K):
        raise CheckpointError(f"shape must be {[N, K]} as qdata says, got {list(entry.shape)}")
    data = stored.view(torch.uint8)
    codes = torch.stack([data & 15, data >> 4], -1).reshape(N, K) ^ 8  # two's complement + 8
    scheme = _scheme(entry, 4, N, K)
    groups = (scheme.num_groups(K), N)
    scale, zero = _part("scale", parts), _part("zero_point", parts)
    for name, tensor in (("scale", scale), ("zero_point", zero)):
        check_float(name, tensor, groups, f"block_size {list(entry.block)}, N={N}, K={K}")
    return _shifted(codes, scale.T.contiguous(), zero.T, scheme)


def _tiles(entry: _Entry, parts: Mapping[str, Tensor]) -> QuantTensor:
    """Int4TilePackedTo4dTensor: the operand order of a tensor-core instruction, padded."""
    if entry.shape is None:
        raise CheckpointError("shape is missing from its metadata; the padded tensors do not tell N and K")
    (N, K), stored, both = entry.shape, _part("qdata", parts), _part("scale_and_zero", parts)
    rows, columns = -(-N // 8) * 8, -(-K // 1024) * 1024
    expect("qdata", stored, (torch.int32,), (rows // 8, columns // 128, 32, 4), f"tiles of 8 rows, N={N}, K={K}")
    scheme = _scheme(entry, 4, N, K)
    if not isinstance(scheme.group_size, int):
        scheme = QuantScheme(4, K)
    group = scheme.group_length(K)
    expect(
        "scale_and_zero",
        both,
        (torch.bfloat16,),
        (columns // group, rows, 2),
        f"block_size {list(entry.block)}, N={N}, K={K}",
    )
    # [row tile, column tile, row, pair, column // 32, nibble] with nibble = [column % 2, (column // 8) % 4]
    nibbles = stored.reshape(rows // 8, columns // 128, 8, 4, 4, 1) >> 4 * torch.arange(8, dtype=torch.int32) & 15
    fields = nibbles.to(torch.uint8).unflatten(-1, (2, 4))
    codes = fields.permute(0, 2, 1, 4, 6, 3, 5).reshape(rows, columns)[:N, :K].contiguous()
    kept = both[: scheme.num_groups(K), :N]
    return _shifted(codes, kept[..., 0].T.contiguous(), kept[..., 1].T, scheme)


def _shifted(codes: Tensor, scales: Tensor, zeros: Tensor, scheme: QuantScheme) -> QuantTensor:
    """(codes - 8) * scale + zero."""
    check_scales(scales)
    if not bool(zeros.any()):
        return QuantTensor(codes, scales, None, None, scheme)
    offsets = (zeros.float() - 8 * scales.float()).contiguous()
    return QuantTensor(codes, scales, offsets, None, QuantScheme(4, scheme.group_size, "offset"))


def _float8(entry: _Entry, parts: Mapping[str, Tensor]) -> QuantTensor:
    """Float8Tensor: floats of 8 bits under scales of rows, groups, blocks or the whole."""
    stored = _part("qdata", parts)
    matrix("qdata", stored, E4M3)
    (N, K), (rows, columns) = stored.shape, entry.block
    if rows == columns and rows > 1 and entry.block != (N, K):
        scheme = square("block_size", list(entry.block))
    else:
        scheme = replace(_scheme(entry, 8, N, K), codebook="e4m3")
    return fp8(stored, _part("scale", parts), scheme, "scale")


def _part(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    if name not in parts:
        raise CheckpointError(f"{_PREFIX}{name} is missing (it has {', '.join(sorted(parts))})")
    return parts[name]


_READERS = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Float8Tensor": _float8,
    "Int4TilePackedTo4dTensor": _tiles,
}
FORMAT: Format = Format(
    name="torchao",
    required=(f"{_PREFIX}qdata",),
    optional=tuple(
        _PREFIX + name
        for name in (
            "scale",
            "zero_point",
            "scale_and_zero",
            "act_pre_scale",
            "act_quant_scale",
            "act_quant_zero_point",
        )
    ),
    matches=lambda config: config.get("quant_method") == METHOD,
    parse=parse,
    needs_metadata=True,
    sliced=True,
)
