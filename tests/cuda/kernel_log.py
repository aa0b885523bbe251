"""The tables of predictions in docs/kernel-log.md, made from heuristics.h: `python -m tests.cuda.kernel_log`
writes them anew."""

from __future__ import annotations

from .calls import PATHS
from .emulator import ROOT
from .test_heuristics import choose
from .test_heuristics_a8 import choose as choose_a8

LOG = ROOT / "docs" / "kernel-log.md"
BEGIN, END = "<!-- predictions -->\n", "<!-- end of predictions -->\n"
N = K = 8192
# Name, sm, GB/s, and 10^3 multiplications a ns with 16-bit inputs and fp32 sums, of the data sheets.
CARDS = (
    ("H200", 90, 4800, 495), ("A100", 80, 2039, 156), ("RTX 3090", 86, 936, 36), ("RTX 4090", 89, 1008, 83),
    ("RTX 5090", 120, 1792, 105),
)  # fmt: skip
# The same with int8 inputs, and of bf16 what the model gives to cuBLAS.
CARDS_A8 = (("H200", 90, 4800, 990, 370.5), ("A100", 80, 2039, 312, 112.5), ("RTX 4090", 89, 1008, 330, 73.8))
PROBLEMS_A8 = (("W8A8", 8, None), ("W4A8", 4, None), ("W4A8, g128", 4, 128), ("W4A8, g32", 4, 32))
TOKENS_A8 = (16, 128, 1024, 4096)
BEGIN_A8, END_A8 = "<!-- int8 predictions -->\n", "<!-- end of int8 predictions -->\n"
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


def table_a8() -> str:
    """cuBLAS reads 2 bytes a weight at 90 % of the bandwidth or multiplies, whichever takes longer, and is one launch of 2 µs."""
    lines = [
        "| card | weights | M | what is chosen | floor | model | cuBLAS bf16 (model) | ratio (model) | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sm, bandwidth, rate, cublas_rate in CARDS_A8:
        for weights, bits, group in PROBLEMS_A8:
            for M in TOKENS_A8:
                moved = N * K * bits / 8 + 2 * (N * (K / group if group else 1) + M * K + M * N)
                floor = max(moved / bandwidth, M * N * K / (rate * 1e3))
                (path, tokens, splits), model = choose_a8(M, N, K, sm, bits, group)
                cublas = 2000 + max(2 * N * K / (0.9 * bandwidth), M * N * K / (cublas_rate * 1e3))
                what = (
                    f"{'wgmma' if path == PATHS['gemm_a8_sm90'] else 'mma.sync'}, {tokens} tokens, {splits} splits of K"
                )
                times = f"{floor / 1e3:.1f} µs | {model / 1e3:.1f} µs | {cublas / 1e3:.1f} µs | {cublas / model:.2f}"
                lines.append(f"| {name} | {weights} | {M} | {what} | {times} | unmeasured |")
    return "\n".join(lines) + "\n"


def replaced(log: str, begin: str, text: str, end: str) -> str:
    before, rest = log.split(begin)
    return before + begin + text + end + rest.split(end)[1]


def with_tables(log: str) -> str:
    return replaced(replaced(log, BEGIN, table(), END), BEGIN_A8, table_a8(), END_A8)


if __name__ == "__main__":
    LOG.write_text(with_tables(LOG.read_text()))
