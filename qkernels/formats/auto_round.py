"""auto-round files, read only: the bodies of GPTQ and AWQ under a config of their own.

| packing_format            | body                                                          |
|---------------------------|---------------------------------------------------------------|
| auto_round:auto_gptq      | GPTQ v1 (zero - 1) without g_idx; so are its symmetric models |
| auto_round                | GPTQ v2 (true zero points) without g_idx                      |
| auto_round:gptqmodel      | GPTQ v2 with g_idx                                            |
| auto_round:auto_awq       | AWQ gemm                                                      |
| auto_round:llm_compressor | compressed-tensors, which such files declare themselves       |

`extra_config` gives single layers other bits, group sizes and symmetry, by name or by pattern. Scales may be negative: a
full-range symmetric scale has the sign of the largest weight. A zero point of 0 is stored as 0 (a clamped -1) under
auto_round:auto_gptq, so that it reads as 1; nothing in the file tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..tensor import QuantTensor
from . import Config, Format, Oddity, awq, gptq
from .validation import naming, pattern_of

METHOD = "auto-round"
_BODIES: dict[str, tuple[Format, str]] = {
    "auto_round:auto_gptq": (gptq.V1, "gptq"),
    "auto_round": (gptq.V2, "gptq_v2"),
    "auto_round:gptqmodel": (gptq.V2, "gptq_v2"),
    "auto_round:auto_awq": (awq.GEMM, "gemm"),
}
_FIELDS = ("bits", "group_size", "sym")


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> QuantTensor:
    """Read one module; see the head of this file.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        body, translated = _translate(module, config)
    return body.parse(module, tensors, translated)


def oddities(module: str, tensors: Mapping[str, Tensor], config: Config) -> list[Oddity]:
    """Those of the body."""
    body, translated = _translate(module, config)
    return body.oddities(module, tensors, translated)


def _translate(module: str, config: Config) -> tuple[Format, dict[str, Any]]:
    """The body, and the quantization_config that its own files would have for this module."""
    body, label = _BODIES[_packing(config)]
    fields = {key: config[key] for key in _FIELDS if key in config} | _extra(module, config)
    if body is awq.GEMM:
        return body, {"quant_method": "awq", "version": label, "zero_point": True, **fields}
    return body, {"quant_method": "gptq", "checkpoint_format": label, **fields}


def _extra(module: str, config: Config) -> dict[str, Any]:
    """What extra_config says of a module: by its name, else by the first pattern that occurs in it."""
    extra: dict[str, Any] = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(fields, dict) for fields in extra.values()):
        raise CheckpointError(f"quantization_config needs extra_config to map names to fields, got {extra!r:.40}")
    fitting = (fields for key, fields in extra.items() if _is_pattern(key) and _occurs(key, module))
    own: dict[str, Any] = extra[module] if module in extra else next(fitting, {})
    return {key: own[key] for key in _FIELDS if own.get(key) is not None}


def _is_pattern(key: str) -> bool:
    return re.fullmatch(r"[\w.\-]*", key) is None


def _occurs(key: str, module: str) -> bool:
    return pattern_of(key, "extra_config").search(module) is not None


def _packing(config: Config) -> str:
    return str(config.get("packing_format", "auto_round:auto_gptq")).lower()


FORMAT: Format = Format(
    name="auto-round",
    required=("qweight", "qzeros", "scales"),
    optional=("g_idx",),
    matches=lambda config: (
        str(config.get("quant_method")).lower() in (METHOD, "intel/auto-round") and _packing(config) in _BODIES
    ),
    parse=parse,
    oddities=oddities,
)
