"""AWQ files of the "gemm" kind: 4 bits, zero points stored as they are.

| tensor  | dtype      | shape       | content                                    |
|---------|------------|-------------|--------------------------------------------|
| qweight | int32      | [K, N / 8]  | codes of 8 neighbouring rows n in a word   |
| qzeros  | int32      | [G, N / 8]  | zero points, same order                    |
| scales  | fp16, bf16 | [G, N]      |                                            |

The eight are interleaved: nibble i of word c is row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i], lowest nibble first, which lets a
CUDA kernel peel off pairs of rows with one mask.

AWQ knows no symmetric weights. One is written with zero points of 8, an equal weight, and `sym: true` in the config
(other readers ignore that key); where it is there and all zero points are 8, the weight reads back as symmetric.

The kinds "gemv" and "gemv_fast" are read by `awq_gemv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from . import Config, Format, Oddity, Parsed, Written
from .validation import (
    boolean,
    check_float,
    check_scales,
    expect,
    first_of,
    group_size_of,
    integer,
    integer_scheme_reasons,
    naming,
    refuse,
    true_zeros,
    weight_reasons,
)

ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        scheme = scheme_of(config)
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight must be [K, N / 8], got {list(qweight.shape)}")
        K, N = qweight.shape[0], qweight.shape[1] * 8
        if isinstance(scheme.group_size, int) and K % scheme.group_size:
            raise CheckpointError(f"K={K} must be a multiple of group_size {scheme.group_size} in an AWQ file")
        G = scheme.num_groups(K)
        why = f"K={K}, N={N}, group_size {scheme.group_size}"
        expect("qweight", qweight, (torch.int32,), (K, N // 8))
        expect("qzeros", qzeros, (torch.int32,), (G, N // 8), why)
        check_float("scales", scales, (G, N), why)
        check_scales(scales)
        zeros: Tensor | None = _deinterleave(qzeros)
        if boolean(config, "sym") and zeros is not None and bool((zeros == 8).all()):
            scheme, zeros = QuantScheme(4, scheme.group_size), None
        weight = QuantTensor(_deinterleave(qweight), scales.T.contiguous(), zeros, None, scheme)
        return Parsed(weight, denied_zeros(config))


def write(weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of one module, by suffix; a symmetric weight gets zero points of 8.

    Raises:
        ConversionError: other than 4 bits; act-order; N that is no multiple of 8 or K that is none of the group size; a
            codebook, float zeros or offsets; one scale per tensor; int8 activations; stacked experts.
    """
    reasons = _reasons(weight.scheme) + weight_reasons(weight)
    if weight.group_index is not None:
        reasons.append("its columns are in act-order, and AWQ has no group index")
    if weight.N % 8:
        reasons.append(f"N={weight.N} is not a multiple of 8")
    if isinstance(weight.scheme.group_size, int) and weight.K % weight.scheme.group_size:
        reasons.append(f"K={weight.K} is not a multiple of group_size {weight.scheme.group_size}")
    refuse("awq", reasons)
    return {
        "qweight": _interleave(weight.codes),
        "qzeros": _interleave(true_zeros(weight)),
        "scales": weight.scales.T.contiguous(),
    }


def config_of(written: Written) -> dict[str, Any]:
    """See `Format`. A file has one group size; symmetric and asymmetric modules may be mixed."""
    default, modules, schemes = written.default, written.modules, written.schemes
    reasons = [reason for scheme in sorted(schemes, key=str) for reason in _reasons(scheme)]
    if written.act_order:
        reasons.append("columns are in act-order, and AWQ has no group index")
    if len({scheme.group_size for scheme in schemes}) > 1:
        other = next(name for name, scheme in sorted(modules.items()) if scheme.group_size != default.group_size)
        reasons.append(f"one file has one group size, got {default} and {modules[other]} ({other})")
    refuse("awq", reasons)
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": default.group_size if isinstance(default.group_size, int) else -1,
        "zero_point": True,
        "version": "gemm",
        "sym": all(scheme.symmetric for scheme in modules.values()) and default.symmetric,
        "modules_to_not_convert": sorted(written.unquantized) or None,
    }


def denied_zeros(config: Config) -> tuple[Oddity, ...]:
    """The oddity of a config that denies the zero points which the tensors have."""
    if boolean(config, "zero_point") is False:
        return (Oddity("zero_point is false, which no AWQ packer writes", "the stored zero points are used"),)
    return ()


def scheme_of(config: Config) -> QuantScheme:
    """4 bits, with integer zero points; the config gives the group size."""
    bits = integer(config, "bits", "w_bit")
    if bits != 4:
        raise CheckpointError(f"bits must be 4 in an AWQ file, got {bits}")
    return QuantScheme(4, group_size_of(config, "group_size", "q_group_size") or "channel", "int")


def _reasons(scheme: QuantScheme) -> list[str]:
    return integer_scheme_reasons(scheme, (4,))


def _matches(config: Config) -> bool:
    method = first_of(config, "quant_method", "method")
    legacy = method is None and "zero_point" in config and "w_bit" in config  # AutoAWQ's quant_config.json
    body = str(first_of(config, "version", "format", "checkpoint_format", default="gemm")).lower()
    return (legacy or method == "awq") and body == "gemm"


def _interleave(codes: Tensor) -> Tensor:
    """uint8 [N, X] -> int32 [X, N / 8]."""
    eights = codes.unflatten(0, (codes.shape[0] // 8, 8))
    words = torch.zeros(codes.shape[0] // 8, codes.shape[1], dtype=torch.int32, device=codes.device)
    for nibble, row in enumerate(ROW_OF_NIBBLE):
        words |= eights[:, row].int() << (4 * nibble)
    return words.T.contiguous()


def _deinterleave(words: Tensor) -> Tensor:
    """int32 [X, N / 8] -> uint8 [N, X]."""
    rows = words.T.contiguous()
    eights = torch.empty(rows.shape[0], 8, rows.shape[1], dtype=torch.uint8, device=words.device)
    for nibble, row in enumerate(ROW_OF_NIBBLE):
        eights[:, row] = rows >> (4 * nibble) & 15
    return eights.flatten(0, 1)


GEMM: Format = Format(
    name="awq",
    required=("qweight", "qzeros", "scales"),
    optional=(),
    matches=_matches,
    parse=parse,
    write=write,
    config_of=config_of,
)
