"""What a checkpoint asks beyond its weights: rotations while the model runs, scales of a KV cache, scaled activation functions.

A reader that passes over such a wish computes another model without a word. So each wish is refused by name where the result
would be wrong without it; and left aside, which an oddity says, where the result only becomes more exact: a cache or activations
that stay in 16 bits. (What the groups of a format say of activations is that format's to tell.)

| wish                                                        | written by                    | here        |
|-------------------------------------------------------------|-------------------------------|-------------|
| `transform_config` with "input", "output", "k_cache", …     | llm-compressor (R3, R4, QuIP) | refused     |
| `transform_config` with "weight_input", "weight_output" alone | llm-compressor (R1, R2)     | in the weights already |
| `rotation`: the input of down_proj is rotated at run time   | GPTQModel (QuaRot)            | refused     |
| `*.act.scales` divide what a GELU puts out                  | AutoAWQ                       | refused     |
| `kv_cache_scheme`, `*.k_scale`, `*.v_scale`                 | llm-compressor, ModelOpt, Quark | left aside |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ..errors import CheckpointError
from . import Config, Oddity

_CACHE_SCALE: Final = re.compile(
    r"(?:^|\.)(?:(?:[qkv]|kv|kv_cache|prob|prob_output)_(?:scale|zero_point)|kv_cache_scaling_factor)$"
)
_ACTIVATION_SCALES: Final = re.compile(r"(?:^|\.)act\.scales$")
_ROTATES: Final = re.compile(r"rotat|hadamard|(?:^|_)had(?:_|$)|(?:^|_)transforms?(?:_config)?$", re.IGNORECASE)
_IN_THE_WEIGHTS: Final = ("weight_input", "weight_output")
_NO: Final[tuple[Any, ...]] = (None, False, 0, "", "none", "None", [], {})

_WAY_OUT = "quantize the original without it, or run this checkpoint with the software that made it"


class Beyond(NamedTuple):
    """Tensors that only matter to what is left aside, and what is to be said of it, by module or field."""

    aside: frozenset[str]
    oddities: tuple[tuple[str, Oddity], ...]


def beyond_weights(config: Config, names: Iterable[str]) -> Beyond:
    """Look through a quantization_config and the names of all tensors beside it.

    Raises:
        CheckpointError: something is asked that is not done here, and without which the result would be wrong.
    """
    _refuse_rotations(config)
    names = list(names)
    scaled = next((name for name in names if _ACTIVATION_SCALES.search(name)), None)
    if scaled is not None:
        raise CheckpointError(
            f"{scaled} divides what an activation function puts out, which is not done here (AutoAWQ adds it to models with "
            f"GELU); {_WAY_OUT}"
        )
    aside = frozenset(name for name in names if _CACHE_SCALE.search(name))
    return Beyond(aside, tuple(_cache(config, sorted(aside))))


def check_below(modules: Collection[str], others: Iterable[str]) -> None:
    """Every tensor under a quantized module belongs to its format, or is its bias: whatever else lies there is meant to change
    what the module computes.

    Raises:
        CheckpointError: naming the tensor and the module.
    """
    for name in others:
        parent = name.rpartition(".")[0]
        while parent:
            if parent in modules and name != f"{parent}.bias":
                raise CheckpointError(
                    f"tensor {name} lies under the quantized module {parent} and is none of its format's: what it is for is not "
                    "known here, and without it the result may be wrong; remove it if it is left over"
                )
            parent = parent.rpartition(".")[0]


def _refuse_rotations(config: Config) -> None:
    meta = config.get("meta")
    for where in (config, meta if isinstance(meta, dict) else {}):
        for key, value in where.items():
            if not _ROTATES.search(str(key)) or value in _NO:
                continue
            online = _online(value) if key == "transform_config" else [f"{value!r:.60}"]
            if online:
                raise CheckpointError(
                    f"quantization_config has {key}, which rotates activations while the model runs ({', '.join(online)}); this "
                    f"is not done here, and without it the result is noise; {_WAY_OUT}"
                )


def _online(transforms: Any) -> list[str]:
    """The transforms of a transform_config that are not in the weights already, as "R4 at input".

    Raises:
        CheckpointError: it is not made as such configs are.
    """
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(
            f"transform_config of quantization_config needs config_groups, got {transforms!r:.60}; {_WAY_OUT}"
        )
    found = []
    for name, group in groups.items():
        uses = group.get("apply") or []
        if not isinstance(uses, list) or not all(isinstance(use, dict) for use in uses):
            raise CheckpointError(f"transform_config needs {name}.apply to be a list of objects, got {uses!r:.60}")
        places = sorted({str(use.get("location")) for use in uses} - set(_IN_THE_WEIGHTS))
        found += [f"{name!s:.40} at {place:.40}" for place in places]
    return found


def _cache(config: Config, scales: list[str]) -> Iterator[tuple[str, Oddity]]:
    scheme = config.get("kv_cache_scheme")
    kept = "left aside: the cache keeps the dtype of the activations"
    if scheme is not None:
        if not isinstance(scheme, Mapping):
            raise CheckpointError(f"quantization_config needs kv_cache_scheme to be an object, got {scheme!r:.60}")
        width = f"{scheme.get('num_bits')!r:.10}-bit {scheme.get('type', 'int')!s:.10}"
        yield "kv_cache_scheme", Oddity(f"the config asks for a KV cache of {width} numbers", kept)
    for name in scales:
        module, _, leaf = name.rpartition(".")
        yield module or name, Oddity("scales of a quantized KV cache", f"{leaf}, {kept}")
