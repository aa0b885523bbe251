"""Launches the Triton kernels of stacked experts: the ops `grouped_gemm_kpack` and `experts_kpack`. Importing this needs Triton.

No result of the device is read on the host, and nothing survives a call, so that CUDA graphs can hold it. Tensors on the CPU are
taken too, which only Triton's interpreter can run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layouts import kpack
from ...ops.grouped import ACTIVATIONS, Stack, read_experts, read_gemm, sorted_by_expert
from ...ops.weight import Weight, weight_from_buffers
from . import grouped_jit as jit
from .launch import buffers_of, card_of, constants_of_weight, line_bytes_of, on
from .table import Config, choose, choose_tile

_COMBINE_BLOCK = 1024
_NONE = int(jit.PLAIN.value)


def grouped_gemm(*arguments: Any, config: Config | None = None) -> Tensor:
    """`y [R, N]`: the op `grouped_gemm_kpack`; `config` in the place of the table's, for tests and tuning."""
    x, rows, offsets, weight, bias, dtype = read_gemm(kpack.LAYOUT, arguments)
    out = x.new_empty((rows.shape[0], weight.out_features), dtype=dtype)
    if out.numel() == 0 or x.shape[0] == 0:
        return out.zero_()
    config = config or _tile(x, rows.shape[0], weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = _aligned(offsets, rows.shape[0], config.block_m)
    _multiply_blocks(x, weight, bias, blocks, out, config, sources=rows.contiguous())
    return out


def experts(*arguments: Any, configs: tuple[Config, Config] | None = None) -> Tensor:
    """`[T, H]`: the op `experts_kpack`.

    configs: of up and down, in the place of the table's: two of kernel "gemv" (pairs as they come) or "gemm" (sorted rows).
    """
    x, ids, weights, up, down, activation, alpha, limit = read_experts(kpack.LAYOUT, arguments)
    first, second = _weight_of(up), _weight_of(down)
    (T, per), count = ids.shape, first.qweight.shape[0]
    out, pairs = x.new_empty((T, second.out_features)), ids.numel()
    if out.numel() == 0 or pairs == 0 or count == 0:
        return out.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    act = {"ACT": ACTIVATIONS.index(activation), "ALPHA": alpha, "LIMIT": limit}
    hidden = x.new_empty((pairs, second.in_features))
    y = x.new_empty((pairs, second.out_features), dtype=torch.float32)
    up_config, down_config = configs or _configs(x, T, pairs, first, second)
    if up_config.kernel == "gemv":
        _multiply_pairs(x, first, up.bias, ids, per, hidden, up_config, act)
        _multiply_pairs(hidden, second, down.bias, ids, 1, y, down_config)
    else:
        order, _, offsets = sorted_by_expert(ids, count)
        blocks = _aligned(offsets, pairs, up_config.block_m)
        _multiply_blocks(x, first, up.bias, blocks, hidden, up_config, sources=order, per=per, act=act)
        if down_config.block_m != up_config.block_m:
            blocks = _aligned(offsets, pairs, down_config.block_m)
        _multiply_blocks(hidden, second, down.bias, blocks, y, down_config, targets=order)
    N = second.out_features
    with on(x.device):
        jit.combine[T, -(-N // _COMBINE_BLOCK)](y, ids, weights, out, count, per, N, BLOCK=_COMBINE_BLOCK)
    return out


def unsorted_is_better(tokens: int, pairs: int, count: int) -> bool:
    """Whether pairs of a token and an expert are multiplied as they come, in three launches, without sorting.

    An expert is then read once a pair instead of once. Experts of one token differ; with as many pairs as half the experts,
    chosen evenly, that is 1.27 times the bytes (1 / (2 (1 - e^-1/2))).
    """
    return tokens == 1 or 2 * pairs <= count


def _configs(x: Tensor, tokens: int, pairs: int, up: Weight, down: Weight) -> tuple[Config, Config]:
    """Both of one kind: a user's table may have a tile of tensor cores for one token, too."""
    card, count = card_of(x.device)[0], up.qweight.shape[0]
    if unsorted_is_better(tokens, pairs, count):
        first, second = (choose(card, 1, w.out_features, max(w.in_features, 1)) for w in (up, down))
        if first.kernel == second.kernel == "gemv":
            return first, second
    return _tile(x, pairs, up), _tile(x, pairs, down)


def _tile(x: Tensor, pairs: int, weight: Weight) -> Config:
    """The dense kernel's tile for the mean number of rows of an expert."""
    each = -(-pairs // max(weight.qweight.shape[0], 1))
    return choose_tile(card_of(x.device)[0], each, weight.out_features, max(weight.in_features, 1))


def _aligned(offsets: Tensor, total: int, size: int) -> Tensor:
    """int32 [3, blocks], see `jit.align`; no more have rows: each of E + 2 segments may have one that is not full."""
    count = offsets.shape[0] - 1
    blocks = offsets.new_empty((3, total // size + min(count + 2, total)), dtype=torch.int32)
    number = blocks.shape[1]
    segments = 1 << (count + 1).bit_length()
    with on(offsets.device):
        jit.align[number,](offsets.contiguous(), blocks, count, total, number, SIZE=size, SEGMENTS=segments)
    return blocks


def _multiply_pairs(
    x: Tensor, weight: Weight, bias: Tensor | None, ids: Tensor, per: int, out: Tensor, config: Config,
    act: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    constants, numbers, options, tiles = _common(x, weight, bias, out, config, act)
    with on(x.device):
        jit.gemv_pairs[tiles, ids.numel()](
            x, *buffers_of(weight), _whole(bias), ids, out, *numbers, per, **constants, **options
        )


def _multiply_blocks(
    x: Tensor, weight: Weight, bias: Tensor | None, blocks: Tensor, out: Tensor, config: Config,
    sources: Tensor | None = None, targets: Tensor | None = None, per: int = 1, act: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    constants, numbers, options, tiles = _common(x, weight, bias, out, config, act)
    constants |= {"SOURCES": sources is not None, "TARGETS": targets is not None, "BLOCK_M": config.block_m}
    count = blocks.shape[1]
    with on(x.device):
        jit.gemm_blocks[count * tiles,](
            x, *buffers_of(weight), _whole(bias), sources, targets, blocks, out, x.shape[0], count, *numbers, per,
            **constants, **options,
        )  # fmt: skip


def _common(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, config: Config, act: dict[str, Any] | None
) -> tuple[dict[str, Any], tuple[int, ...], dict[str, Any], int]:
    """Constants, numbers and options of a launch, and how many tiles of columns the result has: half as wide with a gate, whose
    rows a tile holds too."""
    N = weight.out_features
    act = act or {"ACT": _NONE, "ALPHA": 0.0, "LIMIT": 0.0}
    constants = constants_of_weight(weight, config) | act
    constants |= {"BIAS": bias is not None, "BLOCK_N": config.block_n, "STAGES": config.num_stages}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    columns = config.block_n // (2 if _NONE < act["ACT"] < int(jit.RELU2_UNGATED.value) else 1)
    numbers = (
        weight.qweight.shape[0], N, weight.in_features, weight.scales.shape[-2], x.stride(0), line_bytes_of(weight),
    )  # fmt: skip
    return constants, numbers, options, -(-out.shape[1] // columns)


def _whole(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _weight_of(stack: Stack) -> Weight:
    buffers = [stack.buffers[b.name] for b in kpack.LAYOUT.buffers]
    return weight_from_buffers(kpack.LAYOUT, buffers, stack.numbers, stack.in_features)
