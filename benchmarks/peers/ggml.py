"""llama.cpp's ggml on the CPU, through ctypes: Q4_0 and Q4_K against 4 bits in groups, and each GGUF type against ours on it.

All quantize activations to 8 bits. For Q4_0 and Q4_K the dequantized weight is quantized again by ggml itself, so its output
is compared with what its own bytes mean, which are decoded here; of a GGUF type (`ggml same type`) both have the same blocks.
The weight lies in the first of the CPU's buffer types that takes it, in ggml's own order of choice (AMX or CPU_REPACK before
plain rows), as llama.cpp loads it.

The libraries are those of llama-cpp-python, or of the directory QKERNELS_GGML_LIB, say another build of the same sources, or
ik_llama.cpp's (the one library `libggml.so`; its rows are interleaved by its own `iqk_repack_tensor`, as `-rtr` does). A
process can hold one build only. The names used are those of ggml 0.25 (`ggml.h`, `ggml-alloc.h`, `ggml-backend.h`,
`ggml-cpu.h`) and of ik-llama-cpp-python 0.1.5.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import UnsupportedProblem
from qkernels.formats.gguf import EXACT_SCHEMES, WRITABLE_TYPES, block_type, exact_blocks
from qkernels.kernels.catalogue import Problem
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

from . import Peer, Prepared

F32, Q4_0, Q4_K = 0, 2, 12  # enum ggml_type
BLOCKS = {Q4_0: (32, 18), Q4_K: (256, 144)}  # weights and bytes of a block
_CONTEXT_BYTES = 1 << 20  # tensors' and graphs' descriptions only; what they describe is elsewhere
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_new_tensor_2d": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
    "ggml_new_tensor_3d": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, *(ctypes.c_int64,) * 3)),
    "ggml_view_2d": (
        ctypes.c_void_p,
        (ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 2, *(ctypes.c_size_t,) * 2),
    ),
    "ggml_mul_mat": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_mul_mat_id": (ctypes.c_void_p, (ctypes.c_void_p,) * 4),
    "ggml_swiglu_split": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_mul": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_add": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_new_graph": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "ggml_build_forward_expand": (None, (ctypes.c_void_p,) * 2),
    "ggml_get_data": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "ggml_free": (None, (ctypes.c_void_p,)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p),
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (ctypes.c_void_p, (ctypes.c_void_p,) * 2),
    "ggml_backend_buffer_free": (None, (ctypes.c_void_p,)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_backend_tensor_set": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_graph_compute": (ctypes.c_int, (ctypes.c_void_p,) * 2),
    "ggml_backend_cpu_init": (ctypes.c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int)),
}
_OF_LLAMA_CPP: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_reg_dev_get": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)),
    "ggml_backend_reg_get_proc_address": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (ctypes.c_void_p,) * 2),
    "ggml_backend_dev_buffer_type": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "ggml_backend_cpu_reg": (ctypes.c_void_p, ()),
}
_OF_IK_LLAMA_CPP: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_buffer_type": (ctypes.c_void_p, ()),
    "iqk_repack_tensor": (None, (ctypes.c_void_p,)),
    "ggml_moe_up_gate": (ctypes.c_void_p, (*(ctypes.c_void_p,) * 5, ctypes.c_int)),
    "ggml_mul_multi_add": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def library_directory() -> Path | None:
    """Where libggml-cpu lies: QKERNELS_GGML_LIB, or inside the installed llama_cpp."""
    if given := os.environ.get("QKERNELS_GGML_LIB"):
        return Path(given)
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None


@lru_cache(1)
def library() -> dict[str, Any]:
    """The functions of `_SIGNATURES`, those of its kind of library, and `ggml_init`, by name.

    Raises:
        OSError: there is no such library, or it does not load.
        AttributeError: it lacks a function.
    """
    directory = library_directory()
    if directory is None:
        raise OSError("llama-cpp-python is not installed and QKERNELS_GGML_LIB is not set")
    ik = (directory / "libggml.so").is_file() and not (directory / "libggml-base.so").is_file()
    base, cpu = (
        ctypes.CDLL(str(directory / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
        for name in (("ggml", "ggml") if ik else ("ggml-base", "ggml-cpu"))
    )
    found: dict[str, Any] = {}
    for name, (result, arguments) in (_SIGNATURES | (_OF_IK_LLAMA_CPP if ik else _OF_LLAMA_CPP)).items():
        found[name] = getattr(cpu if name.startswith("ggml_backend_cpu") else base, name)
        found[name].restype, found[name].argtypes = result, arguments
    found["ggml_init"] = base.ggml_init
    base.ggml_init.restype, base.ggml_init.argtypes = ctypes.c_void_p, (_InitParams,)
    return found


def is_ik() -> bool:
    """Whether the library is ik_llama.cpp's."""
    return "iqk_repack_tensor" in library()


