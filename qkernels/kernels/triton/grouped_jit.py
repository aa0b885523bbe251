"""The Triton kernels of stacked experts on layout kpack: the dense kernels' loops (`jit.row_sums`, `jit.tile_sums`) on rows of a
stack, whose experts lie one behind the other: row n of expert e is row `e * N_pad + n`. Importing this needs Triton.

K is never split and there are no atomics: a row of the result is summed over K in one order, whatever else is in the batch.
Nothing here is read by the host: grids are upper bounds, and `align` says on the device what each block does.
"""

# Triton reads parameters' annotations as its own, and has no name for a pointer.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .jit import row_sums, tile_sums

# Values of ACT: places in `ops.grouped.ACTIVATIONS`, and none.
PLAIN = tl.constexpr(-1)
SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
SWIGLU_OAI = tl.constexpr(3)
RELU2_UNGATED = tl.constexpr(4)  # from here on there is no gate
SILU_UNGATED = tl.constexpr(5)
GELU_UNGATED = tl.constexpr(6)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activated(sums, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """fp32 [rows, tokens] of one tile -> [rows / 2, tokens], or with ungated ones [rows, tokens]. NaN stays NaN."""
    if ACT == RELU2_UNGATED:
        positive = tl.where(sums < 0, 0.0, sums)
        made = positive * positive
    elif ACT == SILU_UNGATED:
        made = sums * tl.sigmoid(sums)
    elif ACT == GELU_UNGATED:
        made = _gelu(sums)
    else:
        halves = tl.reshape(sums, (2, sums.shape[0] // 2, sums.shape[1]))
        gate, up = tl.split(tl.permute(halves, (1, 2, 0)))
        if ACT == SILU:
            made = gate * tl.sigmoid(gate) * up
        elif ACT == GELU:
            made = _gelu(gate) * up
        elif ACT == GELU_TANH:  # (1 + tanh(u)) / 2 is the logistic function of 2 u
            made = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
        else:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
            made = (up + 1.0) * (gate * tl.sigmoid(gate * ALPHA))
    return made


@triton.jit
def _rows(tile, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of an expert's weight that a tile multiplies, and which there are: with a gate, as many of gate as of up, whose rows
    come behind all of gate's."""
    i = tl.arange(0, BLOCK_N)
    if ACT != PLAIN and ACT < RELU2_UNGATED:
        HALF: tl.constexpr = BLOCK_N // 2
        rows = tile * HALF + i % HALF
        mask = rows < N // 2
        rows += i // HALF * (N // 2)
    else:
        rows = tile * BLOCK_N + i
        mask = rows < N
    return rows, mask


@triton.jit
def _columns_of_result(tile, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns of the result a tile makes, of how many."""
    if ACT != PLAIN and ACT < RELU2_UNGATED:
        columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = N // 2
    else:
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        width = N
    return columns, width


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["total", "count"])
def align(offsets, blocks, experts, total, count, SIZE: tl.constexpr, SEGMENTS: tl.constexpr):
    """blocks int32 [3, count]: first row, end and expert of each block of at most SIZE of `total` rows; one a program.

    A block is of one expert. Rows before the first expert's and behind the last one's are in blocks of no expert (-1, E), so that
    all are in one; blocks that are left over have none. Offsets come from outside: they are clamped and made to rise.
    SEGMENTS: a power of two, E + 2 at least.
    """
    segment = tl.arange(0, SEGMENTS)
    begin = tl.load(offsets + segment - 1, mask=(segment > 0) & (segment <= experts + 1), other=0)
    end = tl.load(offsets + segment, mask=segment <= experts, other=0)
    begin = tl.where(segment > experts + 1, total, tl.minimum(tl.maximum(begin, 0), total)).to(tl.int32)
    end = tl.where(segment > experts, total, tl.minimum(tl.maximum(end, 0), total)).to(tl.int32)
    begin, end = tl.associative_scan(begin, 0, _larger), tl.associative_scan(end, 0, _larger)
    own = (end - begin + SIZE - 1) // SIZE
    after = tl.cumsum(own, 0)
    block = tl.program_id(0)
    here = (after > block) & (after - own <= block)
    tl.store(blocks + block, tl.sum(tl.where(here, begin + (block - after + own) * SIZE, 0)))
    tl.store(blocks + count + block, tl.sum(tl.where(here, end, 0)))
    tl.store(blocks + 2 * count + block, tl.sum(tl.where(here, segment - 1, 0)))


@triton.jit
def gemv_pairs(
    x, qweight, scales, zeros, outer_scales, outer_zeros, k_order, bias, ids, out, experts, N, K, G, x_stride, line_bytes, per,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Few tokens, nothing sorted: one pair of a token and an expert per program (axis 1), `x[pair // per]` times `ids[pair]`.

    Axis 0: BLOCK_N rows of the weight. An expert that two pairs share is read twice, from the L2 cache at best. Pairs of no
    expert here give 0.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    expert = tl.load(ids + pair)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0).to(tl.int32)
    rows, row_mask = _rows(tile, N, ACT, BLOCK_N)
    total = row_sums(
        x + (pair // per).to(tl.int64) * x_stride, qweight, scales, zeros, outer_scales, outer_zeros, k_order,
        rows + expert * (tl.cdiv(N, 64) * 64), row_mask, 0, tl.where(known, line_bytes, 0), K, G, line_bytes,
        MID, CODES, SCALES, OUTER, DIVIDES, GROUP, LOW, HIGH, SHARED, ORDERED, BLOCK_BYTES, RUN, STAGES,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + expert.to(tl.int64) * N + rows, mask=row_mask & known, other=0.0).to(tl.float32)
    columns, width = _columns_of_result(tile, N, ACT, BLOCK_N)
    if ACT != PLAIN:
        total = tl.reshape(_activated(total[:, None], ACT, ALPHA, LIMIT), columns.shape)
    target = out + pair.to(tl.int64) * width + columns
    tl.store(target, total.to(out.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["tokens", "count"])
def gemm_blocks(
    x, qweight, scales, zeros, outer_scales, outer_zeros, k_order, bias, sources, targets, blocks, out, tokens, count, experts,
    N, K, G, x_stride, line_bytes, per,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows that are sorted by expert: a block of them (`align`) times BLOCK_N rows of their expert's weight per program.

    Axis 0 counts tiles, those of neighbouring blocks first: blocks of one expert that run together read the same weights. Row r
    is `x[sources[r] // per]` of `tokens` rows, clamped, or x[r], and its result row targets[r], or r. Rows of no expert give 0.
    """
    tile, block = tl.program_id(0) // count, tl.program_id(0) % count
    begin, end = tl.load(blocks + block), tl.load(blocks + count + block)
    expert = tl.load(blocks + 2 * count + block)
    known = (expert >= 0) & (expert < experts) & (begin < end)
    expert = tl.where(known, expert, 0)
    places = begin + tl.arange(0, BLOCK_M)
    token_mask = places < end
    source = places.to(tl.int64)
    if SOURCES:
        source = tl.load(sources + places, mask=token_mask, other=0) // per
        source = tl.minimum(tl.maximum(source, 0), tokens - 1)
    rows, row_mask = _rows(tile, N, ACT, BLOCK_N)
    sums = tile_sums(
        x + source[:, None] * x_stride, qweight, scales, zeros, outer_scales, outer_zeros, k_order,
        rows + expert * (tl.cdiv(N, 64) * 64), row_mask, token_mask, 0, tl.where(known, line_bytes, 0), K, G, line_bytes,
        MID, CODES, SCALES, OUTER, DIVIDES, GROUP, LOW, HIGH, SHARED, ORDERED, BLOCK_BYTES, RUN, STAGES,
    )  # fmt: skip
    if BIAS:
        sums += tl.load(bias + expert.to(tl.int64) * N + rows, mask=row_mask & known, other=0.0).to(tl.float32)[:, None]
    columns, width = _columns_of_result(tile, N, ACT, BLOCK_N)
    if ACT != PLAIN:
        sums = _activated(sums, ACT, ALPHA, LIMIT)
    target = places.to(tl.int64)
    if TARGETS:
        target = tl.load(targets + places, mask=token_mask, other=0)
    where = out + target[None, :] * width + columns[:, None]
    tl.store(where, sums.to(out.dtype.element_ty), mask=(columns < width)[:, None] & token_mask[None, :])


@triton.jit
def combine(y, ids, weights, out, experts, per, N, BLOCK: tl.constexpr):
    """out [T, N] = sum over j of weights[t, j] y[t per + j], in ascending order of j and rounded once; one token per program
    (axis 0). Pairs of no expert here add exactly 0, whatever their weight."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(per):
        pair = t * per + j
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < experts)
        values = tl.load(y + pair * N + at, mask=(at < N) & known, other=0.0)
        total += tl.where(known, tl.load(weights + pair).to(tl.float32), 0.0) * values
    tl.store(out + t * N + at, total.to(out.dtype.element_ty), mask=at < N)
