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

from ..errors import ArgumentError, CheckpointError
from ..scheme import QuantScheme
from ..tensor import QuantTensor

Config = Mapping[str, Any]


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


@dataclass(frozen=True)
class Format:
    """One way to store quantized weights in a checkpoint.

    Args:
        name: what `save(format=…)` calls it.
        required: suffixes of the tensors that every module has.
        optional: suffixes that a module may have.
        matches: whether a `quantization_config` means this format.
        parse: (module, tensors by suffix, quantization_config) -> the weight.
        write: weight -> tensors by suffix.
        config_of: the `quantization_config` to write beside them.
        oddities: (module, tensors by suffix, quantization_config) -> what is strange about a module that parses.
        config_file: a file beside config.json that also gets the quantization_config, for older readers.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    matches: Callable[[Config], bool]
    parse: Callable[[str, Mapping[str, Tensor], Config], QuantTensor]
    write: Callable[[QuantTensor], dict[str, Tensor]]
    config_of: ConfigOf
    oddities: Callable[[str, Mapping[str, Tensor], Config], list[Oddity]]
    config_file: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All suffixes, required and optional."""
        return self.required + self.optional


from . import awq, gptq, native  # noqa: E402  (they need Format)

FORMATS: dict[str, Format] = {f.name: f for f in (native.FORMAT, gptq.V1, gptq.V2, awq.GEMM)}

# Read from files often enough to deserve an answer better than "unknown".
_LATER = {
    "compressed-tensors", "bitsandbytes", "hqq", "torchao", "auto-round", "quanto", "fp8", "marlin", "gptq_p",
    "bitblas", "gemv", "gemv_fast", "llm-awq",
}  # fmt: skip


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in FORMATS:
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def detect(config: Config) -> Format:
    """The format that a `quantization_config` declares.

    Raises:
        CheckpointError: none that is read here; names what was declared.
    """
    for candidate in FORMATS.values():
        if candidate.matches(config):
            return candidate
    keys = ("quant_method", "method", "checkpoint_format", "format", "version", "packing_format", "is_marlin_format")
    declared = {key: config[key] for key in keys if key in config}
    later = config.get("is_marlin_format") or any(str(value).lower() in _LATER for value in declared.values())
    raise CheckpointError(
        f"quantization_config declares {declared or 'no quant_method'!r:.200}, "
        f"{'a kind that is not read yet' if later else 'which is not known'}; "
        f"read are {', '.join(FORMATS)} (GPTQ v1 and v2, AWQ gemm)"
    )
