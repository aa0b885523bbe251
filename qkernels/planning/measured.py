"""What was measured, by us and on our bundled model, as far as a plan tells it: an order of schemes, and shares of bandwidth.

KL (nats a token, from the unquantized model) of a model of 8 million parameters says in which order methods and widths stand,
not what a large model will lose: large ones lose less. The numbers are those of docs/quality.md and docs/choosing.md; a test
holds them against these pages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ArgumentError
from ..quantizers import QUANTIZERS, Options


@dataclass(frozen=True)
class Candidate:
    """A form that a float model can be given.

    Args:
        scheme: in short form, or of a GGUF file its mix of types; None: as it is.
        method: of `qkernels quantize`; "": none, of a model as it is and of GGUF files.
        kl: nats a token on the bundled model; None: not measured (its place in the order is that of its width).
        format: of the file, the one that most engines read.
        choices: options of the method that are not its defaults.
    """

    scheme: str | None
    method: str
    kl: float | None
    format: str = "native"
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def options(self) -> Options | None:
        """The method; None for a model as it is."""
        return QUANTIZERS[self.method](**dict(self.choices)) if self.method else None  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods that it is made of, whose times add up: AWQ's scales come first where they are asked for."""
        scales = dict(self.choices).get("scales")
        return tuple(filter(None, (scales, self.method)))

    @property
    def calibrated(self) -> bool:
        """Whether it needs a text."""
        return self.options is not None and self.options.needs == "moments"

    @property
    def orders_columns(self) -> bool:
        return self.options is not None and self.options.orders_columns

    @property
    def takes_experts(self) -> bool:
        """Whether it quantizes stacked experts: a method that scales what linear layers read does not."""
        return self.options is None or not self.options.folds


@dataclass(frozen=True)
class Seconds:
    """How long quantizing takes.

    Args:
        by_method: seconds for 10^9 weights, and how many more for each 1000 tokens of calibration.
        source: what time that is, and where it was measured.
    """

    by_method: Mapping[str, tuple[float, float]]
    source: str


GGUF: Final = "gguf"
QUANTIZING: Final = "quantizing"  # the kind of a result of benchmarks.models.quantize_speed
# The least error that needs no index of columns and no second model in memory (docs/decisions/0032, 0036).
SCALED: Final = (("scales", "awq"), ("act_order", "static"))
# Best first.
CANDIDATES: Final = (
    Candidate(None, "", 0.0),
    Candidate("w8a16_g128", "gptq", 6.2e-5, "gptq"),
    Candidate("Q8_0", "", 2.7e-4, GGUF),
    Candidate("w8a8_channel", "smoothquant", 7.6e-4),
    Candidate("w6a16_g128", "gptq", None),
    Candidate("Q6_K", "", 2.9e-3, GGUF),
    Candidate("w5a16_g128", "gptq", None),
    Candidate("w4a16_g128_asym", "gptq", 3.1e-3, "awq", SCALED),
    Candidate("Q5_K_M", "", 9.7e-3, GGUF),
    Candidate("w4a16_g128", "gptq", 1.0e-2, "gptq"),
    Candidate("w4a8_g128", "gptq", None),
    Candidate("w3a16_g128_asym", "gptq", 1.5e-2, choices=SCALED),
    Candidate("nf4_g64", "nf4", 2.9e-2),
    Candidate("mxfp4_g32", "rtn", None, "compressed-tensors"),
    Candidate("Q4_K_M", "", 4.2e-2, GGUF),
    Candidate("Q3_K_M", "", 5.7e-2, GGUF),
    Candidate("w2a16_g128", "gptq", 1.3e-1),
)
# What --prefer speed and size do not go beyond: from there on the bundled model is visibly another one (top-1 agreement below
# 88 %, docs/quality.md).
LARGEST_KL: Final = 3e-2

# Seconds of quantizing 10^9 weights from files to files, and how many more for each 1000 tokens of calibration, by method; GGUF
# types by the plain search; processor time: benchmarks/results/amd-epyc-family-25-model-17-2-cores/quantize-speed.json
# (benchmarks/models/quantize_speed.py).
SECONDS: Final = Seconds(
    {
        "rtn": (36.1, 0.00),
        "gptq": (341.6, 32.78),
        "awq": (3088.8, 152.87),
        "smoothquant": (284.8, 65.69),
        "nf4": (81.3, 0.00),
        GGUF: (9.3, 0.00),
        "gguf, best search": (26.4, 0.00),
    },
    "measured on one thread of a Zen 4",
)

# Of the rate at which memory is read, what a token of a whole model reaches (eager; compiled: more): 0.59 and 0.73 in the two
# states of the machine of benchmarks/results/amd-epyc-family-26-model-2-2-cores (llama-cpp*.json, 1.2 billion parameters).
CPU_SHARE: Final = (0.59, 0.73)


def seconds_of(results: Sequence[str]) -> tuple[Seconds, list[str]]:
    """How long quantizing takes, as those of these results say that are of `benchmarks.models.quantize_speed`; the others.

    Raises:
        ArgumentError: one of them is no JSON, or is none of its own kind.
    """
    found, others = SECONDS, []
    for path in results:
        try:
            result: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("kind") != QUANTIZING:
                others.append(path)
                continue
            rows = {
                row["method"]: (float(row["seconds"]), float(row["seconds_a_thousand_tokens"]))
                for row in result["rows"]
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"{path} is no result of a benchmark: {error!r}") from error
        if not all(math.isfinite(value) and value >= 0 for pair in rows.values() for value in pair):
            raise ArgumentError(f"{path} has times that are none: {rows}")
        found = Seconds({**found.by_method, **rows}, path)
    return found, others
