"""Runs the CUDA launchers on the CPU: builds csrc/cuda with g++ and -DQKERNELS_HOST, and calls the result.

`load(unit)` is a Python module in this process, for values; `replay(unit, call, "asan")` a program of its own, for what the
sanitizers see. Builds live in build/cuda_host and are incremental. Parallel test workers wait for each other's, but for those
with a bug, which are one object each: two workers build two of them, beside each other.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from tools.locking import locked

from .mutants import MUTANTS, write_mutant

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
HOST = HERE / "host"
CUDA = ROOT / "csrc" / "cuda"
BUILDS = ROOT / "build" / "cuda_host"
CXX = shutil.which("g++")

WHY_NOT = (
    "no g++" if CXX is None else "the fibers are written for x86-64" if platform.machine() != "x86_64" else None
)  # why nothing here can run, or None

Flavour = Literal["module", "program", "asan", "tsan"]
SCHEDULES = ("ascending", "descending", "random", "warp_ahead")

FLAGS: dict[Flavour, tuple[str, ...]] = {
    "module": ("-O2", "-march=native", "-fPIC"),
    "program": ("-O2", "-march=native", "-fPIC"),  # of the same objects
    # Without optimization ASan compiles in a third of the time (7 s instead of 22 for gemm_sm90.cu) and runs for as little.
    "asan": ("-O0", "-g1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-g1", "-march=native", "-fsanitize=thread"),
}
# -ffp-contract=off: what is to be fused is written as fmaf.
COMMON = ("-std=c++20", "-DQKERNELS_HOST", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off")

SAMPLE = HERE / "sample" / "launch_sample.cpp"
SAMPLE_BUGS = (
    "NO_BARRIER", "EARLY_PREFETCH", "SHORT_WAIT", "NO_ROW_MASK", "DIVERGENT", "BLOCKS_OVERLAP", "NO_SWIZZLE",
)  # fmt: skip

# Units: what is built together. `sample` is the lab's own kernel.
SOURCES: dict[str, tuple[Path, ...]] = {
    "sample": (SAMPLE,),
    "wgmma": (HOST / "launch_wgmma.cpp",),
    "runtime": (HOST / "launch_runtime.cpp",),
    "mma_tile": (
        *sorted(CUDA.glob("*.cu")),
        HOST / "launch_mma_tile.cpp",
        HOST / "launch_experts.cpp",
        HOST / "launch_checks.cpp",
    ),
    "drive": (*sorted(CUDA.glob("*.cu")), ROOT / "tools" / "first_light" / "drive" / "drive.cu"),
}
WITH_MAIN = ("drive",)  # programs of their own, which nobody calls by a launcher's name
# The bugs that the sample can be asked to contain (-DQK_BUG_...). The kernels have none in their text: for them a bug is a
# change of one line, made to a copy of csrc/cuda (mutants.py).
BUGS: dict[str, tuple[str, ...]] = {
    "sample": SAMPLE_BUGS, "wgmma": (), "runtime": ("SHARED_OF_ITS_OWN",), "mma_tile": tuple(MUTANTS), "drive": tuple(MUTANTS),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A launcher's arguments. Buffers are contiguous, and written in place where the kernel writes."""

    launcher: str
    buffers: Mapping[str, Tensor | None]
    integers: Mapping[str, int] = field(default_factory=dict)

    def given(self) -> dict[str, Tensor]:
        result = {name: buffer for name, buffer in self.buffers.items() if buffer is not None}
        for name, buffer in result.items():
            assert buffer.is_contiguous(), f"buffer {name} is not contiguous"
        return result


# ---- building ----


def target_of(unit: str, flavour: Flavour, bug: str | None = None) -> str:
    return f"{flavour}/{unit}{'-' + bug if bug else ''}{'.so' if flavour == 'module' else ''}"


def compiled_objects(unit: str, flavour: Flavour, bug: str | None) -> list[tuple[str, Path, Path, str]]:
    """(object, source, folder of csrc/cuda's headers, macro). With a bug, objects that it does not touch are the healthy ones."""
    result = []
    for source in SOURCES[unit]:
        owner = "mma_tile" if source.parent == CUDA else unit  # the kernels' objects serve every unit
        shared = target_of(owner, "module" if flavour == "program" else flavour)
        healthy = (f"{shared}-{source.name}.o", source, CUDA, "")
        if bug is not None and unit == "sample":
            result.append((f"{target_of(unit, flavour, bug)}.o", source, CUDA, f"-DQK_BUG_{bug}"))
        elif bug is not None and MUTANTS[bug].source == source.name:
            folder = BUILDS / "mutants" / bug
            changed = folder / source.name if source.parent == CUDA else source
            result.append((f"{target_of(owner, flavour, bug)}.o", changed, folder, ""))
        else:
            result.append(healthy)
    return result


def rules() -> list[str]:
    return [
        "rule compile",  # the second folder: for ../types.h, which copies with a bug do not have beside them
        f"  command = {CXX} {' '.join(COMMON)} -I$headers -I{CUDA} -I{HOST} $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {CXX} $more $in -o $out -ldl -pthread",
    ]


