"""compressed-tensors files of floating-point weights, and those that mix several kinds; read. `compressed_writing` writes.

| format                           | weight tensor                  | weight_scale                                   |
|----------------------------------|--------------------------------|------------------------------------------------|
| float-quantized, naive-quantized | weight float8_e4m3fn [N, K]    | float [1], [N, 1], [N/128, K/128] rounded up   |
| mxfp8-quantized                  | weight float8_e4m3fn [N, K]    | uint8 [N, K/32], powers of two                 |
| mxfp4-pack-quantized             | weight_packed uint8 [N, K/2]   | uint8 [N, K/32], powers of two                 |
| nvfp4-pack-quantized | weight_packed uint8 [N, K/2] | float8_e4m3fn [N, K/16], weight_global_scale fp32 [1] |
| mixed-precision                  | that of the format of the module's config group: these, pack-quantized, int-quantized |

Two codes lie in a byte, the even column in the low half. The global scale divides. Blocks are those of `block_structure`; the
last one of a side may be short. naive-quantized holds integers where its group says type int.

Activations that a file wants in FP8 or FP4 stay in 16 bits, which an oddity says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from . import Config, Format, Oddity, Parsed
from .compressed_tensors import (
    INT,
    OF_ACTIVATIONS,
    PACK,
    activations_of,
    group_of,
    means,
    parse_integers,
    parse_packed,
)
from .floating import FP8_CHANNEL, FP8_TENSOR, MXFP4, MXFP8, NVFP4, fp8, mxfp4, mxfp8, nvfp4, square
from .validation import group_size_of, integer, naming

FLOAT, NAIVE, MXFP8_BODY = "float-quantized", "naive-quantized", "mxfp8-quantized"
MXFP4_BODY, NVFP4_BODY, MIXED_BODY = "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision"

# What each body needs beside weight_scale.
_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    FLOAT: ("weight",), NAIVE: ("weight",), MXFP8_BODY: ("weight",), INT: ("weight",), MXFP4_BODY: ("weight_packed",),
    NVFP4_BODY: ("weight_packed", "weight_global_scale"), PACK: ("weight_packed", "weight_shape"),
}  # fmt: skip


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        group = group_of(module, config)
        body = _body(group, config)
        needs = {"weight_scale", *_NEEDS[body]}
        missing = sorted(needs - tensors.keys())
        if missing:
            raise CheckpointError(f"{', '.join(missing)} must be there for {body}")
        stray = sorted({"weight", "weight_packed", "weight_global_scale"} & tensors.keys() - needs)
        if stray:
            raise CheckpointError(f"{', '.join(stray)} must be absent for {body}, whose weight is {_NEEDS[body][0]}")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"its config group needs weights with num_bits and type, got {weights!r:.40}")
        integers = body in (INT, PACK) or (body == NAIVE and weights.get("type", "int") == "int")
        if not integers:
            _check_symmetric(weights, tensors)
            return Parsed(_FLOATS[body](weights, tensors), tuple(_oddities(group)))
    as_of = config if body != NAIVE else _called(config, INT)
    return (parse_packed if body == PACK else parse_integers)(module, tensors, as_of)


def _body(group: Mapping[str, Any], config: Config) -> str:
    declared, own = config.get("format"), group.get("format")
    body = declared if own is None else own
    if declared not in (MIXED_BODY, body):
        raise CheckpointError(f"its config group has the format {own!r:.40}, the checkpoint says {declared}")
    if body not in _NEEDS:
        raise CheckpointError(
            f"its config group has the format {body!r:.40}; read are {', '.join(_NEEDS)}; quantize the original again into one "
            "of them"
        )
    return str(body)


def _called(config: Config, body: str) -> dict[str, Any]:
    """A config whose groups say another body: naive-quantized integers are int-quantized ones."""
    groups = {name: {**group, "format": None} for name, group in config["config_groups"].items()}
    return {**config, "format": body, "config_groups": groups}


def _check_symmetric(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Floats have no zero points; some versions write them all the same, all 0."""
    zeros = tensors.get("weight_zero_point")
    if weights.get("symmetric") is False or (zeros is not None and bool(zeros.float().any())):
        raise CheckpointError("weights of type float have no zero points: symmetric must be true, weight_zero_point 0")
    if "weight_g_idx" in tensors:
        raise CheckpointError("weight_g_idx goes with integer codes, and these are floats")


