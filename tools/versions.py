"""Runs tests with other versions of what this library is used with, each at both ends of its range, and writes docs/versions.md.

    python -m tools.versions DIRECTORY                                  # everything; what was installed there is kept
    python -m tools.versions DIRECTORY --only triton --only peft==0.19.0
    python -m tools.versions DIRECTORY --only torch --cuda-builds       # also where torch brings gigabytes of CUDA

A version of a Python package (of transformers with what it needs) is put in a directory of its own, before this environment's in
the path; all else stays as it is. Of torch an environment is made with nothing but it and the wheel in dist/ (`make wheel`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from qkernels.text import table

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "versions.md"
KEPT: Final = "found.json"  # in the directory: what earlier runs found


@dataclass(frozen=True)
class Tried:
    """A package, the versions that are tried, and the tests that ask it most.

    Args:
        alone: whether it is installed without what it needs, which is here.
    """

    versions: tuple[str, ...]
    tests: tuple[str, ...]
    alone: bool = True


_HF: Final = ("tests/integrations/test_transformers.py", "tests/generating", "tests/planning/test_cache.py")
# Few of the Triton kernels, compiled for five architectures, and executed from PTX: all of them take minutes.
_TRITON: Final = (
    "tests/triton/test_ops.py", "tests/triton/test_compiles.py::test_reduction_and_dequantize",
    "tests/triton/test_executed.py::test_odd_shapes", "tests/triton/test_executed.py::test_dequantize_is_bit_identical",
)  # fmt: skip
PACKAGES: Final[Mapping[str, Tried]] = {
    # The oldest of pyproject.toml, the oldest that vLLM 0.32 takes, the newest.
    "transformers": Tried(("5.8.1", "5.16.0", "5.24.0"), _HF, alone=False),
    "peft": Tried(("0.19.0", "0.21.2"), ("tests/integrations/test_peft.py",)),
    "triton": Tried(("3.6.0", "3.9.0"), _TRITON),
    "torch": Tried(("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0"), ("tests/test_wheel.py",)),
}


def commit() -> str:
    """Of this tree, and whether it was changed: the page that this writes does not count."""
    said, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for words in (
            ("rev-parse", "--short=12", "HEAD"),
            ("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}"),
        )
    )
    return f"{said}+changes" if changed else said or "unknown"


@dataclass(frozen=True)
class Found:
    """What came of one version: counts of tests, the first that failed, or why it was not tried."""

    package: str
    version: str
    tests: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    first: str = ""
    seconds: float = 0.0
    commit: str = ""

    def cells(self) -> list[str]:
        result = self.first if not self.passed + self.failed else f"{self.passed} passed, {self.failed} failed"
        if self.passed + self.failed and self.first:
            result += f", first {self.first}"
        return [self.package, self.version, self.tests, result, self.commit]


def counts(output: str) -> tuple[int, int, int, str]:
    """(passed, failed, skipped, the first that failed) of what pytest -q -rf printed.

    >>> from tools.versions import counts
    >>> counts("FAILED tests/a.py::test_b - x\\n1 failed, 20 passed, 3 skipped in 4.5s")
    (20, 1, 3, 'tests/a.py::test_b')
    >>> counts("2 errors in 0.10s")
    (0, 2, 0, '')
    """
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    closing = next((line for line in reversed(output.splitlines()) if re.search(r" in [\d.]+s", line)), "")
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing):
        found["failed" if word == "error" else word] += int(number)
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found["passed"], found["failed"], found["skipped"], first[1] if first else ""


def cuda_packages(report: str) -> list[str]:
    """What a report of `pip install --dry-run` says that torch needs of CUDA."""
    (torch,) = json.loads(report)["install"]
    needed = [line.split(";")[0].strip() for line in torch["metadata"].get("requires_dist", [])]
    return [line for line in needed if line.startswith(("nvidia", "cuda"))]


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    quiet = ("--quiet", "--progress-bar", "off", "--disable-pip-version-check", "--only-binary", ":all:")
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *quiet, *words], capture_output=True, text=True, check=False
    )


def tests(package: str, version: str, paths: Sequence[str], settings: Mapping[str, str], *marks: str) -> Found:
    """Run tests, in a process of their own with these settings of the environment."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rf", "-p", "no:cacheprovider", *marks, *paths]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | dict(settings), capture_output=True, text=True, check=False
    )
    passed, failed, skipped, first = counts(done.stdout)
    if not passed + failed + skipped:
        failed, first = 1, (done.stdout + done.stderr).strip().splitlines()[-1][:200]
    named = ", ".join(path.removeprefix("tests/") for path in paths)
    seconds = round(time.monotonic() - start, 1)
    return Found(package, version, named, passed, failed, skipped, first, seconds, commit())


