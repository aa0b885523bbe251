"""`qkernels bench --tune`: measures launch configurations of the Triton kernels for given shapes on the GPU that is here.

The result is a table of the user's own (`qkernels.kernels.triton.table.user_table`); the package's table stays as it is. What
a configuration computes is compared with the exact product before it is timed. Nothing of this has met a GPU so far.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import ArgumentError, UnsupportedProblem
from qkernels.kernels.catalogue import arch_of
from qkernels.kernels.triton.table import Config, Entry, read, user_table, with_entries, write
from qkernels.layouts import get_layout
from qkernels.ops.backends import missing_triton
from qkernels.scheme import QuantScheme

from ..method import environment
from ..method.timing import Clock, clock_for, copies_needed, copy_tensors, interleaved
from .checking import mismatch
from .weights import random_weight

MOST_GEMV = 8  # tokens up to which the kernel without tensor cores is tried
LEAST_DEQUANTIZED = 128  # tokens from which on a dequantized weight and torch's product are tried
ROUNDS = 15
DTYPE = torch.bfloat16  # of x and scales; fp16 takes the same instructions
BUDGET = 0.25  # share of the free memory that copies of a weight may take


@dataclass(frozen=True)
class Shape:
    """y [M, N] = x [M, K] W^T."""

    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K}"


Seconds = float
# Seconds of each configuration that runs, and why each other one does not.
Timer = Callable[[Shape, Sequence[Config]], tuple[dict[Config, Seconds], dict[Config, str]]]


def shape_of(text: str) -> Shape:
    """ "MxNxK".

    Raises:
        ArgumentError: three positive integers are not there.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"a shape must be MxNxK, three positive integers such as 1x4096x4096, got {text!r}")
    return Shape(*map(int, parts))


def candidates(M: int) -> tuple[Config, ...]:
    """What is worth a try for M tokens: tiles no wider than needed, K split only where tiles alone leave a card idle, the card's
    own product where the tokens are many."""
    found = []
    if M <= MOST_GEMV:
        for block_n, block_k, programs, warps, stages in product((16, 32), (256, 512), (4, 8), (2, 4), (3, 4)):
            found.append(Config("gemv", 1, block_n, block_k, programs, warps, stages))
    needed = 1 << max(M - 1, 0).bit_length()
    tiles = sorted({min(max(needed, 8), 128), min(max(needed // 2, 8), 128)})
    for block_m, block_n, block_k in product(tiles, (32, 64, 128), (64, 128)):
        for programs, stages in product((4, 8) if M <= 16 else (2, 4) if M <= 128 else (0,), (2, 3, 4)):
            found.append(Config("gemm", block_m, block_n, block_k, programs, _warps(block_m, block_n), stages))
    if M >= LEAST_DEQUANTIZED:
        found += [
            Config("dequantize", 1, block_n, block_k, 0, 4, 1) for block_n, block_k in product((16, 64), (128, 256))
        ]
    return tuple(dict.fromkeys(found))


def _warps(block_m: int, block_n: int) -> int:
    """Two of 16 rows of the weight each, and more where sums would not fit their registers."""
    return 8 if block_m * block_n > 4096 else 2 if block_n == 32 else 4


def fastest(seconds: dict[Config, Seconds]) -> Config:
    """Of the shortest times; of equal ones the first."""
    return min(seconds, key=seconds.__getitem__)


def tune(shapes: Iterable[Shape], timer: Timer, say: Callable[[str], None] = print) -> tuple[Entry, ...]:
    """The fastest configuration of each shape.

    Raises:
        UnsupportedProblem: none of the configurations runs a shape; the message has every reason once.
    """
    entries = []
    for shape in shapes:
        seconds, failed = timer(shape, candidates(shape.M))
        reasons = "; ".join(dict.fromkeys(failed.values()))
        if not seconds:
            raise UnsupportedProblem(f"no configuration runs {shape}: {reasons}")
        best = fastest(seconds)
        left_out = f", {len(failed)} do not run: {reasons}" if failed else ""
        say(f"{shape}: {1e6 * seconds[best]:.1f} us with {best} ({len(seconds)} timed{left_out})")
        entries.append(Entry(shape.M, shape.N, shape.K, best))
    return tuple(entries)


def require_gpu(device: torch.device) -> None:
    """Raises:
    UnsupportedProblem: it names what tuning needs and this machine has not.
    """
    needs = "tuning measures the Triton kernels and needs a CUDA device of compute capability 8.0 or later and Triton"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedProblem(
            f"{needs}; got --device {device}{'' if torch.cuda.is_available() else ', and this torch sees no GPU'} "
            "(see qkernels doctor); without one the shipped table is used"
        )
    if why := missing_triton():
        raise UnsupportedProblem(f"{needs}: {why}")


def run(device: torch.device, shapes: Sequence[Shape], scheme: QuantScheme, say: Callable[[str], None] = print) -> None:
    """Measure, and put the winners into the user's table.

    Raises:
        UnsupportedProblem: no GPU, no Triton, or nothing runs.
        ArgumentError: the table that is there is none, or cannot be written; told before anything is measured.
    """
    require_gpu(device)
    path = user_table()
    old = read(path)
    entries = tune(shapes, partial(measured, device, scheme), say)
    write(path, with_entries(old, arch_of(device), entries))
    say(f"written to {path}")


def measured(
    device: torch.device, scheme: QuantScheme, shape: Shape, configs: Sequence[Config],
    clock: Clock | None = None,
) -> tuple[dict[Config, Seconds], dict[Config, str]]:  # fmt: skip
    """Median seconds of a call, on weights that are cold (`timing`), all configurations in turn."""
    from triton.errors import TritonError

    from qkernels.kernels.triton import launch

    clock = clock or clock_for(device)
    weight = random_weight(shape.N, shape.K, scheme, DTYPE)
    exact = weight.dequantize()
    x = torch.randn(shape.M, shape.K, generator=torch.Generator().manual_seed(0)).to(device, DTYPE)
    packed = {n: None if t is None else t.to(device) for n, t in get_layout("kpack").pack(weight).items()}
    size = sum(t.numel() * t.element_size() for t in packed.values() if t is not None)
    count = copies_needed(size, environment.cache_bytes(device), int(BUDGET * environment.available_bytes(device)))
    copies = [packed, *(copy_tensors(packed) for _ in range(count - 1))]
    layout = get_layout("kpack")
    numbers = layout.numbers_of(shape.N, shape.K, scheme)

    def call(config: Config, buffers: dict[str, Any]) -> Tensor:
        return launch.gemm(x, *(buffers[buffer.name] for buffer in layout.buffers), None, *numbers, config=config)

    samplers: dict[Config, Callable[[], float]] = {}
    failed: dict[Config, str] = {}
    for config in configs:
        try:
            wrong = mismatch(call(config, packed), x, exact)
            if wrong is None:
                samplers[config] = clock.prepare([partial(call, config, buffers) for buffers in copies])
        except (RuntimeError, TritonError) as error:  # too much shared memory, too many registers, no memory left
            wrong = str(error).partition("\n")[0] or type(error).__name__
        if wrong is not None:
            failed[config] = wrong
    samples = interleaved({str(config): sampler for config, sampler in samplers.items()}, ROUNDS)
    return {config: statistics.median(samples[str(config)]) for config in samplers}, failed
