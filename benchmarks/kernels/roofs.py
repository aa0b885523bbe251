"""The roofs of a machine, measured in the run whose rows are set against them: memory bandwidth and matrix rate.

A roof from a data sheet belongs to other clocks, other memory and an empty machine. These are what torch reaches here, today.

Bandwidth is measured over 1 GiB: over 128 MiB, four times the cache that the machine reports, a 2-core Zen 5 read 20 to 40 %
faster than its memory can. And it is measured again in every round beside the kernels (`read_sampler`), because it moves by more
than half within seconds where a virtual machine's cores wander over the chiplets of the host (docs/benchmarking.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.text import dtype_name

from ..method import environment
from ..method.timing import ROTATION, Clock, clock_for

BUFFER_BYTES, PIECES = 1 << 30, 4
_ROUNDS = 7


@dataclass(frozen=True)
class Roofs:
    """What the machine can do.

    Args:
        copy_gbs: bytes read plus bytes written by a copy, in 1e9 a second.
        read_gbs: bytes read by a sum; a decode kernel hardly writes, so this is the roof that it meets on a CPU.
        matrix_tflops: 2 n^3 of a square matmul, in 1e12 a second, by dtype of the operands.
        drift: bandwidth at the end of the run over that at its beginning, less 1; None before the end.
    """

    copy_gbs: float
    read_gbs: float
    matrix_tflops: dict[str, float]
    drift: float | None = None

    @property
    def bandwidth_gbs(self) -> float:
        """The larger of the two."""
        return max(self.copy_gbs, self.read_gbs)

    @property
    def best_tflops(self) -> float:
        """The fastest dtype's matrix rate: a kernel may convert its operands as it likes."""
        return max(self.matrix_tflops.values())

    def floor_seconds(self, moved_bytes: float, flops: float) -> float:
        """The least time that this machine needs for so many bytes and operations (Williams et al. 2009, Roofline)."""
        return max(moved_bytes / (self.bandwidth_gbs * 1e9), flops / (self.best_tflops * 1e12))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: torch.device, cache_bytes: int, seconds: float = 2.0) -> Roofs:
    """Measure for about so many seconds. Best of several samples: a roof is what the machine can do, not what it mostly does."""
    copy, read = bandwidth(device, cache_bytes, seconds / 2)
    rates = {}
    for dtype in (torch.bfloat16, torch.float16 if device.type == "cuda" else torch.float32):
        rates[dtype_name(dtype)] = matrix_rate(device, dtype, seconds / 4)
    return Roofs(copy, read, rates)


def buffer_bytes(cache_bytes: int, available: int) -> int:
    """How much to read: 1 GiB, or 4 `ROTATION` caches where these are more, within a quarter of the memory that can be had."""
    return min(max(4 * ROTATION * cache_bytes, BUFFER_BYTES), available // 4) // (4 * PIECES) * (4 * PIECES)


def read_sampler(device: torch.device, cache_bytes: int, clock: Clock | None = None) -> Callable[[], float]:
    """Each call: seconds a byte, of a sum over the next `PIECES`-th of a buffer of `buffer_bytes`."""
    nbytes = buffer_bytes(cache_bytes, environment.available_bytes(device))
    pieces = torch.ones(nbytes // 4, device=device).chunk(PIECES)
    sample = (clock or clock_for(device)).prepare([piece.sum for piece in pieces])
    return lambda: sample() * PIECES / nbytes


def bandwidth(device: torch.device, cache_bytes: int, seconds: float = 1.0) -> tuple[float, float]:
    """(copy, read) in 1e9 bytes a second, over `buffer_bytes` each; a copy reads one half and writes the other."""
    nbytes = buffer_bytes(cache_bytes, environment.available_bytes(device))
    source, target = torch.ones(nbytes // 4, device=device).chunk(2)
    copied = _best(clock_for(device).prepare([lambda: target.copy_(source)]), seconds / 2)
    return nbytes / copied / 1e9, 1e-9 / _best(read_sampler(device, cache_bytes), seconds / 2)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """1e12 operations a second of a square matmul that fills the machine."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out: Tensor = torch.empty(n, n, device=device, dtype=dtype)
    sample = clock_for(device).prepare([lambda: torch.mm(a, b, out=out)])
    return 2 * n**3 / _best(sample, seconds) / 1e12


def _best(sample: Callable[[], float], seconds: float) -> float:
    end, best, count = time.monotonic() + seconds, float("inf"), 0
    while count < _ROUNDS or time.monotonic() < end:
        best, count = min(best, sample()), count + 1
        if count >= 2 and time.monotonic() > end + 4 * seconds:
            break
    return best
