"""`qkernels doctor`: is this installation healthy, which kernels can run here, and if not, why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass

import torch

from .. import extension
from .._version import __version__
from ..kernels.catalogue import Problem, arch_of, list_kernels
from ..machine import find_cores, oversubscribed
from ..nn import QuantLinear
from ..quantizers import RTN
from .common import Subparsers, command_parser, print_json

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis: what was looked at, whether it is well, what was found, and what to do if it is not."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands, "doctor", "diagnose this installation", "  qkernels doctor\n  qkernels doctor --json"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    checks = diagnose()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    tables = {device: list_kernels(_example(device)) for device in devices}
    healthy = all(check.ok for check in checks)
    if args.json:
        kernels = {device: {name: list(reasons) for name, reasons in table.rows} for device, table in tables.items()}
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks], "kernels": kernels})
        return 0 if healthy else 1
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'}  {check.name:<12} {check.found}")
        if check.advice:
            print(f"     {'':<12} -> {check.advice}")
    for table in tables.values():
        print(f"\nkernels for {table.problem}\n{table}")
    well = "it works, and could be faster: see ->" if any(check.advice for check in checks) else "everything is well"
    print(f"\n{well if healthy else 'something is wrong: see the lines marked BAD'}")
    return 0 if healthy else 1


def diagnose() -> list[Check]:
    """Versions, the compiled extension, GPU and compiler, and a computation whose result is known."""
    return [
        Check("qkernels", True, f"{__version__} on Python {platform.python_version()}, {platform.machine()}"),
        Check("packages", True, ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        _extension(),
        _threads(),
        _gpu(),
        Check("nvcc", True, _nvcc()),
        _self_test(),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(absent)"


def _extension() -> Check:
    status = extension.status()
    if not status.loaded:
        advice = (
            "build it: pip install . --no-build-isolation (needs g++, ninja, setuptools >= 77 and the torch to be used)"
        )
        return Check("extension", False, f"not loaded: {status.error}", advice)
    cuda = "with" if status.cuda else "without"
    return Check("extension", True, f"{status.path}, {status.isa} of {', '.join(status.isas)}, {cuda} CUDA kernels")


def _threads() -> Check:
    """Too many threads make everything slow and nothing wrong: advice, but no failure."""
    cores, threads = find_cores(), torch.get_num_threads()
    unread = "".join(f"; a quota could not be read: {reason}" for reason in cores.unread)
    return Check("threads", True, f"{threads} of torch, {cores}{unread}", oversubscribed(cores, threads) or "")


def _gpu() -> Check:
    if torch.cuda.is_available():
        names = [f"{torch.cuda.get_device_name(i)} ({arch_of(f'cuda:{i}')})" for i in range(torch.cuda.device_count())]
        return Check("gpu", True, ", ".join(names) + f", CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Check("gpu", True, "none that this torch can use: it is a CPU build")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return Check("gpu", True, f"none: {str(error).splitlines()[0]}")
    return Check("gpu", True, "none")


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "absent: CUDA kernels cannot be built here"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer: {error}"
    release = [line for line in text.splitlines() if "release" in line]
    return f"{path}, {release[0].split(',')[1].strip() if release else 'version unknown'}"


def _example(device: str) -> Problem:
    dtype = torch.bfloat16
    return Problem(4096, 4096, RTN().scheme, dtype, arch_of(device))


def _self_test() -> Check:
    """A small layer whose exact result is known: integers in, integers out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 8, (96, 256), generator=generator).float()
    weight[:, ::128] = 7.5  # the largest magnitude of each group, so that the scale is exactly 1
    x = torch.randint(-4, 5, (3, 256), generator=generator).float()
    start = time.perf_counter()
    try:
        qt = RTN().quantize(weight)
        layer = QuantLinear.from_quant_tensor(qt, dtype=torch.float32)
        exact = torch.equal(layer(x), x @ qt.dequantize().T)
    except (ValueError, RuntimeError) as error:
        return Check("self-test", False, f"failed: {error}", "see the lines above; then report it with this output")
    found = f"one {layer.layout} layer, {1e3 * (time.perf_counter() - start):.0f} ms"
    if not exact:
        return Check("self-test", False, f"{found}: wrong result", "do not use this build; report it with this output")
    return Check("self-test", True, f"{found}, exact")
