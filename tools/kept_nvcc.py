"""nvcc for the build of the extension: it keeps what the tests and the guard read, so that no kernel is compiled twice.

    PYTORCH_NVCC="env PYTHONPATH=$PWD python -m tools.kept_nvcc" python setup.py build_ext --inplace

The object is the one that nvcc makes of the same arguments; beside it each architecture's PTX, cubin and ptxas's report land
in build/cuda_device, where `tools.nvcc.compile_source` finds them. The build's further arguments (where torch's headers
are, macros of theirs) reach no device code: cubins of both ways were the same bytes for all eight files.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .locking import locked
from .nvcc import KERNELS, NVCC, folder_of, key_of

PTXAS = re.compile(r"^ptxas info    : (?!\()|^    \d+ bytes stack frame")  # not its warnings, which begin with a number
ENTRY = re.compile(r"Compiling entry function '\S+' for 'sm_(\w+)'")


def reports(text: str) -> dict[str, str]:
    """What ptxas said, by architecture. It takes one after the other; what stands before an entry belongs to it."""
    result: dict[str, str] = {}
    waiting: list[str] = []
    arch = None
    for line in text.splitlines(keepends=True):
        entry = ENTRY.search(line)
        if entry:
            arch = entry[1]
            result[arch] = result.get(arch, "") + "".join(waiting)
            waiting.clear()
        if arch is None or "bytes gmem" in line or not PTXAS.match(line):
            waiting.append(line)
        else:
            result[arch] += line
    if arch is not None:
        result[arch] += "".join(waiting)
    return result


def keep(source: Path, arch: str, made: Path, report: str) -> None:
    """Moves this architecture's files to where `compile_source` looks. With one architecture nvcc leaves its name out."""
    folder = folder_of(source, arch)
    with locked(folder):
        (folder / "report").unlink(missing_ok=True)
        for kind in ("ptx", "cubin"):
            names = [f"{source.stem}.compute_{arch}.sm_{arch}", f"{source.stem}.compute_{arch}", source.stem]
            found = next(made / f"{name}.{kind}" for name in names if (made / f"{name}.{kind}").exists())
            (folder / f"{source.stem}.{kind}").write_bytes(found.read_bytes())
        (folder / "report").write_text(f"{key_of(source, arch)}\n{report}")


def main(arguments: list[str]) -> int:
    assert NVCC is not None, "no nvcc"
    source = next((path for path in KERNELS if str(path) in arguments), None)
    if source is None:
        return subprocess.run([str(NVCC), *arguments], check=False).returncode
    with tempfile.TemporaryDirectory() as made:
        command = [str(NVCC), *arguments, "-Xptxas", "-v", "--keep", "--keep-dir", made]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode == 0:
            for arch, report in reports(done.stdout).items():
                keep(source, arch, Path(made), report)
    sys.stdout.writelines(line for line in done.stdout.splitlines(keepends=True) if not PTXAS.match(line))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
