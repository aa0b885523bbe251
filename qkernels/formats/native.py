"""Our own format: every `QuantTensor` without loss, in as few bytes as its codes have bits.

| tensor       | dtype      | shape                        | content                                              |
|--------------|------------|------------------------------|------------------------------------------------------|
| qweight      | uint8      | [..., N, ceil(K * bits / 8)] | codes, Stream(bits) along K                          |
| scales       | as made    | [..., N, G]                  | [..., ceil(N / rows), G] where blocks of rows share them |
| zeros        | uint8      | [..., N, ceil(G * bits / 8)] | integer zero points (true ones), Stream(bits) along G |
|              | float      | [..., N, G]                  | float zero points and offsets                        |
| factors      | uint8      | [..., N, ceil(2 G * bits / 8)] | instead of scales: small factors of them (and then of |
|              |            |                              | offsets), less their lowest, Stream(their bits) along G |
| outer_scales, outer_zeros | floating | [..., N, S]       | outer factors                                        |
| group_index  | int32      | [K], or [E, K]               | act-order only                                       |
| x_static     | float32    | [2]                          | scale and zero point of x, of static activations     |
| weight_shape | int64      | [2 or more]                  | [..., N, K]; K is not in the shape of qweight        |
| weight       | uint8      | [0]                          | nothing; see below                                   |

`quantization_config`: `{"quant_method": "qkernels", "version": 1, "scheme": "w4a16_g128", "modules": {name: scheme}}`
with the schemes of those modules that differ from `scheme`.

**Why an empty `weight`.** A program that has not imported this library may load the checkpoint all the same: transformers warns
of a quant_method that it does not know, and initializes what it misses with random numbers. An empty tensor where it looks for a
weight is a mismatch of shapes, which is an error everywhere (docs/decisions/0017). Stacked experts are parameters without a
`.weight`, so theirs has the stack's own name (`tensor_name`). Files from before have none, or none of stacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..factors import Factors, as_bytes, kind_of
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import FLOAT_DTYPES, SCALE_DTYPES, QuantTensor
from ..text import describe
from . import Config, Format, Parsed, Written
from .bitstream import pack_bytes, unpack_bytes
from .validation import expect, group_index_of, integer, naming

METHOD = "qkernels"
VERSION = 1
GUARD = "weight"
MAX_WEIGHTS = 2**48  # products of sizes beyond this overflow before any check could compare them


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        scheme = scheme_of(module, config)
        check_guard(tensors)
        shape = weight_shape(tensors["weight_shape"])
        rows, in_features = shape[:-1], shape[-1]
        groups = scheme.num_groups(in_features)
        width = -(-in_features * scheme.bits // 8)
        expect("qweight", tensors["qweight"], (torch.uint8,), (*rows, width), f"{scheme}, weight_shape {shape}")
        codes = unpack_bytes(tensors["qweight"], scheme.bits, in_features)
        index = _group_index(tensors.get("group_index"), in_features, rows[:-1], scheme)
        static = _static(tensors, scheme)
        if scheme.factors is not None:
            factors = _parse_factors(tensors, rows, groups, scheme)
            return Parsed(QuantTensor.from_factors(codes, factors, scheme, index, static))
        scales = _required(tensors, "scales", scheme)
        bands = (*rows[:-1], -(-rows[-1] // scheme.rows))
        expect("scales", scales, SCALE_DTYPES, (*bands, groups), f"{scheme}, K={in_features}")
        if scheme.rows > 1:
            scales = as_bytes(scales).repeat_interleave(scheme.rows, dim=-2)[..., : rows[-1], :].view(scales.dtype)
        zeros = tensors.get("zeros")
        if (zeros is None) != scheme.symmetric:
            raise CheckpointError(f"zeros must be {'absent' if scheme.symmetric else 'there'} for {scheme}")
        if zeros is not None and scheme.zeros == "int":
            expect("zeros", zeros, (torch.uint8,), (*rows, -(-groups * scheme.bits // 8)), f"{scheme}, G={groups}")
            zeros = unpack_bytes(zeros, scheme.bits, groups)
        elif zeros is not None:
            expect("zeros", zeros, FLOAT_DTYPES, (*rows, groups), f"{scheme}, G={groups}")
        return Parsed(QuantTensor(codes, scales, zeros, index, scheme, x_static=static))


def _static(tensors: Mapping[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    if not ACTIVATIONS[scheme.act].static:
        if "x_static" in tensors:
            raise CheckpointError(f"x_static must be absent for {scheme}, whose activations are not static")
        return None
    static = _required(tensors, "x_static", scheme)
    expect("x_static", static, (torch.float32,), (2,), f"{scheme}: scale and zero point of x")
    return static


def _group_index(stored: Tensor | None, K: int, lead: list[int], scheme: QuantScheme) -> Tensor | None:
    """One order of columns, or one for each of stacked experts."""
    if stored is None or stored.dim() != 2:
        return group_index_of("group_index", stored, K, scheme)
    expect("group_index", stored, (torch.int32,), (*lead, K), "one for each expert")
    found = [group_index_of("group_index", one, K, scheme) for one in stored]
    return None if all(one is None for one in found) else stored


def _parse_factors(tensors: Mapping[str, Tensor], rows: list[int], groups: int, scheme: QuantScheme) -> Factors:
    kind = kind_of(scheme)
    both = kind.zeros == "offset"
    count = groups * (2 if both else 1)
    packed = _required(tensors, "factors", scheme)
    expect("factors", packed, (torch.uint8,), (*rows, -(-count * kind.small_bits // 8)), f"{scheme}, G={groups}")
    found = []
    for name in ("outer_scales", "outer_zeros"):
        t = _required(tensors, name, scheme) if name == "outer_scales" or both else None
        if t is not None:
            expect(name, t, FLOAT_DTYPES, (*rows, kind.outer_groups(groups)), f"{scheme}, G={groups}")
        found.append(t)
    outer, outer_zeros = found
    assert outer is not None
    values = unpack_bytes(packed, kind.small_bits, count)
    small = values[..., :groups].contiguous()
    dtype: torch.dtype = getattr(torch, kind.small)
    if dtype.is_floating_point:
        return Factors(small.view(dtype), outer)
    small = (small.short() + kind.low).to(dtype)
    return Factors(small, outer, values[..., groups:].contiguous() if both else None, outer_zeros)


def _required(tensors: Mapping[str, Tensor], name: str, scheme: QuantScheme) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name} must be there for {scheme}")
    return tensors[name]


def write(weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of one module, by suffix. Nothing is refused."""
    bits = weight.scheme.bits
    tensors = {"qweight": pack_bytes(weight.codes, bits)}
    if weight.factors is None:
        tensors["scales"] = weight.scales[..., :: weight.scheme.rows, :].contiguous()
    else:
        tensors |= _written_factors(weight.factors, weight.scheme)
    if weight.zeros is not None and weight.factors is None:
        integers = weight.scheme.zeros == "int"
        tensors["zeros"] = pack_bytes(weight.zeros, bits) if integers else weight.zeros.contiguous()
    if weight.group_index is not None:
        tensors["group_index"] = weight.group_index.contiguous()
    if weight.x_static is not None:
        tensors["x_static"] = weight.x_static.contiguous()
    return tensors | {"weight_shape": shape_tensor(weight), GUARD: guard()}


