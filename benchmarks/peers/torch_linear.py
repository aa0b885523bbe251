"""The unquantized layer: `torch.nn.functional.linear` in the activations' dtype (cuBLAS on CUDA, oneDNN on the CPU)."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    full = weight.dequantize(dtype).to(device)
    return Prepared(full, lambda w, x: linear(x, w), bytes_of(full), note="unquantized")


PEER: Peer = Peer("torch linear", lambda device: None, lambda problem: None, prepare)
