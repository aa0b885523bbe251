"""Figures that do not depend on the machine's mood: instruction counts and what the compiler made of the kernels.

    python -m tools.guard             measure and compare with tools/guard.json
    python -m tools.guard --update    measure and commit to the new values (say why in the commit)

Callgrind counts instructions of the AVX2 kernels (valgrind knows no AVX-512), per weight, on problems small enough for its
hundredfold slowdown. Compilers differ by a few percent, so the bound is tight only under the compiler that the committed values
come from. Figures of the CUDA kernels (`guard_cuda.py`) come from nvcc and nvdisasm and need no GPU, those of the Triton kernels
(`guard_triton.py`) from Triton; without these tools they are left out by name, and `--update` keeps the committed ones.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import guard_cuda, guard_triton

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc" / "cpu"
COMMITTED = Path(__file__).with_name("guard.json")

Case = tuple[int, int, int, int, int, int]
CASES: dict[str, Case] = {  # name -> M, N, K, group, bits, bits of activations
    "decode 4-bit": (1, 256, 1024, 128, 4, 16),
    "decode 8-bit": (1, 256, 1024, 128, 8, 16),
    "batch of 16, 4-bit": (16, 128, 512, 128, 4, 16),
    "batch of 16, groups of 32": (16, 128, 512, 32, 4, 16),
    "int8 activations, decode 4-bit": (1, 256, 1024, 128, 4, 8),
    "int8 activations, decode 8-bit": (1, 256, 1024, 1024, 8, 8),
    "int8 activations, batch of 16, 4-bit": (16, 128, 512, 128, 4, 8),
    "int8 activations, batch of 16, groups of 32": (16, 128, 512, 32, 4, 8),
    "int8 activations, batch of 16, 8-bit": (16, 128, 512, 512, 8, 8),
}
OBJECTS = ("avx2", "avx2_int8", "avx512", "avx512_bf16", "avx512_vnni")  # whose spills are counted
SAME_COMPILER, OTHER_COMPILER = 0.03, 0.35  # how far a figure may rise
SLACK = {"spills": 8.0}  # counts near zero need room in absolute terms
VECTOR_SPILL = re.compile(r"\bv?mov(?:aps|ups|dqa|dqu)(?:32|64|8|16)?\s+%[xyz]mm\d+,\s*-?0x[0-9a-f]*\(%r(?:sp|bp)\)|"
                          r"\bv?mov(?:aps|ups|dqa|dqu)(?:32|64|8|16)?\s+%[xyz]mm\d+,\s*\(%rsp\)")  # fmt: skip

Figures = dict[str, dict[str, float]]


def compiler() -> str | None:
    """The C++ compiler's name and version, or None."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def kernels() -> dict[str, Path]:
    """Sources of the CPU kernels by name, without the bindings, which are torch's, and NEON, which is no x86's."""
    left_out = ("bindings", "neon")
    return {source.stem: source for source in sorted(CSRC.glob("*.cpp")) if not source.name.startswith(left_out)}


def shipped() -> dict[str, Path]:
    """The objects that the extension was linked of, if they are newer than all that they are made of; else nothing."""
    sources = [p for folder in (CSRC, CSRC.parent) for p in folder.iterdir() if p.suffix in (".h", ".cpp")]
    newest = max(p.stat().st_mtime for p in [*sources, ROOT / "setup.py"])
    for folder in ROOT.glob("build/temp.*/csrc/cpu"):
        objects = {name: folder / f"{name}.o" for name in kernels()}
        if all(o.exists() and o.stat().st_mtime > newest for o in objects.values()):
            return objects
    return {}


def build(directory: Path) -> dict[str, Path]:
    """Objects of every instruction set, the extension's or compiled with its flags (67 s of processor time), and the driver
    `counted`."""
    cxx = str(shutil.which("g++") or shutil.which("c++"))
    flags = [cxx, "-std=c++20", "-O3", "-DNDEBUG", "-fwrapv", "-fPIC", "-g0", "-w", "-fvisibility=hidden", f"-I{CSRC}"]
    objects = shipped()
    sources = {"counted": Path(__file__).with_name("counted.cpp")} | ({} if objects else kernels())
    objects |= {name: directory / f"{name}.o" for name in sources}
    jobs = [subprocess.Popen([*flags, "-c", str(s), "-o", str(objects[name])]) for name, s in sources.items()]
    if any([job.wait() for job in jobs]):
        raise RuntimeError("the CPU kernels do not compile")
    subprocess.run([*flags, *map(str, objects.values()), "-pthread", "-o", str(directory / "counted")], check=True)
    return {**objects, "counted": directory / "counted"}


