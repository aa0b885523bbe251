"""Finds and loads the compiled extension, and says how that went.

The library has no Python symbol (torch stable ABI): `torch.ops.load_library` maps it, and its implementations attach
themselves to the ops that `qkernels.ops.schema` defines. A missing or broken library is never an error at import; it is
remembered for `qkernels doctor` and for the catalogue's reasons.
"""

from __future__ import annotations

import ctypes
import re
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
        architectures: what they were compiled for, as TORCH_CUDA_ARCH_LIST spells it: "9.0a", "8.0+PTX"; () if the build does
            not say.
    """

    path: Path | None
    loaded: bool
    error: str | None
    isa: str | None
    isas: tuple[str, ...]
    cuda: bool
    architectures: tuple[str, ...] = ()


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
    architectures = tuple(re.findall(r"[^;\s]+", _architectures(library)))
    return ExtensionStatus(path, wrong is None, wrong, isa, isas, bool(library.qkernels_has_cuda()), architectures)


def code_for(arch: str, architectures: tuple[str, ...]) -> str | None:
    """What a card runs of a build: "code for 9.0a", "PTX for 8.0, compiled by the driver at the first call"; or None.

    Code serves its own family from its own minor number on (8.6 runs what was made for 8.0), and with an "a" that card alone. PTX
    serves every later card, and with an "a" none.

    Args:
        arch: "sm90", as `arch_of` names a card.
        architectures: of `ExtensionStatus`. Names that are no numbers ("Hopper") are taken to serve.

    >>> from qkernels.extension import code_for
    >>> code_for("sm100", ("8.0+PTX", "9.0a"))
    'PTX for 8.0, compiled by the driver at the first call'
    """
    card, best, ptx = int(arch.removeprefix("sm")), None, None
    for name in architectures:
        number = re.fullmatch(r"(\d+)\.(\d)(a|f)?(\+PTX)?", name)
        if number is None:
            return f"code for {name}"
        at = 10 * int(number[1]) + int(number[2])
        if card == at or (card // 10 == at // 10 and at < card and number[3] is None):
            best = max(best or (0, ""), (at, name.removesuffix("+PTX")))
        if number[4] and number[3] is None and at <= card:
            ptx = max(ptx or 0, at)
    if best is not None:
        return f"code for {best[1]}"
    return None if ptx is None else f"PTX for {ptx // 10}.{ptx % 10}, compiled by the driver at the first call"


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


def _architectures(library: ctypes.CDLL) -> str:
    """TORCH_CUDA_ARCH_LIST of the build; "" without CUDA, and of builds from before they said so."""
    if not hasattr(library, "qkernels_cuda_architectures"):
        return ""
    library.qkernels_cuda_architectures.restype = ctypes.c_char_p
    return _text(library.qkernels_cuda_architectures()) or ""


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
