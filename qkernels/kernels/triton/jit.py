"""The Triton kernels on layout kpack (`layouts/kpack.py` says what the bytes mean). Importing this needs Triton.

Plain pointers, no atomics, no autotuning. `gemv` and `gemm` either finish their tile (SPLIT false) or write an fp32 part of it
to a workspace [splits, M, N], which `reduce_parts` adds in order: the result does not depend on which block ran first.
Weights are dequantized in fp32, `(code - zero) * scale`; `gemm` rounds them to x's dtype for the tensor cores, `gemv` does not.
"""

# Triton reads parameters' annotations as its own, and has no name for a pointer.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Values of ZEROS, by `launch.zero_kind`.
SYMMETRIC = tl.constexpr(0)
POINTS = tl.constexpr(1)  # integer or float zero points
OFFSETS = tl.constexpr(2)
TABLE = tl.constexpr(3)


@triton.jit
def _unpack(packed, at, half: tl.constexpr, HALVES: tl.constexpr):
    """Stored columns and codes of one half of the bytes at offsets `at` of a row.

    HALVES is 2 for codes of width 4, whose bytes hold two columns 32 apart, and 1 for width 8.
    """
    if HALVES == 2:
        columns = at // 32 * 64 + at % 32 + half * 32
        codes = (packed >> (4 * half)) & 15
    else:
        columns = at
        codes = packed
    return columns, codes


@triton.jit
def _column(k_order, columns, known, K, ORDERED: tl.constexpr):
    """Where stored columns belong; clamped, since the order may come from a file."""
    if ORDERED:
        columns = tl.minimum(tl.maximum(tl.load(k_order + columns, mask=known, other=0), 0), K - 1)
    return columns


