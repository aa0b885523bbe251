"""Everything worth doing when a GPU is at hand, in parts of under ten minutes.

    python -m benchmarks.gpu_check               all parts that have no result for this commit yet
    python -m benchmarks.gpu_check --parts tests repeats     --again

Every part writes its log and verdict under `benchmarks/results/<gpu>/gpu-check/` as it goes, so that a stop loses nothing and
the next start goes on. Nothing is installed or downloaded.
Without a GPU it says so and exits with 2. None of this has met a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import environment
from .shapes import GEOMETRIES

LIMIT_SECONDS = 570
NO_GPU = 2


@dataclass(frozen=True)
class Part:
    """One part: a command, how long it may take, and the program without which it is left out."""

    name: str
    command: tuple[str, ...]
    limit: int = LIMIT_SECONDS
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed", "out of time" or "left out"; `found` is its exit code or the reason."""

    part: str
    verdict: str
    found: str
    seconds: float
    commit: str


def parts(out: Path) -> list[Part]:
    """In order of worth: is it right, is it right under the sanitizers, how fast is it."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    sanitizer = "compute-sanitizer"
    checks = [
        Part("tests", pytest),
        Part("repeats", (python, "-m", "benchmarks.gpu_properties", "repeats", "--repeats", "1000")),
        Part("graphs", (python, "-m", "benchmarks.gpu_properties", "graph")),
        Part("streams", (python, "-m", "benchmarks.gpu_properties", "streams")),
    ]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = (
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            python,
            "-m",
            "benchmarks.gpu_properties",
            "shapes",
        )
        checks.append(Part(tool, command, needs=sanitizer))
    save = str(out / "quick.json")
    checks.append(Part("quick", (python, "-m", "qkernels.cli.main", "bench", "--device", "cuda:0", "--save", save)))
    for model in GEOMETRIES:
        timed: tuple[str, ...] = (
            python,
            "-m",
            "benchmarks",
            "--models",
            model,
            "--device",
            "cuda:0",
            "--seconds",
            "12",
            "--out",
            str(out / f"{model}.json"),
        )
        checks.append(Part(f"kernels {model}", timed))
    for size in ("1b", "8b"):
        modes = ("--modes", "eager", "compile", "graph", "--out", str(out / f"models-{size}.json"))
        checks.append(
            Part(f"model {size}", (python, "-m", "benchmarks.models", "--size", size, "--device", "cuda:0", *modes))
        )
    return checks


def run_part(part: Part, out: Path, commit: str) -> Outcome:
    """Run one part in a process of its own; its output goes to a file while it runs."""
    log = out / f"{part.name.replace(' ', '-')}.log"
    if part.needs is not None and shutil.which(part.needs) is None:
        return Outcome(part.name, "left out", f"{part.needs} is not installed", 0.0, commit)
    start = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=part.limit,
                check=False,
                cwd=environment.ROOT,
            )
        except subprocess.TimeoutExpired:
            return Outcome(
                part.name, "out of time", f"stopped after {part.limit} s; see {log.name}", part.limit, commit
            )
    verdict = "passed" if done.returncode == 0 else "failed"
    return Outcome(part.name, verdict, f"exit code {done.returncode}; see {log.name}", time.monotonic() - start, commit)


def run_all(chosen: Sequence[Part], out: Path, commit: str, again: bool = False) -> list[Outcome]:
    """All parts, each outcome on disk before the next begins; parts that passed under this commit are not run again."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for part in chosen:
        record = out / f"{part.name.replace(' ', '-')}.outcome.json"
        if not again and record.exists():
            was = Outcome(**json.loads(record.read_text()))
            if was.verdict == "passed" and was.commit == commit and not commit.endswith("+changes"):
                outcomes.append(was)
                continue
        print(f"{part.name} …", file=sys.stderr, flush=True)
        outcome = run_part(part, out, commit)
        record.write_text(json.dumps(asdict(outcome), indent=1))
        print(f"{part.name}: {outcome.verdict} ({outcome.found}, {outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="also what has passed under this commit")
    parser.add_argument("--list", action="store_true", help="list the parts")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{part.name:<24} {' '.join(part.command[1:])}" for part in parts(Path("OUT"))))
        return 0
    if not torch.cuda.is_available():
        print(
            "gpu-check needs a GPU: this torch sees none (see qkernels doctor). Nothing was checked.", file=sys.stderr
        )
        return NO_GPU
    out = environment.RESULTS / environment.machine_name(torch.device("cuda:0")) / "gpu-check"
    known = parts(out)
    if unknown := set(args.parts or ()) - {part.name for part in known}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; see --list")
    chosen = [part for part in known if args.parts is None or part.name in args.parts]
    outcomes = run_all(chosen, out, environment.commit(), args.again)
    print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return 0 if all(outcome.verdict in ("passed", "left out") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
