"""The table of predictions in docs/kernel-log.md, made from heuristics.h: `python -m tests.cuda.kernel_log` writes it anew."""

from __future__ import annotations

from .emulator import ROOT
from .test_heuristics import choose

LOG = ROOT / "docs" / "kernel-log.md"
BEGIN, END = "<!-- predictions -->\n", "<!-- end of predictions -->\n"
N = K = 8192
# Name, sm, GB/s, and 10^3 multiplications a ns with 16-bit inputs and fp32 sums, of the data sheets.
CARDS = (
    ("H200", 90, 4800, 495), ("A100", 80, 2039, 156), ("RTX 3090", 86, 936, 36), ("RTX 4090", 89, 1008, 83),
    ("RTX 5090", 120, 1792, 105),
)  # fmt: skip
PROBLEMS = ((1, 4), (8, 4), (16, 4), (1, 8), (64, 4), (128, 4), (512, 4), (2048, 4), (8192, 4))


def floor_ns(M: int, bits: int, bandwidth: int, rate: int) -> float:
    """Codes, 16-bit scales for groups of 128, x and y, each moved once; or the multiplications: whichever takes longer."""
    moved = N * K * bits / 8 + 2 * (N * K / 128 + M * K + M * N)
    return max(moved / bandwidth, M * N * K / (rate * 1e3))


def table() -> str:
    lines = [
        "| card | bits | M | what is chosen | floor | model | share of floor | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sm, bandwidth, rate in CARDS:
        for M, bits in PROBLEMS:
            floor, (_, model, text) = floor_ns(M, bits, bandwidth, rate), choose(M, N, K, sm, bits=bits)
            what = text.split(": ")[1]
            times = f"{floor / 1e3:.1f} µs | {model / 1e3:.1f} µs | {100 * floor / model:.0f} %"
            lines.append(f"| {name} | {bits} | {M} | {what} | {times} | unmeasured |")
    return "\n".join(lines) + "\n"


def with_table(log: str) -> str:
    before, rest = log.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    LOG.write_text(with_table(LOG.read_text()))
