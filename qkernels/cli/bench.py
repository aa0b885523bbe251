"""`qkernels bench`: the quick set of the benchmark suite, which lives beside the package in the source tree."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..scheme import QuantScheme
from .common import Subparsers, command_parser, device, positive, warn_of_threads

NAME, SUMMARY = "bench", "time the kernels beside their peers, in under a minute"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels bench\n"
        "  qkernels bench --json > before.json\n"
        "  qkernels bench --compare before.json      exit code 3 if a kernel became slower\n"
        "  qkernels bench --device cuda:0 --csv\n"
        "  qkernels bench --tune 1x4096x14336 64x4096x14336",
        "Time one layer of Llama-3-8B in 4 and 8 bits beside every peer that is installed. Outputs are compared first; "
        "weights are cold; roofs are measured in the same run. The full set is `make bench`. Needs the source tree.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything, with all samples, as JSON")
    form.add_argument("--csv", action="store_true", help="print one line a row")
    parser.add_argument("--compare", metavar="OLD.json", help="print verdicts against an earlier run instead of times")
    form.add_argument(
        "--tune",
        metavar="MxNxK",
        nargs="+",
        help="instead of the benchmark: measure configurations of the Triton kernels for these shapes on a GPU, and write the "
        "fastest to your own table (QKERNELS_TRITON_TABLE, or qkernels/triton.json among your settings)",
    )
    parser.add_argument(
        "--scheme", default="w4a16_g128", help="of the weights that --tune measures (default: w4a16_g128)"
    )
    parser.add_argument("--save", metavar="FILE", help="also write the JSON there")
    parser.add_argument("--device", type=device, help="cpu or cuda:0 (default: cpu; cuda:0 with --tune)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=positive, default=30, help="about how long to sample (default: 30)")
    return parser


def suite(module: str) -> Any:
    """A module of the benchmark suite, from the source tree that this package or the working directory belongs to.

    Raises:
        ArgumentError: there is no such tree.
    """
    package = Path(__file__).resolve().parent.parent
    for root in (package.parent, Path.cwd()):
        if (root / "benchmarks" / "peers" / "torch_linear.py").exists():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(f"benchmarks.{module}")
    raise ArgumentError(
        f"the benchmark suite is part of the source tree, not of the installed package: no benchmarks/ beside {package} or in "
        f"{Path.cwd()}; run this in a clone of the repository"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    if args.tune:
        if args.compare or args.save:
            raise ArgumentError("--tune writes your table of configurations; leave out --compare and --save")
        tuning = suite("kernels.tune")
        shapes = [tuning.shape_of(text) for text in args.tune]
        tuning.run(args.device or torch.device("cuda:0"), shapes, QuantScheme.parse(args.scheme))
        return 0
    results = suite("method.results")
    place = args.device or torch.device("cpu")
    old = results.read(args.compare) if args.compare else None  # before a minute is spent
    if args.threads:
        torch.set_num_threads(args.threads)
    warn_of_threads(place)
    measured = suite("kernels.quick").quick(place, float(args.seconds))
    if args.save:
        results.write(measured, Path(args.save))
    if old is not None:
        comparison = suite("method.comparison")
        found = comparison.compare(old, measured)
        print(comparison.to_markdown(found))
        return 3 if found.slower else 0
    print(
        results.to_json(measured)
        if args.json
        else results.to_csv(measured.rows)
        if args.csv
        else results.to_markdown(measured)
    )
    return 0
