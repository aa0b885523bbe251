"""Weights and activations to calls of `multiply` with int8 activations, and the y that is right."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.layouts import get_layout
from qkernels.ops import reference
from qkernels.scheme import ACTIVATION_NUMBERS
from tests.cuda import calls, emulator
from tests.cuda.calls import Config
from tests.cuda.emulator import Call


def tokens_for(M: int) -> int:
    return 32 if M <= 32 else 64 if M <= 64 else 128


def multiply_call(
    weight: QuantTensor,
    x: Tensor,
    bias: Tensor | None = None,
    tokens: int | None = None,
    splits: int = 1,
    path: str = "gemm_a8",
) -> Call:
    """y and workspace, of exactly the size that is asked for, start as NaN."""
    config = Config(path, tokens or tokens_for(x.shape[0]), splits=splits)
    return calls.multiply_call(weight, x, config, bias, get_layout("mma_tile_a8"))


def quantized(x: Tensor, act: str | None = "int8") -> tuple[Tensor, Tensor]:
    """int64 `[M, K]` and fp32 `[M, 1]`: the definition, each operation rounded by itself."""
    if act == "int8_wide":
        codes, wide = reference.quantize_rows_wide(x)
        return codes.long(), wide
    scales = x.float().abs().amax(1, keepdim=True) / 127
    return torch.where(scales > 0, torch.round(x.float() / scales), 0).long(), scales


@dataclass(frozen=True)
class Rows:
    """What x becomes.

    Args:
        codes: int64 `[M, K]`.
        scales: fp32 `[M, 1]`.
        zeros: fp32 `[M, 1]`: zero points times scales; None: there are none.
        marked: bool `[K]`: columns that multiply as they are; None: there are none.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    marked: Tensor | None = None


def rows_of(x: Tensor, act: str | None, x_static: Tensor | None = None) -> Rows:
    """The reference's, which tests/ops/test_roundings.py holds against the origins."""
    if act == "int8_outliers":
        codes, scales, marked = reference.quantize_rows_outliers(x)
        return Rows(codes.long(), scales, None, marked)
    if act in ("int8_zero", "int8_static", "int8_static_zero"):
        made = reference.quantize_rows_zero(x) if x_static is None else reference.quantize_rows_static(x, x_static)
        codes, scales, zeros = made
        return Rows(codes.long(), scales, None if act == "int8_static" else zeros * scales)
    return Rows(*quantized(x, act))


def expected(weight: QuantTensor, x: Tensor, bias: Tensor | None = None, splits: int = 1) -> Tensor:
    """y where the scaled sums of groups add up without rounding (checked): integers, then fp32 as gemm_a8.cuh and apart_a8.cuh
    say. A product and a sum that are rounded once are those of float64, which are rounded twice: the same but for one in 2^29.
    """
    rows = rows_of(x, weight.scheme.act, weight.x_static)
    y = sums_of_codes(weight, rows.codes, rows.scales, splits)
    if rows.zeros is not None:
        ones = sums_of_codes(weight, torch.ones(1, weight.K, dtype=torch.int64), torch.ones(1, 1), splits)
        y = (y.double() - rows.zeros.double() * ones.double()).float()
    if rows.marked is not None:
        order = weight.k_order()
        stored = torch.arange(weight.K) if order is None else order.long()
        w = weight.dequantize().double()
        for k in stored[rows.marked[stored]].tolist():
            y = (y.double() + x[:, k : k + 1].double() * w[:, k]).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def sums_of_codes(weight: QuantTensor, q: Tensor, token_scales: Tensor, splits: int) -> Tensor:
    """fp32 `[M, N]`: what the products of codes `[M, K]` leave, parts of K added."""
    codes, scales = weight.codes.long() - weight.scheme.mid_code, weight.scales.double()
    order, groups = weight.k_order(), weight.column_groups()
    stored = torch.arange(weight.K) if order is None else order.long()
    steps = (weight.K + 63) // 64
    each, more = divmod(steps, splits)  # the first parts have one step more
    bounds = [64 * (each * split + min(split, more)) for split in range(splits + 1)]  # in the order that is stored
    unit = scales.abs().amin()
    assert (scales / unit).frac().abs().sum() == 0
    y, magnitude = torch.zeros(len(q), weight.N), torch.zeros(len(q), weight.N).double()
    for part in (stored[begin:end] for begin, end in pairwise(bounds)):
        total = torch.zeros_like(magnitude)
        for group in groups[part].unique():
            those = part[groups[part] == group]
            total += (q[:, those] @ codes[:, those].T).double() * scales[:, group]
            magnitude += (q[:, those].abs() @ codes[:, those].abs().T).double() * scales[:, group].abs()
        y = y + total.float() * token_scales
    assert weight.K == 0 or magnitude.max() / unit < 2**24, "the inputs are too large to be exact"
    return y


