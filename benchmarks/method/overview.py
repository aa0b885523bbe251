"""README's picture: what quantizing loses by size beside other tools, and how much faster a layer is than with them.

python -m benchmarks.method.overview [--out docs/overview.png]

Both halves are committed results; the file says which, so that a test notices when it is older than they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "benchmarks" / "results"
QUALITY: Final = RESULTS / "quality-peers" / "demo-model.json"
SPEED: Final = RESULTS / "amd-epyc-family-25-model-17-2-cores" / "cpu-targets-o-peers.json"
GGUF: Final = SPEED.with_name("cpu-targets-o-gguf.json")
OURS: Final = "#0b6e4f"
TOOLS: Final = {  # as the rows of QUALITY name it: how it names itself, colour and marker, also told apart in grey
    "qkernels": ("qkernels", OURS, "o"),
    "gptqmodel": ("GPTQModel", "#c8553d", "s"),
    "llmcompressor": ("llm-compressor", "#3d5a98", "^"),
    "auto_round": ("auto-round", "#8a6fb0", "D"),
    "hqq": ("HQQ", "#b08a2e", "v"),
}
PEERS: Final = {  # as the rows of SPEED name it: how it is called here
    "torch linear": ("torch, bf16 weights", "#7a7a7a", "P"),
    "torch int4pack": ("torch, int4", "#c8553d", "s"),
    "bitsandbytes nf4": ("bitsandbytes, NF4", "#3d5a98", "^"),
    "zentorch": ("zentorch, int4", "#8a6fb0", "D"),
    "ark": ("auto-round-lib, int4", "#b08a2e", "v"),
}


def digest() -> str:
    """Of the results that are drawn."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (QUALITY, SPEED, GGUF))).hexdigest()[:16]


def _rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def speed_ups() -> dict[str, dict[int, float]]:
    """Peer -> tokens -> its time over ours: 4 bits with 16-bit activations; of ggml Q4_K with int8 ones, over our Q4_K."""
    found: dict[str, dict[int, float]] = {name: {} for name in PEERS}
    for row in _rows(SPEED):
        if row["ours"] and row["scheme"] == "w4a16_g128":
            for name in PEERS:
                if name in row["ratios"]:
                    found[name][row["M"]] = row["ratios"][name][0]
    found["ggml"] = {
        row["M"]: row["ratios"]["ggml same type"][0]
        for row in _rows(GGUF)
        if row["scheme"] == "q4_k_a8" and "ggml same type" in row["ratios"]
    }
    return found


def draw(out: Path) -> Path:
    """Write the picture. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), dpi=110, layout="constrained")
    for tool, (label, colour, marker) in TOOLS.items():
        mine = [row for row in _rows(QUALITY) if row["tool"] == tool]
        first = tool == "qkernels"
        left.scatter(
            [row["bits_per_weight"] for row in mine],
            [row["distance"] for row in mine],
            s=46 if first else 34,
            color=colour,
            marker=marker,
            zorder=2 if first else 3,  # the smaller marks on top: where they meet, both are seen
            alpha=0.9,
            label=label,
        )
    left.set_yscale("log")
    left.set_xlabel("bits a weight in the file")
    left.set_ylabel("KL from the original, nats a token")
    left.set_title("What quantizing loses: down and left is better", loc="left", fontsize=11)
    left.set_xlim(left=2.2)
    left.legend(frameon=False, fontsize=9, loc="lower left")  # few bits that lose little: nothing lies there

    speeds = speed_ups()
    for name, (label, colour, marker) in {**PEERS, "ggml": ("ggml, Q4_K", "#2b2b2b", "X")}.items():
        points = sorted(speeds[name].items())
        right.plot([M for M, _ in points], [ratio for _, ratio in points], color=colour, marker=marker, label=label)
    right.axhline(1, color=OURS, linewidth=1.6)
    right.annotate("qkernels", (16, 1), color=OURS, fontsize=9, xytext=(0, -12), textcoords="offset points")
    right.set_xscale("log", base=2)
    tokens = sorted({M for points in speeds.values() for M in points})
    right.set_xticks(tokens, [str(M) for M in tokens])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_ylim(bottom=0)
    right.set_xlabel("tokens at once")
    right.set_ylabel("their time / ours")
    right.set_title("A layer of 4096 × 4096, two cores of a Zen 4", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Description": digest(), "Software": None})
    pyplot.close(figure)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method.overview", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "overview.png")
    print(draw(parser.parse_args(argv).out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
