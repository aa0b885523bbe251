"""Results -> a page: tables and plots as Markdown and PNG files.

python -m benchmarks.method.report [RESULTS.json …] [--quality QUALITY.json] [--out benchmarks/results/<machine>/report]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qkernels.errors import ArgumentError

from ..peers import CONTROL
from . import envelope, environment, plots, results


def page(
    runs: Sequence[results.Run], quality: Sequence[dict[str, Any]], out: Path, whole_models: Sequence[str] = ()
) -> Path:
    """Write `out/README.md` and its pictures; `whole_models` are pages of `benchmarks.models.sweep`. Returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    blocks = [
        "# Benchmarks",
        "How these were measured: docs/benchmarking.md. A time is the median of interleaved rounds over cold weights.",
    ]
    for number, run in enumerate(runs):
        timed = [row for row in run.rows if row.us is not None]
        for key in dict.fromkeys((r.model, r.layer, r.N, r.K, r.scheme) for r in timed):
            rows = [r for r in timed if (r.model, r.layer, r.N, r.K, r.scheme) == key]
            model, layer, N, K, scheme = key
            title = f"{model} {layer} [{N}, {K}], {scheme}"
            stem = re.sub(r"[^a-z0-9]+", "-", f"{number}-{title}".lower()).strip("-")
            roof = plots.roofline(run, rows, f"Roofline: {title}", out / f"{stem}-roofline.png")
            pictures = [f"![roofline]({roof.name})"]
            if any(r.candidate == CONTROL for r in rows) and len({r.candidate for r in rows}) > 1:
                speed = plots.speed_up(rows, f"Speed-up: {title}", out / f"{stem}-speed-up.png")
                pictures.append(f"![speed-up]({speed.name})")
            blocks.append(f"## {title}\n\n" + "\n\n".join(pictures))
        blocks.append(results.to_markdown(run))
    blocks += [f"## Whole models\n\n{text.strip()}" for text in whole_models]
    if quality:
        picture = plots.bytes_against_perplexity(quality, "Bytes against perplexity", out / "quality.png")
        blocks.append(f"## Quality\n\n![bytes against perplexity]({picture.name})")
    target = out / "README.md"
    target.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return target


def read_quality(path: Path) -> list[dict[str, Any]]:
    """Rows with method, label, bytes and perplexity, as `python -m benchmarks.quality.runnable` writes them."""
    rows = envelope.read(path, "quality").rows
    if not all({"method", "label", "bytes", "perplexity"} <= row.keys() for row in rows):
        raise ArgumentError(f"{path} must have rows with method, label, bytes and perplexity")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method.report", description="Results to a page with plots."
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="files of `python -m benchmarks` (default: this machine's)"
    )
    parser.add_argument(
        "--quality",
        type=Path,
        help="file of `python -m benchmarks.quality.runnable` (default: quality.json of this machine)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    here = environment.RESULTS / environment.machine_name(device)
    files = args.results or sorted(path for path in here.glob("*.json") if envelope.read(path).kind == results.KIND)
    if not files:
        parser.error(f"no results in {here}; run python -m benchmarks first, or name files")
    usual = here / "quality.json"
    chosen = args.quality or (usual if usual.exists() else None)
    quality = read_quality(chosen) if chosen else []
    pages = [path.read_text(encoding="utf-8") for path in sorted(here.glob("models-*.md"))]
    print(page([results.read(path) for path in files], quality, args.out or here / "report", pages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
