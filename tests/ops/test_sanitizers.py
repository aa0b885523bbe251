"""The CPU kernels alone, without torch: under the address and undefined-behaviour sanitizers, and as object files."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from qkernels import extension

CSRC = Path(__file__).parent.parent.parent / "csrc" / "cpu"
# Bindings are torch's, NEON is no x86's.
KERNELS = sorted(source for source in CSRC.glob("*.cpp") if not source.name.startswith(("bindings", "neon")))
HARNESS = Path(__file__).parent / "edge_shapes.cpp"
CXX = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the file list is that of x86"),
]


# All instances of one loop in three widths: checked for undefined behaviour in AVX2's, since that takes as long as all the rest
# of compiling them (19 s of processor time instead of 11 for avx512_vnni.cpp).
ADDRESSES_ALONE = {name: ("-fno-sanitize=undefined",) for name in ("avx512", "avx512_bf16", "avx512_vnni")}


# Those whose code only some CPUs can run.
OF_AN_INSTRUCTION_SET = ("avx2", "avx2_int8", "avx512", "avx512_bf16", "avx512_vnni")


def build(
    sources: list[Path], out: Path, *flags: str, own: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> None:
    """Compiles in parallel (all sources at once would take one core), then links. `own`: further flags of a source."""
    objects = [out.parent / f"{source.stem}.o" for source in sources]
    command = [str(CXX), "-std=c++20", "-Wno-maybe-uninitialized", f"-I{CSRC}", *flags]
    jobs = [
        subprocess.Popen([*command, *own.get(s.stem, ()), "-c", str(s), "-o", str(o)])
        for s, o in zip(sources, objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    subprocess.run([*command, *map(str, objects), "-o", str(out)], check=True)


def shared_names(unit: Path) -> list[str]:
    """What an object file offers to the others, but for names of the sanitizers."""
    symbols = subprocess.run(["nm", "-C", unit], capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        line[17:]
        for line in symbols
        if line[17] in "TWVuBDR" and not re.search("gxx_personality|__odr_asan|__asan", line)
    ]


def test_edge_shapes_under_the_sanitizers(tmp_path: Path) -> None:
    """Every buffer ends where the contract says: one byte read or written past it stops the program. One test for all
    instruction sets, and for their object files, so that parallel workers compile them once: half a minute on two cores.

    A weak symbol compiled for AVX-512 could be the one that the linker keeps, and crash an older CPU. Without optimization,
    as here, no function that could be one is inlined away.
    """
    program = tmp_path / "edge_shapes"
    # Without optimization: the accesses are the same intrinsics, and it compiles in a fifth of the time.
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    probe = [str(CXX), flags[2], "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(probe, input="int main(){}", text=True, check=False).returncode:
        pytest.skip("this compiler has no sanitizer libraries")
    products = [source for source in KERNELS if not source.name.startswith("gguf")]  # searches are not in the harness
    build([*products, HARNESS], program, *flags, own=ADDRESSES_ALONE)
    for name in OF_AN_INSTRUCTION_SET if shutil.which("nm") else ():
        (shared,) = shared_names(tmp_path / f"{name}.o")
        assert "qkernels::cpu::kAvx" in shared
    ran = []
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16"):
        result = subprocess.run([program, isa], capture_output=True, text=True, timeout=120, check=False)
        if result.returncode == 77:  # this CPU lacks it
            continue
        assert result.returncode == 0, result.stdout + result.stderr
        assert ", 0 wrong" in result.stdout
        ran.append(isa)
    assert tuple(ran) == extension.status().isas or not extension.status().isas
    # Negative control: a qweight that is one byte short.
    result = subprocess.run([program, "scalar", "short"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
