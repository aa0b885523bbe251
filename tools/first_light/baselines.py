"""torch, dequantize + mm and every installed peer beside our ops, on the shapes of the sweep: one JSON line a row.

    python -m tools.first_light.baselines --device cuda:0 [--shapes 4096x4096,…] [--tokens 1,8,…]
    python -m tools.first_light.baselines --versions

Each is checked against the exact product before it is timed (`benchmarks.kernels`): no match, no number.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .stages import SHAPES

TOKENS = (1, 8, 16, 64, 128, 256, 512, 1024, 2048, 4096)


def versions() -> dict[str, object]:
    import torch

    from benchmarks.peers import PEER_PACKAGES, version_of
    from qkernels import extension

    packages = {name: version for name in (*PEER_PACKAGES, "triton") if (version := version_of(name)) is not None}
    status = extension.status()
    where = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, **packages}
    return {"mode": "versions", **where, "extension": status.error or list(status.architectures)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.first_light.baselines", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--versions", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", default=",".join(f"{N}x{K}" for N, K in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--scheme", default="w4a16_g128")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape")
    args = parser.parse_args(argv)
    if args.versions:
        print(json.dumps(versions()))
        return 0
    import torch

    from benchmarks.kernels import roofs
    from benchmarks.kernels.shapes import Layer
    from benchmarks.kernels.sweep import Case, candidates, measure_case
    from benchmarks.method import environment
    from qkernels.kernels.catalogue import Problem, arch_of
    from qkernels.scheme import QuantScheme

    device, scheme, dtype = torch.device(args.device), QuantScheme.parse(args.scheme), torch.bfloat16
    measured = roofs.Roofs(1.0, 1.0, {"bfloat16": 1.0})  # a rehearsal measures no roofs
    if device.type != "cpu":
        measured = roofs.measure(device, environment.cache_bytes(device))
    print(json.dumps({"mode": "roofs", **asdict(measured)}, default=str), flush=True)
    tokens, failed = tuple(int(M) for M in args.tokens.split(",")), True
    for N, K in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
        who = candidates(Problem(N, K, scheme, dtype, arch_of(device)), device)
        case = Case(Layer("first light", f"{N}x{K}", N, K), tokens, scheme, dtype)
        for row in measure_case(case, device, measured, who, rounds=9, seconds=args.seconds):
            values = {k: v for k, v in asdict(row).items() if k != "samples_us"}
            print(json.dumps({"mode": "baseline", **values}), flush=True)
            failed = failed and row.us is None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
