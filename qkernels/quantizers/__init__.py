"""Quantizers: float weight (and second moments of its inputs) -> `QuantTensor`. One file a method, one line in `REGISTERED`.

`quantize`, its preview and the command line know methods by this registry and by what they answer (`Options`) alone. Methods
are imported when they are first asked for: the command line lists them without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .awq import AWQ
    from .gptq import GPTQ
    from .hqq import HQQ
    from .nf4 import NF4
    from .options import Options
    from .rtn import RTN, rounding_of
    from .smoothquant import SmoothQuant
    from .statistics import InputStatistics

# By its name on the command line and in reports, which is `Options.name`: where a method is, module:class.
REGISTERED: dict[str, str] = {
    "rtn": ".rtn:RTN",
    "gptq": ".gptq:GPTQ",
    "awq": ".awq:AWQ",
    "hqq": ".hqq:HQQ",
    "nf4": ".nf4:NF4",
    "smoothquant": ".smoothquant:SmoothQuant",
}


class _Quantizers(Mapping[str, "type[Options]"]):
    """The methods by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Options]:
        found: type[Options] = _imported(REGISTERED[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTERED)

    def __len__(self) -> int:
        return len(REGISTERED)


QUANTIZERS: Mapping[str, type[Options]] = _Quantizers()

__all__ = [
    "QUANTIZERS", "RTN", "GPTQ", "AWQ", "HQQ", "NF4", "SmoothQuant", "InputStatistics", "Options", "rounding_of",
]  # fmt: skip


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module, __name__), name)


if not TYPE_CHECKING:  # a type checker would take __getattr__ for any name, misspelled ones too

    def __getattr__(name: str) -> Any:
        places = (*REGISTERED.values(), ".options:Options", ".statistics:InputStatistics", ".rtn:rounding_of")
        found = next((place for place in places if place.endswith(f":{name}")), None)
        if found is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _imported(found)
