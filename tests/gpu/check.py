"""Everything worth doing when a GPU is at hand, in parts of under ten minutes.

    python -m tests.gpu.check               all parts that have no result for this commit yet
    python -m tests.gpu.check --parts tests repeats     --again
    python -m tests.gpu.check --dry-run     what would run and for how long, and whether it could start; needs no GPU

Every part writes its log and verdict under `benchmarks/results/<gpu>/gpu-check/` as it goes, so that a stop loses nothing and
the next start goes on. At the end `benchmarks/results/<gpu>/<date>-<commit>.json` has all rows of the kernel benchmarks, and
the .md beside it the verdicts and tables. Nothing is installed or downloaded; where nvcc is, the extension is built in place.
Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.kernels.shapes import GEOMETRIES
from benchmarks.method import envelope, environment, results
from qkernels.text import table

LIMIT_SECONDS = 570
NO_GPU = 2
KIND = "gpu-check"


@dataclass(frozen=True)
class Part:
    """One part: a command, how long it should take (a prediction: nobody has measured it) and may take, in seconds, and the
    program without which it is left out."""

    name: str
    command: tuple[str, ...]
    predicted: int
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
    """In order of worth: is it built, is it right, is it right under the sanitizers, how fast is it.

    Predictions: 45 products of `gpu_properties` (5 schemes, 9 numbers of tokens) at 50 us a call, 20 s for torch and CUDA to
    start; sanitizers slow the 500 calls of `shapes` down 10 times, racecheck 50 times (guesses); benchmarks sample for as long
    as they are told.
    """
    python, sanitizer = sys.executable, "compute-sanitizer"

    def module(*words: str) -> tuple[str, ...]:
        return (python, "-m", *words)

    built = "from qkernels import extension; s = extension.status(); print(s); raise SystemExit(not s.cuda)"
    checks = [
        Part("build", (python, "setup.py", "--quiet", "build_ext", "--inplace"), 400, needs="nvcc"),
        Part("extension", (python, "-c", built), 10),
        Part(
            "tests", module("pytest", "tests/gpu", "tests/benchmarks", "-m", "gpu", "-q", "-p", "no:cacheprovider"), 180
        ),
        Part("repeats", module("tests.gpu.properties", "repeats", "--repeats", "1000"), 30),
        Part("graphs", module("tests.gpu.properties", "graph"), 30),
        Part("streams", module("tests.gpu.properties", "streams"), 30),
    ]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        options = (sanitizer, "--tool", tool, "--error-exitcode", "1")
        seconds = 400 if tool == "racecheck" else 120
        checks.append(Part(tool, (*options, *module("tests.gpu.properties", "shapes")), seconds, needs=sanitizer))
    save = str(out / "quick.json")
    checks.append(Part("quick", module("qkernels.cli.main", "bench", "--device", "cuda:0", "--save", save), 60))
    device = ("--device", "cuda:0")
    for model in GEOMETRIES:
        timed = ("--models", model, *device, "--seconds", "12", "--out", str(out / f"{model}.json"))
        checks.append(Part(f"kernels {model}", module("benchmarks", *timed), 480))
    for size in ("1b", "8b"):
        modes = ("--modes", "eager", "compile", "graph", "--out", str(out / f"models-{size}.json"))
        checks.append(Part(f"model {size}", module("benchmarks.models.sweep", "--size", size, *device, *modes), 240))
    return checks


def cannot_start(part: Part) -> str | None:
    """Why a part would end before it reaches a GPU: a module that does not import, a file that is not there, or a selection of
    tests that is empty. None if nothing speaks against it."""
    command = part.command
    start = command.index(sys.executable) if sys.executable in command else None
    if start is None:
        return f"it does not run {sys.executable}"
    kind, rest = command[start + 1], command[start + 2 :]
    if kind == "-c":
        compile(rest[0], part.name, "exec")
    elif kind != "-m":
        return None if (environment.ROOT / kind).is_file() else f"{kind} is not there"
    elif rest[0] == "pytest":
        return empty_selection((*command, "--collect-only"))
    else:
        for name in (rest[0], f"{rest[0]}.__main__"):
            try:
                found = importlib.import_module(name)
            except ImportError as error:
                return f"{name} does not import: {error}"
            if not hasattr(found, "__path__"):  # a module, which is what runs; of a package it is __main__
                break
    return None


def empty_selection(command: Sequence[str]) -> str | None:
    """Whether pytest, told to collect only, finds a test."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=environment.ROOT)
    selected = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, re.MULTILINE)
    if done.returncode == 0 and selected and int(selected[1]) > 0:
        return None
    return f"pytest collects no test (exit code {done.returncode}): {done.stdout[-500:]}{done.stderr[-500:]}"


