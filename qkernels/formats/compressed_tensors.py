"""compressed-tensors files of integers, as llm-compressor writes them, read: `pack-quantized` (`compressed_writing` writes it),
`int-quantized`.

| tensor (pack-quantized) | dtype  | shape                     | content                                              |
|-------------------------|--------|---------------------------|------------------------------------------------------|
| weight_packed           | int32  | [N, ceil(K * bits / 32)]  | codes, Stream(bits) along K                          |
| weight_scale            | float  | [N, G], [N, 1] or [1]     | by strategy: group, channel, tensor                  |
| weight_zero_point       | int32  | [ceil(N * bits / 32), G]  | zero points, Stream(bits) down N; asymmetric only    |
| weight_g_idx            | int32  | [K]                       | group of each column; actorder "group" only          |
| weight_shape            | int64  | [2]                       | [N, K]                                               |

Codes and zero points are signed numbers with 2^(bits-1) added, which makes them our codes and true zero points. Some files
keep zero points unpacked, as int8 `[N, G]` without that addition; the dtype tells.

**Two packings of 3, 5, 6 and 7 bits.** Before version 0.18 a word held 32 // bits whole codes and its top bits were wasted;
since then codes straddle words. Nothing but the version says so, but the number of words does: dense if and only if it is
ceil(K * bits / 32). (Rows so short that both need the same number go by the version.)

`int-quantized` keeps `weight` as int8 `[N, K]`, one code a byte, and is made for int8 activations.

int8 activations with one scale a token, made while the model runs, are those of our kernels: "int8_wide" (symmetric) and
"int8_zero" (`scheme.ACTIVATIONS`), to the bit what compressed-tensors 0.20 computes of x (calculate_qparams, fake_quantize). So
are static ones with one scale for all tokens, "int8_static" and "int8_static_zero":

| tensor           | dtype | shape     | content                                                            |
|------------------|-------|-----------|--------------------------------------------------------------------|
| input_scale      | float | [1] or [] | x ≈ (code - zero point) * scale                                    |
| input_zero_point | int8  | [1] or [] | asymmetric: a whole number; symmetric: absent or 0                 |

All others (of 4 bits, of a group, of outputs) leave activations in 16 bits, and an oddity says what the file asks for; asked to
run them (`load(…, activations="file")`), they are an error.

The scheme of a module comes from the `config_groups` entry whose `targets` fit it best: its name, else a pattern ("re:…"),
else the class name "Linear".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import ACTIVATIONS as ACTS
from ..scheme import GroupSize, QuantScheme
from ..tensor import QuantTensor
from . import ACTIVATIONS, Config, Format, Oddity, Parsed
from .bitstream import unpack, word_count
from .native import weight_shape
from .validation import (
    boolean,
    check_float,
    check_scales,
    expect,
    group_index_of,
    group_size_of,
    integer,
    naming,
    pattern_of,
)

METHOD = "compressed-tensors"
PACK, INT = "pack-quantized", "int-quantized"
BITS = range(2, 9)
DENSE_SINCE = (0, 18)


class _Fields(NamedTuple):
    bits: int
    group_size: GroupSize
    symmetric: bool
    ordered: bool  # actorder "group"
    activations: str  # what the group wants done to activations, "" for nothing
    act: str | None  # those of our kernels: a key of `scheme.ACTIVATIONS`

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.bits, self.group_size, "none" if self.symmetric else "int", self.act)


def parse_packed(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module of a pack-quantized file; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        fields = _fields(module, config, PACK)
        packed, sizes = tensors["weight_packed"], weight_shape(tensors["weight_shape"])
        if packed.dim() != 2 or len(sizes) != 2:
            raise CheckpointError(
                f"weight_packed must hold one [N, K] weight, got {list(packed.shape)} for weight_shape {sizes}; "
                "stacked experts are not read yet"
            )
        N, K = sizes
        dense = _dense(packed, K, fields.bits, config)
        width = _words(K, fields.bits, dense)
        why = f"{fields.bits} bits, weight_shape {sizes}"
        expect("weight_packed", packed, (torch.int32,), (N, width), why)
        weight = _weight(_unpack(packed, fields.bits, K, dense), tensors, fields, dense)
        return _as_asked(weight, fields, config, _oddities(tensors, fields, dense))


def parse_integers(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module of an int-quantized file.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        fields = _fields(module, config, INT)
        stored = tensors["weight"]
        if stored.dim() != 2:
            raise CheckpointError(f"weight must be int8 [N, K], got {list(stored.shape)}")
        expect("weight", stored, (torch.int8,), tuple(stored.shape))
        weight = _weight(_unsigned("weight", stored, fields.bits), tensors, fields, True)
        return _as_asked(weight, fields, config, _oddities(tensors, fields, True))


def _as_asked(weight: QuantTensor, fields: _Fields, config: Config, oddities: Iterator[Oddity]) -> Parsed:
    """The weight with the activations that it runs with, and a word about those of the file."""
    if not fields.activations:
        return Parsed(weight, tuple(oddities))
    if fields.act is not None:
        return Parsed(weight, tuple(oddities))
    asked = f"the config asks for {fields.activations}"
    if config.get(ACTIVATIONS) == "file":
        raise CheckpointError(
            f"{asked}; kernels here have int8 with one scale a token, made while they run, or one for all from the file; load it "
            'with activations="16bit"'
        )
    return Parsed(weight, (Oddity(asked, "the weights are used with 16-bit activations instead"), *oddities))


def _act_of(group: Mapping[str, Any]) -> str | None:
    """The activations of our kernels that a group asks for; None where they have none such."""
    args = group.get("input_activations")
    if not isinstance(args, dict) or group.get("output_activations") is not None:
        return None
    static = args.get("dynamic") in (None, False)
    strategy = args.get("strategy") or ("tensor" if args.get("group_size") is None else "group")
    found = (args.get("num_bits"), args.get("type") or "int", strategy, static or args.get("dynamic"))
    if found != (8, "int", "tensor" if static else "token", True):
        return None
    zero_points = boolean(args, "symmetric") is False
    if static:
        return "int8_static_zero" if zero_points else "int8_static"
    return "int8_zero" if zero_points else "int8_wide"


def _static(tensors: Mapping[str, Tensor], act: str | None) -> Tensor | None:
    """`QuantTensor.x_static` of a module whose activations are static.

    Raises:
        CheckpointError: naming the field.
    """
    if not ACTS[act].static:
        return None
    scale, zero = (tensors.get(f"input_{leaf}") for leaf in ("scale", "zero_point"))
    way_out = 'the file has static activations; quantize it again, or let its config say "input_activations": null'
    if scale is None:
        raise CheckpointError(f"input_scale is missing: {way_out}")
    check_float("input_scale", scale.reshape(-1), (1,), f"one for all tokens, got {list(scale.shape)}")
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"input_scale must be positive and finite, got {value}: {way_out}")
    if zero is None and ACTS[act].zero_points:
        raise CheckpointError(
            f"input_zero_point is missing, although input_activations say symmetric: false: {way_out}"
        )
    if zero is not None:
        expect("input_zero_point", zero.reshape(-1), (torch.int8,), (1,), "one for all tokens")
        if int(zero) and not ACTS[act].zero_points:
            raise CheckpointError(
                f"input_zero_point must be absent or 0, because input_activations say symmetric, got {int(zero)}"
            )
    return torch.tensor([value, 0.0 if zero is None else float(zero)])


def _oddities(tensors: Mapping[str, Tensor], fields: _Fields, dense: bool) -> Iterator[Oddity]:
    """The older packing, act-order that is natural or denied."""
    if fields.bits in (3, 5, 6, 7) and not dense:
        yield Oddity("codes are packed as before version 0.18", f"{32 // fields.bits} in a word")
    if "weight_g_idx" in tensors and not fields.ordered and not _unset(tensors["weight_g_idx"]):
        yield Oddity("weight_g_idx is there although actorder is not group", "read as it is")
    if fields.ordered and "weight_g_idx" not in tensors:
        yield Oddity("weight_g_idx is missing although actorder is group", "its columns are read in natural order")


def _weight(codes: Tensor, tensors: Mapping[str, Tensor], fields: _Fields, dense: bool) -> QuantTensor:
    """What both bodies have in common: scales, zero points and group index around the codes [N, K]."""
    N, K = codes.shape
    scheme = fields.scheme
    G = scheme.num_groups(K)
    why = (
        f"N={N}, K={K}, {fields.group_size if isinstance(fields.group_size, str) else f'groups of {fields.group_size}'}"
    )
    scales = _spread("weight_scale", tensors["weight_scale"], N, G, fields.group_size)
    check_float("weight_scale", scales, (N, G), why)
    check_scales(scales)
    zeros = _zeros(tensors.get("weight_zero_point"), N, G, fields, dense)
    if fields.symmetric and zeros is not None:
        if not bool((zeros == scheme.mid_code).all()):
            raise CheckpointError("weight_zero_point must be absent or zero, because the config says symmetric")
        zeros = None
    if not fields.symmetric and zeros is None:
        raise CheckpointError("weight_zero_point is missing, although the config says symmetric: false")
    g_idx = tensors.get("weight_g_idx")
    g_idx = None if g_idx is None or _unset(g_idx) else g_idx
    index = group_index_of("weight_g_idx", g_idx, K, scheme)
    return QuantTensor(codes, scales, zeros, index, scheme, x_static=_static(tensors, scheme.act))


def _zeros(stored: Tensor | None, N: int, G: int, fields: _Fields, dense: bool) -> Tensor | None:
    if stored is None:
        return None
    if stored.dtype != torch.int32:
        spread = _spread("weight_zero_point", stored, N, G, fields.group_size)
        expect("weight_zero_point", spread, (torch.int8,), (N, G), "not packed")
        return _unsigned("weight_zero_point", spread, fields.bits)
    expect(
        "weight_zero_point", stored, (torch.int32,), (_words(N, fields.bits, dense), G), f"{fields.bits} bits, N={N}"
    )
    return _unpack(stored.T, fields.bits, N, dense).T.contiguous()


def _spread(field: str, tensor: Tensor, N: int, G: int, group_size: GroupSize) -> Tensor:
    """One value for the whole tensor, repeated for every row; anything else as it is."""
    if group_size != "tensor" or tensor.numel() != 1 or tensor.dim() > 2:
        return tensor
    return tensor.reshape(1, 1).expand(N, G).contiguous()


def _unset(g_idx: Tensor) -> bool:
    """A g_idx that was made but never filled: -1 everywhere."""
    return g_idx.numel() > 0 and not g_idx.is_floating_point() and bool((g_idx == -1).all())


def _unsigned(field: str, values: Tensor, bits: int) -> Tensor:
    """int8 numbers -> codes."""
    codes: Tensor = values.short() + 2 ** (bits - 1)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise CheckpointError(f"{field} must be {-(2 ** (bits - 1))} … {2 ** (bits - 1) - 1} for {bits} bits")
    return codes.to(torch.uint8)


def _dense(packed: Tensor, K: int, bits: int, config: Config) -> bool:
    """Whether codes straddle words."""
    dense, padded = _words(K, bits, True), _words(K, bits, False)
    return packed.shape[-1] == dense if dense != padded else _version(config) >= DENSE_SINCE


def _version(config: Config) -> tuple[int, ...]:
    """The version as numbers; without one, that of today."""
    parts = str(config.get("version", "0.18")).split(".")[:2]
    return tuple(int(part) for part in parts) if all(p.isascii() and p.isdecimal() for p in parts) else DENSE_SINCE


def _words(count: int, bits: int, dense: bool) -> int:
    return word_count(count, bits) if dense else -(-count // (32 // bits))


def _unpack(words: Tensor, bits: int, count: int, dense: bool) -> Tensor:
    if dense:
        return unpack(words, bits, count)
    codes = [words >> (bits * i) & (2**bits - 1) for i in range(32 // bits)]
    whole: Tensor = torch.stack(codes, -1).to(torch.uint8).flatten(-2)
    return whole[..., :count].contiguous()


def _fields(module: str, config: Config, body: str) -> _Fields:
    group = group_of(module, config)
    if group.get("format") not in (None, body):
        raise CheckpointError(f"its config group has the format {group['format']!r:.40}, the checkpoint says {body}")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"its config group needs weights with num_bits and strategy, got {weights!r:.40}")
    if weights.get("type", "int") != "int":
        raise CheckpointError(
            f"weights must be of type int, got {weights['type']!r:.40}: it holds floating-point codes"
        )
    bits = integer(weights, "num_bits")
    if bits not in BITS:
        raise CheckpointError(f"num_bits must be 2 … 8, got {bits}")
    symmetric = boolean(weights, "symmetric")
    ordered = weights.get("actorder")
    return _Fields(
        bits=bits,
        group_size=_group_size(weights),
        symmetric=symmetric is not False,
        ordered=ordered is True or str(ordered).lower() == "group",
        activations=activations_of(group),
        act=_act_of(group),
    )


def _group_size(weights: Mapping[str, Any]) -> GroupSize:
    stated = weights.get("group_size") is not None
    size = group_size_of(weights, "group_size") if stated else None
    strategy = weights.get("strategy") or ("tensor" if not stated else "channel" if size is None else "group")
    if strategy in ("channel", "tensor"):
        return "channel" if strategy == "channel" else "tensor"
    if strategy != "group":
        raise CheckpointError(f"the strategy must be group, channel or tensor, got {strategy!r:.40}")
    if size is None:
        raise CheckpointError("the strategy is group, but there is no group_size")
    return size


def activations_of(group: Mapping[str, Any]) -> str:
    """What a group says about activations, in words; "" where it leaves them in 16 bits."""
    said = []
    for key, what in (("input_activations", "activations"), ("output_activations", "output activations")):
        args = group.get(key)
        if args is None:
            continue
        if not isinstance(args, dict):
            raise CheckpointError(f"{key} must be an object or null, got {args!r:.40}")
        when = "quantized per token" if args.get("dynamic") else "with scales of their own in the file"
        said.append(f"{args.get('num_bits')!r:.10}-bit {args.get('type', 'int')!s:.10} {what}, {when}")
    return ", and ".join(said)


def group_of(module: str, config: Config) -> Mapping[str, Any]:
    """The config group of a module: its name before a pattern before a class name. A config with one group needs no
    match: names in files and in models may differ."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise CheckpointError(f"quantization_config needs config_groups, got {groups!r:.40}")
    if any(_matches_name(module, t) for t in _strings(config, "ignore")):
        raise CheckpointError("quantization_config ignores it, but it has quantized tensors")
    ranked = [
        (0 if target == module else 1 if target.startswith("re:") else 2, group)
        for group in groups.values()
        for target in _strings(group, "targets")
        if target == "Linear" or _matches_name(module, target)
    ]
    if ranked:
        best: Mapping[str, Any] = min(ranked, key=lambda pair: pair[0])[1]
        return best
    if len(groups) > 1:
        raise CheckpointError(f"none of the {len(groups)} config_groups targets it")
    only: Mapping[str, Any] = next(iter(groups.values()))
    return only


def _matches_name(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return pattern_of(target, "targets or ignore", "re:").match(module) is not None
    return target == module


def _strings(config: Config, key: str) -> Iterator[str]:
    values = config.get(key) or []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise CheckpointError(f"quantization_config needs {key} to be a list of names, got {values!r:.40}")
    return iter(values)


def means(config: Config, *bodies: str) -> bool:
    """Whether a `quantization_config` is of this method, in one of these formats, and not sparse besides."""
    sparsity = config.get("sparsity_config")
    sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    return config.get("quant_method") == METHOD and config.get("format") in bodies and not sparse


# Scales that no kernel here looks at: see `activations_of`.
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")

INTEGERS: Format = Format(
    name="compressed-tensors int-quantized",
    required=("weight_scale", "weight"),
    optional=("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS),
    matches=lambda config: means(config, INT),
    parse=parse_integers,
    sliced=True,
)
