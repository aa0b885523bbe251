"""bitsandbytes files, read only: 4 bits through a table (NF4, FP4), and int8.

| tensor (4 bits)                                | dtype         | shape                  | content                          |
|------------------------------------------------|---------------|------------------------|----------------------------------|
| weight                                         | uint8, viewed | [ceil(N * K / 2), 1]   | codes of the flat weight         |
| weight.absmax                                  | fp32          | [blocks]               | scale of each block              |
|                                                | uint8         | [blocks]               | the same, quantized once more    |
| weight.quant_map                               | fp32          | [16]                   | the table                        |
| weight.nested_absmax, weight.nested_quant_map  | fp32          | [blocks / 256], [256]  | only where absmax is uint8       |
| weight.quant_state.bitsandbytes__nf4 (or fp4)  | uint8         |                        | JSON: quant_type, blocksize, …   |

Element 2i of the flat weight is in the **high** nibble of byte i, 2i + 1 in the low one. Blocks run along the flat weight, so
that they are groups of a row only where K is a multiple of their size; other files are refused. With double quantization
absmax[i] = nested_quant_map[absmax[i]] * nested_absmax[i // 256] + nested_offset, in fp32.

| tensor (8 bits) | dtype | shape  | content                          |
|-----------------|-------|--------|----------------------------------|
| weight          | int8  | [N, K] | w = weight * SCB / 127           |
| SCB             | fp32  | [N]    | largest magnitude of a row       |
| weight_format   | uint8 | []     | 0: rows, the only one read       |

Its scale becomes SCB / 127 in fp32. The origin rounds the product with SCB before it multiplies by 1 / 127, so that the two
agree to within 2 ulp of fp32. Activations are those of LLM.int8 with the threshold 6 ("int8_outliers" in `scheme.ACTIVATIONS`);
with another `llm_int8_threshold` they stay in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import CODEBOOKS, QuantScheme
from ..tensor import QuantTensor
from . import ACTIVATIONS, Config, Format, Oddity, Parsed
from .validation import check_scales, expect, naming

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
NESTED_BLOCK = 256
THRESHOLD = 6.0  # of LLM.int8 in kernels here
MAX_STATE_BYTES = 4096
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)  # bnb_4bit_quant_storage


class _State(NamedTuple):
    codebook: str
    block: int
    shape: tuple[int, int]
    nested_block: int
    nested_offset: float


def parse_4bit(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one 4-bit module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field; also where a block crosses rows.
    """
    with naming(module):
        state = _state(tensors)
        N, K = state.shape
        if K % state.block:
            raise CheckpointError(
                f"blocks of {state.block} run along the flat weight and cross its rows of K={K}, so that they are no groups "
                "of a row; dequantize the checkpoint with bitsandbytes and quantize it again"
            )
        stored = tensors["weight"]
        if stored.dtype not in _STORAGE:
            raise CheckpointError(f"weight must be uint8 or a float dtype that stands for bytes, got {stored.dtype}")
        data = stored.contiguous().flatten().view(torch.uint8) if stored.numel() else torch.empty(0, dtype=torch.uint8)
        expect("weight as bytes", data, (torch.uint8,), (N * K // 2,), f"shape {list(state.shape)} in quant_state")
        codes = torch.stack([data >> 4, data & 15], -1).reshape(N, K)
        blocks = N * K // state.block
        scales = _absmax(tensors, state, blocks).reshape(N, K // state.block)
        check_scales(scales)
        _check_table(tensors["weight.quant_map"], state.codebook)
        return Parsed(QuantTensor(codes, scales, None, None, QuantScheme(4, state.block, codebook=state.codebook)))


def parse_int8(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one int8 module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        weight, largest, kind = tensors["weight"], tensors["SCB"], tensors.get("weight_format")
        if weight.dim() != 2:
            raise CheckpointError(f"weight must be int8 [N, K], got {list(weight.shape)}")
        expect("weight", weight, (torch.int8,), tuple(weight.shape))
        expect("SCB", largest, (torch.float32,), (weight.shape[0],), f"N={weight.shape[0]}")
        if kind is not None and (kind.is_floating_point() or kind.numel() != 1 or int(kind) != 0):
            raise CheckpointError(
                f"weight_format must be 0 (rows), got {kind.flatten()[:4].tolist()}; tiles are not read"
            )
        scales = (largest / 127)[:, None].contiguous()
        check_scales(scales)
        codes = (weight.short() + 128).to(torch.uint8)
        threshold = config.get("llm_int8_threshold", THRESHOLD)
        if type(threshold) not in (int, float):
            raise CheckpointError(f"llm_int8_threshold must be a number, got {threshold!r:.40}")
        act = "int8_outliers" if threshold == THRESHOLD else None
        read = QuantTensor(codes, scales, None, None, QuantScheme(8, "channel", act=act))
        if act is not None:
            return Parsed(read)
        asked = f"the config asks for int8 activations with llm_int8_threshold {threshold}"
        if config.get(ACTIVATIONS) == "file":
            raise CheckpointError(f'{asked}; kernels here have {THRESHOLD}; load it with activations="16bit"')
        return Parsed(read, (Oddity(asked, "the weights are used with 16-bit activations instead"),))


def _state(tensors: Mapping[str, Tensor]) -> _State:
    """The JSON of the one quant_state, checked."""
    found = [name for name in tensors if name.startswith(STATE)]
    if len(found) != 1:
        raise CheckpointError(f"it needs exactly one {STATE}nf4 or …fp4, got {len(found)}")
    codebook, data = found[0].removeprefix(STATE), tensors[found[0]]
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() > MAX_STATE_BYTES:
        raise CheckpointError(f"{found[0]} must be JSON in a uint8 tensor of at most {MAX_STATE_BYTES} bytes")
    try:
        fields = json.loads(bytes(data.tolist()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{found[0]} must be JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{found[0]} must be a JSON object, got {fields!r:.40}")
    if fields.get("quant_type") != codebook:
        raise CheckpointError(f"quant_state is named {codebook} but its quant_type is {fields.get('quant_type')!r:.40}")
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise CheckpointError(f"quant_state needs a shape [N, K], got {shape!r:.40}")
    offset = fields.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not abs(offset) < 1e30:
        raise CheckpointError(f"quant_state needs a finite nested_offset, got {offset!r:.40}")
    nested = _block(fields, "nested_blocksize", NESTED_BLOCK)
    return _State(codebook, _block(fields, "blocksize", None), (shape[0], shape[1]), nested, float(offset))


def _block(fields: Mapping[str, Any], key: str, default: int | None) -> int:
    size = fields.get(key, default)
    if type(size) is not int or not 2 <= size <= 4096 or size & (size - 1):
        raise CheckpointError(f"quant_state needs {key} to be a power of two up to 4096, got {size!r:.40}")
    return size


def _absmax(tensors: Mapping[str, Tensor], state: _State, blocks: int) -> Tensor:
    """fp32 [blocks]: the scale of each block, dequantized if need be."""
    absmax = tensors["weight.absmax"]
    expect("weight.absmax", absmax, (torch.float32, torch.uint8), (blocks,), f"blocks of {state.block}")
    if absmax.dtype == torch.float32:
        return absmax
    nested, table = tensors.get("weight.nested_absmax"), tensors.get("weight.nested_quant_map")
    if nested is None or table is None:
        raise CheckpointError("weight.absmax is uint8, but weight.nested_absmax or weight.nested_quant_map is missing")
    expect("weight.nested_quant_map", table, (torch.float32,), (256,))
    expect("weight.nested_absmax", nested, (torch.float32,), (-(-blocks // state.nested_block),), f"{blocks} blocks")
    per_block = nested.repeat_interleave(state.nested_block)[:blocks]
    return table[absmax.long()] * per_block + torch.tensor(state.nested_offset, dtype=torch.float32)


def _check_table(stored: Tensor, codebook: str) -> None:
    """The kernels of the origin use their own table: a file that says another one lies."""
    table = torch.tensor(CODEBOOKS[codebook], dtype=torch.float32)
    expect("weight.quant_map", stored, (torch.float32,), (16,))
    if not torch.allclose(stored, table, rtol=2**-22, atol=0):  # fp32, two roundings
        raise CheckpointError(f"weight.quant_map must be the table of {codebook}, got {stored[:4].tolist()} …")


def _matches(key: str, config: Config) -> bool:
    # Only one of the two may be set; a value that is no boolean is as good as none.
    return config.get("quant_method") == METHOD and config.get(key) is True


NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
FOUR_BIT: Format = Format(
    name="bitsandbytes 4-bit",
    required=("weight.absmax", "weight", "weight.quant_map"),
    optional=(*NESTED, f"{STATE}nf4", f"{STATE}fp4"),
    matches=lambda config: _matches("load_in_4bit", config),
    parse=parse_4bit,
)
INT8: Format = Format(
    name="bitsandbytes int8",
    required=("SCB", "weight"),
    optional=("weight_format",),
    matches=lambda config: _matches("load_in_8bit", config),
    parse=parse_int8,
)
