"""The full set: every layer of `shapes.FULL_SET`, results under `benchmarks/results/<machine>/`, written as it goes.

python -m benchmarks [--models llama-3-8b …] [--device cuda:0] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import environment, results
from .kernels import run_cases
from .quick import full_cases
from .shapes import GEOMETRIES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time every layer of the models beside all peers."
    )
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, help="only these (default: all)")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each candidate (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of sampling per layer and scheme, at most (default: 60)"
    )
    parser.add_argument("--out", type=Path, help="file (default: benchmarks/results/<machine>/kernels.json)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    out = args.out or environment.RESULTS / environment.machine_name(device) / "kernels.json"
    cases = full_cases(device, models=tuple(args.models) if args.models else None)
    print(f"{len(cases)} cases to {out}", file=sys.stderr)

    def progress(so_far: results.Run) -> None:
        results.write(so_far, out)
        print(f"{len(so_far.rows)} rows", file=sys.stderr)

    measured = run_cases(cases, device, args.rounds, args.seconds, progress=progress)
    results.write(measured, out)
    print(results.to_markdown(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
