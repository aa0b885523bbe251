"""Peers: what else could run the same layer here. One small file each; what is installed is found by itself.

An adapter turns our `QuantTensor` into the peer's own packed form. A peer that is not installed, does not take a problem, raises,
or computes something else keeps its line in the table, with the reason instead of a number.

Adapters that were never run by us say so in `status`: they follow the peer's public documentation of the version named there, and
nothing about them is trusted before their output has matched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor
from qkernels.text import dtype_name

PEER_PACKAGES = ("humming-kernels", "gemlite", "gptqmodel", "bitsandbytes", "torchao", "llama-cpp-python", "triton",
                 "zentorch", "auto-round-lib", "openvino")  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A weight in a peer's hands.

    Args:
        buffers: what `run` reads, as nested tensors or a module; it is copied to rotate over cold weights.
        run: (buffers, x `[M, K]`) -> y `[M, N]`.
        nbytes: bytes that one call reads of the weight, with scales and zero points.
        weight: what the peer's weight means, fp32 `[N, K]`, where its format cannot hold ours; None: the same as ours.
        activation_bits: 8 where it quantizes x.
        note: what a reader of the table should know, for example another format.
    """

    buffers: Any
    run: Callable[[Any, Tensor], Tensor]
    nbytes: int
    weight: Tensor | None = None
    activation_bits: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Peer:
    """One adapter.

    Args:
        name: in tables.
        available: why it cannot be used here at all (not installed, no such device), or None.
        reason: why it does not take a problem, or None.
        prepare: (weight, activation dtype, device) -> what runs it.
        status: "" where we have run it; else what the adapter rests on.
    """

    name: str
    available: Callable[[torch.device], str | None]
    reason: Callable[[Problem], str | None]
    prepare: Callable[[QuantTensor, torch.dtype, torch.device], Prepared]
    status: str = ""

    def why_not(self, problem: Problem, device: torch.device) -> str | None:
        """The first reason against it, or None."""
        return self.available(device) or self.reason(problem)


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def needs(package: str, module: str, *, device: str | None = None) -> Callable[[torch.device], str | None]:
    """An `available` that asks for an installed package and perhaps a kind of device. Nothing is imported."""

    def available(on: torch.device) -> str | None:
        if device is not None and on.type != device:
            return f"runs on {device} only"
        if importlib.util.find_spec(module) is None:
            return f"not installed (pip install {package})"
        return None

    return available


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def integer_zeros(weight: QuantTensor) -> Tensor:
    """Zero points of a scheme with zeros "none" or "int", fp32 `[N, G]`."""
    if weight.zeros is None:
        return torch.full(weight.scales.shape, float(weight.scheme.mid_code), device=weight.device)
    return weight.zeros.float()


def unlike(
    problem: Problem,
    *,
    bits: tuple[int, ...],
    groups: tuple[int | str, ...],
    zeros: tuple[str, ...] = ("none",),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
    acts: tuple[str | None, ...] = (None,),
    n_multiple: int = 1,
    k_multiple: int = 1,
) -> str | None:
    """The usual reasons: what a peer takes, against what the problem is."""
    scheme = problem.scheme
    if scheme.codebook is not None or scheme.act not in acts or scheme.bits not in bits or scheme.zeros not in zeros:
        return f"has no kernel for {scheme}"
    if scheme.group_size not in groups:
        return f"takes groups of {', '.join(map(str, groups))}, got {scheme.group_size}"
    if problem.dtype not in dtypes:
        return f"takes {', '.join(map(dtype_name, dtypes))} activations, got {problem.dtype}"
    if problem.N % n_multiple or problem.K % k_multiple:
        return f"takes N % {n_multiple} == 0 and K % {k_multiple} == 0, got N={problem.N} K={problem.K}"
    return None


from . import (  # noqa: E402  (they need Peer)
    ark,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    gemlite,
    ggml,
    gptqmodel_cpu,
    gptqmodel_marlin,
    humming,
    openvino,
    own,
    torch_dynamic_int8,
    torch_int4pack,
    torch_int8pack,
    torch_linear,
    torchao_int4,
    zentorch,
)

CONTROL = torch_linear.PEER.name  # unquantized, and not ours: tells a slower kernel from a slower machine
PEERS: tuple[Peer, ...] = (
    torch_linear.PEER,
    torch_int4pack.PEER,
    torch_int8pack.PEER,
    torch_dynamic_int8.PEER,
    humming.PEER,
    gptqmodel_marlin.PEER,
    gptqmodel_cpu.PEER,
    gemlite.PEER,
    bitsandbytes_nf4.PEER,
    bitsandbytes_int8.PEER,
    torchao_int4.PEER,
    ggml.PEER_Q4_0,
    ggml.PEER_Q4_K,
    ggml.PEER_SAME,
    zentorch.PEER,
    ark.PEER,
    openvino.PEER,
    own.PEER_W8A8,
    own.PEER_W4,
    own.PEER_W8,
)