def try_package(name: str, version: str, directory: Path) -> Found:
    """A version of a Python package before those of this environment."""
    tried, place = PACKAGES[name], directory / f"{name}-{version}"
    if not place.exists():
        done = pip(*(["--no-deps"] if tried.alone else []), "--target", str(place), f"{name}=={version}")
        if done.returncode:
            return Found(name, version, "", first=f"not installed: {done.stderr.strip().splitlines()[-1][:200]}")
    path = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    seen = subprocess.run(
        [sys.executable, "-c", f"import {name}; print({name}.__version__)"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if seen.stdout.strip() != version:
        return Found(name, version, "", first=f"not imported: got {seen.stdout.strip() or seen.stderr.strip()[-200:]}")
    return tests(name, version, tried.tests, {"PYTHONPATH": path})


def try_torch(version: str, cuda_builds: bool) -> Found:
    """The wheel of dist/ beside a torch, in an environment without anything else."""
    looked = pip("--dry-run", "--no-deps", "--ignore-installed", "--report", "-", f"torch=={version}")
    if looked.returncode:
        return Found("torch", version, "", first=f"not found: {looked.stderr.strip().splitlines()[-1][:200]}")
    needed = cuda_packages(looked.stdout[looked.stdout.index("{") :])
    if needed and not cuda_builds:
        return Found(
            "torch", version, "", first=f"not tried: the index has a build with CUDA alone ({len(needed)} packages)"
        )
    paths = PACKAGES["torch"].tests
    found = tests("torch", version, paths, {"QKERNELS_WHEEL_TORCH": version}, "-m", "large or not large")
    if found.skipped:
        return Found("torch", version, "", first="not tried: there is no wheel in dist/ (make wheel)")
    return found


HEAD: Final = """# Versions

What other versions of packages were tried, by `python -m tools.versions` ([source](../tools/versions.py)): the tests that ask
each of them most, on a CPU, all else as in the environment of the tests (torch {torch}, Python {python}). Of torch it is the
wheel of `make wheel` in an environment with nothing else: import, a layer beside its own product, `doctor`, `quantize` and
`generate`. Ranges: [pyproject.toml](../pyproject.toml).

What fails in planning/test_cache.py with transformers 5.8.1: `plan` refuses the cache of GraniteMoeHybrid, which asks weights for
their values there, and names a context of 0 as the way out. (There and in 5.16.0 Gemma 3n's cache has no entries for layers that
read those of others, so that `plan` does not count them as "none"; the bytes are the same.)

"""


def page(found: Sequence[Found]) -> str:
    """docs/versions.md, with a row for every version of `PACKAGES`."""
    held = {(one.package, one.version): one for one in found}
    every = [(name, version) for name, tried in PACKAGES.items() for version in tried.versions]
    rows = [held.get(key, Found(*key, "", first="not run")).cells() for key in every]
    python = ".".join(map(str, sys.version_info[:2]))
    head = HEAD.format(torch=metadata.version("torch"), python=python)
    return head + table(["package", "version", "tests", "result", "commit"], rows) + "\n"


def chosen(only: Sequence[str]) -> list[tuple[str, str]]:
    """(package, version) of what `--only` names, all where it names nothing.

    Raises:
        ValueError: no such package, or a version that is none of its row in `PACKAGES`.

    >>> from tools.versions import chosen
    >>> chosen(["peft==0.19.0", "triton"])
    [('peft', '0.19.0'), ('triton', '3.6.0'), ('triton', '3.9.0')]
    """
    every = [(name, version) for name, tried in PACKAGES.items() for version in tried.versions]
    found = []
    for wanted in only:
        matching = [pair for pair in every if wanted in (pair[0], "==".join(pair))]
        if not matching:
            raise ValueError(f"expected one of {', '.join(map('=='.join, every))}, got {wanted!r}")
        found += matching
    return found or every


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, help="outside of the repository, for what is installed")
    parser.add_argument("--only", action="append", default=[], metavar="NAME[==VERSION]", help="these; may be repeated")
    parser.add_argument("--cuda-builds", action="store_true", help="also torches that need CUDA's packages")
    args = parser.parse_args(argv)
    try:
        wanted = chosen(args.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    directory = args.directory.resolve()
    if directory.is_relative_to(ROOT):
        parser.error(f"{directory} lies in the repository: name a directory outside of it")
    directory.mkdir(parents=True, exist_ok=True)
    kept = directory / KEPT
    earlier = [Found(**values) for values in json.loads(kept.read_text())] if kept.exists() else []
    held = {(one.package, one.version): one for one in earlier}
    for name, version in wanted:
        found = try_torch(version, args.cuda_builds) if name == "torch" else try_package(name, version, directory)
        print(*found.cells(), sep=" | ", flush=True)
        held[name, version] = found
        kept.write_text(json.dumps([asdict(one) for one in held.values()], indent=1))
        PAGE.write_text(page(list(held.values())), encoding="utf-8")
    return 1 if any(one.failed for one in held.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