def quantize(
    x: Tensor, order: Tensor | None = None, act: str = "int8", x_static: Tensor | None = None
) -> dict[str, Tensor]:
    """What quantize_a8 leaves of x: `codes` int8 `[rows, K_pad]` as they are stored, `scales` and, where the kernel makes them,
    `zeros` fp32 `[rows]`; of outliers, `marked`: the stored columns in the list. The workspace starts as NaN and is as long as it
    says.
    """
    (M, K), steps = x.shape, -(-x.shape[1] // 64)
    buffers, integers = calls.x_arguments(x)
    more = {
        "N": 64, "bits": 8, "group": max(K, 1), "scale_type": 3, "zero_type": 0, "zeros_are_offsets": 0, "bias_type": 0,
        "act": ACTIVATION_NUMBERS[act], "type": calls.TYPES[x.dtype], **Config("gemm_a8", 32).integers(),
    }  # fmt: skip
    offsets = torch.zeros(6, dtype=torch.int64)
    buffers = {**buffers, "k_order": order, "x_static": x_static}
    emulator.run(calls.UNIT, Call("workspace_a8", {**buffers, "offsets": offsets}, {**integers, **more}))
    scales, zeros, marks, listed, end = offsets[:5].tolist()
    workspace = torch.full((int(offsets[5]) // 4,), float("nan"))
    emulator.run(calls.UNIT, Call("quantize_a8", {**buffers, "workspace": workspace}, {**integers, **more}))
    raw = workspace.view(torch.uint8)
    rows = M + (act in ("int8_zero", "int8_static_zero"))
    made = {
        "codes": raw[: rows * steps * 64].view(torch.int8).reshape(rows, -1),
        "scales": raw[scales : scales + 4 * rows].view(torch.float32),
    }
    if marks > zeros:
        made["zeros"] = raw[zeros : zeros + 4 * rows].view(torch.float32)
    if end > listed:
        numbers = raw[listed:end].view(torch.int32)
        made["marked"] = numbers[1 : 1 + int(numbers[0])]
    return made


def in_fragment_order(q: Tensor) -> Tensor:
    """Of each 16 columns, position 4 c + j holds column 2 c + {0, 8, 1, 9}[j]; zeros past K."""
    columns = torch.tensor([2 * c + j for c in range(4) for j in (0, 8, 1, 9)])
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % 64))
    return padded.reshape(len(q), -1, 16)[..., columns].reshape(len(q), -1).to(torch.int8)


def noise(M: int, K: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    weight: QuantTensor,
    x: Tensor,
    bias: Tensor | None = None,
    tokens: int | None = None,
    splits: int = 1,
    schedule: str = "ascending",
    path: str = "gemm_a8",
) -> None:
    """The emulator's y is the right one, bit for bit."""
    call = multiply_call(weight, x, bias, tokens, splits, path)
    emulator.run(calls.UNIT, call, schedule)
    y = call.buffers["y"]
    assert y is not None
    right = expected(weight, x, bias, splits)
    wrong = ((y != right) & ~(y.isnan() & right.isnan())).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {y.numel()} differ, the first at [m, n] = {wrong[0].tolist()}"
