"""compressed-tensors files, written: integers as `pack-quantized`, floats as the format of their kind. The tables at the heads of
`compressed_tensors` and `compressed_floats` say what the tensors hold.

| scheme                                     | format               | tensors                                            |
|--------------------------------------------|----------------------|----------------------------------------------------|
| w2a16 … w8a16, w4a8w, w4a8z, …             | pack-quantized       | weight_packed, weight_scale, weight_shape, …       |
| w8a8w_channel, w8a8z_channel, …            | int-quantized        | weight, weight_scale, weight_zero_point            |
| fp8_tensor, fp8_channel, fp8_block128, …   | float-quantized      | weight, weight_scale                               |
| mxfp4_g32                                  | mxfp4-pack-quantized | weight_packed, weight_scale                        |
| nvfp4_g16                                  | nvfp4-pack-quantized | weight_packed, weight_scale, weight_global_scale   |

Schemes of several formats in one checkpoint make it `mixed-precision`; each config group then says its own. Activations are
left in 16 bits (W4A16, NVFP4A16, W8A16), or in int8 with one scale a token, or static. Its arithmetic is that of "int8_wide",
"int8_zero" and the static ones (`scheme.ACTIVATIONS`); "int8", which divides by 127, it has no word for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ..factors import as_bytes
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import QuantTensor
from ..text import dtype_name
from . import Format, Written
from .bitstream import pack
from .compressed_floats import FLOAT, MIXED_BODY, MXFP4_BODY, NVFP4_BODY
from .compressed_tensors import BITS, INT, METHOD, OF_ACTIVATIONS, PACK, means, parse_packed
from .floating import E8M0, MXFP4, NVFP4
from .native import shape_tensor
from .validation import integer_scheme_reasons, refuse, weight_reasons

NAME = "compressed-tensors"
VERSION: Final = "0.18.0"  # the first whose packing is ours
_TOKEN: Final = {
    "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "group_size": None, "actorder": None,
    "block_structure": None, "observer": None, "observer_kwargs": {},
}  # fmt: skip
_TENSOR: Final = {**_TOKEN, "strategy": "tensor", "dynamic": False, "observer": "minmax"}
_ACTIVATIONS: Final[dict[str | None, dict[str, Any]]] = {
    "int8_wide": {**_TOKEN, "symmetric": True},
    "int8_zero": {**_TOKEN, "symmetric": False},
    "int8_static": {**_TENSOR, "symmetric": True},
    "int8_static_zero": {**_TENSOR, "symmetric": False},
}
_SCALES: Final = {MXFP4_BODY: "torch.uint8", NVFP4_BODY: "torch.float8_e4m3fn"}  # dtypes as its config spells them


def write(weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of one module, by suffix.

    Raises:
        ConversionError: a scheme without a format above; one scale per tensor with zero points; int8 activations that it has not;
            a short last group; stacked experts; scales that are all zero, or of another dtype than the format's.
    """
    scheme = weight.scheme
    body = _body(scheme)
    reasons = _reasons(scheme)
    if weight.codes.dim() != 2:
        reasons += weight_reasons(weight)
    elif not reasons:
        reasons += _float_reasons(weight, body) if body not in (PACK, INT) else weight_reasons(weight)
    if isinstance(scheme.group_size, int) and scheme.rows == 1 and weight.K % scheme.group_size:
        reasons.append(f"K={weight.K} is not a multiple of group_size {scheme.group_size}, which its readers need")
    if scheme.group_size == "tensor" and not weight.scales.numel():
        reasons.append("an empty weight has no scale per tensor")
    refuse(NAME, reasons)
    if body not in (PACK, INT):
        return _floats(weight, body)
    return (_bytes(weight) if body == INT else _integers(weight)) | _inputs(weight)


def _inputs(weight: QuantTensor) -> dict[str, Tensor]:
    """Scale and zero point of static activations, the scale in the dtype of the weight's where that holds it."""
    if weight.x_static is None:
        return {}
    scale, zero = weight.x_static[:1], weight.x_static[1:]
    stored = scale.to(weight.scales.dtype)
    tensors = {
        "input_scale": stored if weight.x_static.is_meta or torch.equal(stored.float(), scale) else scale.clone()
    }
    return tensors | ({"input_zero_point": zero.to(torch.int8)} if ACTIVATIONS[weight.scheme.act].zero_points else {})


def _bytes(weight: QuantTensor) -> dict[str, Tensor]:
    signed = {"weight": weight.codes, "weight_zero_point": weight.zeros}
    tensors = {name: (t.short() - 128).to(torch.int8) for name, t in signed.items() if t is not None}
    if weight.group_index is not None:
        tensors["weight_g_idx"] = weight.group_index.contiguous()
    return tensors | {"weight_scale": _scales(weight)}


def _integers(weight: QuantTensor) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    tensors = {"weight_packed": pack(weight.codes, bits), "weight_scale": _scales(weight)}
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack(weight.zeros.T, bits).T.contiguous()
    if weight.group_index is not None:
        tensors["weight_g_idx"] = weight.group_index.contiguous()
    return tensors | {"weight_shape": shape_tensor(weight)}


