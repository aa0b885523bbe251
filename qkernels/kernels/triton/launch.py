"""Launches the Triton kernels: the ops `gemm_kpack`, `gemv_kpack` and `dequantize_kpack`. Importing this needs Triton.

Arguments were checked by `ops.schema`. Tensors on the CPU are taken too, which only Triton's interpreter can run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layouts import kpack
from ...ops.weight import Weight, read_dequantize, read_product
from . import jit
from .table import ANY_CARD, Config, choose

_DEQUANTIZE_ROWS, _DEQUANTIZE_BYTES = 16, 64
_REDUCE_BLOCK = 1024


def gemm(*arguments: Any, config: Config | None = None) -> Tensor:
    """`y [M, N]`: the op `gemm_kpack`; `config` in the place of the table's, for tests and tuning."""
    x, weight, bias = read_product(kpack.LAYOUT, arguments)
    qweight, scales, k_order, N, K = (
        weight.qweight,
        weight.scales,
        weight.k_order,
        weight.out_features,
        weight.in_features,
    )
    zeros, group_size = zeros_or_table(weight), weight.group_size
    M = x.shape[0]
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    card, multiprocessors = _card(x.device)
    config = config or choose(card, M, N, max(K, 1))
    x = x if x.stride(1) == 1 else x.contiguous()
    constants = _constants(weight)
    groups, row_bytes, halves = scales.shape[-2], qweight.shape[-1], constants["HALVES"]
    block_bytes = config.block_bytes(halves, groups, group_size)
    part = config.bytes_per_split(M, N, row_bytes, block_bytes, multiprocessors)
    splits = max(1, -(-row_bytes // part))
    parts = out if splits == 1 else x.new_empty((splits, M, N), dtype=torch.float32)
    constants |= {
        "UNIFORM": groups == 1 or group_size % (block_bytes * halves) == 0,
        "BIAS": bias is not None,
        "SPLIT": splits > 1,
        "BLOCK_N": config.block_n,
        "BLOCK_BYTES": block_bytes,
    }
    operands = (x, qweight, scales, zeros, k_order, bias, parts)
    numbers = (N, K, groups, group_size, x.stride(0), row_bytes, part)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tiles_n = -(-N // config.block_n)
    with _on(x.device):
        if config.kernel == "gemv":
            jit.gemv[tiles_n, M, splits](*operands, *numbers, **constants, **options)
        else:
            tiles = -(-M // config.block_m) * tiles_n
            jit.gemm[tiles, splits](*operands, M, *numbers, **constants, BLOCK_M=config.block_m, **options)
        if splits > 1:
            blocks = -(-M * N // _REDUCE_BLOCK)
            jit.reduce_parts[blocks,](parts, bias, out, M, N, splits, BIAS=bias is not None, BLOCK=_REDUCE_BLOCK)
    return out


def dequantize(*arguments: Any) -> Tensor:
    """The weight `[..., N, K]`: the op `dequantize_kpack`, one launch per expert."""
    weight, dtype = read_dequantize(kpack.LAYOUT, arguments)
    qweight, scales, k_order, N, K = (
        weight.qweight,
        weight.scales,
        weight.k_order,
        weight.out_features,
        weight.in_features,
    )
    zeros = zeros_or_table(weight)
    lead = qweight.shape[:-3]
    out = qweight.new_empty((*lead, N, K), dtype=dtype)
    if out.numel() == 0:
        return out
    constants = _constants(weight)
    row_bytes, groups = qweight.shape[-1], scales.shape[-2]
    weights, targets = qweight.reshape(-1, *qweight.shape[-3:]), out.view(-1, N, K)
    all_scales = scales.reshape(-1, *scales.shape[-3:])
    all_zeros = zeros if zeros is None or weight.codebook else zeros.reshape(-1, *zeros.shape[-3:])
    grid = (-(-N // _DEQUANTIZE_ROWS), -(-row_bytes // _DEQUANTIZE_BYTES))
    with _on(qweight.device):
        for i, codes in enumerate(weights):
            own_zeros = all_zeros if all_zeros is None or weight.codebook else all_zeros[i]
            jit.dequantize[grid](
                codes, all_scales[i], own_zeros, k_order, targets[i], N, K, groups, weight.group_size, row_bytes, **constants,
                BLOCK_N=_DEQUANTIZE_ROWS, BLOCK_BYTES=_DEQUANTIZE_BYTES, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def zeros_or_table(weight: Weight) -> Tensor | None:
    """What the kernels find behind their pointer to zeros: a codebook has none, and they look its values up there."""
    table: Tensor | None = weight.own["table"]
    return table if weight.codebook else weight.zeros


def zero_kind(weight: Weight) -> int:
    """What the kernels call ZEROS."""
    if weight.codebook:
        return int(jit.TABLE.value)
    if weight.zeros is None:
        return int(jit.SYMMETRIC.value)
    return int(jit.OFFSETS.value if weight.zeros_are_offsets else jit.POINTS.value)


def _constants(weight: Weight) -> dict[str, Any]:
    return {
        "MID": 1 << (weight.bits - 1),
        "ZEROS": zero_kind(weight),
        "HALVES": 8 // kpack.LAYOUT.stored_bits(weight.bits),
        "ORDERED": weight.k_order is not None,
    }


@lru_cache(maxsize=64)
def _card(device: torch.device) -> tuple[str, int]:
    """The table's name of a card, and how many multiprocessors it has."""
    if device.type != "cuda":
        return ANY_CARD, 4  # the interpreter: few, so that it splits K where a small card would
    properties = torch.cuda.get_device_properties(device)
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