@lru_cache(1)
def _backend() -> int:
    backend: int = library()["ggml_backend_cpu_init"]()
    return backend


def _buffer_types() -> list[int]:
    """The CPU's buffer types, special ones first."""
    g = library()
    if is_ik():
        return [g["ggml_backend_cpu_buffer_type"]()]
    registry = g["ggml_backend_cpu_reg"]()
    device = g["ggml_backend_reg_dev_get"](registry, 0)
    address = g["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device) if address else None
    found: list[int] = []
    while extra and extra[len(found)]:
        found.append(int(extra[len(found)]))
    return [*found, g["ggml_backend_dev_buffer_type"](device)]


def _context() -> int:
    context: int | None = library()["ggml_init"](_InitParams(_CONTEXT_BYTES, None, True))
    if context is None:
        raise UnsupportedProblem("ggml has no context left")
    return context


class Weight:
    """A weight in ggml's hands, with one graph for each number of tokens that was asked for. Copying it packs it again."""

    def __init__(self, kind: int, rows: Tensor, N: int, K: int) -> None:
        g = library()
        self.kind, self.rows, self.N, self.K = kind, rows, N, K
        self.graphs: dict[int, tuple[int, Tensor, Tensor]] = {}
        for buffer_type in _buffer_types():
            self.context = context = _context()  # one for all graphs, too: ik_llama.cpp has 64 of them
            self.tensor = g["ggml_new_tensor_2d"](context, kind, K, N)
            buffer = g["ggml_backend_alloc_ctx_tensors_from_buft"](context, buffer_type)
            if buffer and _takes(context, self.tensor, K):
                self.buffers = [buffer]
                weakref.finalize(self, _free_all, context, self.buffers)
                self.where = g["ggml_backend_buft_name"](buffer_type).decode()
                g["ggml_backend_tensor_set"](self.tensor, rows.data_ptr(), 0, rows.numel())
                if is_ik():
                    g["iqk_repack_tensor"](self.tensor)
                    self.where = "ik_llama.cpp, repacked where it has such a form"
                return
            _free(context, buffer)
        raise UnsupportedProblem(f"no buffer type of ggml's CPU backend takes type {kind} with N={N} K={K}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        return Weight(self.kind, self.rows, self.N, self.K)

    def multiply(self, x: Tensor) -> Tensor:
        """x `[M, K]` -> y `[M, N]` in fp32, valid until the next call with the same M."""
        if x.shape[0] not in self.graphs:
            self.graphs[x.shape[0]] = self._graph(x.shape[0])
        graph, inputs, outputs = self.graphs[x.shape[0]]
        inputs.copy_(x)
        g = library()
        g["ggml_backend_cpu_set_n_threads"](_backend(), torch.get_num_threads())
        if status := g["ggml_backend_graph_compute"](_backend(), graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return outputs

    def _graph(self, M: int) -> tuple[int, Tensor, Tensor]:
        g, context = library(), self.context
        x = g["ggml_new_tensor_2d"](context, F32, self.K, M)
        y = g["ggml_mul_mat"](context, self.tensor, x)
        graph = g["ggml_new_graph"](context)
        g["ggml_build_forward_expand"](graph, y)
        self.buffers.append(g["ggml_backend_alloc_ctx_tensors_from_buft"](context, _buffer_types()[-1]))
        return graph, _view(g["ggml_get_data"](x), M, self.K), _view(g["ggml_get_data"](y), M, self.N)


def _takes(context: int, weight: int, K: int) -> bool:
    """Whether the CPU multiplies with a weight that lies where it lies."""
    g = library()
    if is_ik():
        return True
    probe = g["ggml_mul_mat"](context, weight, g["ggml_new_tensor_2d"](context, F32, K, 1))
    device = g["ggml_backend_reg_dev_get"](g["ggml_backend_cpu_reg"](), 0)
    return bool(g["ggml_backend_dev_supports_op"](device, probe))


def _free(context: int, buffer: int | None) -> None:
    _free_all(context, [buffer] if buffer else [])


def _free_all(context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        library()["ggml_backend_buffer_free"](buffer)
    library()["ggml_free"](context)


def _view(address: int, rows: int, columns: int) -> Tensor:
    memory = (ctypes.c_float * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def meaning(kind: int, rows: Tensor, N: int, K: int) -> Tensor:
    """fp32 `[N, K]` of Q4_0 or Q4_K bytes (`block_q4_0`, `block_q4_K` in ggml-common.h)."""
    blocks = rows.view(-1, BLOCKS[kind][1])
    if kind == Q4_0:  # a scale; the low nibbles of 16 bytes, then the high ones, each less 8
        scale, nibbles = blocks[:, :2].contiguous().view(torch.float16).float(), blocks[:, 2:]
        return (scale * (torch.cat([nibbles & 15, nibbles >> 4], 1).float() - 8)).view(N, K)
    # two scales, 8 pairs of 6 bits in 12 bytes, then four times 32 bytes whose low nibbles come before their high ones
    scale, least = blocks[:, :4].contiguous().view(torch.float16).float().split(1, 1)
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = torch.cat([low & 63, (high & 15) | (low >> 6) << 4], 1).float() * scale
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 6) << 4], 1).float() * least
    nibbles = blocks[:, 16:].view(-1, 4, 32)
    codes = torch.stack([nibbles & 15, nibbles >> 4], 2).float().view(-1, 8, 32)
    values: Tensor = codes * factors[:, :, None] - minima[:, :, None]
    return values.view(N, K)


def available(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "is compared on cpu only"
    if library_directory() is None:
        return "not installed (pip install llama-cpp-python, or QKERNELS_GGML_LIB)"
    try:
        library()
    except (OSError, AttributeError) as error:
        return f"failed: {type(error).__name__}: {error}"[:200]
    return None


def reason(kind: int, problem: Problem) -> str | None:
    scheme, length = problem.scheme, BLOCKS[kind][0]
    if scheme.bits != 4 or scheme.codebook is not None or scheme.group_size not in (32, 64, 128, 256):
        return f"is set against 4 bits in groups of 32 to 256, got {scheme}"
    return f"takes K % {length} == 0, got K={problem.K}" if problem.K % length else None


def _run(weight: Weight, x: Tensor) -> Tensor:
    return weight.multiply(x)


def prepare(kind: int, weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    length, nbytes = BLOCKS[kind]
    rows = torch.zeros(weight.N * weight.K // length * nbytes, dtype=torch.uint8)
    full = weight.dequantize(torch.float32).contiguous()
    library()["ggml_quantize_chunk"](kind, full.data_ptr(), rows.data_ptr(), 0, weight.N, weight.K, None)
    made = Weight(kind, rows, weight.N, weight.K)
    note = f"another format, {made.where}; quantizes activations to 8 bits"
    return Prepared(
        made, _run, rows.numel(), weight=meaning(kind, rows, weight.N, weight.K), activation_bits=8,
        note=note,
    )  # fmt: skip


PEER_Q4_0: Peer = Peer("ggml q4_0", available, partial(reason, Q4_0), partial(prepare, Q4_0))
PEER_Q4_K: Peer = Peer("ggml q4_k", available, partial(reason, Q4_K), partial(prepare, Q4_K))


def type_of(scheme: QuantScheme) -> str | None:
    """The writable GGUF type of codebooks or factors that holds a scheme's weights (q4_k_a8: Q4_K), or None."""
    if scheme.codebook is None and scheme.factors is None:  # integers in groups: PEER_Q4_0 and PEER_Q4_K
        return None
    plain = replace(scheme, act=None)
    return next((name for name in WRITABLE_TYPES if EXACT_SCHEMES.get(name) == plain), None)


def same_reason(problem: Problem) -> str | None:
    name = type_of(problem.scheme)
    if name is None:
        return f"is set against the codebooks and super-blocks of GGUF, got {problem.scheme}"
    length = block_type(name).ggml.elements
    return f"takes K % {length} == 0, got K={problem.K}" if problem.K % length else None


def prepare_same(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    name, blocks = exact_blocks(replace(weight, scheme=replace(weight.scheme, act=None)), type_of(weight.scheme))
    made = Weight(block_type(name).ggml.id, blocks.contiguous(), weight.N, weight.K)
    note = f"{made.where}; quantizes activations to 8 bits"
    return Prepared(made, _run, blocks.numel(), activation_bits=8, note=note)


PEER_SAME: Peer = Peer("ggml same type", available, same_reason, prepare_same)
