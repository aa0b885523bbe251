"""What was measured, by us and on our bundled model, as far as a plan tells it: an order of schemes, and shares of bandwidth.

KL (nats a token, from the unquantized model) of a model of 8 million parameters says in which order methods and widths stand,
not what a large model will lose: large ones lose less. The numbers are those of docs/quality.md and docs/choosing.md; a test
holds them against these pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..quantizers import QUANTIZERS, Options


@dataclass(frozen=True)
class Candidate:
    """A form that a float model can be given.

    Args:
        scheme: in short form; None: as it is.
        method: of `qkernels quantize`.
        kl: nats a token on the bundled model; None: not measured (its place in the order is that of its width).
        format: of the file, the one that most engines read.
    """

    scheme: str | None
    method: str
    kl: float | None
    format: str = "native"

    @property
    def options(self) -> Options | None:
        """The method as it is by default; None for a model as it is."""
        return QUANTIZERS[self.method]() if self.method else None

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


# Best first.
CANDIDATES: Final = (
    Candidate(None, "", 0.0),
    Candidate("w8a16_g128", "gptq", 6.2e-5, "gptq"),
    Candidate("w8a8_channel", "smoothquant", 7.6e-4),
    Candidate("w6a16_g128", "gptq", None),
    Candidate("w5a16_g128", "gptq", None),
    Candidate("w4a16_g128_asym", "awq", 5.9e-3, "awq"),
    Candidate("w4a16_g128", "gptq", 1.0e-2, "gptq"),
    Candidate("w4a8_g128", "gptq", None),
    Candidate("nf4_g64", "nf4", 2.9e-2),
    Candidate("mxfp4_g32", "rtn", None, "compressed-tensors"),
    Candidate("w3a16_g128_asym", "awq", 2.4e-2),
    Candidate("w2a16_g128", "gptq", 1.3e-1),
)
# What --prefer speed and size do not go beyond: from there on the bundled model is visibly another one (top-1 agreement below
# 88 %, docs/quality.md).
LARGEST_KL: Final = 3e-2

# Seconds of GPTQ for 10^9 weights, on two cores of a machine at work: 162 s for 1.03 (4 bits with clipping, 8 x 64 tokens,
# docs/quantizing-large-models.md). Passes over more tokens come on top.
CALIBRATED_SECONDS: Final = 157

# Of the rate at which memory is read, what a token of a whole model reaches (eager; compiled: more): 0.59 and 0.73 in the two
# states of the machine of benchmarks/results/amd-epyc-family-26-model-2-2-cores (llama-cpp*.json, 1.2 billion parameters).
CPU_SHARE: Final = (0.59, 0.73)