def dry_run(chosen: Sequence[Part]) -> int:
    """Print what would run; 1 if a part could not start. A missing program is no failure: the part is left out then, too."""
    failed = False
    for part in chosen:
        here = part.needs is None or shutil.which(part.needs) is not None
        why = cannot_start(part)
        failed |= why is not None
        state = (
            f"CANNOT START: {why}"
            if why
            else "can start"
            if here
            else f"would be left out: {part.needs} is not installed"
        )
        print(f"{part.name:<22} {part.predicted:>4} s of {part.limit}  {state}\n    {' '.join(part.command)}")
    print(f"{len(chosen)} parts, {sum(part.predicted for part in chosen)} s (predicted). Nothing was run on a GPU.")
    return int(failed)


def outcome_of(path: Path) -> Outcome:
    """What `keep` wrote."""
    (row,) = envelope.read(path, KIND).rows
    return Outcome(**row)


def keep(outcome: Outcome, part: Part, path: Path, machine: str) -> None:
    """An outcome in its result file, under the part's own command."""
    where = {"machine": machine, "date": environment.now(), "commit": outcome.commit}
    envelope.write(envelope.sealed(KIND, where, [asdict(outcome)], command=envelope.told(part.command)), path)


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
            was = outcome_of(record)
            if was.verdict == "passed" and was.commit == commit and not commit.endswith("+changes"):
                outcomes.append(was)
                continue
        print(f"{part.name} …", file=sys.stderr, flush=True)
        outcome = run_part(part, out, commit)
        keep(outcome, part, record, out.parent.name)
        print(f"{part.name}: {outcome.verdict} ({outcome.found}, {outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    return outcomes


def summarize(outcomes: Sequence[Outcome], out: Path, commit: str, day: date) -> Path:
    """Join what the kernel benchmarks under `out` measured at this commit, and write it with all verdicts beside `out`; returns
    the Markdown. Percentages of a roof are each of the roof that its own run measured."""
    runs = [results.read(path) for model in GEOMETRIES if (path := out / f"{model}.json").exists()]
    runs = [run for run in runs if run.environment.get("commit") == commit]
    to = out.parent / f"{day.isoformat()}-{commit}.md"
    lines = [[o.part, o.verdict, f"{o.seconds:.0f}", o.found] for o in outcomes]
    text = f"# {out.parent.name}, {commit}\n\n{table(['part', 'verdict', 's', 'found'], lines)}\n"
    if runs:
        absent = {name: why for run in runs for name, why in run.absent.items()}
        joined = replace(runs[0], rows=[row for run in runs for row in run.rows], absent=absent)
        results.write(joined, to.with_suffix(".json"))
        text += f"\n{results.to_markdown(joined)}"
    to.write_text(text, encoding="utf-8")
    return to


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="also what has passed under this commit")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--dry-run", action="store_true", help="list them, and see whether each could start")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{part.name:<24} {' '.join(part.command[1:])}" for part in parts(Path("OUT"))))
        return 0
    gpu = torch.cuda.is_available()
    out = environment.RESULTS / (environment.machine_name(torch.device("cuda:0")) if gpu else "GPU") / "gpu-check"
    known = parts(out)
    if unknown := set(args.parts or ()) - {part.name for part in known}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; see --list")
    chosen = [part for part in known if args.parts is None or part.name in args.parts]
    if args.dry_run:
        return dry_run(chosen)
    if not gpu:
        print(
            "gpu-check needs a GPU: this torch sees none (see qkernels doctor). Nothing was checked.", file=sys.stderr
        )
        return NO_GPU
    commit = environment.commit()
    outcomes = run_all(chosen, out, commit, args.again)
    print(f"written: {summarize(outcomes, out, commit, date.today())}", file=sys.stderr)
    print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return 0 if all(outcome.verdict in ("passed", "left out") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
