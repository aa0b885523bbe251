"""One token through large layers whose weights lie on small pages or on huge ones, interleaved.

    python -m benchmarks.models.huge_pages

Both variants hold the same bytes and run the same kernel, over layers worth four times the last-level cache.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from qkernels import ops
from qkernels.nn import QuantLinear
from qkernels.nn.huge_pages import begins_huge_page
from qkernels.scheme import QuantScheme
from qkernels.text import table as markdown_table

from ..kernels import roofs
from ..kernels.shapes import find_layer
from ..kernels.weights import random_weight
from ..method import environment
from ..method.statistics import median_interval, ratio_interval
from ..method.timing import WallClock, copies_needed, copy_tensors, interleaved
from ..peers import bytes_of

SCHEMES = ("w4a16_g128", "w4a8_g128", "w8a16_g128")
LAYERS = ("qkv", "o", "gate_up", "down")
ROUNDS = 21


def rows_of(name: str, scheme: str, read_gbs: float) -> list[str]:
    """One layer of Llama-3-8B: GB/s on small and huge pages, time ratio [99 % interval], share of the read bandwidth."""
    shape = find_layer("llama-3-8b", name)
    layer = QuantLinear.from_quant_tensor(
        random_weight(shape.N, shape.K, QuantScheme.parse(scheme), torch.bfloat16), dtype=torch.bfloat16
    )
    assert begins_huge_page(layer.qweight)
    buffers = {"qweight": layer.qweight, "scales": layer.scales}
    nbytes = bytes_of(*buffers.values())
    copies = copies_needed(nbytes, environment.cache_bytes(torch.device("cpu")), 4 << 30)
    x = torch.randn(1, shape.K, dtype=torch.bfloat16)
    multiply = partial(
        ops.gemm, layer.layout, zeros=None, k_order=None, bias=None, in_features=shape.K, out_features=shape.N,
        scheme=layer.scheme,
    )  # fmt: skip
    rotated = {
        "small": [{key: t.clone() for key, t in buffers.items()} for _ in range(copies)],
        "huge": [copy_tensors(buffers) for _ in range(copies)],
    }
    assert torch.equal(multiply(x, **rotated["small"][0]), multiply(x, **rotated["huge"][0]))
    clock = WallClock()
    samplers = {pages: clock.prepare([partial(multiply, x, **b) for b in made]) for pages, made in rotated.items()}
    samples = interleaved(samplers, ROUNDS)
    ratio = ratio_interval(samples["small"], samples["huge"])
    rates = [nbytes / median_interval(samples[pages]).median / 1e9 for pages in ("small", "huge")]
    return [
        f"{shape.N} × {shape.K}", scheme, *(f"{rate:.1f}" for rate in rates),
        f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", f"{100 * rates[1] / read_gbs:.0f}",
    ]  # fmt: skip


def main() -> int:
    device = torch.device("cpu")
    with torch.inference_mode():
        _, read = roofs.bandwidth(device, environment.cache_bytes(device))
        lines = [rows_of(name, scheme, read) for name in LAYERS for scheme in SCHEMES]
    head = ["N × K", "scheme", "small pages, GB/s", "huge pages, GB/s", "small : huge", f"% of read ({read:.1f} GB/s)"]
    print(markdown_table(head, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
