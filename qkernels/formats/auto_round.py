"""auto-round files, read only: the bodies of GPTQ and AWQ under a config of their own.

| packing_format            | body                                                          |
|---------------------------|---------------------------------------------------------------|
| auto_round:auto_gptq      | GPTQ v1 (zero - 1) without g_idx; so are its symmetric models |
| auto_round                | GPTQ v2 (true zero points) without g_idx                      |
| auto_round:gptqmodel      | GPTQ v2 with g_idx                                            |
| auto_round:auto_awq       | AWQ gemm                                                      |
| auto_round:llm_compressor | compressed-tensors, which such files declare themselves       |

The GPTQ bodies have 2 to 8 bits, 5, 6 and 7 of them in the same stream as the others; AWQ bodies other than 4 bits wide are
refused.

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
from . import Config, Format, Parsed, awq, gptq
from .validation import naming, pattern_of

METHOD = "auto-round"
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_AWQ = "auto_round:auto_awq"
_VERSIONS: dict[str, gptq.Version] = {"auto_round:auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}
_FIELDS = ("bits", "group_size", "sym")


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        version, translated = _translate(module, config)
    if version is None:
        return awq.GEMM.parse(module, tensors, translated)
    return gptq.parse(version, module, tensors, translated, WIDTHS)


def _translate(module: str, config: Config) -> tuple[gptq.Version | None, dict[str, Any]]:
    """The GPTQ version of the body, None for AWQ, and the quantization_config that its own files would have for this module."""
    packing = _packing(config)
    fields = {key: config[key] for key in _FIELDS if key in config} | _extra(module, config)
    if packing == _AWQ:
        return None, {"quant_method": "awq", "version": "gemm", "zero_point": True, **fields}
    return _VERSIONS[packing], {"quant_method": "gptq", **fields}


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
        str(config.get("quant_method")).lower() in (METHOD, "intel/auto-round")
        and _packing(config) in (_AWQ, *_VERSIONS)
    ),
    parse=parse,
)
