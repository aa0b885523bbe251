"""The Triton kernels on layout kpack (`layouts/kpack.py` says what the bytes mean). Importing this needs Triton.

`scales` and `zeros` are the small factors where OUTER says so; the outer ones are `outer_scales` and `outer_zeros`. Floats of one
byte come as bytes: not every card has a type for them, and all can shift.

Plain pointers, no atomics, no autotuning. `gemv` and `gemm` either finish their tile (SPLIT false) or write an fp32 part of it
to a workspace [splits, M, N], which `reduce_parts` adds in order: the result does not depend on which block ran first.
Weights are dequantized in fp32, `(code - zero) * scale`; `gemm` rounds them to x's dtype for the tensor cores, `gemv` does not.

LOW and HIGH are the widths of a code's planes, HIGH 0 where there is one; FIELDS the fields of the narrowest plane in a byte,
LINES the layout's lines of bytes in a block. A step takes BLOCK_BYTES bytes of each line, and offsets are those in a line.
"""

# Triton reads parameters' annotations as its own, and has no name for a pointer.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Values of CODES, what a code means, by `launch.meaning_of_codes`.
SYMMETRIC = tl.constexpr(0)
POINTS = tl.constexpr(1)  # integer or float zero points
OFFSETS = tl.constexpr(2)
TABLE = tl.constexpr(3)
E2M1 = tl.constexpr(4)
E4M3 = tl.constexpr(5)
E5M2 = tl.constexpr(6)
# Values of SCALES: as what they are stored (small factors among them).
NUMBERS = tl.constexpr(0)
E8M0_BYTES = tl.constexpr(1)
E4M3_BYTES = tl.constexpr(2)
# A value of OUTER, which else is the number of groups under one outer factor, and 0 where there is none.
ONE_A_ROW = tl.constexpr(-1)


@triton.jit
def _columns(at, field: tl.constexpr, FIELDS: tl.constexpr):
    """Stored columns of one field of the bytes at offsets `at` of a line (`kpack.run_of`)."""
    OF_RUN: tl.constexpr = 16 if FIELDS > 4 else 64 // FIELDS
    return at // OF_RUN * (OF_RUN * FIELDS) + at % OF_RUN + field * OF_RUN if FIELDS > 1 else at


@triton.jit
def _line(row_start, at, mask, line: tl.constexpr, LINES: tl.constexpr):
    """Bytes [rows, places] of one line of each block; where there are several, a run has 16 columns."""
    where = at // 16 * (16 * LINES) + at % 16 + line * 16 if LINES > 1 else at
    return tl.load(row_start + where[None, :], mask=mask, other=0)


@triton.jit
def _sources(k_order, columns, K, ORDERED: tl.constexpr):
    """Where stored columns belong; clamped, since the order may come from a file."""
    if ORDERED:
        columns = tl.minimum(tl.maximum(tl.load(k_order + columns, mask=columns < K, other=0), 0), K - 1)
    return columns


@triton.jit
def _bases(rows, G, OUTER: tl.constexpr):
    """Where the scales of these rows begin, and their outer factors (else the same)."""
    strips = (rows // 64).to(tl.int64)
    base = strips * G * 64 + rows % 64
    outer = base
    if OUTER == ONE_A_ROW:
        outer = strips * 64 + rows % 64
    elif OUTER != 0:
        outer = strips * tl.cdiv(G, OUTER) * 64 + rows % 64
    return base, outer


@triton.jit
def _of_groups(
    values, strip_base, row_mask, start, field: tl.constexpr, K, GROUP: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Scales or zeros [rows, runs] of one field of the bytes from `start` on. GROUP 0: all in one group.

    One run a step is loaded as a row of rows: as [rows, 1] its layout would become that of all weights.
    """
    if GROUP == 0:
        of_runs = tl.load(values + strip_base, mask=row_mask, other=0)[:, None]
    elif RUN == BLOCK_BYTES:
        column = _columns(start, field, FIELDS)
        of_runs = tl.load(values + (strip_base + column // GROUP * 64), mask=row_mask & (column < K), other=0)[:, None]
    else:
        columns = _columns(start + tl.arange(0, BLOCK_BYTES // RUN) * RUN, field, FIELDS)
        at = strip_base[:, None] + (columns // GROUP * 64)[None, :]
        of_runs = tl.load(values + at, mask=row_mask[:, None] & (columns < K)[None, :], other=0)
    return of_runs


@triton.jit
def _e4m3(bits):
    """The float of such a byte (int32): its exponent's bias is 120 below that of fp32, so that subnormals come out right."""
    value = (((bits & 127) << 20) | ((bits & 128) << 24)).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((bits & 127) == 127, float("nan"), value)


@triton.jit
def _stored(values, SCALES: tl.constexpr):
    """Scales as they are stored, bytes as the fp32 that they mean."""
    if SCALES == E8M0_BYTES:
        bits = values.to(tl.int32)
        shifted = tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23))  # 2^-127 is subnormal
        values = shifted.to(tl.float32, bitcast=True)
    elif SCALES == E4M3_BYTES:
        values = _e4m3(values.to(tl.int32))
    return values