def _written_factors(factors: Factors, scheme: QuantScheme) -> dict[str, Tensor]:
    kind = kind_of(scheme)
    small = (
        as_bytes(factors.small)
        if factors.small.is_floating_point()
        else (factors.small.short() - kind.low).to(torch.uint8)
    )
    if factors.small_zeros is not None:
        small = torch.cat([small, factors.small_zeros], dim=-1)
    tensors = {"factors": pack_bytes(small, kind.small_bits), "outer_scales": factors.outer.contiguous()}
    if factors.outer_zeros is not None:
        tensors["outer_zeros"] = factors.outer_zeros.contiguous()
    return tensors


def config_of(written: Written) -> dict[str, Any]:
    """See `Format`. Which modules are quantized and in which order their columns are, the tensors say themselves."""
    default, modules = written.default, sorted(written.modules.items())
    differing = {name: str(scheme) for name, scheme in modules if scheme != default}
    return {"quant_method": METHOD, "version": VERSION, "scheme": str(default), "modules": differing}


def scheme_of(module: str, config: Config) -> QuantScheme:
    """The scheme that a `quantization_config` gives a module.

    Raises:
        CheckpointError: another version of the format, or no scheme.
    """
    version = integer(config, "version")
    if version != VERSION:
        raise CheckpointError(f"the checkpoint has version {version} of this format, this qkernels reads {VERSION}")
    modules = config.get("modules", {})
    text = modules.get(module, config.get("scheme")) if isinstance(modules, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(f"quantization_config needs a scheme and modules with schemes, got {text!r:.40}")
    scheme = QuantScheme.parse(text)
    if isinstance(scheme.group_size, int) and scheme.group_size >= 2**31:
        raise CheckpointError(f"quantization_config needs groups smaller than 2^31, got {text}")
    return scheme


def tensor_name(module: str, suffix: str, weight: QuantTensor) -> str:
    """What a tensor of a weight is called in files.

    >>> import torch
    >>> from qkernels import RTN, QuantTensor
    >>> from qkernels.formats.native import tensor_name
    >>> experts = QuantTensor.stack([RTN(4, 8).quantize(torch.ones(2, 8))] * 3)
    >>> tensor_name("mlp.experts.down_proj", "qweight", experts), tensor_name("mlp.experts.down_proj", "weight", experts)
    ('mlp.experts.down_proj.qweight', 'mlp.experts.down_proj')
    """
    return module if suffix == GUARD and weight.codes.dim() > 2 else f"{module}.{suffix}"


def guard() -> Tensor:
    """What stands in the place of the weight that others would look for."""
    return torch.empty(0, dtype=torch.uint8)


def check_guard(tensors: Mapping[str, Tensor]) -> None:
    """Raise where a module's `weight` is one, or nothing that we wrote.

    Raises:
        CheckpointError: says so.
    """
    found = tensors.get(GUARD)
    if found is not None and found.numel():
        raise CheckpointError(
            f"both a weight {describe(found)} and a quantized one are there; one of them is left over"
        )
    if found is not None and (found.dtype, found.shape) != (torch.uint8, (0,)):
        raise CheckpointError(f"weight must be uint8 [0], which stands for nothing, got {describe(found)}")


def shape_tensor(weight: QuantTensor) -> Tensor:
    """What `weight_shape` holds."""
    return torch.tensor(weight.codes.shape, dtype=torch.int64)


def weight_shape(tensor: Tensor) -> list[int]:
    """The sizes in a file's `weight_shape`, checked.

    Raises:
        CheckpointError: it is no list of sizes, or of sizes that no weight has.
    """
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or not 2 <= tensor.numel() <= 8 or bool((tensor < 0).any()):
        raise CheckpointError(f"weight_shape must be int64 sizes [..., N, K], got {tensor.dtype} {list(tensor.shape)}")
    sizes = [int(size) for size in tensor]
    if math.prod(sizes) >= MAX_WEIGHTS or max(sizes) >= 2**31:
        raise CheckpointError(f"weight_shape must be below 2^31 and 2^48 weights in all, got {sizes}")
    return sizes


FORMAT: Format = Format(
    name="native",
    required=("qweight", "weight_shape"),
    optional=("scales", "zeros", "factors", "outer_scales", "outer_zeros", "group_index", "x_static", GUARD),
    matches=lambda config: config.get("quant_method") == METHOD and "layout" not in config,
    parse=parse,
    write=write,
    config_of=config_of,
    stacks=True,
)
