"""llama.cpp's experts on the CPU: the graph that it builds of `ggml_mul_mat_id` for a block of experts with SwiGLU.

Our 4-bit codes as Q4_0, which holds them exactly: a group of 128 is four blocks with one scale. Activations are quantized to 8
bits. With repacked weights (`CPU_REPACK`) or plain rows, as llama.cpp loads them with and without `--no-repack`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.errors import UnsupportedProblem
from qkernels.tensor import QuantTensor

from . import ggml

I32 = 26  # enum ggml_type


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
        repack: whether in the buffer type of repacked weights, or as plain rows.

    Raises:
        UnsupportedProblem: it does not take such a product.
    """

    def __init__(self, weights: Sequence[tuple[QuantTensor, QuantTensor]], repack: bool) -> None:
        g = ggml.library()
        (self.width, self.hidden), experts = (weights[0][1].K, weights[0][1].N), len(weights)
        types = ggml._buffer_types()
        names = [g["ggml_backend_buft_name"](kind).decode() for kind in types]
        wanted = [kind for kind, name in zip(types, names, strict=True) if name == ("CPU_REPACK" if repack else "CPU")]
        if not wanted:
            raise UnsupportedProblem(f"this ggml has the buffer types {', '.join(names)}")
        context = ggml._context()
        shapes = [(self.hidden, self.width), (self.hidden, self.width), (self.width, self.hidden)]
        self.stacks = [g["ggml_new_tensor_3d"](context, ggml.Q4_0, k, n, experts) for k, n in shapes]
        buffer = g["ggml_backend_alloc_ctx_tensors_from_buft"](context, wanted[0])
        weakref.finalize(self, ggml._free, context, buffer)
        probes = ggml._context()
        x = g["ggml_new_tensor_3d"](probes, ggml.F32, self.hidden, 1, 1)
        probe = g["ggml_mul_mat_id"](probes, self.stacks[0], x, g["ggml_new_tensor_2d"](probes, I32, 1, 1))
        device = g["ggml_backend_reg_dev_get"](g["ggml_backend_cpu_reg"](), 0)
        taken = g["ggml_backend_dev_supports_op"](device, probe)
        ggml._free(probes, None)
        if not taken:
            raise UnsupportedProblem(f"{names[types.index(wanted[0])]} takes no ggml_mul_mat_id of Q4_0")
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
        """As llama.cpp's `build_moe_ffn` has it: weights times outputs, then the outputs of one token added one by one."""
        g, context = ggml.library(), ggml._context()
        x = g["ggml_new_tensor_3d"](context, ggml.F32, self.hidden, 1, T)
        ids = g["ggml_new_tensor_2d"](context, I32, k, T)
        weights = g["ggml_new_tensor_3d"](context, ggml.F32, 1, k, T)
        gate, up = (g["ggml_mul_mat_id"](context, stack, x, ids) for stack in self.stacks[:2])
        inner = g["ggml_swiglu_split"](context, gate, up)
        each = g["ggml_mul"](context, g["ggml_mul_mat_id"](context, self.stacks[2], inner, ids), weights)
        row = 4 * self.hidden
        views = [g["ggml_view_2d"](context, each, self.hidden, T, k * row, j * row) for j in range(k)]
        total = views[0]
        for other in views[1:]:
            total = g["ggml_add"](context, total, other)
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
