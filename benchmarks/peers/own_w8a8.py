"""Our own w8a8_channel beside w8a8o6_channel: what the columns cost that LLM.int8 looks for and multiplies in 16 bits."""

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
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, unlike


def reason(problem: Problem) -> str | None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return unlike(problem, bits=(8,), groups=("channel",), dtypes=dtypes, acts=("int8_outliers",))


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    plain = replace(weight, scheme=replace(weight.scheme, act="int8"))
    layout = select(Problem(plain.N, plain.K, plain.scheme, dtype, arch_of(device))).layout
    packed = get_layout(layout).pack(plain)
    buffers = {name: None if t is None else on_huge_pages(t.to(device)) for name, t in packed.items()}
    call = partial(ops.gemm, layout, in_features=plain.K, out_features=plain.N, scheme=plain.scheme)

    def run(buffers: dict[str, Any], x: Tensor) -> Tensor:
        return call(x, **buffers)

    return Prepared(buffers, run, bytes_of(*buffers.values()), activation_bits=8)


PEER: Peer = Peer("qkernels w8a8_channel", lambda device: None, reason, prepare)