@triton.jit
def _weights(
    codes, scales, zeros, rows, row_mask, columns, first_column, K, G, group_size,
    MID: tl.constexpr, ZEROS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """fp32 weights [rows, columns] from codes.

    UNIFORM: all columns lie in the group of the first, so that a row has one scale; else there is a look-up per weight.
    """
    strip_base = (rows // 64).to(tl.int64) * G * 64 + rows % 64
    if UNIFORM:
        at = (strip_base + first_column // group_size * 64)[:, None]
        mask = (row_mask & (first_column < K))[:, None]
    else:
        at = strip_base[:, None] + (columns // group_size * 64)[None, :]
        mask = row_mask[:, None] & (columns < K)[None, :]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if ZEROS == TABLE:
        weights = tl.load(zeros + (codes.to(tl.int32) & (2 * MID - 1))) * scale  # a code beyond the table wraps
    elif ZEROS == SYMMETRIC:
        weights = (codes.to(tl.float32) - MID) * scale
    elif ZEROS == OFFSETS:
        weights = codes.to(tl.float32) * scale + tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    else:
        weights = (codes.to(tl.float32) - tl.load(zeros + at, mask=mask, other=0).to(tl.float32)) * scale
    return weights


@triton.jit
def gemv(
    x, qweight, scales, zeros, k_order, bias, out, N, K, G, group_size, x_stride, row_bytes, bytes_per_split,
    MID: tl.constexpr, ZEROS: tl.constexpr, UNIFORM: tl.constexpr, HALVES: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """One row of x per program (axis 1), without tensor cores. Axis 0: BLOCK_N rows of the weight, axis 2: parts of K."""
    m, part = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    offsets = tl.arange(0, BLOCK_BYTES)
    row_start = qweight + rows.to(tl.int64)[:, None] * row_bytes
    x_row = x + m.to(tl.int64) * x_stride
    sums = tl.zeros((BLOCK_N, BLOCK_BYTES), dtype=tl.float32)
    first = part * bytes_per_split
    last = tl.minimum(first + bytes_per_split, row_bytes)
    for start in range(first, last, BLOCK_BYTES):
        at = start + offsets
        packed = tl.load(row_start + at[None, :], mask=row_mask[:, None] & (at < last)[None, :], other=0)
        for half in tl.static_range(HALVES):
            columns, codes = _unpack(packed, at, half, HALVES)
            known = (columns < K) & (at < last)
            source = _column(k_order, columns, known, K, ORDERED)
            values = tl.load(x_row + source, mask=known, other=0.0).to(tl.float32)
            weights = _weights(
                codes, scales, zeros, rows, row_mask, columns, start * HALVES + 32 * half, K, G, group_size,
                MID, ZEROS, UNIFORM,
            )  # fmt: skip
            sums += values[None, :] * weights
    total = tl.sum(sums, axis=1)
    if SPLIT:
        tl.store(out + (part.to(tl.int64) * tl.num_programs(1) + m) * N + rows, total, mask=row_mask)
    else:
        if BIAS:
            total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(out + m.to(tl.int64) * N + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["M"])
def gemm(
    x, qweight, scales, zeros, k_order, bias, out, M, N, K, G, group_size, x_stride, row_bytes, bytes_per_split,
    MID: tl.constexpr, ZEROS: tl.constexpr, UNIFORM: tl.constexpr, HALVES: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_N tile of the result per program, on tensor cores.

    Axis 0 counts tiles, those of neighbouring rows of x first, so that blocks that run together read the same weights; axis 1
    counts parts of K. Arguments are those of `gemv`.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    tokens = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask, row_mask = tokens < M, rows < N
    offsets = tl.arange(0, BLOCK_BYTES)
    row_start = qweight + rows.to(tl.int64)[:, None] * row_bytes
    x_rows = x + tokens.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = part * bytes_per_split
    last = tl.minimum(first + bytes_per_split, row_bytes)
    for start in range(first, last, BLOCK_BYTES):
        at = start + offsets
        packed = tl.load(row_start + at[None, :], mask=row_mask[:, None] & (at < last)[None, :], other=0)
        for half in tl.static_range(HALVES):
            columns, codes = _unpack(packed, at, half, HALVES)
            known = (columns < K) & (at < last)
            source = _column(k_order, columns, known, K, ORDERED)
            values = tl.load(x_rows + source[None, :], mask=token_mask[:, None] & known[None, :], other=0.0)
            weights = _weights(
                codes, scales, zeros, rows, row_mask, columns, start * HALVES + 32 * half, K, G, group_size,
                MID, ZEROS, UNIFORM,
            )  # fmt: skip
            sums = tl.dot(values, tl.trans(weights.to(values.dtype)), sums)
    mask = token_mask[:, None] & row_mask[None, :]
    if SPLIT:
        target = out + (part.to(tl.int64) * M + tokens)[:, None] * N + rows[None, :]
        tl.store(target, sums, mask=mask)
    else:
        if BIAS:
            sums += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
        target = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "splits"])
def reduce_parts(parts, bias, out, M, N, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = sum of parts [splits, M, N] in ascending order + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = M.to(tl.int64) * N
    mask = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(splits):
        total += tl.load(parts + part * size + at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize(
    qweight, scales, zeros, k_order, out, N, K, G, group_size, row_bytes,
    MID: tl.constexpr, ZEROS: tl.constexpr, HALVES: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """out [N, K], rounded once. Launched without contraction to FMA, so that it is bit-identical to the reference."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    row_mask = rows < N
    row_start = qweight + rows.to(tl.int64)[:, None] * row_bytes
    packed = tl.load(row_start + at[None, :], mask=row_mask[:, None] & (at < row_bytes)[None, :], other=0)
    for half in tl.static_range(HALVES):
        columns, codes = _unpack(packed, at, half, HALVES)
        known = columns < K
        target = _column(k_order, columns, known, K, ORDERED)
        weights = _weights(codes, scales, zeros, rows, row_mask, columns, 0, K, G, group_size, MID, ZEROS, False)
        where = out + rows.to(tl.int64)[:, None] * K + target[None, :]
        tl.store(where, weights.to(out.dtype.element_ty), mask=row_mask[:, None] & known[None, :])
