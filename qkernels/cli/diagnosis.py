"""What `qkernels doctor` looks at: is this installation healthy, which kernels can run here, and if not, why not."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass

import torch

from .. import extension
from .._version import __version__
from ..errors import MissingPackage
from ..kernels.catalogue import KernelTable, Problem, arch_of, list_kernels
from ..machine import find_cores, oversubscribed
from ..nn import QuantLinear
from ..optional import need_transformers
from ..quantizers import RTN

# The same is said at the head of docs/kernel-log.md, and nowhere else.
GPU_KERNELS = "verified without a GPU, never run on one: speeds are predictions (docs/kernel-log.md)"
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "matplotlib")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis: what was looked at, whether it is well, what was found, and what to do if it is not."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def diagnose() -> list[Check]:
    """Versions, the compiled extension, GPU and compiler, and a computation whose result is known."""
    return [
        Check("qkernels", True, f"{__version__} on Python {platform.python_version()}, {platform.machine()}"),
        Check("packages", True, ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        _extension(),
        _transformers(),
        _threads(),
        _gpu(),
        Check("gpu kernels", True, GPU_KERNELS),
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


def _transformers() -> Check:
    """Layers run without it: advice, but no failure."""
    try:
        need_transformers("whatever reads a model's directory (load, quantize, eval, generate)")
    except MissingPackage as error:
        return Check("transformers", True, "absent, or cannot be imported", str(error))
    return Check("transformers", True, _version("transformers"))


def _threads() -> Check:
    """Too many threads make everything slow and nothing wrong: advice, but no failure."""
    cores, threads = find_cores(), torch.get_num_threads()
    unread = "".join(f"; a quota could not be read: {reason}" for reason in cores.unread)
    return Check("threads", True, f"{threads} of torch, {cores}{unread}", oversubscribed(cores, threads) or "")


def _gpu() -> Check:
    if torch.cuda.is_available():
        cards = [(torch.cuda.get_device_name(i), arch_of(f"cuda:{i}")) for i in range(torch.cuda.device_count())]
        named = [f"{name} ({arch}; {code_of(arch)})" for name, arch in cards]
        return Check("gpu", True, ", ".join(named) + f", CUDA {torch.version.cuda}", _without_cuda_kernels())
    if torch.version.cuda is None:
        return Check("gpu", True, "none that this torch can use: it is a CPU build")
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return Check("gpu", True, f"none: {str(error).splitlines()[0]}")
    return Check("gpu", True, "none")


def _without_cuda_kernels() -> str:
    """The way to CUDA kernels, where a GPU finds an extension without them; Triton's run meanwhile."""
    status = extension.status()
    if not status.loaded or status.cuda:
        return ""
    return (
        "CUDA kernels come with a build on this machine: with nvcc, or after pip install -r requirements-cuda.txt, run "
        "pip install . --no-build-isolation in a checkout"
    )


def code_of(arch: str) -> str:
    """What the extension has for a card."""
    status = extension.status()
    if not status.cuda:
        return "no CUDA kernels in the extension"
    if not status.architectures:
        return "the extension does not say what it was compiled for"
    built = ", ".join(status.architectures)
    return extension.code_for(arch, status.architectures) or f"no code in the extension, which has {built}"


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


def kernel_tables() -> dict[str, KernelTable]:
    """By device of this machine: which kernels run a layer of the default scheme there, and why the others do not."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    scheme = RTN().scheme
    return {device: list_kernels(Problem(4096, 4096, scheme, torch.bfloat16, arch_of(device))) for device in devices}


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
