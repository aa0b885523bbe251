"""Launches the Triton kernels: the ops `gemm_kpack`, `gemv_kpack` and `dequantize_kpack`. Importing this needs Triton.

Arguments were checked by `ops.schema`. Tensors on the CPU are taken too, which only Triton's interpreter can run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layouts import BUFFERS, kpack
from ...layouts.tiles import GPU_PLANES
from ...ops.reference import scheme_of
from ...ops.weight import Weight, read_dequantize, read_product
from ...scheme import FACTORS, QuantScheme, ZeroKind
from . import jit
from .table import ANY_CARD, Config, choose, run_bytes, shared_fields, tiles_in

_DEQUANTIZE = Config("dequantize", 1, 16, 128, 0, 4, 1)  # the tile of the op `dequantize_kpack`
_REDUCE_BLOCK = 1024
SLICE_BYTES = 64 << 20  # of dequantized weight at a time: it stays in the L2 of large cards


def gemm(*arguments: Any, config: Config | None = None) -> Tensor:
    """`y [M, N]`: the op `gemm_kpack`; `config` in the place of the table's, for tests and tuning."""
    x, weight, bias = read_product(kpack.LAYOUT, arguments)
    N, K = weight.out_features, weight.in_features
    M = x.shape[0]
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    card, multiprocessors = card_of(x.device)
    config = config or choose(card, M, N, max(K, 1))
    x = x if x.stride(1) == 1 else x.contiguous()
    if config.kernel == "dequantize":
        _multiply_dequantized(x, weight, bias, out, config)
        return out
    groups, line_bytes = weight.scales.shape[-2], line_bytes_of(weight)
    part = config.bytes_per_split(M, N, line_bytes, config.block_bytes(GPU_PLANES[weight.bits]), multiprocessors)
    splits = max(1, -(-line_bytes // part))
    parts = out if splits == 1 else x.new_empty((splits, M, N), dtype=torch.float32)
    constants = constants_of_weight(weight, config) | {
        "BIAS": bias is not None,
        "SPLIT": splits > 1,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    operands = (x, *buffers_of(weight), bias, parts)
    numbers = (N, K, groups, x.stride(0), line_bytes, part)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    tiles_n = -(-N // config.block_n)
    with on(x.device):
        if config.kernel == "gemv":
            jit.gemv[tiles_n, M, splits](*operands, *numbers, **constants, **options)
        else:
            tiles = -(-M // config.block_m) * tiles_n
            jit.gemm[tiles, splits](*operands, M, *numbers, **constants, BLOCK_M=config.block_m, **options)
        if splits > 1:
            blocks = -(-M * N // _REDUCE_BLOCK)
            jit.reduce_parts[blocks,](
                parts, bias, out, M, N, splits, BIAS=bias is not None, BLOCK=_REDUCE_BLOCK, enable_fp_fusion=True
            )  # fmt: skip
    return out


def dequantize(*arguments: Any) -> Tensor:
    """The weight `[..., N, K]`: the op `dequantize_kpack`, one launch per expert."""
    weight, dtype = read_dequantize(kpack.LAYOUT, arguments)
    N, K, experts = weight.out_features, weight.in_features, weight.qweight.shape[:-3]
    out = weight.qweight.new_empty((*experts, N, K), dtype=dtype)
    if out.numel() == 0:
        return out
    tiled = {b.name: weight.value(b.name) for b in BUFFERS if b.tiled and weight.value(b.name) is not None}
    for i, target in enumerate(out.view(-1, N, K)):
        own = {name: t.reshape(-1, *t.shape[len(experts) :])[i] for name, t in tiled.items()}
        _dequantize(weight._replace(**own), target, _DEQUANTIZE)
    return out


def _dequantize(weight: Weight, out: Tensor, config: Config) -> None:
    """out [N, K], of one expert."""
    if out.numel() == 0:
        return
    N, K = weight.out_features, weight.in_features
    line_bytes = line_bytes_of(weight)
    grid = (-(-N // config.block_n), -(-line_bytes // config.block_bytes(GPU_PLANES[weight.bits])))
    with on(out.device):
        jit.dequantize[grid](
            *buffers_of(weight), out, N, K, weight.scales.shape[-2], line_bytes,
            **constants_of_weight(weight, config), BLOCK_N=config.block_n, num_warps=config.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def _multiply_dequantized(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, config: Config) -> None:
    """Slices of the weight in x's dtype, each multiplied by torch (cuBLAS) while it is in the L2 cache."""
    N, K, rows = weight.out_features, weight.in_features, kpack.LAYOUT.rows_per_tile
    tiles, tiles_per_slice = -(-N // rows), tiles_in(SLICE_BYTES, K)
    buffer = x.new_empty((min(tiles_per_slice * rows, N), K))
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, tiles, tiles_per_slice):
        part = weight.tiles(kpack.LAYOUT, first, min(first + tiles_per_slice, tiles))
        here = slice(first * rows, first * rows + part.out_features)
        plain = buffer[: part.out_features]
        _dequantize(part, plain, config)
        # linear.out: autocast leaves it alone, and a bias is added before the one rounding.
        torch.ops.aten.linear.out(x, plain, None if bias is None else bias[here], out=out[:, here])


def buffers_of(weight: Weight) -> tuple[Tensor | None, ...]:
    """What the kernels take of a weight. Codebooks have no zeros: behind that pointer they find the table."""
    table: Tensor | None = weight.own["table"]
    zeros = table if weight.codebook else weight.zeros
    scales = weight.scales.view(torch.uint8) if weight.scales.dtype in _SCALES else weight.scales
    return (
        weight.qweight, scales, zeros, weight.outer_scales, weight.outer_zeros, weight.k_order,
    )  # fmt: skip


# What the kernels make of a code by shifts; the values of other codebooks they look up.
_FLOATS = {"e2m1": jit.E2M1, "e4m3": jit.E4M3, "e5m2": jit.E5M2}
_SCALES = {torch.float8_e8m0fnu: jit.E8M0_BYTES, torch.float8_e4m3fn: jit.E4M3_BYTES}


def meaning_of_codes(zeros: ZeroKind, codebook: str | None) -> int:
    """What the kernels call CODES."""
    if codebook is not None:
        return int(_FLOATS.get(codebook, jit.TABLE).value)
    kinds = {"none": jit.SYMMETRIC, "int": jit.POINTS, "float": jit.POINTS, "offset": jit.OFFSETS}
    return int(kinds[zeros].value)


def line_bytes_of(weight: Weight) -> int:
    """Bytes of a row's line over all blocks: as many as the row's bytes where a code has one plane."""
    low, high = (*GPU_PLANES[weight.bits], 0)[:2]
    row_bytes: int = weight.qweight.shape[-1]
    return row_bytes // (low // high + 1) if high else row_bytes


def constants_of(scheme: QuantScheme, K: int, scales: torch.dtype, ordered: bool, config: Config) -> dict[str, Any]:
    """What every kernel is compiled for; the length of groups too: a division by a constant is a multiplication.

    Args:
        scales: their dtype (that of the small factors where they are products).
    """
    widths = GPU_PLANES[scheme.bits]
    low, high = (*widths, 0)[:2]
    fields, block_bytes = kpack.fields_of(widths), config.block_bytes(widths)
    run = kpack.run_of(fields)
    group = scheme.group_length(K) if scheme.num_groups(K) > 1 else 0
    kind = None if scheme.factors is None else FACTORS[scheme.factors]
    return {
        "MID": scheme.mid_code,
        "CODES": meaning_of_codes(scheme.zeros, scheme.codebook),
        "SCALES": int(_SCALES.get(scales, jit.NUMBERS).value),
        "OUTER": 0 if kind is None else kind.groups_per_outer or int(jit.ONE_A_ROW.value),
        "DIVIDES": kind is not None and kind.divides,
        "GROUP": group,
        "LOW": low,
        "HIGH": high,
        "SHARED": shared_fields(group, fields, run),
        "ORDERED": ordered,
        "BLOCK_BYTES": block_bytes,
        "RUN": run_bytes(group, fields, run, block_bytes),
    }


def constants_of_weight(weight: Weight, config: Config) -> dict[str, Any]:
    """`constants_of` the scheme that an op's arguments spell out."""
    ordered = weight.k_order is not None
    return constants_of(scheme_of(weight), weight.in_features, weight.scales.dtype, ordered, config)


@lru_cache(maxsize=64)
def card_of(device: torch.device) -> tuple[str, int]:
    """The table's name of a card, and how many multiprocessors it has."""
    if device.type != "cuda":
        return ANY_CARD, 4  # the interpreter: few, so that it splits K where a small card would
    properties = torch.cuda.get_device_properties(device)
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
