"""Who runs the ops of a layout: the compiled kernels of the CPU and of CUDA, Triton, or plain PyTorch; and why not here.

What a backend needs of device, architecture and installation is said once: `schema` makes the refusals of ops that are not there
from it, and the catalogue the reasons of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import extension
from ..layouts import BackendName, Layout
from ..text import dtype_names

OLDEST_TRITON = (3, 6)  # compiles these kernels (tests/triton/README.md says which versions were tried)


@dataclass(frozen=True)
class Backend:
    """One kind of kernels.

    Args:
        device: the device type whose tensors they take; None: any.
        elsewhere: arch (see `kernels.catalogue.arch_of`) -> why they do not run on it.
        missing: why their code cannot run in this installation, or None.
        built: whether their ops have an implementation, or will get one from Python.
    """

    device: str | None
    elsewhere: Callable[[str], list[str]]
    missing: Callable[[], str | None]
    built: Callable[[], bool]

    def reasons(self, layout: Layout, dtype: torch.dtype, arch: str) -> list[str]:
        """Why the kernels of a layout do not run with activations of `dtype` on `arch` here; empty if they do."""
        missing = self.missing()
        return [*self.elsewhere(arch), *([missing] if missing else []), *_of_dtype(layout, dtype)]

    def limits(self, layout: Layout, dtype: torch.dtype, arch: str) -> list[str]:
        """The same of an installation that has all code, on whatever machine."""
        asked = _not_sm80 if self.device == "cuda" else self.elsewhere
        return [*asked(arch), *_of_dtype(layout, dtype)]


def _of_dtype(layout: Layout, dtype: torch.dtype) -> list[str]:
    return [] if dtype in layout.dtypes else [f"activations must be {dtype_names(layout.dtypes)} (got {dtype})"]


def _not_the_cpu(arch: str) -> list[str]:
    # A meta layer takes the layout of the CPU: it is where it will be filled first.
    return [] if arch in ("cpu", "meta") else [f"runs on the CPU (got {arch})"]


def _not_sm80(arch: str) -> list[str]:
    sm = int(arch[2:]) if arch.startswith("sm") else None
    if arch != "cuda" and sm is None:  # "cuda": a device that this process cannot ask
        return [f"runs on CUDA devices (got {arch})"]
    if sm is not None and sm < 80:
        return [f"needs compute capability 8.0 (A100, RTX 30) or later (got {arch})"]
    return []


def _no_cuda_code(arch: str) -> list[str]:
    """Beside `_not_sm80`: a card that the build has no code for and no PTX that its driver could compile."""
    why, built = _not_sm80(arch), extension.status().architectures
    if not why and arch != "cuda" and built and extension.code_for(arch, built) is None:
        why = [
            f"the extension has no code for {arch}: it was built for {', '.join(built)}; build it with TORCH_CUDA_ARCH_LIST "
            f"naming {arch[2:-1]}.{arch[-1]}, or 8.0+PTX"
        ]
    return why


def _missing_extension() -> str | None:
    status = extension.status()
    return None if status.loaded else f"the compiled extension is not loaded: {status.error}"


def _missing_cuda() -> str | None:
    without = "the compiled extension was built without CUDA (no CUDA toolkit, or QKERNELS_CUDA=0)"
    return _missing_extension() or (None if extension.status().cuda else without)


@lru_cache(maxsize=1)
def missing_triton() -> str | None:
    """Why the Triton kernels cannot be compiled here, or None. Imports nothing."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"needs Triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or later (got {found})"
    return None


BACKENDS: dict[BackendName, Backend] = {
    # An instruction set that this CPU lacks was asked for: the ops are there and say so.
    "cpu": Backend("cpu", _not_the_cpu, _missing_extension, lambda: bool(extension.status().isas)),
    "cuda": Backend("cuda", _no_cuda_code, _missing_cuda, lambda: extension.status().cuda),
    "triton": Backend("cuda", _not_sm80, lambda: missing_triton(), lambda: True),
    "torch": Backend(None, lambda arch: [], lambda: None, lambda: True),
}
