"""The quick set of `qkernels bench`: one layer of Llama-3-8B in 4 and 8 bits, decode to small batches, in under a minute."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qkernels.scheme import QuantScheme

from ..method.results import Run
from .shapes import CPU_SET, CPU_TOKENS, FULL_SET, TOKENS, find_layer, layers_of
from .sweep import Case, run_cases

SCHEMES = ("w4a16_g128", "w8a16_channel")
FULL_SCHEMES = (*SCHEMES, "w4a8_g128", "w8a8_channel")


def quick_cases(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """The o projection of Llama-3-8B, [4096, 4096]."""
    tokens = (1, 4, 16, 64) if device.type == "cpu" else (1, 8, 32, 256, 2048)
    layer = find_layer("llama-3-8b", "o")
    return [Case(layer, tokens, QuantScheme.parse(s), dtype) for s in SCHEMES]


def full_cases(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, models: tuple[str, ...] | None = None
) -> list[Case]:
    """Every layer of `shapes.FULL_SET`, M to 8192; on a CPU of `shapes.CPU_SET`, M to 256, unless `models` are named."""
    tokens, usual = (TOKENS, FULL_SET) if device.type == "cuda" else (CPU_TOKENS, CPU_SET)
    chosen = usual if models is None else [entry for entry in FULL_SET if entry[0] in models]
    layers = [layer for model, shards in chosen for layer in layers_of(model, shards)]
    return [Case(layer, tokens, QuantScheme.parse(s), dtype) for layer in layers for s in FULL_SCHEMES]


def quick(device: torch.device, seconds: float = 30.0, progress: Callable[[Run], None] | None = None) -> Run:
    """Measure the quick set; sampling takes about `seconds`, preparation 10 to 20 more."""
    cases = quick_cases(device)
    return run_cases(cases, device, rounds=25, seconds=seconds / len(cases), progress=progress)
