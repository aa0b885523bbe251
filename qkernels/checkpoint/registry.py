"""Every format that a checkpoint may have: those of `formats/`, and one for each layout that a kernel reads (`packed.py`)."""

from __future__ import annotations

from typing import Final

from ..errors import ArgumentError, CheckpointError
from ..formats import FORMATS, READ_ONLY, Config, Format
from .packed import PACKED

WRITTEN: Final[dict[str, Format]] = FORMATS | PACKED

# Met often enough to deserve an answer better than "unknown"; the first three have bodies that are read, and others.
_LATER = {
    "bitsandbytes", "auto-round", "compressed-tensors", "fp8", "marlin", "gptq_p", "bitblas", "float-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-quantized", "mxfp8-quantized",
    "mixed-precision", "marlin-24",
}  # fmt: skip


def get_format(name: str) -> Format:
    """The format of that name, to write.

    Raises:
        ArgumentError: there is none.
    """
    if name not in WRITTEN:
        known = f"{name!r}, which is only read" if name in READ_ONLY else repr(name)
        raise ArgumentError(f"format must be one of {', '.join(WRITTEN)}, got {known}")
    return WRITTEN[name]


def detect(config: Config) -> Format:
    """The format that a `quantization_config` declares.

    Raises:
        CheckpointError: none that is read here; names what was declared.
    """
    for candidate in (*WRITTEN.values(), *READ_ONLY.values()):
        if candidate.matches(config):
            return candidate
    keys = ("quant_method", "method", "checkpoint_format", "format", "version", "packing_format", "is_marlin_format")
    declared = {key: config[key] for key in keys if key in config}
    later = config.get("is_marlin_format") or any(str(value).lower() in _LATER for value in declared.values())
    raise CheckpointError(
        f"quantization_config declares {declared or 'no quant_method'!r:.200}, "
        f"{'a kind that is not read yet' if later else 'which is not known'}; "
        f"read are {', '.join((*WRITTEN, *READ_ONLY))}"
    )
