"""Each mode of the CPU kernels against each peer, with the ratio it is meant to reach beside the ratio measured.

    python -m benchmarks.kernels.cpu_targets --layer gate_up
    QKERNELS_GGML_LIB=<ggml built for AVX2, or ik_llama.cpp's> python -m benchmarks.kernels.cpu_targets --isa avx2

A process can load one build of ggml, so the AVX2 rows are runs of their own, one a build. A target is reached if the median of
the paired ratios is at least the target; where the 99 % interval holds the target the row says "within noise" beside. A mode
without a kernel, or a peer without a number, is "unmeasured" with its reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qkernels import extension
from qkernels.scheme import QuantScheme
from qkernels.text import table as markdown_table

from ..method import environment, results
from ..method.results import Row, Run
from ..peers import PEERS
from .shapes import find_layer
from .sweep import Case, run_cases

TOKENS = (1, 4, 16, 128)
GGML = ("ggml q4_0", "ggml q4_k")
SAME = "ggml same type"
LLM_INT8 = "w8a8o6_channel"
READ_SHARE = 80.0  # % of the read bandwidth that a token should reach on a matrix beyond the last-level cache


@dataclass(frozen=True)
class Target:
    """`factors[i]`: the fastest of `peers` should take at least so many times as long as ours at `TOKENS[i]` (None: no
    target); `outliers`: with so many columns of x that have an entry of 8."""

    scheme: str
    peers: tuple[str, ...]
    factors: tuple[float | None, ...]
    outliers: int = 0


TARGETS = (
    Target("w4a16_g128", ("torch linear",), (4.0, 3.2, 1.8, 1.0)),
    Target("w4a16_g128", ("torch int4pack",), (1.5, 2.0, 2.0, 2.2)),
    Target("w4a16_g128", ("gptqmodel cpu", "bitsandbytes nf4"), (1.0, 1.0, 1.0, 1.0)),
    Target("w4a8_g32", GGML, (1.1, 2.5, 1.8, 1.4)),
    Target("w4a8_g128", GGML, (1.1, 2.5, 1.8, 1.4)),
    Target("w8a8_channel", ("torch dynamic int8",), (1.2, 1.1, 1.0, 1.0)),
    Target("w4a16_g128", ("zentorch", "ark", "openvino"), (2.0, 2.0, 2.0, 2.0)),
    Target("w4a8_g128", ("zentorch",), (2.0, 1.4, 1.5, 1.3)),
    Target("nf4_g64", ("bitsandbytes nf4",), (1.4, 1.4, 1.4, 1.4)),
    *(Target(LLM_INT8, ("bitsandbytes int8",), (1.5, 1.5, 1.5, 1.5), outliers) for outliers in (0, 6)),
    Target(LLM_INT8, ("qkernels w8a8_channel",), (1 / 1.15,) * 4),
    Target(LLM_INT8, ("qkernels w8a8_channel",), (1 / 1.3,) * 4, outliers=6),
    # time goes with the bytes within 10 % at one token, and unpacking costs so much where products bind
    Target("w3a16_g128", ("qkernels w4a16_g128",), (4.125 / 3.125 / 1.1, 1 / 1.15, 1 / 1.15, 1 / 1.15)),
    Target("w6a16_g128", ("qkernels w8a16_g128",), (8.125 / 6.125 / 1.1, 1 / 1.1, 1 / 1.1, 1 / 1.1)),
    Target("w8a16_g128", ("qkernels w4a16_g128",), (None, None, 1 / 1.1, 1 / 1.1)),
    *(Target(f"{name}_a8", (SAME,), (1.1, 1.8, 1.8, 2.0)) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
    *(
        Target(name, (SAME,), (1.1, 1.8, 1.8, 1.5))
        for name in ("iq4_xs_a8", "iq4nl_g32_a8", "mxfp4_g32_a8", "mxfp4_g32")
    ),
)
TARGETS_AVX2 = (
    Target("w4a8_g32", GGML, (1.1, 1.8, 1.5, 1.5)),
    Target("w4a8_g128", GGML, (1.1, 1.8, 1.5, 1.5)),
    *(
        Target(f"{name}_a8", (SAME,), (1.0, 1.0, 1.0, 1.0))
        for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4nl_g32", "mxfp4_g32")
    ),
)


def targets_of(isa: str | None) -> tuple[Target, ...]:
    return TARGETS_AVX2 if isa == "avx2" else TARGETS


def verdict(target: Target, factor: float, rows: Sequence[Row], absent: dict[str, str]) -> tuple[str, str]:
    """(ratio, verdict) as text. Where a target is missed the verdict also says how fast it would have to read its bytes, in
    % of the memory bandwidth read in the same rounds: no kernel reaches a target that needs more than 100.

    Args:
        target: whose scheme and peers.
        factor: to be reached.
        rows: of one layer, scheme and number of tokens.
        absent: of the run: candidates without a row -> why.
    """
    mine = [row for row in rows if row.ours and row.us is not None]
    if not mine:
        said = [row.reason for row in rows if row.ours and row.reason] or [
            why for name, why in absent.items() if name.startswith("qkernels cpu")
        ]
        return "–", f"unmeasured: {'; '.join(said) or 'not in this run'}"
    best = min(mine, key=lambda row: row.us or 0.0)
    reasons = {row.candidate: row.reason or "" for row in rows} | absent
    lacking = [f"{name} ({reasons.get(name) or 'not in this run'})" for name in target.peers if name not in best.ratios]
    found = {name: best.ratios[name] for name in target.peers if name in best.ratios}
    if not found:
        return "–", f"unmeasured: {'; '.join(lacking)}"
    rival = min(found, key=lambda name: found[name][0])
    median, low, high = found[rival]
    word = "reached" if median >= factor else "**short**"
    if median < factor and best.read_percent is not None:
        word += f", would read at {best.read_percent[0] * factor / median:.0f} % of memory"
    word += ", within noise" if low < factor <= high else ""
    word += f"; unmeasured: {'; '.join(lacking)}" if lacking else ""
    return f"{median:.2f} [{low:.2f}, {high:.2f}] {rival}", word


def _with(outliers: int) -> str:
    """What the name of a layer says of them, after it."""
    return f" with {outliers} outliers" if outliers else ""


def _outliers_of(layer: str) -> int:
    return next((n for n in {t.outliers for t in TARGETS} if n and layer.endswith(_with(n))), 0)


def to_markdown(run: Run, isa: str | None) -> str:
    """Target by target and layer by layer; then what one token reads a second."""
    lines, reads, asked = [], [], {row.scheme for row in run.rows}
    for layer in dict.fromkeys(f"{row.layer} [{row.N}, {row.K}]" for row in run.rows):
        here = [row for row in run.rows if f"{row.layer} [{row.N}, {row.K}]" == layer]
        for target in targets_of(isa):
            if str(QuantScheme.parse(target.scheme)) not in asked or target.outliers != _outliers_of(here[0].layer):
                continue
            for M, factor in zip(TOKENS, target.factors, strict=True):
                if factor is None:
                    continue
                rows = [row for row in here if row.M == M and row.scheme == str(QuantScheme.parse(target.scheme))]
                ratio, word = verdict(target, factor, rows, run.absent)
                against = "fastest of " + ", ".join(target.peers) if len(target.peers) > 1 else target.peers[0]
                lines.append([layer, target.scheme, against, str(M), f"≥ {factor:.3g}", ratio, word])
        cache = max(run.environment["caches"].values(), default=0)
        for row in here:
            if row.M == 1 and row.gbs is not None and row.ours and row.read_percent is not None:
                median, low, high = row.read_percent
                nbytes = row.gbs * (row.us or 0) * 1e3
                word = (
                    "smaller than the cache" if nbytes <= cache else "reached" if median >= READ_SHARE else "**short**"
                )
                share = f"{median:.0f} [{low:.0f}, {high:.0f}]"
                reads.append([layer, row.scheme, row.candidate, f"{nbytes / 2**20:.1f}", f"{row.gbs:.1f}", share, word])
    header = ["layer", "mode", "against", "M", "target", "peer time / ours", "verdict"]
    second = ["layer", "mode", "kernel", "MiB", "GB/s", "% of memory read in the same rounds", f"≥ {READ_SHARE:.0f} %"]
    blocks = [markdown_table(header, lines)]
    if reads:
        blocks.append("What one token reads:\n\n" + markdown_table(second, reads))
    return "\n\n".join(blocks) + "\n\n" + results.to_markdown(run)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.cpu_targets", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--layer", default="o", help="of Llama-3-8B: qkv, o, gate_up, down (default: o)")
    parser.add_argument("--schemes", nargs="+", help="only these (default: all that have a target)")
    parser.add_argument("--isa", help="force the CPU kernels' instruction set; avx2 has targets of its own")
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="of sampling per layer and scheme (default: 20)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/cpu-targets-LAYER[-ISA].json")
    args = parser.parse_args(argv)
    if args.isa:
        extension.use_isa(args.isa)
    device = torch.device("cpu")
    name = "-".join(filter(None, ("cpu-targets", args.layer.replace("_", "-"), args.isa)))
    out = args.out or environment.RESULTS / environment.machine_name(device) / f"{name}.json"
    schemes = args.schemes or list(dict.fromkeys(target.scheme for target in targets_of(args.isa)))
    layer = find_layer("llama-3-8b", args.layer)
    kinds = dict.fromkeys([(scheme, 0) for scheme in schemes])
    kinds |= dict.fromkeys((t.scheme, t.outliers) for t in targets_of(args.isa) if t.scheme in schemes)
    cases = [
        Case(
            replace(layer, name=layer.name + _with(outliers)), tuple(args.tokens), QuantScheme.parse(scheme),
            torch.bfloat16, outliers,
        )
        for scheme, outliers in kinds
    ]  # fmt: skip
    wanted = {peer for target in targets_of(args.isa) for peer in target.peers} | {"torch linear"}
    peers = [peer for peer in PEERS if peer.name in wanted]
    measured = run_cases(cases, device, args.rounds, args.seconds, peers)
    results.write(measured, out)
    text = to_markdown(measured, args.isa)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
