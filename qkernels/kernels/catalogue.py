"""Which kernel runs which problem, in order of preference, and why the others do not.

Nothing falls back to a slow path silently: with no fit, `select` raises `UnsupportedProblem` with every kernel's reasons,
and the plain-PyTorch reference runs only where the caller allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..errors import ArgumentError, UnsupportedProblem
from ..layouts import Layout, canonical, cpu_tile_a8, cpu_tile_a16, get_layout, kpack, mma_tile
from ..ops.backends import BACKENDS
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import as_dtype
from ..text import dtype_name
from . import triton  # noqa: F401  (attaches its kernels to their ops)

OnUnsupported = Literal["raise", "skip", "reference"]


@dataclass(frozen=True)
class Problem:
    """What is known when a layer is built. M is not in it: the op chooses by M.

    Args:
        N: out_features.
        K: in_features.
        scheme: how the weight is quantized; its short form is taken, too.
        dtype: of the activations; its name ("bfloat16") is taken, too.
        arch: "cpu", or "sm80", "sm90", … for a CUDA device (`arch_of`).
        experts: 0 for a plain linear layer.
        own_orders: whether experts have orders of columns (act-order) of their own.

    >>> import torch
    >>> from qkernels import Problem
    >>> print(Problem(4096, 14336, "w4a16_g128", torch.bfloat16, "sm90"))
    w4a16_g128, N=4096 K=14336, bfloat16, sm90
    """

    N: int
    K: int
    scheme: QuantScheme
    dtype: torch.dtype
    arch: str = "cpu"
    experts: int = 0
    own_orders: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", QuantScheme.parse(self.scheme))
        object.__setattr__(self, "dtype", as_dtype(self.dtype))

    def __str__(self) -> str:
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.scheme}, N={self.N} K={self.K}, {dtype_name(self.dtype)}, {self.arch}{experts}"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel that the catalogue can choose; all that is known of it, its layout says.

    Args:
        name: "cpu.cpu_tile_a16", or the layout's name alone where plain PyTorch runs it.
        layout: the layout's name.
        op: the `torch.ops.qkernels` op that runs it.
    """

    name: str
    layout: str
    op: str

    @classmethod
    def of(cls, layout: Layout) -> KernelSpec:
        """The kernel of a layout's backend."""
        backend = "" if layout.backend == "torch" else f"{layout.backend}."
        return cls(f"{backend}{layout.name}", layout.name, f"gemm_{layout.name}")

    def reasons(self, problem: Problem, installed: bool = True) -> list[str]:
        """Why it cannot run the problem; empty if it can. `installed`: whether its code has to be there, in this installation."""
        layout = get_layout(self.layout)
        experts = _against_experts(layout, problem) if problem.experts else []
        backend = BACKENDS[layout.backend]
        return [
            *experts,
            *(backend.reasons if installed else backend.limits)(layout, problem.dtype, problem.arch),
            *layout.reasons(problem.N, problem.K, problem.scheme),
        ]


def _against_experts(layout: Layout, problem: Problem) -> list[str]:
    why = []
    if not layout.grouped:
        why.append(f"has no grouped kernels for stacked experts yet (got {problem.experts})")
    if not ACTIVATIONS[problem.scheme.act].grouped:
        why.append(f"{ACTIVATIONS[problem.scheme.act]}: not for stacked experts")
    if problem.own_orders and layout.backend != "torch":
        why.append("each expert has an order of columns of its own (act-order), and its kernels take one for all")
    return why


def arch_of(device: torch.device | str) -> str:
    """ "cpu", "meta", or "sm<major><minor>" of a CUDA device."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


KERNELS: tuple[KernelSpec, ...] = (
    KernelSpec.of(mma_tile.LAYOUT),
    KernelSpec.of(mma_tile.LAYOUT_A8),
    KernelSpec.of(kpack.LAYOUT),
    KernelSpec.of(cpu_tile_a16.LAYOUT),
    KernelSpec.of(cpu_tile_a8.LAYOUT),
)
REFERENCES: tuple[KernelSpec, ...] = (KernelSpec.of(canonical.LAYOUT), KernelSpec.of(canonical.LAYOUT_A8))


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
    """Every kernel and why it cannot run `problem` (empty: it can). Print the result for the table.

    >>> import torch
    >>> from qkernels import Problem, list_kernels
    >>> table = list_kernels(Problem(4096, 4096, "w4a16_g128", torch.bfloat16))
    >>> reasons = dict(table.rows)
    >>> reasons["reference"], reasons["triton.kpack"][0]
    ((), 'runs on CUDA devices (got cpu)')
    """
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
