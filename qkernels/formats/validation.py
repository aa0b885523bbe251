"""Checks and texts that the readers and writers of several formats share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError, QKernelsError
from ..group_index import validated_group_index
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import describe, dtype_name

MAX_PATTERN = 1000  # characters of a regular expression in a config


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Errors from here on are `CheckpointError` and begin with the module's name."""
    try:
        yield
    except QKernelsError as error:
        raise CheckpointError(f"{module}: {error}") from error


def first_of(config: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """The value of the first key that is there: files spell the same field in several ways."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def integer(config: Mapping[str, Any], *keys: str) -> int:
    """An integer field of a quantization_config.

    Raises:
        CheckpointError: missing or something else.
    """
    value = first_of(config, *keys)
    if type(value) is not int:
        raise CheckpointError(f"quantization_config needs an integer {' or '.join(keys)}, got {value!r:.40}")
    return value


def boolean(config: Mapping[str, Any], key: str) -> bool | None:
    """A true/false field of a quantization_config, None where it is missing.

    Raises:
        CheckpointError: something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"quantization_config needs {key} to be true or false, got {value!r:.40}")
    return value


def group_size_of(config: Mapping[str, Any], *keys: str) -> int | None:
    """The group size of a file, None for the -1 that means one group per row."""
    size = integer(config, *keys)
    if size == -1:
        return None
    if not 0 < size < 2**31:
        raise CheckpointError(f"quantization_config needs a {keys[0]} of 1 … 2^31 - 1, or -1, got {size}")
    return size


def pattern_of(text: str, field: str, *prefixes: str) -> re.Pattern[str]:
    """A regular expression of a quantization_config, which may begin with one of `prefixes`.

    Raises:
        CheckpointError: it is too long, or none.
    """
    body = next((text.removeprefix(prefix) for prefix in prefixes if text.startswith(prefix)), text)
    if len(body) > MAX_PATTERN:
        raise CheckpointError(f"quantization_config has a pattern of {len(body)} characters in {field}")
    try:
        return re.compile(body)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"quantization_config has an invalid pattern {text!r:.80} in {field}: {error}") from error


def expect(field: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], why: str = "") -> None:
    """Check a tensor's dtype and shape.

    Raises:
        CheckpointError: naming the field, what was expected and what came.
    """
    if tensor.dtype not in dtypes or list(tensor.shape) != list(shape):
        names = " or ".join(map(dtype_name, dtypes))
        raise CheckpointError(f"{field} must be {names} {list(shape)}{why and f' ({why})'}, got {describe(tensor)}")


def check_scales(scales: Tensor) -> None:
    """Finite and not all zero; single zeros and negative scales are valid.

    Raises:
        CheckpointError: otherwise. (An expert that saw no calibration token is how NaN gets into real files.)
    """
    bad = int((~torch.isfinite(scales)).sum())
    if bad:
        raise CheckpointError(f"scales must be finite, got {bad} NaN or infinite entries of {scales.numel()}")
    if scales.numel() and not bool(scales.any()):
        raise CheckpointError("scales must not all be zero, which would make the whole weight zero")


def check_float(field: str, tensor: Tensor, shape: Sequence[int], why: str = "") -> None:
    """`expect` for the three dtypes that scales come in."""
    expect(field, tensor, FLOAT_DTYPES, shape, why)


def group_index_of(field: str, tensor: Tensor | None, in_features: int, scheme: QuantScheme) -> Tensor | None:
    """A file's group index, None where it is natural or absent.

    Raises:
        TensorError: wrong dtype or shape, entries outside 0 … G - 1, or wrongly filled groups.
    """
    return None if tensor is None else validated_group_index(tensor, in_features, scheme, field)


def refuse(format_name: str, reasons: Sequence[str]) -> None:
    """Raise if there are reasons why a weight cannot be written.

    Raises:
        ConversionError: listing them, and the way out.
    """
    if reasons:
        raise ConversionError(
            f'{format_name} cannot store this weight: {"; ".join(reasons)}; format="native" stores every weight'
        )


def integer_scheme_reasons(scheme: QuantScheme, bits: Sequence[int]) -> list[str]:
    """Why a file of integer codes, scales and integer zero points cannot express a scheme."""
    reasons = []
    if scheme.codebook is not None:
        reasons.append(f"{scheme} has a codebook")
    if scheme.factors is not None:
        reasons.append(f"scales are products of factors in {scheme}")
    if scheme.rows > 1:
        reasons.append(f"scales are those of blocks in {scheme}")
    if scheme.bits not in bits:
        reasons.append(f"bits must be {' or '.join(map(str, bits))}, got {scheme.bits}")
    if scheme.zeros in ("float", "offset"):
        reasons.append(f"zero points must be integers, {scheme} has zeros={scheme.zeros!r}")
    if scheme.group_size == "tensor":
        reasons.append("it has no spelling for one scale per tensor")
    if scheme.act is not None:
        reasons.append(
            f'it has no field for {ACTIVATIONS[scheme.act]}; a checkpoint can be loaded with activations="16bit"'
        )
    return reasons


def weight_reasons(weight: QuantTensor) -> list[str]:
    """Why such a file cannot hold this weight, apart from its scheme."""
    if weight.codes.dim() != 2:
        return [
            f"it holds one [N, K] weight a module, got {list(weight.codes.shape)}; write each expert as its own module"
        ]
    if weight.scales.dtype not in FLOAT_DTYPES:
        return [f"its scales are 16- or 32-bit floats, got {dtype_name(weight.scales.dtype)}"]
    if weight.scales.numel() and not weight.scales.is_meta and not bool(weight.scales.any()):
        return ["all scales are zero, which its readers refuse"]
    return []


def true_zeros(weight: QuantTensor) -> Tensor:
    """uint8 `[N, G]`: the zero points, also of a symmetric weight, where they are 2^(bits-1)."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, weight.scheme.mid_code, dtype=torch.uint8, device=weight.device)
