"""What transformers keeps as a checkpoint's `quantization_config`: ours, and those of other origins as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Final

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats import native
from ..nn.selection import as_patterns
from ..scheme import QuantScheme

# The methods of other origins whose checkpoints `enable` answers for, and the names by which transformers asks about each. It has
# none for ModelOpt's and for auto-round's older spelling: it would skip what it does not know, and leave weights random.
METHODS: Final[dict[str, tuple[str, ...]]] = {
    "gptq": ("gptq",),
    "awq": ("awq",),
    "compressed-tensors": ("compressed-tensors",),
    "auto-round": ("auto-round", "intel/auto-round"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "fp8": ("fp8",),
    "mxfp4": ("mxfp4",),
    "modelopt": ("modelopt", "modelopt_fp4", "modelopt_mixed"),
}


class QKernelsConfig(QuantizationConfigMixin):
    """How to quantize while loading, and what a native checkpoint says of itself.

    Args:
        scheme: a `QuantScheme` or its short form, for every layer that no override matches.
        include, exclude, overrides: as for `replace_linear`.
        version, modules, layout, layout_version, embeddings: of a checkpoint that is quantized already.

    Raises:
        SchemeError: a scheme cannot be parsed.
        TypeError: an unknown keyword.
    """

    def __init__(
        self,
        scheme: QuantScheme | str = "w4a16_g128",
        *,
        include: Iterable[str] | str | None = None,
        exclude: Iterable[str] | str | None = None,
        overrides: Mapping[str, QuantScheme | str] | None = None,
        modules: Mapping[str, str] | None = None,
        version: int = native.VERSION,
        quant_method: str = native.METHOD,
        layout: str | None = None,
        layout_version: int | None = None,
        embeddings: Iterable[str] = (),
    ) -> None:
        self.quant_method = quant_method
        self.scheme = str(QuantScheme.parse(scheme))
        self.include, self.exclude = as_patterns(include), as_patterns(exclude)
        self.overrides = {pattern: str(QuantScheme.parse(s)) for pattern, s in (overrides or {}).items()}
        self.version, self.modules = version, dict(modules or {})
        self.layout, self.layout_version = layout, layout_version

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a native checkpoint."""
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "scheme": self.scheme,
            "modules": self.modules,
        }


class CheckpointConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint in a format of somebody else, kept as it is."""

    _load_in_4bit = _load_in_8bit = False  # what transformers asks of bitsandbytes', whatever the file leaves out

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = fields.get("quant_method", "")
        for key in ("load_in_4bit", "load_in_8bit"):
            if key in fields:
                self.__dict__[f"_{key}"] = fields[key]  # behind a property of theirs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return (cls(**config_dict), kwargs) if return_unused_kwargs else cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def as_it_is(theirs: type[QuantizationConfigMixin]) -> type[CheckpointConfig]:
    """A class that keeps what a file says, under the name of `theirs` and as an instance of it.

    Scripts pass `quantization_config=GPTQConfig(…)` for a checkpoint of GPTQ, too; transformers takes it, and goes by the
    checkpoint, where the two classes have one name. Of bitsandbytes' files it wants a BitsAndBytesConfig.
    """
    return type(theirs.__name__, (CheckpointConfig, theirs), {"__module__": __name__})