def instructions(program: Path, case: Case, directory: Path, isa: str = "avx2") -> float:
    """Instructions per weight and token that `gemm` executes: the difference of two runs, so that set-up cancels."""
    counts = []
    for calls in (1, 3):
        log = directory / "callgrind.out"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={log}",
            str(program),
            isa,
            str(calls),
            *map(str, case),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        found = re.search(r"Collected : (\d+)", done.stderr)
        if done.returncode or not found:
            raise RuntimeError(f"callgrind failed: {done.stderr[-400:]}")
        counts.append(int(found[1]))
    M, N, K = case[:3]
    return (counts[1] - counts[0]) / 2 / (M * N * K)


def spills(obj: Path) -> float:
    """Vector registers stored to the stack, as instructions in the object file."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(obj)], capture_output=True, text=True, check=True
    ).stdout
    return float(len(VECTOR_SPILL.findall(text)))


def missing() -> list[str]:
    """Tools that measuring needs and that are not here."""
    tools = [tool for tool in ("valgrind", "objdump") if shutil.which(tool) is None]
    return tools if compiler() else [*tools, "g++"]


def measure(directory: Path) -> Figures:
    """All figures: {"instructions per weight": {case: n}, "spills": {instruction set: n}}."""
    built = build(directory)
    counts = {name: instructions(built["counted"], case, directory) for name, case in CASES.items()}
    return {
        "instructions per weight": {name: round(n, 4) for name, n in counts.items()},
        "spills": {isa: spills(built[isa]) for isa in OBJECTS},
    }


def regressions(committed: Mapping[str, Any], measured: Figures, with_compiler: str | None) -> list[str]:
    """What rose beyond its bound, or fell where that is worse; one sentence each. A figure that is gone counts too, and one
    that was never committed."""
    same = committed["compiler"] == with_compiler
    room = SAME_COMPILER if same else OTHER_COMPILER
    wrong = []
    for kind, values in committed["figures"].items():
        for name, was in values.items():
            now = measured.get(kind, {}).get(name)
            least = kind in guard_triton.AT_LEAST
            limit = was * (1 - room if least else 1 + room) + SLACK.get(kind, 0.0) * (1 if same else 4)
            if now is None:
                wrong.append(f"{kind}, {name}: no longer measured")
            elif now < limit if least else now > limit:
                wrong.append(
                    f"{kind}, {name}: {now:g}, committed {was:g}, bound {limit:g} ({'same' if same else 'another'} compiler)"
                )
    known = {(kind, name) for kind, values in committed["figures"].items() for name in values}
    new = [(kind, name) for kind, values in measured.items() for name in values if (kind, name) not in known]
    return wrong + [f"{kind}, {name}: not committed; python -m tools.guard --update" for kind, name in new]


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(COMMITTED.read_text())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.guard", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the measured values to guard.json")
    args = parser.parse_args(argv)
    if lacking := missing():
        print(f"needs {', '.join(lacking)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        cpu = measure(Path(directory))
    before = committed() if COMMITTED.exists() else {}
    now: dict[str, Any] = {"compiler": compiler(), "figures": cpu}
    wrong = regressions(before, cpu, compiler()) if before else []
    for key, kernels, source in (("cuda", "CUDA", guard_cuda), ("triton", "Triton", guard_triton)):
        if lacking := source.missing():
            print(f"{kernels} kernels: needs {', '.join(lacking)}; left as they are", file=sys.stderr)
            now[key] = before.get(key)
            continue
        figures, mixes = source.measure()
        now[key] = {"compiler": source.compiler(), "figures": figures, "inner loops": mixes}
        wrong += regressions(before[key], figures, source.compiler()) if key in before else [f"{key}: not committed"]
    print(json.dumps(now, indent=1))
    if args.update:
        COMMITTED.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    print("\n".join(wrong) or "nothing rose beyond its bound")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
