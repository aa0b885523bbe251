"""The full set: every layer of `shapes.FULL_SET` (on a CPU `shapes.CPU_SET`), results under `benchmarks/results/<machine>/`.

    python -m benchmarks [--models llama-3-8b …] [--device cuda:0] [--rounds 15]

Results are written after every case, and a run that was stopped goes on with the cases that are missing, as long as the commit is
the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .kernels.quick import full_cases
from .kernels.shapes import GEOMETRIES
from .kernels.sweep import Case, run_cases
from .method import environment, results


def earlier(out: Path, device: torch.device) -> results.Run | None:
    """What a run of the same commit on the same device left at `out`."""
    if not out.exists():
        return None
    run = results.read(out)
    here = (environment.commit(), environment.machine_name(device), torch.__version__, torch.get_num_threads())
    return run if here == tuple(run.environment.get(k) for k in ("commit", "machine", "torch", "threads")) else None


def measured(case: Case, run: results.Run) -> bool:
    """Whether the run has rows of a case for every number of tokens."""
    layer = case.layer
    problem = (layer.model, layer.name, layer.N, layer.K, str(case.scheme))
    found = {row.M for row in run.rows if (row.model, row.layer, row.N, row.K, row.scheme) == problem}
    return found >= set(case.tokens)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time every layer of the models beside all peers."
    )
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, help="only these (default: all)")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each candidate (default: 15)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="of sampling per layer and scheme, at least 8 rounds (default: 5 on a CPU, 60 on CUDA)",
    )
    parser.add_argument("--out", type=Path, help="file (default: benchmarks/results/<machine>/kernels.json)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    out = args.out or environment.RESULTS / environment.machine_name(device) / "kernels.json"
    cases = full_cases(device, models=tuple(args.models) if args.models else None)
    before = earlier(out, device)
    missing = [case for case in cases if before is None or not measured(case, before)]
    print(f"{len(missing)} of {len(cases)} cases to measure, to {out}", file=sys.stderr, flush=True)
    if not missing and before is not None:
        print(results.to_markdown(before))
        return 0
    began, done = time.monotonic(), 0

    def joined(now: results.Run) -> results.Run:
        return now if before is None else results.merged(before, now)

    def progress(now: results.Run) -> None:
        nonlocal done
        results.write(joined(now), out)
        case, done = missing[done], done + 1
        print(
            f"{done} of {len(missing)}: {case.layer} {case.scheme}, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    seconds = args.seconds or (60.0 if device.type == "cuda" else 5.0)
    whole = joined(run_cases(missing, device, args.rounds, seconds, progress=progress))
    results.write(whole, out)
    print(results.to_markdown(whole))
    return 0


if __name__ == "__main__":
    sys.exit(main())
