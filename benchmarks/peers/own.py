"""Our own kernels on another scheme of the same layer: what LLM.int8's 16-bit columns cost beside w8a8_channel, and whether time
goes with the bytes: 3 bits beside 4, 6 beside 8, and 8 beside 4 where products bind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.kernels.catalogue import Problem, arch_of, select
from qkernels.layouts import get_layout
from qkernels.nn.huge_pages import on_huge_pages
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of


def reason(compared: tuple[str, ...], problem: Problem) -> str | None:
    if str(problem.scheme) in compared:
        return None
    return f"is set against {', '.join(compared)}, got {problem.scheme}"


def _as(weight: QuantTensor, scheme: QuantScheme) -> QuantTensor:
    """The same values where the scheme has as many bits, else the nearest that it has: symmetric codes on a coarser grid."""
    step = max(weight.scheme.mid_code // scheme.mid_code, 1)
    values = (weight.codes.float() - weight.scheme.mid_code) / step
    codes = (values.round() + scheme.mid_code).clamp(0, 2**scheme.bits - 1).to(torch.uint8)
    return replace(weight, codes=codes, scales=weight.scales * step, scheme=scheme)


def prepare(short: str, weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    plain = _as(weight, QuantScheme.parse(short))
    layout = select(Problem(plain.N, plain.K, plain.scheme, dtype, arch_of(device))).layout
    packed = get_layout(layout).pack(plain)
    buffers = {name: None if t is None else on_huge_pages(t.to(device)) for name, t in packed.items()}
    call = partial(ops.gemm, layout, in_features=plain.K, out_features=plain.N, scheme=plain.scheme)

    def run(buffers: dict[str, Any], x: Tensor) -> Tensor:
        return call(x, **buffers)

    bits = None if plain.scheme.act is None else 8
    means = plain.dequantize(torch.float32)
    return Prepared(buffers, run, bytes_of(*buffers.values()), weight=means, activation_bits=bits)


def _peer(short: str, *compared: str) -> Peer:
    schemes = tuple(str(QuantScheme.parse(other)) for other in compared)
    return Peer(f"qkernels {short}", lambda device: None, partial(reason, schemes), partial(prepare, short))


PEER_W8A8: Peer = _peer("w8a8_channel", "w8a8o6_channel")
PEER_W4: Peer = _peer("w4a16_g128", "w3a16_g128", "w8a16_g128")
PEER_W8: Peer = _peer("w8a16_g128", "w6a16_g128")
