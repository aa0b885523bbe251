"""Formats: checkpoint tensors <-> `QuantTensor`. One file each, one registration line here.

A format is a value made of pure functions. `parse` validates everything that comes from a file, tells the weight and its
oddities at once, and raises `CheckpointError` naming the module, the field, what was expected and what came; `write` raises
`ConversionError` for what the format cannot express, so that whatever is written reads back as an equal weight.

Tensors of a module are named `<module>.<suffix>`; a bias is an ordinary tensor and none of a format's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ConversionError
from ..scheme import QuantScheme
from ..tensor import QuantTensor

Config = Mapping[str, Any]
METADATA = "__metadata__"  # the name that a safetensors header has for it
SHAPES = "__shapes__"  # () -> (N, K) by module
ACTIVATIONS = "__activations__"  # what `load` was asked for, where `parse` finds it: "file", or absent


class Oddity(NamedTuple):
    """Something a reader can live with but the user should know: one short kind for many modules, and the detail."""

    kind: str
    detail: str


def summary(oddities: Iterable[tuple[str, Oddity]]) -> Iterator[str]:
    """One line for each kind of oddity among (module, oddity) pairs: how many modules, and the first of them."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for module, oddity in oddities:
        kinds.setdefault(oddity.kind, []).append((module, oddity.detail))
    for kind, found in kinds.items():
        module, detail = found[0]
        yield f"{kind}: {len(found)} module{'s' if len(found) > 1 else ''}, first {module} ({detail})"


class Parsed(NamedTuple):
    """What a module's tensors mean, and what is strange about them."""

    weight: QuantTensor
    oddities: tuple[Oddity, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a checkpoint holds, as far as its `quantization_config` has to say it.

    Args:
        default: the scheme of every module that `modules` does not give another.
        modules: the scheme of each quantized module by name.
        act_order: whether any weight has a group index.
        unquantized: linear modules left in 16 bits; embeddings may be among them.
    """

    default: QuantScheme
    modules: Mapping[str, QuantScheme]
    act_order: bool = False
    unquantized: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, modules: Mapping[str, QuantScheme], act_order: bool = False, unquantized: Iterable[str] = ()
    ) -> Written:
        """The most frequent scheme is the default. There must be a module."""
        default = Counter(modules.values()).most_common(1)[0][0]
        return cls(default, modules, act_order, tuple(unquantized))

    @property
    def schemes(self) -> set[QuantScheme]:
        """Every scheme that occurs."""
        return {self.default, *self.modules.values()}


def _not_written(weight: QuantTensor) -> dict[str, Tensor]:
    raise ConversionError(f"this format is only read; written are {', '.join(FORMATS)}")


def _no_config(written: Written) -> dict[str, Any]:
    raise ConversionError(f"this format is only read; written are {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Format:
    """One way to store quantized weights in a checkpoint.

    Args:
        name: what `save(format=…)` calls it.
        required: suffixes of the tensors that every module has, first the one that only quantized modules have. A suffix
            may have dots of its own ("weight.absmax").
        optional: suffixes that a module may have.
        matches: whether a `quantization_config` means this format.
        parse: (module, tensors by suffix, quantization_config) -> the weight, and what is strange about it.
        write: weight -> tensors by suffix; a format that is only read leaves it out.
        config_of: the `quantization_config` to write beside them. Raises `ConversionError` if the format has no spelling for
            these schemes, so that it can be asked before the work.
        config_file: a file beside config.json that also gets the quantization_config, for older readers.
        needs_metadata: the metadata of the safetensors headers says what the tensors are; `parse` finds it in the
            quantization_config, under `METADATA`.
        needs_shapes: tensors do not tell N and K of a module; `parse` finds those of the model that config.json describes in the
            quantization_config, under `SHAPES`.
        joint: what stands between the name of a module and a suffix.
        stacks: whether a module may be stacked experts `[E, N, K]`; else they are written one by one.
        sliced: whether stacked experts are read expert by expert, each as a module of its own (`stacks.py`).
        codes: suffixes of which one is the tensor of codes.
        rows_as_stored: stacked experts have their rows in the order of transformers' parameter; else gate's come first.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    matches: Callable[[Config], bool]
    parse: Callable[[str, Mapping[str, Tensor], Config], Parsed]
    write: Callable[[QuantTensor], dict[str, Tensor]] = _not_written
    config_of: Callable[[Written], dict[str, Any]] = _no_config
    config_file: str | None = None
    needs_metadata: bool = False
    needs_shapes: bool = False
    joint: str = "."
    rows_as_stored: bool = False
    stacks: bool = False
    sliced: bool = False
    codes: tuple[str, ...] = ("weight_packed", "weight", "_weight_qdata")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All suffixes, required and optional."""
        return self.required + self.optional


from . import (  # noqa: E402  (they need Format)
    auto_round,
    awq,
    awq_gemv,
    bitsandbytes,
    compressed_floats,
    compressed_tensors,
    compressed_writing,
    fp8,
    gptq,
    gptq_planar,
    hqq,
    modelopt,
    mxfp4,
    native,
    quanto,
    torchao,
)

FORMATS: dict[str, Format] = {f.name: f for f in (native.FORMAT, gptq.V1, gptq.V2, awq.GEMM, compressed_writing.PACKED)}
# Origins whose files are read, into any of the above, but not written.
READ_ONLY: dict[str, Format] = {
    f.name: f
    for f in (
        compressed_tensors.INTEGERS, compressed_floats.FLOATS, compressed_floats.FP4, compressed_floats.MIXED,
        fp8.FORMAT, modelopt.FORMAT, awq_gemv.GEMV, awq_gemv.GEMV_FAST, bitsandbytes.FOUR_BIT, bitsandbytes.INT8, hqq.FORMAT,
        auto_round.FORMAT, torchao.FORMAT, mxfp4.FORMAT, gptq_planar.FORMAT,
        quanto.FORMAT, fp8.SCALED,
    )
}  # fmt: skip
