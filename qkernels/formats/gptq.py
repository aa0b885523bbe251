"""GPTQ files, v1 ("gptq") and v2 ("gptq_v2").

| tensor  | dtype      | shape                   | content                                            |
|---------|------------|-------------------------|----------------------------------------------------|
| qweight | int32      | [ceil(K * bits / 32), N] | codes, Stream(bits) down K                         |
| qzeros  | int32      | [G, ceil(N * bits / 32)] | zero points, Stream(bits) along N; v1 holds zero - 1 |
| scales  | fp16, bf16 | [G, N]                  |                                                    |
| g_idx   | int32      | [K]                     | group of each column; absent means k // group_size |

**The minus one of v1.** GPTQModel subtracts 0b0001…0001 from whole 2-, 4- and 8-bit words, so a true zero point of 0
borrows from the field above it; adding the same constant modulo 2^32 is the exact inverse, decoding field by field
is not. At 3 bits the fields are handled one by one, modulo 8. AutoGPTQ instead ORed a sign-extended -1 into the word,
which sets every field from the one with zero point 0 upwards to all ones; what was there is lost, and `oddities` names
such modules.

**Labels lie.** Symmetric files of GPTQModel 5 hold v2 zero points under the name "gptq". Where all fields equal
the symmetric constant of either version, the data decides and the label does not.

GPTQModel 7.7 refuses asymmetric v1 files whose `meta.quantizer` does not name GPTQModel itself; asymmetric weights for it are
better written as v2, which it takes from anybody (tests/golden/README.md).

Other than 2, 3, 4 and 8 bits are refused: the name alone does not tell whether their bits lie in planes (`gptq_planar`) or in a
stream (in auto-round's files they lie in a stream, which `widths` says).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..errors import CheckpointError
from ..group_index import natural_group_index
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from . import Config, Format, Oddity, Parsed, Written
from .bitstream import pack, unpack, word_count
from .validation import (
    boolean,
    check_float,
    check_scales,
    expect,
    first_of,
    group_index_of,
    group_size_of,
    integer,
    integer_scheme_reasons,
    naming,
    pattern_of,
    refuse,
    true_zeros,
    weight_reasons,
)

Version = Literal[1, 2]
BITS = (2, 3, 4, 8)
WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a 1 in each field of a word
_NAMES: dict[Version, str] = {1: "gptq", 2: "gptq_v2"}
_TRUSTED_WRITERS = ("gptqmodel", "qkernels")  # subtract from whole words


class _Fields(NamedTuple):
    bits: int
    group_size: int | None
    sym: bool | None


class _Zeros(NamedTuple):
    """How the stored fields read: `values` are the true zero points [G, N], None for a symmetric weight."""

    values: Tensor | None
    stored_as: Version | None  # what the data says, where it can say it


def parse(
    version: Version, module: str, tensors: Mapping[str, Tensor], config: Config, widths: Sequence[int] = BITS
) -> Parsed:
    """Read one module; see the head of this file for `tensors`. `widths`: the bits whose codes are known to lie in a stream.

    A weight is symmetric if the config does not say `sym: false` and all zero points are 2^(bits-1).

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        fields = _fields(module, config, widths)
        scales, qweight, g_idx = tensors["scales"], tensors["qweight"], tensors.get("g_idx")
        if scales.dim() != 2:
            raise CheckpointError(f"scales must be [G, N], got {list(scales.shape)}")
        N = scales.shape[1]
        K = _in_features(qweight, g_idx, fields.bits)
        scheme = QuantScheme(fields.bits, fields.group_size or "channel")
        why = f"K={K}, group_size {scheme.group_size}"
        check_float("scales", scales, (scheme.num_groups(K), N), why)
        expect("qweight", qweight, (torch.int32,), (word_count(K, fields.bits), N), f"{fields.bits} bits, K={K}, N={N}")
        check_scales(scales)
        zeros = _read_zeros(version, tensors["qzeros"], scales, fields)
        if zeros.values is not None:
            scheme = QuantScheme(scheme.bits, scheme.group_size, "int")
        weight = QuantTensor(
            unpack(qweight.T, fields.bits, K),
            scales.T.contiguous(),
            None if zeros.values is None else zeros.values.T.contiguous(),
            group_index_of("g_idx", g_idx, K, scheme),
            scheme,
        )
        return Parsed(weight, tuple(_oddities(version, weight, tensors["qzeros"], zeros, fields, config)))


