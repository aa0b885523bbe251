"""Hashes of the blocks that llama.cpp's own quantizers (`ggml_quantize_chunk`, in the library inside xllamacpp) make of
`tests/gguf_weights.py`, with and without importance.

pip install xllamacpp==2026.10.11549 torch; PYTHONPATH=. python tests/golden/gguf/make_quantized.py
"""

from __future__ import annotations

import ctypes
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qkernels.formats.gguf.search import WRITABLE_TYPES
from qkernels.storage.gguf_types import GGML_TYPES
from tests.gguf_weights import digest, made_equals, made_importance, made_weight

found = find_spec("xllamacpp")
assert found is not None and found.origin is not None
chunk = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so")))).ggml_quantize_chunk
chunk.restype = ctypes.c_size_t
chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]


def quantized(weight: Tensor, type: str, importance: Tensor | None) -> str:
    ggml, (rows, columns) = GGML_TYPES[type], weight.shape
    out = torch.zeros(rows, columns // ggml.elements * ggml.nbytes, dtype=torch.uint8)
    matrix = None if importance is None else importance.data_ptr()
    assert chunk(ggml.id, weight.data_ptr(), out.data_ptr(), 0, rows, columns, matrix) == out.numel()
    return digest(out)


importance = made_importance()


def hashes(weight: Tensor) -> dict[str, dict[str, str]]:
    return {
        name: {"plain": quantized(weight, name, None), "importance": quantized(weight, name, importance)}
        for name in WRITABLE_TYPES
    }


golden = {"xllamacpp": version("xllamacpp"), "blocks": hashes(made_weight()), "equals": hashes(made_equals())}
(Path(__file__).parent / "quantized.json").write_text(json.dumps(golden, indent=1) + "\n")
