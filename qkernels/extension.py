"""Finds and loads the compiled extension, and says how that went.

The library has no Python symbol (torch stable ABI): `torch.ops.load_library` maps it, and its implementations attach
themselves to the ops that `qkernels.ops.schema` defines. A missing or broken library is never an error at import; it is
remembered for `qkernels doctor` and for the catalogue's reasons.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .errors import ArgumentError


@dataclass(frozen=True)
class ExtensionStatus:
    """How loading went.

    Args:
        path: the library that was found, or None.
        loaded: whether its kernels can be called.
        error: why not, or None.
        isa: the instruction set that the CPU kernels use: the best of `isas`, or what QKERNELS_ISA asks for.
        isas: the instruction sets that this CPU and this build both have, plainest first.
        cuda: whether CUDA kernels are in it.
    """

    path: Path | None
    loaded: bool
    error: str | None
    isa: str | None
    isas: tuple[str, ...]
    cuda: bool


def load() -> None:
    """Load the extension if it has not been tried yet. Never raises: see `status`."""
    _library()


def status() -> ExtensionStatus:
    """How loading went, and which instruction set is in use now."""
    path, library, error = _library()
    if library is None:
        return ExtensionStatus(path, False, error, None, (), False)
    isa, wrong = _text(library.qkernels_cpu_isa()), _text(library.qkernels_cpu_isa_error())
    isas = tuple((_text(library.qkernels_cpu_isas()) or "").split())
    return ExtensionStatus(path, wrong is None, wrong, isa, isas, bool(library.qkernels_has_cuda()))


def use_isa(name: str) -> None:
    """Switch the CPU kernels to another instruction set, for tests and benchmarks. Not while an op runs.

    Raises:
        ArgumentError: this CPU or this build does not have it, or the extension is not loaded.
    """
    _, library, error = _library()
    if library is None:
        raise ArgumentError(f"no instruction set can be chosen, the extension is not loaded: {error}")
    wrong = _text(library.qkernels_cpu_use_isa(name.encode()))
    if wrong is not None:
        raise ArgumentError(wrong)


@lru_cache(maxsize=1)
def _library() -> tuple[Path | None, ctypes.CDLL | None, str | None]:
    package = Path(__file__).resolve().parent
    found = sorted(package.glob("_C*.so"))
    if not found:
        return None, None, _not_built(package)
    path = found[0]
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        for function in (library.qkernels_cpu_isa, library.qkernels_cpu_isas, library.qkernels_cpu_isa_error):
            function.restype = ctypes.c_char_p
        library.qkernels_cpu_use_isa.restype = ctypes.c_char_p
        library.qkernels_cpu_use_isa.argtypes = [ctypes.c_char_p]
        library.qkernels_has_cuda.restype = ctypes.c_int
    except (OSError, AttributeError) as error:  # another torch, another libstdc++, another version of this package
        return path, None, f"{path.name} does not load with torch {torch.__version__}: {error}"
    return path, library, None


def _not_built(package: Path) -> str:
    """Why there is no library, and the way out. A clone that was never built hides the installed package from every Python that
    is started in it."""
    places = [Path(entry or ".").resolve() / package.name for entry in sys.path]
    hidden = next((place for place in places if place != package and any(place.glob("_C*.so"))), None)
    elsewhere = f"{hidden} is built, and hidden by this one" if hidden else "if qkernels is installed"
    return (
        f"there is no _C*.so in {package}, which was checked out or installed without building it; build it there "
        f"(pip install . --no-build-isolation), or start Python in another directory: {elsewhere}"
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
