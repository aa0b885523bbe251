"""The first minutes on a GPU. Standard library alone.

    python -m tools.first_light build [--arch 90a]        drive, for the card that is here or the one that is named
    python -m tools.first_light first --out OUT --deadline 395        is it right, and what are the numbers
    python -m tools.first_light fit OUT                               without a card: regret, numbers of card.h, a table
    python -m tools.first_light second --out OUT --deadline 280 --old OLD_DRIVE
    python -m tools.first_light all --out OUT             both, and more, without a deadline: `make gpu-check`
    python -m tools.first_light all --dry-run             the stages, their limits, and which could start here

Under `--out` are at most 8 files of at most 16 MB, written as the stages go. Exit status: 0 if every stage passed or was left
out, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import fit
from .runner import Runner, summary
from .stages import PHASES, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVE = fit.BUILDS / "drive"
NO_GPU = 2


def card_here() -> str | None:
    """The compute capability of the first GPU as nvcc spells it, 9.0 with its "a"; None without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = done.stdout.split()[:1]
    return (
        None
        if done.returncode or not first
        else {"90": "90a"}.get(first[0].replace(".", ""), first[0].replace(".", ""))
    )


def build(arch: str | None) -> int:
    """nvcc's `drive`, one static binary, and the commit beside it."""
    from tools.nvcc import KERNELS, NVCC

    arch = arch or card_here()
    if NVCC is None or arch is None:
        print("drive is built by nvcc, for the card that is here or for --arch", file=sys.stderr)
        return 1
    fit.BUILDS.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-I{ROOT / 'csrc' / 'cuda'}", "--threads", "0"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", *(["-DQKERNELS_SM90A"] if arch == "90a" else [])]
    sources = [*map(str, KERNELS), str(Path(__file__).with_name("drive") / "drive.cu")]
    subprocess.run([str(NVCC), *flags, *sources, "-o", str(DRIVE)], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    (fit.BUILDS / "COMMIT").write_text(head.stdout)
    return 0


def dry_run(stages: Sequence[Stage]) -> int:
    for stage in stages:
        program = stage.needs or stage.command[0].replace("{python}", sys.executable).replace("{drive}", str(DRIVE))
        state = "can start" if shutil.which(program) else f"would be left out: {program} is not there"
        print(f"{stage.name:<44} {stage.limit:>5.0f} s  {stage.file:<12} {state}\n    {' '.join(stage.command)}")
    print(f"{len(stages)} stages, {sum(stage.limit for stage in stages):.0f} s at most. Nothing was run.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    about, _, _ = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m tools.first_light", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("build")
    made.add_argument("--arch", help="such as 90a; the card that is here if it is not given")
    fitted = commands.add_parser("fit")
    fitted.add_argument("out", type=Path)
    fitted.add_argument("--source", default="a sweep", help="what card.h is to say that the numbers are from")
    for phase in PHASES:
        one = commands.add_parser(phase)
        one.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "gpu-check")))
        one.add_argument("--deadline", type=float, help="seconds for all; none if it is not given")
        one.add_argument("--drive", type=Path, default=DRIVE)
        one.add_argument(
            "--old", type=Path, default=DRIVE.with_name("drive-old"), help="an earlier build, to compare with"
        )
        one.add_argument("--only", nargs="+", help="stages whose name begins with one of these")
        one.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "build":
        return build(args.arch)
    if args.command == "fit":
        print(fit.fit(args.out, args.source))
        return 0
    stages = PHASES[args.command]()
    if args.only:
        stages = [stage for stage in stages if stage.name.startswith(tuple(args.only))]
    if args.dry_run:
        return dry_run(stages)
    if not args.drive.exists() and card_here() is not None:
        build(None)
    words = {"drive": str(args.drive.resolve()), "old": str(args.old.resolve()), "python": sys.executable}
    probe = (words["drive"], "clusters")
    if not args.drive.exists() or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        print(
            f"{args.command} needs a GPU and {args.drive}: `{' '.join(probe)}` does not run. Nothing was checked.",
            file=sys.stderr,
        )
        return NO_GPU
    commit = args.drive.with_name("COMMIT")
    if commit.exists():
        os.environ.setdefault("QKERNELS_COMMIT", commit.read_text().strip()[:12])
    outcomes = Runner(args.out.resolve(), words, args.deadline, probe).run(stages)
    print(summary(outcomes))
    return int(any(outcome.verdict not in ("passed", "left out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
