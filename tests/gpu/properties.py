"""Properties that need hardware to be believed: the same bits every time, in graphs, on several streams, at odd shapes.

python -m tests.gpu.properties {repeats,graph,streams,shapes} [--device cuda:0] [--repeats N] [--kernels cuda]

`repeats` and `shapes` also run on the CPU, which is how their own logic is tested.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.checking import mismatch
from benchmarks.kernels.sweep import ours
from benchmarks.kernels.weights import random_weight
from qkernels.kernels.catalogue import Problem, arch_of
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

# Long and short groups, every kind of zero, both widths.
SCHEMES = (
    "w4a16_g128", "w4a16_g64_asym", "w8a16_channel", "w4a16_g16_fzero", "w8a16_g32_offset", "w8a8_channel", "w4a8_g128",
)  # fmt: skip
# Each number of tokens that a decode block can have, and each tile of the GEMM kernels.
TOKENS = (1, 3, 8, 12, 17, 33, 64, 129, 300)
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """A kernel with a weight: x -> y, the weight in fp32, and the bits that x is rounded to, if it is."""

    name: str
    product: Product
    weight: Tensor
    activation_bits: int | None


def products(
    N: int,
    K: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
    kernels: str = "",
) -> list[Made]:
    """Every kernel whose name begins with `kernels`, and every scheme that this device has."""
    found: list[Made] = []
    for scheme in map(QuantScheme.parse, SCHEMES):
        weight = random_weight(N, K, scheme, dtype)
        if act_order and scheme.group_size != "channel":
            order = torch.randperm(K, generator=torch.Generator().manual_seed(K))
            index = (order // scheme.group_length(K)).int().to(weight.device)
            weight = QuantTensor(weight.codes, weight.scales, weight.zeros, index, weight.scheme)
        for candidate in ours(Problem(N, K, scheme, dtype, arch_of(device)), device):
            if (
                candidate.reason is None
                and candidate.prepare is not None
                and candidate.name.split()[-1].startswith(kernels)
            ):
                made = candidate.prepare(weight)
                run: Product = lambda x, made=made: made.run(made.buffers, x)  # type: ignore[misc]  # noqa: E731
                truth = weight.dequantize(torch.float32)
                found.append(Made(f"{candidate.name} {scheme}", run, truth, made.activation_bits))
    return found


def inputs(M: int, K: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(device, dtype)


def differing(product: Product, x: Tensor, repeats: int) -> int:
    """How many of `repeats` further calls return other bits than the first."""
    first = product(x).clone()
    return sum(not torch.equal(product(x), first) for _ in range(repeats))


def repeats(device: torch.device, count: int, kernels: str = "") -> list[str]:
    """Same bits every time."""
    wrong = []
    for made in products(1024, 2048, device, kernels=kernels):
        for M in TOKENS:
            if bad := differing(made.product, inputs(M, 2048, device), count):
                wrong.append(f"{made.name}, M={M}: {bad} of {count} calls returned other bits")
    return wrong


def shapes(device: torch.device, count: int, kernels: str = "") -> list[str]:
    """Odd sizes, both types, with and without act-order; what compute-sanitizer watches. 0 tokens are taken, too.

    Small layers never need the largest tiles; the last, wide one does.
    """
    wrong = []
    for N, K in ((1, 128), (33, 264), (257, 1000), (640, 333), (4096, 512)):
        for dtype, act_order in ((torch.bfloat16, False), (torch.float16, True)):
            for made in products(N, K, device, dtype, act_order, kernels):
                for M in (0, *TOKENS):
                    x = inputs(M, K, device, dtype)
                    y = made.product(x)
                    if y.shape != (M, N) or (M and (why := mismatch(y, x, made.weight, made.activation_bits))):
                        wrong.append(f"{made.name}, N={N} K={K} M={M}: {why if M else 'shape'}")
    return wrong


def graph(device: torch.device, count: int, kernels: str = "") -> list[str]:
    """A captured call replayed on memory full of NaN, as an allocator hands it out, gives the bits of the eager call."""
    wrong = []
    for made in products(1024, 2048, device, kernels=kernels):
        for M in TOKENS:
            x = inputs(M, 2048, device)
            expected = made.product(x).clone()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                y = made.product(x)
            for _ in range(20):
                torch.full((64 << 20,), float("nan"), device=device)  # dirties the pool's free blocks
                y.fill_(float("nan"))
                captured.replay()
                if not torch.equal(y, expected):
                    wrong.append(f"{made.name}, M={M}: a replay differs from the eager call")
                    break
    return wrong


def streams(device: torch.device, count: int, kernels: str = "") -> list[str]:
    """Two streams at once, each with its own x, give what each gives alone."""
    wrong = []
    for made in products(1024, 2048, device, kernels=kernels):
        for M in TOKENS:
            xs = [inputs(M, 2048, device), -inputs(M, 2048, device)]
            alone = [made.product(x).clone() for x in xs]
            lanes = [torch.cuda.Stream(), torch.cuda.Stream()]
            torch.cuda.synchronize()
            got: list[list[Tensor]] = [[], []]
            for _ in range(50):
                for i, lane in enumerate(lanes):
                    with torch.cuda.stream(lane):
                        got[i].append(made.product(xs[i]))
            torch.cuda.synchronize()
            if any(not torch.equal(y, alone[i]) for i in range(2) for y in got[i]):
                wrong.append(f"{made.name}, M={M}: results of two streams at once differ from each alone")
    return wrong


CHECKS: dict[str, Callable[[torch.device, int, str], list[str]]] = {
    "repeats": repeats, "graph": graph, "streams": streams, "shapes": shapes,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.properties")
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--kernels", default="", help="only those whose name begins so: cuda, triton")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if not products(64, 128, device, kernels=args.kernels):
        print(f"no kernel of the catalogue runs on {device}: nothing was checked")
        return 1
    with torch.inference_mode():
        wrong = CHECKS[args.check](device, args.repeats, args.kernels)
    print("\n".join(wrong) or f"{args.check}: everything holds on {device}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
