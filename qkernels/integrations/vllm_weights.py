"""What one rank of a serving engine needs of weights: names of tensors into modules, rows and columns cut. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ..errors import ArgumentError, CheckpointError
from ..formats import Format
from ..formats.stacks import stack_and_suffix
from ..tensor import QuantTensor


def parameter_name(suffix: str) -> str:
    """The name of a tensor's parameter: that of the file, without dots."""
    return suffix.replace(".", "__")


def owner_of(name: str, found: Format) -> tuple[str, str] | None:
    """(module, suffix) of a tensor, whose suffix may be spelled as a parameter's name; None where it is no part of a weight.

    >>> from qkernels.formats import FORMATS
    >>> from qkernels.integrations.vllm_weights import owner_of
    >>> owner_of("mlp.experts.3.up_proj.qweight", FORMATS["gptq"])
    ('mlp.experts.3.up_proj', 'qweight')
    """
    if (stack := stack_and_suffix(name, found)) is not None:
        return stack
    spelled = {f".{text}": suffix for suffix in found.suffixes for text in (suffix, parameter_name(suffix))}
    end = max((end for end in spelled if name.endswith(end)), key=len, default=None)
    return None if end is None else (name.removesuffix(end), spelled[end])


def grouped(names: Sequence[str], found: Format) -> dict[str, tuple[str, ...]]:
    """Module -> the suffixes of its tensors in the headers; a module has at least what its format requires.

    Raises:
        CheckpointError: it has the telling one of them, and lacks another.
    """
    tensors: dict[str, list[str]] = {}
    for name in names:
        if (owner := owner_of(name, found)) is not None:
            tensors.setdefault(owner[0], []).append(owner[1])
    whole = {module: tuple(suffixes) for module, suffixes in tensors.items() if found.required[0] in suffixes}
    for module, suffixes in whole.items():
        if suffixes == ("weight",):
            continue  # of a layer that is not quantized, where quantized ones have a tensor of that name, too
        if missing := [suffix for suffix in found.required if suffix not in suffixes]:
            raise CheckpointError(f"{module} lacks {', '.join(missing)} (it has {', '.join(suffixes)})")
    return {module: s for module, s in whole.items() if set(found.required) <= set(s)}


def joined(weights: Sequence[QuantTensor]) -> list[QuantTensor]:
    """One weight where schemes and column orders agree, else the parts: mixed widths, act-order of each its own."""
    try:
        return [QuantTensor.concat(weights)] if len(weights) > 1 else list(weights)
    except ArgumentError:
        return list(weights)


def rows_of(weight: QuantTensor, sizes: Sequence[int]) -> list[QuantTensor]:
    """A weight's rows, `sizes` of them each, one after another.

    Raises:
        CheckpointError: it has not so many.
    """
    if sum(sizes) != weight.N:
        raise CheckpointError(f"rows must be {' + '.join(map(str, sizes))} = {sum(sizes)}, got {weight.N}")
    unit = math.gcd(*sizes)
    units = [weight.shard("N", index, weight.N // unit) for index in range(weight.N // unit)]
    edges = [0, *accumulate(size // unit for size in sizes)]
    return [QuantTensor.concat(units[first:last]) for first, last in pairwise(edges)]
