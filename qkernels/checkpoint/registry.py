"""Every format that a checkpoint may have: those of `formats/`, and one for each layout that a kernel reads (`packed.py`)."""

from __future__ import annotations

from typing import Final

from ..errors import ArgumentError, CheckpointError
from ..formats import FORMATS, READ_ONLY, Config, Format
from .packed import PACKED

WRITTEN: Final[dict[str, Format]] = FORMATS | PACKED

# Met in files often enough to deserve an answer better than "unknown": kinds that nothing here reads, and origins of which
# some kinds are read (a config of theirs that no format matched is another kind).
_UNREAD = {
    "marlin", "bitblas", "mxfp6-quantized", "marlin-24", "fbgemm_fp8", "mxfp4", "quark",
}  # fmt: skip
_READ_IN_PART = {"bitsandbytes", "auto-round", "compressed-tensors"}


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
    named = {str(value).lower() for value in declared.values()}
    known = config.get("is_marlin_format") or named & (_UNREAD | _READ_IN_PART)
    raise CheckpointError(
        f"quantization_config declares {declared or 'no quant_method'!r:.200}, "
        f"{'a kind that is not read yet' if known else 'which is not known'}; "
        f"read are {', '.join((*WRITTEN, *READ_ONLY))}"
    )
