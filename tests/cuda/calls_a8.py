"""Weights and activations to calls of `multiply` with int8 activations, and the y that is right."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.layouts import get_layout
from qkernels.ops import reference
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


def expected(weight: QuantTensor, x: Tensor, bias: Tensor | None = None, splits: int = 1) -> Tensor:
    """y where the scaled sums of groups add up without rounding (checked): integers, then fp32 as gemm_a8.cuh says."""
    q, token_scales = quantized(x, weight.scheme.act)
    codes, scales = weight.codes.long() - weight.scheme.mid_code, weight.scales.double()
    order, groups = weight.k_order(), weight.column_groups()
    stored = torch.arange(weight.K) if order is None else order.long()
    steps = (weight.K + 63) // 64
    each, more = divmod(steps, splits)  # the first parts have one step more
    bounds = [64 * (each * split + min(split, more)) for split in range(splits + 1)]  # in the order that is stored
    unit = scales.abs().amin()
    assert (scales / unit).frac().abs().sum() == 0
    y, magnitude = torch.zeros(x.shape[0], weight.N), torch.zeros(x.shape[0], weight.N).double()
    for part in (stored[begin:end] for begin, end in pairwise(bounds)):
        total = torch.zeros_like(magnitude)
        for group in groups[part].unique():
            those = part[groups[part] == group]
            total += (q[:, those] @ codes[:, those].T).double() * scales[:, group]
            magnitude += (q[:, those].abs() @ codes[:, those].abs().T).double() * scales[:, group].abs()
        y = y + total.float() * token_scales
    assert weight.K == 0 or magnitude.max() / unit < 2**24, "the inputs are too large to be exact"
    return (y if bias is None else y + bias.float()).to(x.dtype)


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
    wrong = (y != expected(weight, x, bias, splits)).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {y.numel()} differ, the first at [m, n] = {wrong[0].tolist()}"