def _check_kind(weights: Mapping[str, Any], scheme: QuantScheme) -> None:
    """What the config says of a kind that has one group size must be that."""
    _check_float(weights, scheme.bits)
    size = group_size_of(weights, "group_size") if weights.get("group_size") is not None else scheme.group_size
    if size != scheme.group_size:
        raise CheckpointError(f"group_size must be {scheme.group_size} for {scheme}, got {weights['group_size']!r:.40}")


def _check_float(weights: Mapping[str, Any], bits: int) -> None:
    if weights.get("type") != "float" or integer(weights, "num_bits") != bits:
        got = f"{weights.get('type')!r:.20} of {weights.get('num_bits')!r:.20} bits"
        raise CheckpointError(f"weights must be of type float and num_bits {bits}, got {got}")


def _fp8(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantTensor:
    _check_float(weights, 8)
    strategy, scale = weights.get("strategy"), tensors["weight_scale"]
    scheme = FP8_CHANNEL
    if strategy == "tensor":
        scheme = FP8_TENSOR
    elif strategy == "block":
        scheme = _blocks(weights.get("block_structure"))
    elif strategy == "group":
        size = group_size_of(weights, "group_size")
        scheme = QuantScheme(8, "channel" if size is None else size, codebook="e4m3")
    elif strategy != "channel":
        raise CheckpointError(f"the strategy must be tensor, channel, group or block, got {strategy!r:.40}")
    return fp8(tensors["weight"], scale, scheme)


def _blocks(structure: Any) -> QuantScheme:
    """Of a block_structure [128, 128], which older versions spell "128x128"."""
    sides = structure.lower().split("x") if isinstance(structure, str) else structure
    if isinstance(sides, list) and all(_is_decimal(side) for side in sides):
        return square("block_structure", [int(side) for side in sides])
    return square("block_structure", structure)


def _is_decimal(side: Any) -> bool:
    return type(side) is int or (isinstance(side, str) and side.isascii() and side.isdecimal() and len(side) < 10)


def _mxfp8(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantTensor:
    _check_kind(weights, MXFP8)
    return mxfp8(tensors["weight"], tensors["weight_scale"])


def _mxfp4(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantTensor:
    _check_kind(weights, MXFP4)
    return mxfp4(tensors["weight_packed"], tensors["weight_scale"])


def _nvfp4(weights: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantTensor:
    _check_kind(weights, NVFP4)
    packed, scale, outer = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_global_scale"))
    return nvfp4(packed, scale, outer, NVFP4, "weight_packed", "weight_global_scale")


_FLOATS: Final[dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], QuantTensor]]] = {
    FLOAT: _fp8, NAIVE: _fp8, MXFP8_BODY: _mxfp8, MXFP4_BODY: _mxfp4, NVFP4_BODY: _nvfp4,
}  # fmt: skip


def _oddities(group: Mapping[str, Any]) -> Iterator[Oddity]:
    asked = activations_of(group)
    if asked:
        yield Oddity(f"the config asks for {asked}", "the weights are used with 16-bit activations instead")


_ALSO = ("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS)
FLOATS: Format = Format(
    name="compressed-tensors float-quantized",
    required=("weight_scale", "weight"),
    optional=_ALSO,
    matches=lambda config: means(config, FLOAT, NAIVE, MXFP8_BODY),
    parse=parse,
    sliced=True,
)
FP4: Format = Format(
    name="compressed-tensors fp4-pack-quantized",
    required=("weight_packed", "weight_scale"),
    optional=("weight_global_scale", *_ALSO),
    matches=lambda config: means(config, MXFP4_BODY, NVFP4_BODY),
    parse=parse,
    sliced=True,
)
MIXED: Format = Format(
    name="compressed-tensors mixed-precision",
    required=("weight_scale",),
    optional=("weight", "weight_packed", "weight_shape", "weight_global_scale", *_ALSO),
    matches=lambda config: means(config, MIXED_BODY),
    parse=parse,
    sliced=True,
)
