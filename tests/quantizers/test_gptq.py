"""GPTQ against a textbook oracle in float64, and its orders, dead columns and damping."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor

from qkernels.errors import ArgumentError, CalibrationError
from qkernels.quantizers import GPTQ, RTN, InputStatistics
from qkernels.quantizers.gptq import inverse_factor
from tests.quantizers.problems import output_error, problem

# Most tests compare with a grid over the full range.
full_range = partial(GPTQ, clip="none")
ORDERS = ("none", "group", "static")


def oracle(w: Tensor, hessian: Tensor, method: GPTQ) -> tuple[Tensor, Tensor]:
    """Codes and the group of each column, column by column as in the paper's equations 2 and 3: no blocks, no Cholesky; the
    inverse Hessian loses a row and column after each step. Own grid, own order, everything in float64."""
    K, scheme = w.shape[1], method.scheme
    length = scheme.group_length(K)
    work = w.double().clone()
    h = hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = h.diagonal()[~dead].mean()
    h += torch.eye(K, dtype=torch.float64) * method.damping * h.diagonal().mean()
    order = list(range(K)) if method.act_order == "none" else sorted(range(K), key=lambda i: -float(hessian[i, i]))
    if method.act_order != "none" and bool(dead.any()):
        order = sorted(range(K), key=lambda i: -float(h[i, i]))
    position = {column: i for i, column in enumerate(order)}
    group_of = [(position[i] if method.act_order == "group" else i) // length for i in range(K)]

    def grid(values: Tensor) -> tuple[Tensor, Tensor]:
        if scheme.symmetric:
            scale = (values.abs().amax(1) * 2 / scheme.max_code).half().double()
            return scale, torch.full_like(scale, scheme.mid_code)
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        scale = ((high - low) / scheme.max_code).half().double()
        return scale, torch.round(-low / scale)

    members = {g: [i for i in range(K) if group_of[i] == g] for g in set(group_of)}
    grids = {g: grid(work[:, columns]) for g, columns in members.items()} if method.act_order == "static" else {}
    inverse = torch.linalg.inv(h)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    left = list(order)
    for column in order:
        group = group_of[column]
        if group not in grids:
            grids[group] = grid(work[:, members[group]])
        scale, zero = grids[group]
        q = (torch.round(work[:, column] / scale) + zero).clamp(0, scheme.max_code)
        codes[:, column] = q.to(torch.uint8)
        error = (work[:, column] - (q - zero) * scale) / inverse[column, column]
        left.remove(column)
        if left:
            work[:, left] -= torch.outer(error, inverse[column, left])
            inverse[torch.tensor(left)[:, None], left] -= (
                torch.outer(inverse[left, column], inverse[column, left]) / inverse[column, column]
            )
    return codes, torch.tensor(group_of)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "N", "K"),
    [
        (4, 32, True, 12, 96),
        (4, 32, False, 12, 96),
        (3, 48, True, 8, 160),  # blocks of 96 columns, a short last group
        (2, 200, False, 8, 300),  # a group longer than a block, and a short one
        (8, 16, True, 8, 40),
        (4, "channel", True, 12, 150),
        (3, 7, False, 5, 30),
    ],
)
def test_codes_equal_the_oracle(
    act_order: str, bits: int, group_size: int | str, symmetric: bool, N: int, K: int
) -> None:
    w, hessian = problem(N, K, seed=bits)
    method = full_range(bits, group_size, symmetric, act_order=act_order)  # type: ignore[arg-type]
    tensor = method.quantize(w, hessian)
    codes, groups = oracle(w, hessian, method)
    assert torch.equal(tensor.column_groups(), groups)
    assert torch.equal(tensor.codes, codes)


def test_the_oracle_notices_a_wrong_update() -> None:
    """Negative control: the same oracle without error compensation (a diagonal Hessian) gives other codes."""
    w, hessian = problem(12, 96)
    method = full_range(4, 32, act_order="none")
    codes, _ = oracle(w, torch.diag(hessian.diagonal()), method)
    assert not torch.equal(method.quantize(w, hessian).codes, codes)
    assert torch.equal(codes, RTN(4, 32).quantize(w).codes)


@pytest.mark.parametrize("act_order", ORDERS)
def test_fp32_agrees_with_fp64_but_for_ties(act_order: str) -> None:
    """A code may differ where an fp32 rounding moves a weight across a boundary, and then its error feeds on; the output
    error stays what it is."""
    w, hessian = problem(64, 256, tokens=2000)
    method = full_range(4, 64, act_order=act_order)  # type: ignore[arg-type]
    exact, single = method.quantize(w, hessian), method.quantize(w, hessian.float())
    assert (exact.codes != single.codes).float().mean() < 0.02
    assert output_error(single, w, hessian) == pytest.approx(output_error(exact, w, hessian), rel=0.02)


@pytest.mark.parametrize(
    "scheme", ["w3a16_g48_asym", "w4a16_channel", "w8a16_g16", "w4a16_tensor", "nf4_g32", "w3a16_g32_fzero"]
)
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_output_error_is_below_that_of_rounding(scheme: str, clip: str) -> None:
    check_better_than_rounding(scheme, clip)


def test_output_error_is_below_that_of_rounding_at_two_bits() -> None:
    """With the full range, codes of -2 … 1 steps cannot follow the corrections that earlier columns ask for."""
    check_better_than_rounding("w2a16_g32", "mse")


def check_better_than_rounding(scheme: str, clip: str) -> None:
    w, hessian = problem(48, 144, tokens=1000)
    rounded = output_error(RTN(clip=clip).with_scheme(scheme).quantize(w), w, hessian)  # type: ignore[arg-type]
    for act_order in ORDERS:
        method = GPTQ(clip=clip, act_order=act_order).with_scheme(scheme)  # type: ignore[arg-type]
        assert output_error(method.quantize(w, hessian), w, hessian) < 0.8 * rounded


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_lowers_the_output_error(bits: int, act_order: str) -> None:
    """It is the default, and its share per group is chosen for the output: measured there, it pays."""
    w, hessian = problem(48, 256, tokens=1000)
    clipped = GPTQ(bits, 64, act_order=act_order).quantize(w, hessian)  # type: ignore[arg-type]
    whole = full_range(bits, 64, act_order=act_order).quantize(w, hessian)
    assert output_error(clipped, w, hessian) < 0.95 * output_error(whole, w, hessian)


def test_without_correlation_it_is_rounding() -> None:
    w, _ = problem(8, 64)
    hessian = torch.eye(64, dtype=torch.float64)
    for act_order in ORDERS:
        tensor = full_range(4, 16, act_order=act_order).quantize(w, hessian)  # type: ignore[arg-type]
        assert torch.equal(tensor.codes, RTN(4, 16).quantize(w).codes)
        assert tensor.group_index is None


def test_group_order_puts_columns_of_like_energy_together() -> None:
    w, hessian = problem(8, 96)
    tensor = full_range(4, 32, act_order="group").quantize(w, hessian)
    assert tensor.group_index is not None
    energy = hessian.diagonal()
    for group in range(tensor.G - 1):
        assert energy[tensor.group_index == group].min() >= energy[tensor.group_index == group + 1].max()


@pytest.mark.parametrize("act_order", ["none", "static"])
def test_other_orders_keep_natural_groups(act_order: str) -> None:
    w, hessian = problem(8, 96)
    assert full_range(4, 32, act_order=act_order).quantize(w, hessian).group_index is None  # type: ignore[arg-type]


def test_static_order_uses_the_grid_of_the_weight_as_it_came() -> None:
    w, hessian = problem(8, 96)
    tensor = full_range(4, 32, symmetric=False, act_order="static").quantize(w, hessian)
    plain = RTN(4, 32, symmetric=False).quantize(w)
    assert tensor.zeros is not None
    assert plain.zeros is not None
    assert torch.equal(tensor.scales, plain.scales)
    assert torch.equal(tensor.zeros, plain.zeros)


@pytest.mark.parametrize("act_order", ORDERS)
def test_dead_columns_are_rounded_and_disturb_nobody(act_order: str) -> None:
    w, hessian = problem(8, 64)
    dead = torch.tensor([3, 17, 40])
    hessian[dead] = 0
    hessian[:, dead] = 0
    method = full_range(4, 16, act_order=act_order)  # type: ignore[arg-type]
    tensor = method.quantize(w, hessian)
    assert torch.equal(tensor.codes, oracle(w, hessian, method)[0])
    step = tensor.scales[:, tensor.column_groups()].float()
    assert bool(((tensor.dequantize() - w)[:, dead].abs() <= step[:, dead] * 0.51).all())


def test_all_columns_dead() -> None:
    w, _ = problem(4, 32)
    tensor = full_range(4, 16).quantize(w, torch.zeros(32, 32))
    assert torch.equal(tensor.codes, RTN(4, 16).quantize(w).codes)


@pytest.mark.parametrize("scheme", ["w4a16_g16", "w2a16_g16_asym", "nf4_g16"])
@pytest.mark.parametrize("act_order", ORDERS)
def test_zero_rows_and_a_zero_first_group_stay_zero(scheme: str, act_order: str) -> None:
    """A later group of zeros need not: it takes over errors of the columns before it."""
    w, hessian = problem(4, 64)
    w[2] = 0
    tensor = full_range(act_order=act_order).with_scheme(scheme).quantize(w, hessian)  # type: ignore[arg-type]
    assert bool((tensor.dequantize()[2] == 0).all())
    assert bool((tensor.scales[2] == 1).all())
    w[:, :16] = 0
    tensor = full_range(act_order="none").with_scheme(scheme).quantize(w, hessian)
    assert bool((tensor.dequantize()[:, :16] == 0).all())
    assert bool((tensor.scales[:, 0] == 1).all())


def test_the_inverse_factor_is_one() -> None:
    _, hessian = problem(1, 40)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + torch.eye(40, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    assert torch.equal(factor, factor.triu())
    # a backward stable factorization and inverse: each entry is off by at most K eps times the condition number
    atol = 40 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(damped))
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40, dtype=torch.float64), rtol=0, atol=atol)


def test_damping_escalates_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, hessian = problem(1, 40)
    mean = hessian.diagonal().mean()
    smallest = torch.linalg.eigvalsh(hessian)[0]
    shifted = hessian - torch.eye(40) * (smallest + 0.05 * mean)  # the smallest eigenvalue is -5 % of the mean
    with caplog.at_level(logging.WARNING, "qkernels"):
        inverse_factor(shifted, 0.01, "layers.0.up_proj")
    assert "layers.0.up_proj: the Hessian needed a damping of 0.1 instead of 0.01" in caplog.text


def test_a_hopeless_hessian_is_named() -> None:
    w, hessian = problem(4, 40)
    with pytest.raises(
        CalibrationError, match=r"Hessian of down_proj\.weight is not positive definite with a damping of 1;"
    ):
        full_range(4, 8).quantize(w, hessian - torch.eye(40) * 9 * hessian.diagonal().mean(), "down_proj.weight")


@pytest.mark.parametrize(
    ("hessian", "error", "message"),
    [
        (
            torch.eye(7),
            ArgumentError,
            r"Hessian of weight must be float32 or float64 \[K, K\] = \[8, 8\], got torch.float32 \[7, 7\]",
        ),
        (torch.eye(8).half(), ArgumentError, r"must be float32 or float64 .* got torch.float16"),
        (torch.eye(8) * float("nan"), CalibrationError, "Hessian of weight has NaN or infinite entries"),
    ],
)
def test_hessians_that_do_not_fit(hessian: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        full_range(4, 8).quantize(torch.randn(4, 8), hessian)


def test_experts_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"GPTQ takes a weight \[N, K\], got weight \[2, 4, 8\]; quantize experts one by one"
    ):
        full_range(4, 8).quantize(torch.randn(2, 4, 8), torch.eye(8))


def test_statistics_do_not_depend_on_the_batches() -> None:
    """The sums of a batch are rounded once each: 1e-6 is 16 fp32 roundings of sums of like sign, and the off-diagonal ones
    are measured against the diagonal."""
    x = torch.randn(60, 16, dtype=torch.float64)
    one, many = InputStatistics(16), InputStatistics(16)
    one.update(x.view(3, 20, 16))
    for row in x.split(7):
        many.update(row)
    hessian = 2 / 60 * x.T @ x
    tolerance = 1e-6 * float(hessian.diagonal().max())
    for statistics in (one, many):
        assert statistics.tokens == 60
        torch.testing.assert_close(statistics.hessian().double(), hessian, rtol=0, atol=tolerance)
        torch.testing.assert_close(statistics.mean_magnitude().double(), x.abs().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "calibration sent no token through up_proj"),
        (torch.full((2, 4), float("nan")), "inputs of up_proj are NaN or infinite during calibration"),
        (torch.full((2, 4), 1e30), "inputs of up_proj are NaN or infinite during calibration"),
    ],
)
def test_statistics_that_cannot_be_used(x: Tensor | None, message: str) -> None:
    statistics = InputStatistics(4)
    if x is not None:
        statistics.update(x)
    for read in (statistics.hessian, statistics.mean_magnitude):
        with pytest.raises(CalibrationError, match=message):
            read("up_proj")
