"""Which kernel runs which problem, in order of preference, and why the others do not.

Nothing falls back to a slow path silently: with no fit, `select` raises `UnsupportedProblem` with every kernel's reasons,
and the plain-PyTorch reference runs only where the caller allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from .. import extension
from ..errors import ArgumentError, UnsupportedProblem
from ..layouts import get_layout
from ..scheme import QuantScheme
from ..text import dtype_name
from . import triton

OnUnsupported = Literal["raise", "skip", "reference"]


@dataclass(frozen=True)
class Problem:
    """What is known when a layer is built. M is not in it: the op chooses by M.

    Args:
        N: out_features.
        K: in_features.
        scheme: how the weight is quantized.
        dtype: of the activations.
        arch: "cpu", or "sm80", "sm90", … for a CUDA device (`arch_of`).
        experts: 0 for a plain linear layer.
    """

    N: int
    K: int
    scheme: QuantScheme
    dtype: torch.dtype
    arch: str = "cpu"
    experts: int = 0

    def __str__(self) -> str:
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.scheme}, N={self.N} K={self.K}, {dtype_name(self.dtype)}, {self.arch}{experts}"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel the catalogue can choose: its layout, the `torch.ops.qkernels` op that runs it, and why it may not."""

    name: str
    layout: str
    op: str
    reasons: Callable[[Problem], list[str]]


def arch_of(device: torch.device | str) -> str:
    """ "cpu", "meta", or "sm<major><minor>" of a CUDA device."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


def _common(problem: Problem) -> list[str]:
    return [f"stacked experts are not implemented yet (got {problem.experts})"] if problem.experts else []


def _cpu_tile(layout: str, problem: Problem) -> list[str]:
    reasons = _common(problem)
    # A meta layer takes the layout of the CPU: it is where it will be filled first.
    if problem.arch not in ("cpu", "meta"):
        reasons.append(f"runs on the CPU (got {problem.arch})")
    status = extension.status()
    if not status.loaded:
        reasons.append(f"the compiled extension is not loaded: {status.error}")
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"activations must be float32, bfloat16 or float16 (got {problem.dtype})")
    return reasons + get_layout(layout).reasons(problem.N, problem.K, problem.scheme)


def _needs_sm80(arch: str) -> list[str]:
    sm = int(arch[2:]) if arch.startswith("sm") else None
    if arch != "cuda" and sm is None:  # "cuda": a device that this process cannot ask
        return [f"runs on CUDA devices (got {arch})"]
    if sm is not None and sm < 80:
        return [f"needs compute capability 8.0 (A100, RTX 30) or later (got {arch})"]
    return []


def _cuda_mma_tile(layout: str, problem: Problem) -> list[str]:
    reasons = _common(problem) + _needs_sm80(problem.arch)
    status = extension.status()
    if not status.loaded:
        reasons.append(f"the compiled extension is not loaded: {status.error}")
    elif not status.cuda:
        reasons.append("the compiled extension was built without CUDA (no CUDA toolkit, or QKERNELS_CUDA=0)")
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"activations must be bfloat16 or float16 (got {problem.dtype})")
    return reasons + get_layout(layout).reasons(problem.N, problem.K, problem.scheme)


def _triton_kpack(problem: Problem) -> list[str]:
    reasons = _common(problem) + _needs_sm80(problem.arch)
    if why := triton.missing():
        reasons.append(why)
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"activations must be bfloat16 or float16 (got {problem.dtype})")
    return reasons + get_layout("kpack").reasons(problem.N, problem.K, problem.scheme)


def _reference(problem: Problem) -> list[str]:
    act8 = ["int8 activations (act='int8'): reference_a8 has them"] if problem.scheme.act == "int8" else []
    return _common(problem) + act8


def _reference_a8(problem: Problem) -> list[str]:
    act16 = ["16-bit activations: reference has them"] if problem.scheme.act is None else []
    return _common(problem) + act16


KERNELS: tuple[KernelSpec, ...] = (
    KernelSpec("cuda.mma_tile", "mma_tile", "gemm_mma_tile", partial(_cuda_mma_tile, "mma_tile")),
    KernelSpec("cuda.mma_tile_a8", "mma_tile_a8", "gemm_mma_tile_a8", partial(_cuda_mma_tile, "mma_tile_a8")),
    KernelSpec("triton.kpack", "kpack", "gemm_kpack", _triton_kpack),
    KernelSpec("cpu.cpu_tile_a16", "cpu_tile_a16", "gemm_cpu_tile_a16", partial(_cpu_tile, "cpu_tile_a16")),
    KernelSpec("cpu.cpu_tile_a8", "cpu_tile_a8", "gemm_cpu_tile_a8", partial(_cpu_tile, "cpu_tile_a8")),
)
REFERENCES: tuple[KernelSpec, ...] = (
    KernelSpec("reference", "reference", "gemm_reference", _reference),
    KernelSpec("reference_a8", "reference_a8", "gemm_reference_a8", _reference_a8),
)


@dataclass(frozen=True)
class KernelTable:
    """The catalogue's answer for one problem: kernel names in order of preference, each with its reasons against."""

    problem: Problem
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = []
        for name, reasons in self.rows:
            shown = reasons or (_REFERENCE_HINT if name in (spec.name for spec in REFERENCES) else "available",)
            lines += [f"  {name if i == 0 else '':<{width}}  {reason}" for i, reason in enumerate(shown)]
        return "\n".join(lines)


_REFERENCE_HINT = 'available: on_unsupported="reference" (slow)'


def list_kernels(problem: Problem) -> KernelTable:
    """Every kernel and why it cannot run `problem` (empty: it can). Print the result for the table."""
    return KernelTable(problem, tuple((spec.name, tuple(spec.reasons(problem))) for spec in (*KERNELS, *REFERENCES)))


def select(problem: Problem, on_unsupported: OnUnsupported = "raise") -> KernelSpec:
    """The first kernel without a reason against it.

    Args:
        problem: the layer.
        on_unsupported: "reference" also allows the plain-PyTorch reference.

    Raises:
        UnsupportedProblem: no kernel fits; lists every kernel with its reasons.
    """
    if on_unsupported not in get_args(OnUnsupported):
        raise ArgumentError(
            f"on_unsupported must be one of {', '.join(get_args(OnUnsupported))}, got {on_unsupported!r}"
        )
    for spec in KERNELS if on_unsupported != "reference" else (*KERNELS, *REFERENCES):
        if not spec.reasons(problem):
            return spec
    raise UnsupportedProblem(f"no kernel for {problem}\n{list_kernels(problem)}")
