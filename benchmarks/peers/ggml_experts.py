"""llama.cpp's and ik_llama.cpp's experts on the CPU: the graph that each builds for a block of experts with SwiGLU.

Our 4-bit codes as Q4_0, which holds them exactly: a group of 128 is four blocks with one scale. Activations are quantized to 8
bits. llama.cpp multiplies by `ggml_mul_mat_id`, with repacked weights (`CPU_REPACK`) or plain rows, as it loads them with and
without `--no-repack`; ik_llama.cpp makes gate, up and activation in one op (`ggml_moe_up_gate`, its `-fmoe`) and weighs and
adds in another (`ggml_mul_multi_add`), with rows that its `iqk_repack_tensor` interleaved or plain ones, as with and without
`-rtr`. Which of the two it is, the library in `ggml.library` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.errors import UnsupportedProblem
from qkernels.tensor import QuantTensor

from . import ggml

I32, SILU = 26, 10  # enum ggml_type, and ggml_unary_op as ik-llama-cpp-python 0.1.5 has it


def q4_0(weight: QuantTensor) -> Tensor:
    """The bytes of symmetric 4-bit codes in groups of a multiple of 32, uint8 `[N, K / 32, 18]` (`block_q4_0`)."""
    nibbles = weight.codes.view(weight.N, -1, 2, 16)
    blocks = torch.empty(weight.N, weight.K // 32, 18, dtype=torch.uint8)
    blocks[..., 2:] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    scales = weight.scales.half().repeat_interleave(weight.K // 32 // weight.scales.shape[1], 1)
    blocks[..., :2] = scales.contiguous().view(torch.uint8).view(weight.N, -1, 2)
    return blocks


class Block:
    """gate, up and down of all experts in ggml's hands, with one graph for each number of tokens that was asked for.

    Args:
        weights: (gate and up `[2 I, H]`, down `[H, I]`) of each expert.
        repack: whether in the form of repacked weights that the library has, or as plain rows.

    Raises:
        UnsupportedProblem: it does not take such a product.
    """

    def __init__(self, weights: Sequence[tuple[QuantTensor, QuantTensor]], repack: bool) -> None:
        g = ggml.library()
        (self.width, self.hidden), experts = (weights[0][1].K, weights[0][1].N), len(weights)
        wanted = _buffer_type("CPU_REPACK" if repack and not ggml.is_ik() else "CPU")
        context = ggml._context()
        shapes = [(self.hidden, self.width), (self.hidden, self.width), (self.width, self.hidden)]
        self.stacks = [g["ggml_new_tensor_3d"](context, ggml.Q4_0, k, n, experts) for k, n in shapes]
        buffer = g["ggml_backend_alloc_ctx_tensors_from_buft"](context, wanted)
        weakref.finalize(self, ggml._free, context, buffer)
        if not ggml.is_ik():
            _take(self.stacks[0], self.hidden, g["ggml_backend_buft_name"](wanted).decode())
        made: dict[int, Tensor] = {}  # experts may be the same object: its bytes are made once

        def rows_of(weight: QuantTensor) -> Tensor:
            if id(weight) not in made:
                made[id(weight)] = q4_0(weight)
            return made[id(weight)]

        parts = (
            [rows_of(gate_up)[: self.width] for gate_up, _ in weights],
            [rows_of(gate_up)[self.width :] for gate_up, _ in weights],
            [rows_of(down) for _, down in weights],
        )
        for stack, each in zip(self.stacks, parts, strict=True):
            rows = torch.stack(each)
            g["ggml_backend_tensor_set"](stack, rows.data_ptr(), 0, rows.numel())
            if repack and ggml.is_ik():
                g["iqk_repack_tensor"](stack)
        self.graphs: dict[tuple[int, int], tuple[int, Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x `[T, H]`, ids int32 `[T, k]`, weights `[T, k]` -> fp32 `[T, H]`, valid until the next call with such a T and k."""
        key = (ids.shape[0], ids.shape[1])
        if key not in self.graphs:
            self.graphs[key] = self._graph(*key)
        graph, to_x, to_ids, to_weights, y = self.graphs[key]
        to_x.copy_(x)
        to_ids.copy_(ids)
        to_weights.copy_(weights)
        g = ggml.library()
        g["ggml_backend_cpu_set_n_threads"](ggml._backend(), torch.get_num_threads())
        if status := g["ggml_backend_graph_compute"](ggml._backend(), graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return y

    def _graph(self, T: int, k: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        g, context = ggml.library(), ggml._context()
        x = g["ggml_new_tensor_3d"](context, ggml.F32, self.hidden, 1, T)
        ids = g["ggml_new_tensor_2d"](context, I32, k, T)
        weights = g["ggml_new_tensor_3d"](context, ggml.F32, 1, k, T)
        total = (_of_ik_llama_cpp if ggml.is_ik() else _of_llama_cpp)(
            context, self.stacks, x, ids, weights, (self.hidden, k, T)
        )
        graph = g["ggml_new_graph"](context)
        g["ggml_build_forward_expand"](graph, total)
        buffer = g["ggml_backend_alloc_ctx_tensors_from_buft"](context, ggml._buffer_types()[-1])
        weakref.finalize(self, ggml._free, context, buffer)

        def view(tensor: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return ggml._view(g["ggml_get_data"](tensor), *shape).view(dtype)

        return (
            graph,
            view(x, T, self.hidden),
            view(ids, T, k, dtype=torch.int32),
            view(weights, T, k),
            view(total, T, self.hidden),
        )


def _of_llama_cpp(
    context: int, stacks: Sequence[int], x: int, ids: int, weights: int, sizes: tuple[int, int, int]
) -> int:
    """As llama.cpp's `build_moe_ffn` has it: weights times outputs, then the outputs of one token added one by one."""
    g, (hidden, k, T) = ggml.library(), sizes
    gate, up = (g["ggml_mul_mat_id"](context, stack, x, ids) for stack in stacks[:2])
    inner = g["ggml_swiglu_split"](context, gate, up)
    each = g["ggml_mul"](context, g["ggml_mul_mat_id"](context, stacks[2], inner, ids), weights)
    row = 4 * hidden
    views = [g["ggml_view_2d"](context, each, hidden, T, k * row, j * row) for j in range(k)]
    total: int = views[0]
    for other in views[1:]:
        total = g["ggml_add"](context, total, other)
    return total


def _of_ik_llama_cpp(
    context: int, stacks: Sequence[int], x: int, ids: int, weights: int, sizes: tuple[int, int, int]
) -> int:
    """As ik_llama.cpp's `llm_build_moe_ffn` has it with its fused ops."""
    g = ggml.library()
    inner = g["ggml_moe_up_gate"](context, stacks[1], stacks[0], x, ids, SILU)
    total: int = g["ggml_mul_multi_add"](context, g["ggml_mul_mat_id"](context, stacks[2], inner, ids), weights)
    return total


def _buffer_type(name: str) -> int:
    types = {ggml.library()["ggml_backend_buft_name"](kind).decode(): kind for kind in ggml._buffer_types()}
    if name not in types:
        raise UnsupportedProblem(f"this ggml has the buffer types {', '.join(types)}, not {name}")
    return types[name]


def _take(stack: int, hidden: int, where: str) -> None:
    """Raise where llama.cpp multiplies with no experts that lie where these lie."""
    g, context = ggml.library(), ggml._context()
    x = g["ggml_new_tensor_3d"](context, ggml.F32, hidden, 1, 1)
    probe = g["ggml_mul_mat_id"](context, stack, x, g["ggml_new_tensor_2d"](context, I32, 1, 1))
    taken = g["ggml_backend_dev_supports_op"](g["ggml_backend_reg_dev_get"](g["ggml_backend_cpu_reg"](), 0), probe)
    ggml._free(context, None)
    if not taken:
        raise UnsupportedProblem(f"{where} takes no ggml_mul_mat_id of Q4_0")