def write(version: Version, weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of one module, by suffix. g_idx is always written: older readers need it, and it alone gives K.

    Raises:
        ConversionError: bits other than 2, 3, 4, 8; a codebook, float zeros or offsets; one scale per tensor; int8
            activations; stacked experts; scales that are all zero.
    """
    scheme, bits = weight.scheme, weight.scheme.bits
    refuse(_NAMES[version], integer_scheme_reasons(scheme, BITS) + weight_reasons(weight))
    index = weight.group_index
    return {
        "qweight": pack(weight.codes, bits).T.contiguous(),
        "qzeros": _write_zeros(version, true_zeros(weight).T, bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": natural_group_index(weight.K, scheme, weight.device) if index is None else index.contiguous(),
    }


def config_of(version: Version, written: Written) -> dict[str, Any]:
    """See `Format`. Modules with a scheme of their own, and those left in 16 bits, become rules of `dynamic`."""
    for scheme in written.schemes:
        refuse(_NAMES[version], integer_scheme_reasons(scheme, BITS))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **_own_fields(written.default),
        "desc_act": written.act_order,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": "lm_head" in written.modules,
        "checkpoint_format": _NAMES[version],
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qkernels:{__version__}"]},
    }
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(_beside_quantized(written))}
    differing = {name: scheme for name, scheme in sorted(written.modules.items()) if scheme != written.default}
    rules |= {f"+:^{re.escape(name)}$": _own_fields(scheme) for name, scheme in differing.items()}
    return config | ({"dynamic": rules} if rules else {})


def _beside_quantized(written: Written) -> list[str]:
    """What is left out of the numbered layers that hold quantized ones: readers of this format look nowhere else."""
    stacks = {stack for stack in map(_stack, written.modules) if stack is not None}
    return [name for name in written.unquantized if _stack(name) in stacks]


def _stack(module: str) -> str | None:
    """`model.layers` of `model.layers.3.mlp.up_proj`."""
    parts = module.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if numbered is None else ".".join(parts[:numbered])


def _oddities(
    version: Version, weight: QuantTensor, qzeros: Tensor, zeros: _Zeros, fields: _Fields, config: Config
) -> Iterator[Oddity]:
    """What is strange about a module that parses: a label that the zero points contradict, act-order that the config
    denies, the overflow of AutoGPTQ."""
    if zeros.stored_as is not None and zeros.stored_as != version:
        label = f"the config says {_NAMES[version]}"
        yield Oddity(f"zero points are stored as {_NAMES[zeros.stored_as]} although {label}", "read by value")
    if zeros.values is not None and fields.sym:
        yield Oddity("asymmetric zero points although the config says sym", "read as they are")
    if version == 1 and zeros.values is not None and not _trusted(config):
        damaged = _overflowed_words(qzeros, weight.N, fields.bits)
        if damaged:
            yield Oddity(
                "zero points of 0 look damaged by AutoGPTQ, which set all fields above them to ones",
                f"{damaged} of {qzeros.numel()} words; the weights there are wrong, quantize the model again",
            )
    if weight.group_index is not None and config.get("desc_act") is False:
        yield Oddity("g_idx is in act-order although the config says desc_act: false", "read as it is")


def _matches(version: Version, config: Config) -> bool:
    method = first_of(config, "quant_method", "method")
    legacy = (
        method is None and "desc_act" in config and "bits" in config
    )  # AutoGPTQ's quantize_config.json names no method
    body = first_of(config, "checkpoint_format", "format", default="gptq")
    return (legacy or method == "gptq") and body == _NAMES[version] and not config.get("is_marlin_format")


def _fields(module: str, config: Config, widths: Sequence[int]) -> _Fields:
    """bits, group size and symmetry of one module, after the rules of `dynamic`: the first pattern that matches the
    beginning of its name gives them ("+:" or no prefix) or says that it is not quantized ("-:")."""
    own: dict[str, Any] = dict(config)
    rules = config.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"quantization_config needs dynamic to map patterns to fields, got {rules!r:.40}")
    for pattern, override in rules.items():
        if not _pattern(pattern).match(module):
            continue
        if pattern.startswith("-:"):
            raise CheckpointError(f"quantization_config excludes it ({pattern!r}), but it has quantized tensors")
        if not isinstance(override, dict):
            raise CheckpointError(f"quantization_config needs fields for the pattern {pattern!r}, got {override!r:.40}")
        own |= override
        break
    if own.get("pack_dtype", "int32") not in ("int32", None):
        raise CheckpointError(f"pack_dtype must be int32, got {own['pack_dtype']!r:.40}; other words are not read")
    bits = integer(own, "bits", "w_bit")
    if bits not in widths:
        *few, last = map(str, widths)
        raise CheckpointError(f"bits must be {', '.join(few)} or {last} in a GPTQ file, got {bits}")
    return _Fields(bits, group_size_of(own, "group_size", "q_group_size"), boolean(own, "sym"))


def bits_of(module: str, config: Config, widths: Sequence[int]) -> int:
    """The width of a module's codes.

    Raises:
        CheckpointError: it is none of `widths`, or the config excludes the module.
    """
    return _fields(module, config, widths).bits


def _pattern(text: str) -> re.Pattern[str]:
    return pattern_of(text, "dynamic", "+:", "-:")


def _in_features(qweight: Tensor, g_idx: Tensor | None, bits: int) -> int:
    if qweight.dim() != 2:
        raise CheckpointError(f"qweight must be [ceil(K * bits / 32), N], got {list(qweight.shape)}")
    if g_idx is not None:
        if g_idx.dim() != 1:
            raise CheckpointError(f"g_idx must be [K], got {list(g_idx.shape)}")
        return g_idx.shape[0]
    if qweight.shape[0] * 32 % bits:
        raise CheckpointError(
            f"qweight has {qweight.shape[0]} rows, not a whole number of {bits}-bit codes; no g_idx tells K"
        )
    return qweight.shape[0] * 32 // bits


def _read_zeros(version: Version, qzeros: Tensor, scales: Tensor, fields: _Fields) -> _Zeros:
    bits, (G, N) = fields.bits, scales.shape
    full, floor = word_count(N, bits), N // 32 * bits
    # AutoGPTQ and auto-round drop the last, partial block of columns; a symmetric weight loses nothing by that.
    width = floor if qzeros.shape[1:] == (floor,) else full
    expect("qzeros", qzeros, (torch.int32,), (G, width), f"{bits} bits, N={N}")
    count = min(N, width * 32 // bits)
    stored = unpack(qzeros, bits, count)
    mid = 2 ** (bits - 1)
    if fields.sym is not False:
        constants: dict[Version, int] = {1: mid - 1, 2: mid}
        for candidate in sorted(constants, key=lambda v: v != version):  # an empty weight fits both: the label decides
            if bool((stored == constants[candidate]).all()):
                return _Zeros(None, candidate)
    if count < N:
        raise CheckpointError(f"qzeros holds zero points for {count} of N={N} rows, and they are not symmetric")
    if version == 2:
        return _Zeros(stored, None)
    if bits not in WORD_ONES:
        return _Zeros((stored + 1) & (2**bits - 1), None)
    return _Zeros(unpack(_add(qzeros, WORD_ONES[bits]), bits, N), None)


def _write_zeros(version: Version, zeros: Tensor, bits: int) -> Tensor:
    """Zero points [G, N] as words. The fill makes the last word of a symmetric weight look like all others."""
    mid = 2 ** (bits - 1)
    if version == 2:
        return pack(zeros, bits, fill=mid)
    if bits == 3:
        return pack((zeros - 1) & 7, bits, fill=mid - 1)
    return _add(pack(zeros, bits, fill=mid), -WORD_ONES[bits])


def _add(words: Tensor, constant: int) -> Tensor:
    """words + constant modulo 2^32."""
    return ((words.long() + constant) & 0xFFFFFFFF).int()


def _trusted(config: Config) -> bool:
    meta = config.get("meta")
    writers = meta.get("quantizer", []) if isinstance(meta, dict) else []
    writers = writers if isinstance(writers, list) else [writers]
    return any(str(writer).lower().startswith(_TRUSTED_WRITERS) for writer in writers)


def _overflowed_words(qzeros: Tensor, out_features: int, bits: int) -> int:
    """Words whose two topmost fields are all ones. One such field alone is a true zero point of 0 there, undamaged."""
    whole = qzeros[:, : out_features * bits // 32].long() & 0xFFFFFFFF
    return int((whole >> (32 - 2 * bits) == 2 ** (2 * bits) - 1).sum())


def _own_fields(scheme: QuantScheme) -> dict[str, Any]:
    group_size = scheme.group_size if isinstance(scheme.group_size, int) else -1
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.symmetric}


def _format(version: Version) -> Format:
    return Format(
        name=_NAMES[version],
        required=("qweight", "qzeros", "scales"),
        optional=("g_idx",),
        matches=partial(_matches, version),
        parse=partial(parse, version),
        write=partial(write, version),
        config_of=partial(config_of, version),
        config_file="quantize_config.json",
    )


V1: Format = _format(1)
V2: Format = _format(2)