def ninja_file() -> str:
    """All that can be built without a bug; an object per source, rebuilt when a header changes. Only what a test asks for is."""
    import pybind11

    python = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')} -DQK_MODULE_NAME=module"
    lines, known = rules(), set()
    for flavour, options in FLAGS.items():
        more = "  more = " + " ".join(options)
        main, shared = f"{flavour}/main.o", " -shared" if flavour == "module" else ""
        source = HOST / ("module.cpp" if flavour == "module" else "replay.cpp")
        lines += [f"build {main}: compile {source}", f"  headers = {CUDA}", f"{more} {python if shared else ''}"]
        for unit in SOURCES:
            objects = [] if unit in WITH_MAIN else [main]
            for compiled, source, headers, _ in compiled_objects(unit, flavour, None):
                objects.append(compiled)
                if compiled not in known:
                    known.add(compiled)
                    lines += [f"build {compiled}: compile {source}", f"  headers = {headers}", more]
            lines += [f"build {target_of(unit, flavour)}: link {' '.join(objects)}", f"{more}{shared}"]
    return "\n".join(lines) + "\n"


def ninja_file_with_bug(unit: str, flavour: Flavour, bug: str) -> str:
    """One program with a bug, of the healthy objects but one. In a folder of its own, below that of `ninja_file`."""
    more = "  more = " + " ".join(FLAGS[flavour])
    quick = more.replace("-O2", "-O0")  # it runs once: 3 s to compile instead of 7
    healthy = [] if unit in WITH_MAIN else [f"{BUILDS}/{flavour}/main.o"]
    lines, broken = rules(), list[str]()
    for compiled, source, headers, macro in compiled_objects(unit, flavour, bug):
        if headers == CUDA and not macro:
            healthy.append(f"{BUILDS}/{compiled}")
        else:
            broken.append(f"{BUILDS}/{compiled}")
            lines += [f"build {broken[-1]}: compile {source}", f"  headers = {headers}", f"{quick} {macro}"]
    # The broken object first: where others have the same inline function, the linker takes the first.
    lines += [f"build {BUILDS}/{target_of(unit, flavour, bug)}: link {' '.join(broken + healthy)}", more]
    return "\n".join(lines) + "\n"


@functools.cache
def build(unit: str, flavour: Flavour, bug: str | None = None) -> Path:
    """What was built. Fails the test with the compiler's words where it does not compile."""
    target = BUILDS / target_of(unit, flavour, bug)
    if bug is None:
        with locked(BUILDS):
            ninja(BUILDS, ninja_file(), target_of(unit, flavour))
        return target
    build(unit, flavour)
    if bug in MUTANTS:
        with locked(BUILDS / "mutants" / bug):  # whose copies all flavours share
            write_mutant(CUDA, MUTANTS[bug], BUILDS / "mutants" / bug)
    folder = BUILDS / "bugs" / f"{flavour}-{bug}"
    with locked(folder):
        ninja(folder, ninja_file_with_bug(unit, flavour, bug), str(target))
    return target


def ninja(folder: Path, file: str, target: str) -> None:
    (folder / "build.ninja").write_text(file)
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", "2", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def load(unit: str) -> ModuleType:
    """The module: `run(launcher, addresses, integers, schedule, seed)`, `record(...)`, `launchers()`, KernelError."""
    spec = importlib.util.spec_from_file_location("module", build(unit, "module"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- running ----


def run(unit: str, call: Call, schedule: str = "ascending", seed: int = 1) -> None:
    """Runs the launcher; raises the module's KernelError (a RuntimeError) for what a kernel must not do."""
    addresses = {name: buffer.data_ptr() for name, buffer in call.given().items()}
    error = load(unit).run(call.launcher, addresses, dict(call.integers), SCHEDULES.index(schedule), seed)
    if error:
        raise RuntimeError(f"{call.launcher} returned error {error}")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the entry's mangled name, as in nvcc's PTX, and what the GPU would be told."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: list[bytes]


def record(unit: str, call: Call) -> list[Launch]:
    """What the launcher would launch. Nothing runs; the parameters hold the addresses of the buffers."""
    addresses = {name: buffer.data_ptr() for name, buffer in call.given().items()}
    return [Launch(*launch) for launch in load(unit).record(call.launcher, addresses, dict(call.integers))]


@dataclass(frozen=True)
class Replayed:
    status: int
    report: str  # the sanitizer's, or the kernel error
    buffers: dict[str, Tensor]  # afterwards; empty if it failed


def replay(
    unit: str,
    call: Call,
    flavour: Flavour = "program",
    schedule: str = "ascending",
    seed: int = 1,
    bug: str | None = None,
) -> Replayed:
    """Runs the launcher in a program of its own, whose buffers end where they should."""
    given = call.given()
    head = [
        f"launcher {call.launcher} {SCHEDULES.index(schedule)} {seed}",
        *(f"integer {name} {value}" for name, value in call.integers.items()),
        *(f"buffer {name} {buffer.nbytes}" for name, buffer in given.items()),
        "data\n",
    ]
    program = build(unit, flavour, bug)
    with TemporaryDirectory() as folder:
        file, result = Path(folder) / "call", Path(folder) / "result"
        with file.open("wb") as out:
            out.write("\n".join(head).encode())
            for buffer in given.values():
                out.write(raw(buffer).numpy().tobytes())
        done = subprocess.run([program, file, result], capture_output=True, text=True, timeout=300, check=False)
        data = torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.uint8) if done.returncode == 0 else None
    buffers: dict[str, Tensor] = {}
    if data is not None:
        parts = torch.split(data, [buffer.nbytes for buffer in given.values()])
        buffers = {n: part.clone().view(b.dtype).reshape(b.shape) for (n, b), part in zip(given.items(), parts)}
    return Replayed(done.returncode, done.stderr, buffers)


def raw(buffer: Tensor) -> Tensor:
    return buffer.reshape(-1).view(torch.uint8)
