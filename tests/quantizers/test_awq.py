"""The pure half of AWQ: candidate scales, their search, folding."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from qkernels.quantizers import AWQ, RTN
from qkernels.quantizers.awq import clips, fold_into_norm, fold_into_rows, search, weight_magnitude

X = torch.tensor([0.5, 2.0, 8.0, 1.0])
W = torch.tensor([0.2, 0.1, 0.4, 0.3])


@pytest.mark.parametrize("duo", [True, False])
def test_candidates_hold_identity_and_the_full_ratio(duo: bool) -> None:
    candidates = AWQ(grid=20, duo_scaling=duo).candidates(X, W)
    assert len(candidates) == (22 if duo else 21)
    assert torch.equal(candidates[0], torch.ones(4))
    full = X / (1 + 1e-4 if duo else 1)
    torch.testing.assert_close(candidates[-1], full / (full.max() * full.min()).sqrt())


def test_candidates_follow_the_formula() -> None:
    scales = AWQ(grid=4).candidates(X, W)[1 + 3]
    expected = [x**0.75 / (w**0.25 + 1e-4) for x, w in zip(X.tolist(), W.tolist(), strict=True)]
    middle = math.sqrt(max(expected) * min(expected))
    torch.testing.assert_close(scales, torch.tensor(expected) / middle)


def test_channels_that_were_always_zero_keep_a_scale_of_one() -> None:
    for scales in AWQ().candidates(torch.tensor([0.0, 2.0, 8.0, 0.0]), W):
        assert scales[0] == scales[3] == 1
        assert bool(torch.isfinite(scales).all())
        assert float(scales.max() / scales.min()) <= 1e4
    assert len(AWQ().candidates(torch.zeros(4), W)) == 1


def test_search_takes_the_least_loss_and_no_scale_on_a_tie() -> None:
    tries = [torch.full((2,), float(i)) for i in range(4)]
    losses = iter([3.0, 1.0, float("nan"), 1.0])
    choice = search(tries, lambda scales, part: next(losses))
    assert choice.scales is tries[1]
    assert (choice.loss, choice.unscaled_loss) == (1.0, 3.0)
    assert search(tries, lambda scales, part: 5.0).scales is tries[0]
    assert search(tries, lambda scales, part: 5.0, batches=0).scales is tries[0]


def test_search_is_a_race_in_which_no_scale_runs_to_the_end() -> None:
    tries = [torch.tensor([float(i)]) for i in range(22)]
    ran: Counter[int] = Counter()

    def loss(scales: torch.Tensor, part: range) -> float:
        i = int(scales)
        ran[i] += len(part)
        if i == 8:
            return sum(0.0 if batch < 2 else 100.0 for batch in part)  # the best at first
        return len(part) * (9.0 if i == 0 else 1 + abs(i - 10) / 10)

    choice = search(tries, loss, 8)
    assert choice.scales is tries[10]
    assert (choice.loss, choice.unscaled_loss) == (8.0, 72.0)
    assert ran[0] == ran[10] == 8
    assert sum(ran.values()) == 22 + 8 + 3 * 2 + 2 * 4


def test_weight_magnitude_is_relative_to_the_group() -> None:
    w = torch.tensor([[1.0, -2.0, 10.0, 5.0, 3.0]])
    torch.testing.assert_close(weight_magnitude([w], 2), torch.tensor([0.5, 1.0, 1.0, 0.5, 1.0]))
    torch.testing.assert_close(weight_magnitude([w, 2 * w], 2), weight_magnitude([w], 2))
    assert bool((weight_magnitude([torch.zeros(2, 4)], 2) == 0).all())


def test_scaling_protects_a_salient_channel() -> None:
    """The paper's point: with one loud input channel, a scale lowers the output error."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 128, generator=g), torch.randn(500, 128, generator=g)
    x[:, 5] *= 50
    method = AWQ(group_size=128, scale_dtype=torch.float32)

    def loss(scales: torch.Tensor, part: range) -> float:
        return float(((method.rounded(w, scales) - w) @ x.T).square().sum())

    choice = search(method.candidates(x.abs().mean(0), weight_magnitude([w], 128)), loss)
    assert choice.loss < 0.5 * choice.unscaled_loss
    assert choice.scales[5] == choice.scales.max()


def test_rounded_without_scales_is_round_to_nearest() -> None:
    w = torch.randn(8, 32)
    method = AWQ(3, 16, symmetric=True)
    assert torch.equal(method.rounded(w, torch.ones(32)), RTN(3, 16).quantize(w).dequantize())


def test_quantize_clips_only_with_second_moments() -> None:
    w = torch.randn(32, 64)
    gram = torch.eye(64)
    assert torch.equal(AWQ(3, 32).quantize(w).codes, RTN(3, 32, symmetric=False).quantize(w).codes)
    clipped = RTN(3, 32, symmetric=False, clip="mse").quantize(w)
    assert torch.equal(AWQ(3, 32).quantize(w, gram).scales, clipped.scales)
    assert torch.equal(AWQ(3, 32, clip="none").quantize(w, gram).codes, AWQ(3, 32).quantize(w).codes)


@pytest.mark.parametrize(
    ("name", "clipped"),
    [("self_attn.q_proj", False), ("self_attn.k_proj", False), ("self_attn.v_proj", True), ("mlp.up_proj", True)],
)
def test_queries_and_keys_are_not_clipped(name: str, clipped: bool) -> None:
    assert clips(name) is clipped
    w, gram = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)), torch.eye(64)
    whole, made = AWQ(3, 32).quantize(w).scales, AWQ(3, 32).quantize(w, gram, f"layers.0.{name}.weight").scales
    assert torch.equal(made, whole) is not clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_folding_into_a_norm_is_exact_in_its_stored_dtype(dtype: torch.dtype, unit_offset: bool) -> None:
    """gain x (scaled weight) is the same up to two fp32 roundings, although the new gain is rounded to `dtype`."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, generator=g).to(dtype).float()
    weight[7] = -1.0 if unit_offset else 0.0  # a channel that the norm switches off
    scales = torch.rand(64, generator=g) * 3 + 0.1
    folded, bias, exact = fold_into_norm(weight, None, scales, dtype, unit_offset)
    offset = 1.0 if unit_offset else 0.0
    assert bias is None
    assert torch.equal(folded.to(dtype).float(), folded)
    torch.testing.assert_close((folded + offset) * exact, weight + offset, rtol=3e-7, atol=0)
    assert exact[7] == scales[7]


def test_folding_into_a_layer_norm_takes_the_bias_along() -> None:
    weight, bias, scales = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]), torch.tensor([2.0, 0.5])
    folded, new_bias, exact = fold_into_norm(weight, bias, scales, torch.float32, False)
    assert new_bias is not None
    assert torch.equal(folded, torch.tensor([0.5, 4.0]))
    assert torch.equal(new_bias * exact, bias)
    assert torch.equal(exact, scales)


def test_folding_into_a_linear_divides_its_rows() -> None:
    weight, bias = fold_into_rows(torch.ones(2, 3), torch.ones(2), torch.tensor([2.0, 4.0]))
    assert bias is not None
    assert torch.equal(weight, torch.tensor([[0.5] * 3, [0.25] * 3]))
    assert torch.equal(bias, torch.tensor([0.5, 0.25]))
