"""How far each result lies behind the tree: the commits of csrc/ and of qkernels/ between its own commit and now.

python -m benchmarks.method.age [RESULTS.json …]      (make results-check; default: all below benchmarks/results/)

A result that is many commits behind is not wrong, but nobody should stand behind it: measure again, or remove it. A file that has
no envelope (`envelope.py`) is named, and the exit code is 1. What was measured on another machine than this one says so: that
cannot be measured again here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qkernels.errors import ArgumentError
from qkernels.text import table

from . import envelope, environment

CODE = ("csrc", "qkernels")  # what a number depends on


def commits_since(commit: str, folder: str, root: Path = environment.ROOT) -> int | None:
    """How many commits after `commit` changed a folder; None where this repository does not have the commit (a shallow clone)."""
    command = ["git", "rev-list", "--count", f"{commit}..HEAD", "--", folder]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    return int(done.stdout) if done.returncode == 0 else None


def line_of(path: Path, found: envelope.Envelope, root: Path = environment.ROOT) -> list[str]:
    """A line of the table: file, kind, date, commit, commits behind in each folder of `CODE`, whose machine, unknown fields."""
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    here = [environment.machine_name(torch.device(kind)) for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]
    behind = [None if found.commit is None else commits_since(found.commit, folder, root) for folder in CODE]
    return [
        name, found.kind, found.date or "–", found.tree if found.commit else "–",
        *("?" if count is None else str(count) for count in behind),
        "–" if found.machine is None else "this" if found.machine in here else "another",
        ", ".join(found.unknown),
    ]  # fmt: skip


def check(paths: Sequence[Path], root: Path = environment.ROOT) -> tuple[list[list[str]], list[str]]:
    """(lines of the table, what is wrong with files that are no results)."""
    lines, wrong = [], []
    for path in paths:
        try:
            lines.append(line_of(path, envelope.read(path), root))
        except ArgumentError as error:
            wrong.append(str(error))
    return lines, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method.age", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="files (default: all below benchmarks/results/)")
    args = parser.parse_args(argv)
    lines, wrong = check(args.results or sorted(environment.RESULTS.rglob("*.json")))
    header = ["result", "kind", "date", "commit", *(f"{folder}/ behind" for folder in CODE), "machine", "not recorded"]
    print(table(header, lines) if lines else "no results")
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
