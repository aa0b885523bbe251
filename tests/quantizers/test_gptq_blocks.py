"""GPTQ in GGUF's types: codes on scales that a search found, both orders, and the descent after them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from qkernels.errors import ArgumentError, CalibrationError
from qkernels.formats.gguf import WRITABLE_TYPES, BlockGrid, dequantize, gguf_blocks
from qkernels.layerwise.gguf_blocks import gguf_gptq
from tests.gguf_weights import made_weight


@cache
def problem() -> tuple[Tensor, Tensor]:
    """A weight `[15, 512]` and the Hessian of inputs of which neighbours are alike and some are loud."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 512, generator=generator)
    x = (x + x.roll(1, 1) + 0.5 * x.roll(7, 1)) * torch.randn(512, generator=generator).exp()
    return made_weight()[9:, :512].contiguous(), x.T @ x * (2 / 1024)


def output_error(blocks: Tensor, type: str, damping: float = 0.0) -> float:
    weight, hessian = problem()
    h = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(512)
    difference = (dequantize(blocks, type) - weight).double()
    return float(((difference @ h) * difference).sum())


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_a_grid_has_the_values_of_its_blocks(type: str) -> None:
    weight = made_weight()[:, :512]
    importance = torch.linspace(0.1, 2, 512)
    blocks = gguf_blocks(weight, type, importance, "best")
    grid, values = BlockGrid.search(weight, type, importance), dequantize(blocks, type)
    codes = torch.empty_like(weight)
    for index in range(512):
        codes[:, index], found = grid.round(values[:, index], index)
        assert torch.equal(found, values[:, index]), index
    assert torch.equal(dequantize(grid.blocks(codes), type), values)
    with pytest.raises(ArgumentError, match=r"codes must be \[24, 512\]"):
        grid.blocks(codes[:, :3])


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_moved_scales_are_those_of_the_blocks(type: str) -> None:
    """Each row by another shift, to the ends of what six bits hold and no further."""
    weight = made_weight()[:, :512]
    grid = BlockGrid.search(weight, type)
    codes = grid.parts.codes.T.float()
    before = dequantize(grid.blocks(codes.T), type)
    shifts = torch.tensor(grid.shifts)
    assert grid.shifts[0] == (0, 0) and len(shifts) == (25 if grid.parts.minima is not None else 5)
    for group in range(512 // grid.group):
        cut = slice(group * grid.group, (group + 1) * grid.group)
        assert torch.equal(grid.shifted(group, codes[cut], (0, 0))[0].T, before[:, cut])
        by = shifts[(torch.arange(24) + group) % len(shifts)].T
        expected = grid.shifted(group, codes[cut], by)[0].T
        grid.move(group, by)
        assert torch.equal(dequantize(grid.blocks(codes.T), type)[:, cut], expected)
        for index in range(cut.start, cut.stop):
            assert torch.equal(grid.round(expected[:, index - cut.start], index)[1], expected[:, index - cut.start])


@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q4_0", "Q5_1", "MXFP4"])
def test_the_error_of_the_output_falls(type: str, order: str) -> None:
    weight, hessian = problem()
    best = output_error(gguf_blocks(weight, type, hessian.diagonal(), "best"), type)
    swept, descended = (gguf_gptq(weight, hessian, type, order, rounds=rounds) for rounds in (0, 2))  # type: ignore[arg-type]
    assert swept.shape == gguf_blocks(weight, type).shape
    assert output_error(swept, type) < 0.8 * best
    assert output_error(descended, type, 0.01) <= output_error(swept, type, 0.01)


def test_inputs_that_know_nothing_of_each_other_leave_the_search_as_it_is() -> None:
    weight, _ = problem()
    for order in ("natural", "energy"):
        found = gguf_gptq(weight, torch.eye(512) * 3, "Q4_K", order)  # type: ignore[arg-type]
        searched = gguf_blocks(weight, "Q4_K", torch.ones(512), "best")
        errors = [float((dequantize(blocks, "Q4_K") - weight).square().sum()) for blocks in (found, searched)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)  # importance is 1 but for rounding


def test_float64_and_dead_columns() -> None:
    weight, hessian = problem()
    quiet = hessian.double().clone()
    quiet[5], quiet[:, 5] = 0, 0
    values = dequantize(gguf_gptq(weight, quiet, "Q4_K"), "Q4_K")
    assert bool((values[:, 5] - weight[:, 5]).abs().max() < 0.1 * weight.abs().max())


def test_refusals() -> None:
    weight, hessian = problem()
    with pytest.raises(ArgumentError, match="GGUF types that can be written are .*got 'IQ1_S'"):
        gguf_gptq(weight, hessian, "IQ1_S")
    with pytest.raises(ArgumentError, match='order must be "natural" or "energy"'):
        gguf_gptq(weight, hessian, "Q4_K", "static")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rounds must be"):
        gguf_gptq(weight, hessian, "Q4_K", rounds=-1)
    with pytest.raises(ArgumentError, match="multiple of 256 columns, got 96"):
        gguf_gptq(weight[:, :96], hessian[:96, :96], "Q4_K")
    with pytest.raises(ArgumentError, match=r"\[512, 512\]"):
        gguf_gptq(weight, hessian[:3, :3], "Q4_K")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        gguf_gptq(weight, hessian * float("nan"), "Q4_K")
