"""The real llama.cpp, where it is installed (pip install xllamacpp): logits of a GGUF file, computed in fp32 caches."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

_F32: Final = 0
_NO_FLASH_ATTENTION: Final = 0


class _ModelOptions(ctypes.Structure):
    """llama_model_params, which is smaller."""

    _fields_ = [("data", ctypes.c_char * 512)]


class _ContextOptions(ctypes.Structure):
    """llama_context_params as of build 11549; the rest is left as it comes."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "outputs", "per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx", "rope", "pooling", "attention", "flash")),
        *((name, ctypes.c_uint32) for name in ("base", "scale", "ext", "attn", "fast", "slow", "orig", "defrag")),
        ("eval", ctypes.c_void_p), ("eval_data", ctypes.c_void_p), ("type_k", ctypes.c_int), ("type_v", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


@functools.cache
def library() -> Any:
    """llama.cpp's library; skips a test where there is none."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama.cpp is not here (pip install xllamacpp)")
    found = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    found.llama_model_default_params.restype = _ModelOptions
    found.llama_context_default_params.restype = _ContextOptions
    found.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelOptions]
    found.llama_model_load_from_file.restype = ctypes.c_void_p
    found.llama_init_from_model.argtypes = [ctypes.c_void_p, _ContextOptions]
    found.llama_init_from_model.restype = ctypes.c_void_p
    found.llama_batch_init.restype = _Batch
    found.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    found.llama_get_logits.argtypes = [ctypes.c_void_p]
    found.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    found.llama_free.argtypes = found.llama_model_free.argtypes = [ctypes.c_void_p]
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    found.quiet = quiet  # must outlive the library's use of it
    found.llama_log_set(quiet, None)
    found.llama_backend_init()
    return found


def llama_cpp_logits(path: Path, ids: Tensor, vocabulary: int) -> Tensor:
    """float32 `[tokens, vocabulary]` of ids `[tokens]`; llama.cpp rounds activations to 8 bits where a weight is quantized."""
    lib = library()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = 1
    options.flash, options.type_k, options.type_v = _NO_FLASH_ATTENTION, _F32, _F32
    context = lib.llama_init_from_model(model, options)
    assert context, "llama.cpp makes no context"
    count = len(ids)
    batch = lib.llama_batch_init(ctypes.c_int32(count), ctypes.c_int32(0), ctypes.c_int32(1))
    tokens, positions = (ctypes.cast(at, ctypes.POINTER(ctypes.c_int32)) for at in (batch.token, batch.pos))
    sequences = ctypes.cast(batch.seq_id, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
    counts, wanted = (
        ctypes.cast(batch.n_seq_id, ctypes.POINTER(ctypes.c_int32)),
        ctypes.cast(batch.logits, ctypes.POINTER(ctypes.c_int8)),
    )
    for i in range(count):
        tokens[i], positions[i], counts[i], wanted[i] = int(ids[i]), i, 1, 1
        sequences[i][0] = 0
    batch.count = count
    assert lib.llama_decode(context, batch) == 0
    found = torch.tensor(lib.llama_get_logits(context)[: count * vocabulary]).view(count, vocabulary)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found
