"""What nvcc makes of csrc/cuda: PTX, cubins with ptxas's report, SASS. No GPU is needed for any of it.

Results are kept in build/cuda_device and made again when a source, a header or nvcc's place changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .locking import locked

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
KERNELS = tuple(sorted(CUDA.glob("*.cu")))  # the files of the package that nvcc compiles
BUILDS = ROOT / "build" / "cuda_device"
# What is compiled: what the guard reads, and in a full run all.
ARCHITECTURES = ("80", "90a", "120") if os.environ.get("QKERNELS_TEST_FULL") else ("80", "90a")
# Bytes of shared memory that a block may have (CUDA programming guide, "technical specifications per compute capability").
SHARED_LIMITS = {"80": 166912, "86": 101376, "89": 101376, "90a": 232448, "120": 101376}
FLAGS = ("-std=c++17", "-O3")  # as setup.py
REGISTERS = 65536  # of a multiprocessor, so at most as many of a block


def find_nvcc() -> Path | None:
    """The nvcc that setup.py would take: one with the CUDA headers beside it."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += sorted((str(p) for p in Path("/usr/local").glob("cuda-*")), reverse=True)
    for home in (Path(place) for place in places if place):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home / "bin/nvcc"
    return None


NVCC = find_nvcc()


def find_nvdisasm() -> Path | None:
    """CUDA's own, or the one in the wheels of nvidia-cuda-nvdisasm and triton."""
    site = Path(sysconfig.get_path("purelib"))
    places = [Path(shutil.which("nvdisasm") or "/nonexistent"), *([NVCC.with_name("nvdisasm")] if NVCC else [])]
    places += [*site.glob("nvidia/*/bin/nvdisasm"), site / "triton/backends/nvidia/bin/nvdisasm"]
    return next((place for place in places if place.exists()), None)


def included(path: Path, known: set[Path]) -> set[Path]:
    """`known` with this file and all of ours that it includes: beside it, or in csrc/cuda."""
    if path not in known:
        known.add(path)
        for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, CUDA):
                if (folder / name).exists():
                    included((folder / name).resolve(), known)
                    break
    return known


def folder_of(source: Path, arch: str, bug: str | None = None) -> Path:
    return BUILDS / f"{source.stem}-{arch}{f'-{bug}' if bug else ''}"


def key_of(source: Path, arch: str, bug: str | None = None) -> str:
    """Of all that the device code depends on, in hexadecimal digits."""
    digest = hashlib.sha256(" ".join([str(NVCC), *FLAGS, arch, str(bug)]).encode())
    for path in sorted(included(source.resolve(), set())):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def compile_source(source: Path, arch: str, kind: str, bug: str | None = None) -> tuple[Path, str]:
    """The file (`kind`: ptx or cubin), and what ptxas said. nvcc runs once for both: getting to PTX takes half of its time.
    What `make test` compiled for the extension is taken from there (`tools.kept_nvcc`).

    Args:
        bug: a macro QK_BUG_… that the tests' own kernels know.

    Raises:
        AssertionError: no nvcc, or it does not compile; then with nvcc's words.
    """
    assert NVCC is not None, "no nvcc"
    folder = folder_of(source, arch, bug)
    cubin, report = folder / f"{source.stem}.cubin", folder / "report"
    command = [str(NVCC), *FLAGS, f"-arch=sm_{arch}", "-cubin", f"-I{CUDA}", str(source), "-o", str(cubin)]
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(folder), *([f"-DQK_BUG_{bug}"] if bug else [])]
    key = key_of(source, arch, bug)
    with locked(folder):
        if not (cubin.exists() and report.exists() and report.read_text().startswith(key)):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            report.write_text(f"{key}\n{done.stdout}{done.stderr}")
    return cubin.with_suffix(f".{kind}"), report.read_text()


def disassembled(cubin: Path, *options: str) -> str:
    """What `nvdisasm -c` prints, kept beside the cubin: 20 s of processor time for all of them, which several tests read."""
    kept = cubin.with_suffix(f".c{''.join(options)}.sass")
    with locked(cubin.parent):
        if not kept.exists() or kept.stat().st_mtime_ns < cubin.stat().st_mtime_ns:
            command = [str(find_nvdisasm()), "-c", *options, str(cubin)]
            kept.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return kept.read_text()


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel. Bytes; registers of a thread."""

    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


def usages(report: str) -> list[Usage]:
    """The report of `-Xptxas -v`, which says three things of each kernel in three lines."""
    pattern = re.compile(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\s+ptxas info\s+: Used (\d+) registers([^\n]*)"
    )
    result = []
    for name, stack, stores, loads, registers, rest in pattern.findall(report):
        static = re.search(r"(\d+) bytes smem", rest)
        result.append(Usage(name, int(registers), int(stack), int(stores), int(loads), int(static[1]) if static else 0))
    return result


def complaints(report: str) -> list[str]:
    """What ptxas says where it serializes wgmma or adds waits, each of which costs the overlap that a kernel is for."""
    return [line for line in report.splitlines() if re.search(r"serializ|warpgroup\.(wait|arrive) is injected", line)]


@functools.cache
def compiled_usages(sources: tuple[Path, ...], arch: str) -> dict[str, Usage]:
    """Of every kernel of these files, by mangled name."""
    return {u.kernel: u for s in sources for u in usages(compile_source(s, arch, "cubin")[1])}


@functools.cache
def sass(source: Path, arch: str, bug: str | None = None) -> dict[str, list[str]]:
    """The instructions of each kernel, by mangled name, such as `LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]`."""
    text = disassembled(compile_source(source, arch, "cubin", bug)[0])
    sections = re.split(r"\.section\s+\.text\.([\w$]+)", text)
    lines = {
        name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;", body)
        for name, body in zip(sections[1::2], sections[2::2])
    }
    return {name: [re.sub(r"^@!?U?P\w+\s+", "", line) for line in body] for name, body in lines.items()}
