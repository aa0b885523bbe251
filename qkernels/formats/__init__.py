"""Formats: checkpoint tensors <-> `QuantTensor`. One file each, one registration line here.

A format is a value made of pure functions. `parse` validates everything that comes from a file and raises
`CheckpointError` naming the module, the field, what was expected and what came; `write` raises `ConversionError` for
what the format cannot express, so that whatever is written reads back as an equal weight.

Tensors of a module are named `<module>.<suffix>`; a bias is an ordinary tensor and none of a format's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..errors import ArgumentError, CheckpointError, ConversionError
from ..scheme import QuantScheme
from ..tensor import QuantTensor

Config = Mapping[str, Any]
METADATA = "__metadata__"  # the name that a safetensors header has for it


class Oddity(NamedTuple):
    """Something a reader can live with but the user should know: one short kind for many modules, and the detail."""

    kind: str
    detail: str


class ConfigOf(Protocol):
    """The `quantization_config` of a checkpoint: `default` holds for every module that `modules` does not give another
    scheme; `act_order` says whether any weight has a group index; `unquantized` names linear modules left in 16 bits.

    Raises `ConversionError` if the format has no spelling for these schemes, so that it can be asked before the work.
    """

    def __call__(
        self,
        default: QuantScheme,
        modules: Mapping[str, QuantScheme],
        *,
        act_order: bool = False,
        unquantized: Sequence[str] = (),
    ) -> dict[str, Any]: ...


def no_oddities(module: str, tensors: Mapping[str, Tensor], config: Config) -> list[Oddity]:
    """Of a format that leaves nothing to guess."""
    return []


def _not_written(weight: QuantTensor) -> dict[str, Tensor]:
    raise ConversionError(f"this format is only read; written are {', '.join(FORMATS)}")


def _no_config(
    default: QuantScheme,
    modules: Mapping[str, QuantScheme],
    *,
    act_order: bool = False,
    unquantized: Sequence[str] = (),
) -> dict[str, Any]:
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
        parse: (module, tensors by suffix, quantization_config) -> the weight.
        write: weight -> tensors by suffix; a format that is only read leaves it out.
        config_of: the `quantization_config` to write beside them.
        oddities: (module, tensors by suffix, quantization_config) -> what is strange about a module that parses.
        config_file: a file beside config.json that also gets the quantization_config, for older readers.
        needs_metadata: the metadata of the safetensors headers says what the tensors are; `parse` and `oddities` find it in
            the quantization_config, under `METADATA`.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    matches: Callable[[Config], bool]
    parse: Callable[[str, Mapping[str, Tensor], Config], QuantTensor]
    write: Callable[[QuantTensor], dict[str, Tensor]] = _not_written
    config_of: ConfigOf = _no_config
    oddities: Callable[[str, Mapping[str, Tensor], Config], list[Oddity]] = no_oddities
    config_file: str | None = None
    needs_metadata: bool = False

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All suffixes, required and optional."""
        return self.required + self.optional


from . import (  # noqa: E402  (they need Format)
    auto_round,
    awq,
    awq_gemv,
    bitsandbytes,
    compressed_tensors,
    gptq,
    hqq,
    native,
    torchao,
)

FORMATS: dict[str, Format] = {f.name: f for f in (native.FORMAT, gptq.V1, gptq.V2, awq.GEMM, compressed_tensors.PACKED)}
# Origins whose files are read, into any of the above, but not written.
READ_ONLY: dict[str, Format] = {
    f.name: f
    for f in (
        compressed_tensors.INTEGERS, awq_gemv.GEMV, awq_gemv.GEMV_FAST, bitsandbytes.FOUR_BIT, bitsandbytes.INT8, hqq.FORMAT,
        auto_round.FORMAT, torchao.FORMAT,
    )
}  # fmt: skip

# Met in files often enough to deserve an answer better than "unknown": kinds that nothing here reads, and origins of which
# some kinds are read (a config of theirs that no format matched is another kind).
_UNREAD = {
    "fp8", "marlin", "gptq_p", "bitblas", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-quantized", "mxfp8-quantized", "mixed-precision", "marlin-24",
}  # fmt: skip
_READ_IN_PART = {"bitsandbytes", "auto-round", "compressed-tensors"}


def get_format(name: str) -> Format:
    """The format of that name, to write.

    Raises:
        ArgumentError: there is none.
    """
    if name not in FORMATS:
        known = f"{name!r}, which is only read" if name in READ_ONLY else repr(name)
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}, got {known}")
    return FORMATS[name]


def detect(config: Config) -> Format:
    """The format that a `quantization_config` declares.

    Raises:
        CheckpointError: none that is read here; names what was declared.
    """
    for candidate in (*FORMATS.values(), *READ_ONLY.values()):
        if candidate.matches(config):
            return candidate
    keys = ("quant_method", "method", "checkpoint_format", "format", "version", "packing_format", "is_marlin_format")
    declared = {key: config[key] for key in keys if key in config}
    named = {str(value).lower() for value in declared.values()}
    known = config.get("is_marlin_format") or named & (_UNREAD | _READ_IN_PART)
    raise CheckpointError(
        f"quantization_config declares {declared or 'no quant_method'!r:.200}, "
        f"{'a kind that is not read yet' if known else 'which is not known'}; "
        f"read are {', '.join((*FORMATS, *READ_ONLY))}"
    )
