"""optimum-quanto's files, read only: a model of transformers and `quanto_qmap.json`, which has for each module
`{"weights": "qint4", "activations": "none"}`; config.json says nothing.

| weights        | weight._data                          | weight._scale | weight._shift   | weight                            |
|----------------|---------------------------------------|---------------|-----------------|-----------------------------------|
| qint8          | int8 [N, K]                           | [N, 1]        |                 | data * scale                      |
| qfloat8_e4m3fn, qfloat8_e5m2 | that float, [N, K]      | [N, 1]        |                 | data * scale                      |
| qint4, qint2   | ._data uint8 [ceil(R / s), g]         | [R, 1]        | [R, 1], float   | code * scale - shift              |
|                |                                       |               | [R, 1], integer | (code - shift) * scale            |

R = N * K / g: the weight is cut into groups, `weight.reshape(R, g)`, and s = 4 or 2 rows lie in a byte, far apart: byte row i has
rows i, i + ceil(R / s), …, lowest bits first. Where K is at most 128 or no group fits, g = K. The tensors do not tell N and K;
the model's own layers do (`SHAPES`).

Activations that a file wants quantized (`input_scale`, `output_scale`: quanto rounds what goes into a layer and what comes out)
stay in 16 bits, which an oddity says; asked for as in the file, those of qint8 are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import GroupSize, QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import describe
from . import ACTIVATIONS, SHAPES, Config, Format, Oddity, Parsed
from .floating import FP8_CHANNEL, fp8
from .validation import check_float, check_scales, expect, naming

METHOD: Final = "quanto"
MAP: Final = "quanto_qmap.json"
MODULES: Final = "modules"
_BITS: Final = {"qint2": 2, "qint4": 4}


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        entry = _entry(module, config)
        kind, activations = entry.get("weights"), entry.get("activations", "none")
        needs = {"weight._scale", *({"weight._data._data", "weight._shift"} if kind in _BITS else {"weight._data"})}
        weights = {name for name in tensors if name.startswith("weight.")}
        if weights != needs:
            raise CheckpointError(f"{kind!r:.20} needs {', '.join(sorted(needs))}, got {', '.join(sorted(weights))}")
        scale = tensors["weight._scale"]
        if kind in _BITS:
            weight = _packed(_BITS[str(kind)], tensors, scale, _shape(module, config))
        elif kind == "qint8":
            weight = _bytes(tensors["weight._data"], scale)
        elif kind in ("qfloat8", "qfloat8_e4m3fn"):
            weight = fp8(tensors["weight._data"], scale, FP8_CHANNEL, "weight._scale")
        else:
            raise CheckpointError(
                f"{MAP} says weights {kind!r:.40}; read are qint2, qint4, qint8 and qfloat8_e4m3fn; dequantize it with "
                "optimum-quanto and quantize the model again"
            )
        if activations in (None, "none"):
            return Parsed(weight)
        asked = f"{MAP} asks for {activations!s:.20} activations"
        if config.get(ACTIVATIONS) == "file" and activations == "qint8":
            raise CheckpointError(
                f'{asked}, of inputs and outputs, which no kernel here has; load it with activations="16bit"'
            )
        return Parsed(weight, (Oddity(asked, "16-bit activations are used instead"),))


def _entry(module: str, config: Config) -> Mapping[str, Any]:
    modules = config.get(MODULES)
    entry = modules.get(module) if isinstance(modules, dict) else None
    if not isinstance(entry, dict):
        raise CheckpointError(f"{MAP} has no entry for it, got {entry!r:.40}")
    return entry


def _shape(module: str, config: Config) -> tuple[int, int]:
    shapes: Mapping[str, tuple[int, int]] = config[SHAPES]() if SHAPES in config else {}
    if module not in shapes:
        raise CheckpointError(
            "the model that config.json describes has no linear layer of that name, which would tell N, K"
        )
    return shapes[module]


def _bytes(stored: Tensor, scale: Tensor) -> QuantTensor:
    if stored.dim() != 2:
        raise CheckpointError(f"weight._data must be int8 [N, K], got {describe(stored)}")
    expect("weight._data", stored, (torch.int8,), tuple(stored.shape))
    check_float("weight._scale", scale, (stored.shape[0], 1), f"N={stored.shape[0]}")
    check_scales(scale)
    return QuantTensor((stored.short() + 128).to(torch.uint8), scale, None, None, QuantScheme(8, "channel"))


def _packed(bits: int, tensors: Mapping[str, Tensor], scale: Tensor, shape: tuple[int, int]) -> QuantTensor:
    (N, K), stored, shift = shape, tensors["weight._data._data"], tensors["weight._shift"]
    if stored.dim() != 2 or not stored.shape[1] or K % stored.shape[1]:
        raise CheckpointError(f"weight._data._data must be uint8 with groups that divide K={K}, got {describe(stored)}")
    group, fields = stored.shape[1], 8 // bits
    rows = N * (K // group)
    why = f"N={N}, K={K}, groups of {group}"
    expect("weight._data._data", stored, (torch.uint8,), (-(-rows // fields), group), why)
    check_float("weight._scale", scale, (rows, 1), why)
    check_scales(scale)
    integers = (torch.int8, torch.uint8)
    expect("weight._shift", shift, (*FLOAT_DTYPES, *integers), (rows, 1), why)
    parts = [stored >> bits * i & (1 << bits) - 1 for i in range(fields)]
    codes = torch.cat(parts)[:rows].reshape(N, K)
    scales, shifts = scale.reshape(N, -1), shift.reshape(N, -1)
    size: GroupSize = "channel" if group == K else group
    if shift.dtype not in integers:
        if not bool(shift.isfinite().all()):
            raise CheckpointError("weight._shift must be finite, got NaN or infinite entries")
        return QuantTensor(codes, scales, -shifts, None, QuantScheme(bits, size, "offset"))
    if shift.numel() and not 0 <= int(shift.min()) <= int(shift.max()) < 1 << bits:
        raise CheckpointError(
            f"weight._shift must be 0 … {(1 << bits) - 1}, got {int(shift.min())} … {int(shift.max())}"
        )
    return QuantTensor(codes, scales, shifts.to(torch.uint8), None, QuantScheme(bits, size, "int"))


FORMAT: Format = Format(
    name=METHOD,
    required=("weight._scale",),
    optional=("weight._data", "weight._data._data", "weight._shift", "input_scale", "output_scale"),
    matches=lambda config: config.get("quant_method") == METHOD,
    parse=parse,
    needs_shapes=True,
)