@triton.jit
def _spread(values, RUN: tl.constexpr):
    """[rows, runs] to [rows, runs * RUN], each value RUN times over; a single run is left to broadcasting."""
    if values.shape[1] > 1 and RUN > 1:
        runs = tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], RUN))
        values = tl.reshape(runs, (values.shape[0], values.shape[1] * RUN))
    return values


@triton.jit
def _outers(
    outer_scales, outer_zeros, outer_base, row_mask, start, K, CODES: tl.constexpr, OUTER: tl.constexpr, GROUP: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Outer factors of scales and of zeros, fp32 [rows, runs], for all fields of these bytes: 256 columns are whole blocks."""
    SPAN: tl.constexpr = 0 if OUTER == ONE_A_ROW else GROUP * OUTER
    LONG: tl.constexpr = BLOCK_BYTES if SPAN == 0 or SPAN // FIELDS > BLOCK_BYTES else SPAN // FIELDS
    outer = _of_groups(outer_scales, outer_base, row_mask, start, 0, K, SPAN, FIELDS, BLOCK_BYTES, LONG).to(tl.float32)
    outer = _spread(outer, LONG // RUN)
    zero = outer
    if CODES == OFFSETS:
        zero = _of_groups(outer_zeros, outer_base, row_mask, start, 0, K, SPAN, FIELDS, BLOCK_BYTES, LONG).to(
            tl.float32
        )
        zero = _spread(zero, LONG // RUN)
    return outer, zero


@triton.jit
def _scales_and_zeros(
    scales, zeros, outer, outer_zero, strip_base, row_mask, start, field: tl.constexpr, K,
    CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr, GROUP: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Both of `_of_groups`; scales in the place of zeros that are not there. Products are rounded once, as `qkernels.factors`
    makes them; outer and outer_zero are those of `_outers`."""
    scale = _stored(_of_groups(scales, strip_base, row_mask, start, field, K, GROUP, FIELDS, BLOCK_BYTES, RUN), SCALES)
    zero = scale
    if CODES == POINTS or CODES == OFFSETS:  # noqa: SIM109, Triton has no `in`
        zero = _of_groups(zeros, strip_base, row_mask, start, field, K, GROUP, FIELDS, BLOCK_BYTES, RUN)
    if OUTER != 0:
        small = scale.to(tl.float32)
        if DIVIDES:
            outer = tl.where(outer == 0, 1.0, outer)  # of rows and columns that are not there
            small, outer = tl.broadcast(small, outer)
            scale = tl.div_rn(small, outer)
        else:
            scale = small * outer
        if CODES == OFFSETS:
            zero = -(zero.to(tl.float32) * outer_zero)
    return scale, zero


@triton.jit
def _weights(
    low, high, field: tl.constexpr, scale, zero, table, nought, always, MID: tl.constexpr, CODES: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """fp32 weights [rows, bytes] of one field: of its line of the low plane, `low`, and of the only line of the high one, `high`,
    where HIGH is not 0. scale and zero [rows, runs] are as they are stored. Codebooks have one plane.

    A conversion from integer runs at an eighth of the rate of other arithmetic. Here the code takes the place of mantissa bits
    behind an exponent that makes it BASE + code: one logical operation a plane. (Codes are put a field of the narrowest plane
    apart: then all fields of `high` that meet one line are shifted together.) Of that, `(code - zero) * scale` takes one FMA
    where it is exact: BASE + code and BASE + zero have 9 bits at most and a scale of 16 bits has 11, so that neither product
    rounds, and the difference is a product of so few bits, too. (A scale beyond 2^119 overflows in them.) A weight is formed
    before it meets x: what x times a code or a zero would make of an infinity, or of 1e36, is not what a float layer gives.

    nought: 0. Where the compiler does not know it, the mask stays in its register; else ptxas makes it anew for each weight.
    always: true. Triton pipelines no load inside a branch, and would copy the table's entries to shared memory one by one.
    """
    AT: tl.constexpr = field % (8 // LOW)  # the place in a byte of `low`
    wide = scale.to(tl.float32)
    if CODES == TABLE:
        codes = (low >> (LOW * AT)).to(tl.int32) & (2 * MID - 1)  # a code beyond the table wraps
        entries = tl.zeros(low.shape, tl.float32)
        if always:
            entries = tl.load(table + codes)
        weights = entries * _spread(wide, RUN)
    elif CODES == E2M1:
        codes = (low >> (LOW * AT)).to(tl.int32)
        entries = (((codes & 7) << 22) | ((codes & 8) << 28)).to(tl.float32, bitcast=True) * 2.0**126  # its bias is 1
        weights = entries * _spread(wide, RUN)
    elif CODES == E4M3:
        weights = _e4m3(low.to(tl.int32)) * _spread(wide, RUN)
    elif CODES == E5M2:
        entries = (low.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)  # fp16 without its last 8 bits
        weights = entries * _spread(wide, RUN)
    else:
        PLACE: tl.constexpr = (HIGH if HIGH > 0 else LOW) * AT  # of the code above bit 15; it ends below bit 23
        BASE: tl.constexpr = 256 >> PLACE
        EXPONENT: tl.constexpr = (127 + 8 - PLACE) << 23
        PLACES: tl.constexpr = ((1 << LOW) - 1) << (15 + PLACE)
        bits = ((low.to(tl.int32) << (15 + PLACE - LOW * AT)) & (PLACES + nought)) | EXPONENT
        if HIGH > 0:
            ABOVE: tl.constexpr = ((1 << HIGH) - 1) << (15 + PLACE + LOW)
            bits |= (high.to(tl.int32) << (15 + LOW - (field - AT) * HIGH)) & (ABOVE + nought)
        lifted = bits.to(tl.float32, bitcast=True)
        if CODES == OFFSETS:
            weights = (lifted - BASE) * _spread(wide, RUN) + _spread(zero.to(tl.float32), RUN)
        elif CODES == POINTS and not zero.dtype.is_int():
            weights = ((lifted - BASE) - _spread(zero.to(tl.float32), RUN)) * _spread(wide, RUN)
        else:
            point = tl.full(wide.shape, BASE + MID, tl.float32) if CODES == SYMMETRIC else zero.to(tl.float32) + BASE
            if scale.dtype.primitive_bitwidth <= 16:
                weights = tl.fma(lifted, _spread(wide, RUN), _spread(-point * wide, RUN))
            else:
                weights = (lifted - _spread(point, RUN)) * _spread(wide, RUN)
    return weights


@triton.jit
def row_sums(
    x_row, qweight, scales, zeros, outer_scales, outer_zeros, k_order, rows, row_mask, first, last, K, G, line_bytes,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 [rows]: one row of x times rows of the weight, over bytes `first` to `last`, without tensor cores.

    RUN: so many bytes in a row lie in one group (`table.run_bytes`). STAGES: so many steps are under way; Triton pipelines a
    loop without `tl.dot` only if the loop says so.
    """
    offsets = tl.arange(0, BLOCK_BYTES)
    FIELDS: tl.constexpr = 8 // (HIGH if HIGH > 0 else LOW)
    LINES: tl.constexpr = LOW // HIGH + 1 if HIGH > 0 else 1
    row_start = qweight + rows.to(tl.int64)[:, None] * (line_bytes * LINES)
    strip_base, outer_base = _bases(rows, G, OUTER)
    sums = tl.zeros((rows.shape[0], BLOCK_BYTES), dtype=tl.float32)
    nought = tl.minimum(line_bytes, 0)
    for start in tl.range(first, last, BLOCK_BYTES, num_stages=STAGES):
        at = start + offsets
        here = row_mask[:, None] & (at < line_bytes)[None, :]
        high = at
        if HIGH > 0:
            high = _line(row_start, at, here, LINES - 1, LINES)
        outer, outer_zero = at, at
        if OUTER != 0:
            outer, outer_zero = _outers(
                outer_scales, outer_zeros, outer_base, row_mask, start, K, CODES, OUTER, GROUP, FIELDS, BLOCK_BYTES, RUN,
            )  # fmt: skip
        for field in tl.static_range(FIELDS):
            if field % (8 // LOW) == 0:
                low = _line(row_start, at, here, field // (8 // LOW), LINES)
            if field % SHARED == 0:  # else it lies in the group of the one before
                scale, zero = _scales_and_zeros(
                    scales, zeros, outer, outer_zero, strip_base, row_mask, start, field, K,
                    CODES, SCALES, OUTER, DIVIDES, GROUP, FIELDS, BLOCK_BYTES, RUN,
                )  # fmt: skip
            columns = _columns(at, field, FIELDS)
            source = _sources(k_order, columns, K, ORDERED)
            values = tl.load(x_row + source, mask=columns < K, other=0.0).to(tl.float32)
            weights = _weights(
                low, high, field, scale, zero, zeros, nought, start < line_bytes, MID, CODES, LOW, HIGH, RUN
            )  # fmt: skip
            sums += values[None, :] * weights
    return tl.sum(sums, axis=1)


@triton.jit
def gemv(
    x, qweight, scales, zeros, outer_scales, outer_zeros, k_order, bias, out, N, K, G, x_stride, line_bytes, bytes_per_split,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x per program (axis 1). Axis 0: BLOCK_N rows of the weight, axis 2: parts of K. See `row_sums`."""
    m, part = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    first = part * bytes_per_split
    last = tl.minimum(first + bytes_per_split, line_bytes)
    total = row_sums(
        x + m.to(tl.int64) * x_stride, qweight, scales, zeros, outer_scales, outer_zeros, k_order, rows, row_mask, first, last,
        K, G, line_bytes, MID, CODES, SCALES, OUTER, DIVIDES, GROUP, LOW, HIGH, SHARED, ORDERED, BLOCK_BYTES, RUN, STAGES,
    )  # fmt: skip
    if SPLIT:
        tl.store(out + (part.to(tl.int64) * tl.num_programs(1) + m) * N + rows, total, mask=row_mask)
    else:
        if BIAS:
            total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
        tl.store(out + m.to(tl.int64) * N + rows, total.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def tile_sums(
    x_rows, qweight, scales, zeros, outer_scales, outer_zeros, k_order, rows, row_mask, token_mask, first, last, K, G,
    line_bytes, MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 [rows, tokens] on tensor cores: W x^T over bytes `first` to `last`; `x_rows` [tokens, 1] point to rows of x.

    The weight is the first operand of the product, which tensor cores of all cards take from registers, where it was made
    (wgmma takes the second from shared memory alone); tokens are the second, which is 8 wide at least, where the first is 16.
    """
    offsets = tl.arange(0, BLOCK_BYTES)
    FIELDS: tl.constexpr = 8 // (HIGH if HIGH > 0 else LOW)
    LINES: tl.constexpr = LOW // HIGH + 1 if HIGH > 0 else 1
    row_start = qweight + rows.to(tl.int64)[:, None] * (line_bytes * LINES)
    strip_base, outer_base = _bases(rows, G, OUTER)
    sums = tl.zeros((rows.shape[0], token_mask.shape[0]), dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_BYTES, num_stages=STAGES):
        at = start + offsets
        here = row_mask[:, None] & (at < line_bytes)[None, :]
        high = at
        if HIGH > 0:
            high = _line(row_start, at, here, LINES - 1, LINES)
        outer, outer_zero = at, at
        if OUTER != 0:
            outer, outer_zero = _outers(
                outer_scales, outer_zeros, outer_base, row_mask, start, K, CODES, OUTER, GROUP, FIELDS, BLOCK_BYTES, RUN,
            )  # fmt: skip
        for field in tl.static_range(FIELDS):
            if field % (8 // LOW) == 0:
                low = _line(row_start, at, here, field // (8 // LOW), LINES)
            if field % SHARED == 0:  # else it lies in the group of the one before
                scale, zero = _scales_and_zeros(
                    scales, zeros, outer, outer_zero, strip_base, row_mask, start, field, K,
                    CODES, SCALES, OUTER, DIVIDES, GROUP, FIELDS, BLOCK_BYTES, RUN,
                )  # fmt: skip
            columns = _columns(at, field, FIELDS)
            source = _sources(k_order, columns, K, ORDERED)
            values = tl.load(x_rows + source[None, :], mask=token_mask[:, None] & (columns < K)[None, :], other=0.0)
            weights = _weights(
                low, high, field, scale, zero, zeros, 0, start < line_bytes, MID, CODES, LOW, HIGH, RUN
            )  # fmt: skip
            sums = tl.dot(weights.to(values.dtype), tl.trans(values), sums)
    return sums


@triton.jit(do_not_specialize=["M"])
def gemm(
    x, qweight, scales, zeros, outer_scales, outer_zeros, k_order, bias, out, M, N, K, G, x_stride, line_bytes, bytes_per_split,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_N tile of the result per program: its transpose, see `tile_sums`.

    Axis 0 counts tiles, those of neighbouring rows of x first, so that blocks that run together read the same weights; axis 1
    counts parts of K. Arguments are those of `gemv`.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile, part = tl.program_id(0), tl.program_id(1)
    tokens = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask, row_mask = tokens < M, rows < N
    first = part * bytes_per_split
    last = tl.minimum(first + bytes_per_split, line_bytes)
    sums = tile_sums(
        x + tokens.to(tl.int64)[:, None] * x_stride, qweight, scales, zeros, outer_scales, outer_zeros, k_order, rows,
        row_mask, token_mask, first, last, K, G, line_bytes, MID, CODES, SCALES, OUTER, DIVIDES, GROUP, LOW, HIGH, SHARED,
        ORDERED, BLOCK_BYTES, RUN, STAGES,
    )  # fmt: skip
    mask = row_mask[:, None] & token_mask[None, :]
    if SPLIT:
        target = out + (part.to(tl.int64) * M + tokens)[None, :] * N + rows[:, None]
        tl.store(target, sums, mask=mask)
    else:
        if BIAS:
            sums += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        target = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
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
    qweight, scales, zeros, outer_scales, outer_zeros, k_order, out, N, K, G, line_bytes,
    MID: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, OUTER: tl.constexpr, DIVIDES: tl.constexpr,
    GROUP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHARED: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out [N, K], rounded once. Launched without contraction to FMA, so that it is bit-identical to the reference."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_BYTES
    at = start + tl.arange(0, BLOCK_BYTES)
    row_mask = rows < N
    FIELDS: tl.constexpr = 8 // (HIGH if HIGH > 0 else LOW)
    LINES: tl.constexpr = LOW // HIGH + 1 if HIGH > 0 else 1
    row_start = qweight + rows.to(tl.int64)[:, None] * (line_bytes * LINES)
    strip_base, outer_base = _bases(rows, G, OUTER)
    here = row_mask[:, None] & (at < line_bytes)[None, :]
    high = at
    if HIGH > 0:
        high = _line(row_start, at, here, LINES - 1, LINES)
    outer, outer_zero = at, at
    if OUTER != 0:
        outer, outer_zero = _outers(
            outer_scales, outer_zeros, outer_base, row_mask, start, K, CODES, OUTER, GROUP, FIELDS, BLOCK_BYTES, RUN,
        )  # fmt: skip
    for field in tl.static_range(FIELDS):
        if field % (8 // LOW) == 0:
            low = _line(row_start, at, here, field // (8 // LOW), LINES)
        scale, zero = _scales_and_zeros(
            scales, zeros, outer, outer_zero, strip_base, row_mask, start, field, K,
            CODES, SCALES, OUTER, DIVIDES, GROUP, FIELDS, BLOCK_BYTES, RUN,
        )  # fmt: skip
        columns = _columns(at, field, FIELDS)
        target = _sources(k_order, columns, K, ORDERED)
        weights = _weights(low, high, field, scale, zero, zeros, 0, start < line_bytes, MID, CODES, LOW, HIGH, RUN)
        where = out + rows.to(tl.int64)[:, None] * K + target[None, :]
        tl.store(where, weights.to(out.dtype.element_ty), mask=row_mask[:, None] & (columns < K)[None, :])