def _floats(weight: QuantTensor, body: str) -> dict[str, Tensor]:
    if body == FLOAT:
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": _scales(weight)}
    pairs = {"weight_packed": weight.codes[:, ::2] | weight.codes[:, 1::2] << 4}
    if weight.factors is None:
        return pairs | {"weight_scale": as_bytes(weight.scales).contiguous()}
    outer = weight.factors.outer[0].contiguous()
    return pairs | {"weight_scale": weight.factors.small.contiguous(), "weight_global_scale": outer}


def _scales(weight: QuantTensor) -> Tensor:
    """One a tensor, a block or a row of a group."""
    if weight.scheme.group_size == "tensor":
        return weight.scales[0, :1].contiguous()
    return weight.scales[:: weight.scheme.rows].contiguous()


def config_of(written: Written) -> dict[str, Any]:
    """See `Format`. "Linear" has the default scheme; every other scheme becomes a group that names its modules."""
    default, modules = written.default, written.modules
    for scheme in written.schemes:
        refuse(NAME, _reasons(scheme))
    targets: dict[QuantScheme, list[str]] = {default: ["Linear"]}
    for name, scheme in sorted(modules.items()):
        if scheme != default:
            targets.setdefault(scheme, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": _fields(scheme, written.act_order),
            "input_activations": dict(_ACTIVATIONS[scheme.act]) if scheme.act in _ACTIVATIONS else None,
            "output_activations": None,
            "format": _body(scheme),
        }
        for i, (scheme, names) in enumerate(targets.items())
    }
    bodies = sorted({_body(scheme) for scheme in targets})
    return {
        "quant_method": METHOD,
        "format": bodies[0] if len(bodies) == 1 else MIXED_BODY,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([] if "lm_head" in modules else ["lm_head"]), *sorted({*written.unquantized} - {"lm_head"})],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _fields(scheme: QuantScheme, act_order: bool) -> dict[str, Any]:
    body, grouped = _body(scheme), isinstance(scheme.group_size, int) and scheme.rows == 1
    strategy = "block" if scheme.rows > 1 else "group" if grouped else scheme.group_size
    fields: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if body in (PACK, INT) else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if body == NVFP4_BODY else strategy,
        "group_size": scheme.group_size if grouped else None,
        "actorder": "group" if act_order and grouped and body in (PACK, INT) else None,
        "block_structure": [scheme.rows, scheme.rows] if scheme.rows > 1 else None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scales = _SCALES.get(body)
    return fields if scales is None else fields | {"scale_dtype": scales, "zp_dtype": scales}


def _body(scheme: QuantScheme) -> str:
    """The format of a scheme that one has; pack-quantized of any other."""
    if scheme.act in _ACTIVATIONS and scheme.bits == 8 and scheme.codebook is None:
        return INT
    if scheme in (MXFP4, NVFP4):
        return MXFP4_BODY if scheme == MXFP4 else NVFP4_BODY
    plain = not isinstance(scheme.group_size, int) or scheme.rows > 1
    return FLOAT if scheme.codebook == "e4m3" and plain else PACK


def _reasons(scheme: QuantScheme) -> list[str]:
    """Why no format has a scheme."""
    if _body(scheme) not in (PACK, INT):
        return []
    if scheme.group_size == "tensor" and scheme.zeros == "int":
        return ["one scale per tensor goes with one zero point, and ours has one a row"]
    plain = scheme if scheme.group_size != "tensor" else replace(scheme, group_size="channel")
    if scheme.act != "int8":
        return integer_scheme_reasons(replace(plain, act=None) if scheme.act in _ACTIVATIONS else plain, BITS)
    wide = replace(scheme, act="int8_wide")
    said = f"its int8 activations are those of {wide} (max |x| / 127.5), got {scheme}"
    return [*integer_scheme_reasons(replace(plain, act=None), BITS), said]


def _float_reasons(weight: QuantTensor, body: str) -> list[str]:
    """Why a weight of floats does not fit its format, which has no act-order and one dtype for scales."""
    reasons = [] if weight.group_index is None else ["weight_g_idx goes with integer codes, and these are floats"]
    if body == FLOAT:
        return reasons + weight_reasons(weight)
    if not weight.scales.numel():
        return [*reasons, "the weight is empty"]
    if weight.factors is None:
        got = dtype_name(weight.scales.dtype)
        return reasons if weight.scales.dtype == E8M0 else [*reasons, f"scales of mxfp4 are float8_e8m0fnu, got {got}"]
    outer, small = weight.factors.outer, weight.factors.small
    if outer.is_meta:
        return reasons
    if outer.dtype != torch.float32 or bool((outer != outer[:1]).any()) or not float(outer[0, 0]) > 0:
        reasons.append(
            "weight_global_scale is one positive float32 for the whole weight, and its rows have outer scales of their own"
        )
    if not bool(small.float().any()):
        reasons.append("all scales are zero, which its readers refuse")
    return reasons


PACKED: Format = Format(
    name=NAME,
    required=("weight_packed", "weight_scale", "weight_shape"),
    optional=("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS),
    matches=lambda config: means(config, PACK),
    parse=parse_packed,
    write=write,
    config_of=config_of,
    sliced=True,
)
