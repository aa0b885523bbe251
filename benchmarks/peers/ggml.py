"""llama.cpp's ggml (through llama-cpp-python): not wired up.

Its C interface changes between releases and could not be checked against an installed library, so this names the gap instead of
guessing. What an adapter needs: quantize the dequantized weight to Q4_0 and Q4_K, a graph of one `ggml_mul_mat` per weight copy
in the CPU_REPACK buffer type, `weight` read back by `ggml_get_type_traits(type)->to_float`, `activation_bits=8`.
"""

from __future__ import annotations

import torch

from qkernels.errors import UnsupportedProblem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, version_of


def available(device: torch.device) -> str | None:
    version = version_of("llama-cpp-python")
    return (
        "not installed (pip install llama-cpp-python)"
        if version is None
        else f"{version} is installed, but there is no adapter"
    )


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    raise UnsupportedProblem("there is no adapter for ggml")


PEER = Peer("ggml", available, lambda problem: None, prepare, status="no adapter")
