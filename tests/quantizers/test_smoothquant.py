"""SmoothQuant: equation 4, what it is for, and that a smoothed layer computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from qkernels import RTN, SmoothQuant
from qkernels.errors import ArgumentError
from qkernels.layerwise.folds import HeadSharing
from qkernels.layerwise.running import LayerInputs, LayerJob, Place, run_layer
from qkernels.layerwise.scaling import smooth_inputs
from qkernels.layerwise.tracing import find_folds
from qkernels.models.architectures import decoder_layers, expected_folds
from qkernels.quantizers import InputStatistics
from tests.tiny_models import VOCABULARY, first_inputs, tiny_model

X, W = torch.tensor([16.0, 1.0, 0.25, 4.0]), torch.tensor([1.0, 1.0, 4.0, 0.25])


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_scales_follow_the_formula(alpha: float) -> None:
    expected = X**alpha / W ** (1 - alpha)
    expected = expected / (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(SmoothQuant(alpha=alpha).scales(X, W), expected)


def test_at_one_half_both_sides_are_equally_loud() -> None:
    """Section 4.1: max|X_j| / s_j and s_j max|W_j| are one number times a common factor."""
    scales = SmoothQuant().scales(X, W)
    ratio = (X / scales) / (W * scales)
    torch.testing.assert_close(ratio, ratio[:1].expand(4))


def test_silent_channels_keep_a_scale_of_one() -> None:
    scales = SmoothQuant().scales(torch.tensor([0.0, 2.0, 8.0, 3.0]), torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert scales[0] == scales[3] == 1
    assert torch.equal(SmoothQuant().scales(torch.zeros(4), W), torch.ones(4))


def fake_quantized(x: Tensor) -> Tensor:
    """int8 per token, as W8A8 kernels quantize activations."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("bits", [8, 4])
def test_smoothing_lowers_the_error_where_a_channel_is_loud(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 128, generator=generator), torch.randn(500, 128, generator=generator)
    x[:, :3] *= 100
    method = SmoothQuant(bits)
    scales = method.scales(x.abs().amax(0), w.abs().amax(0))
    plain = fake_quantized(x) @ RTN().with_scheme(method.scheme).quantize(w).dequantize().T
    smooth = fake_quantized(x / scales) @ method.quantize(w * scales).dequantize().T
    truth = x @ w.T
    assert float((smooth - truth).norm()) < 0.8 * float((plain - truth).norm())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt", "phi3"])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_a_smoothed_layer_computes_what_it_did(model_type: str, alpha: float) -> None:
    """In float64: folding is exact but for rounding, also through grouped-query attention's shared value heads.
    (Gemma's norms multiply in fp32 whatever the dtype; their fold has its test in test_awq.py.)"""
    model = tiny_model(model_type).double()
    name, layers = decoder_layers(model)
    place = Place(torch.device("cpu"), torch.float64)
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chain = first_inputs(model, ids, torch.float64)
        inputs = LayerInputs(chain.hidden, chain.calls[f"{name}.0"])
        before = copy.deepcopy(layers[0].state_dict())
        stored = {name: torch.float64 for name in before}
        job = LayerJob("0", {}, stored, place)
        folds = find_folds(layers[0], inputs, place, "0").proved
        (expected,) = run_layer(layers[0], inputs, place)
        assert [found.fold for found in folds] == [*expected_folds(model)]
        for fold in folds:
            smooth_inputs(layers[0], fold, SmoothQuant(alpha=alpha), inputs, job)
        (got,) = run_layer(layers[0], inputs, place)
    assert any(not torch.equal(before[name], value) for name, value in layers[0].state_dict().items())
    # the scales are fp32 numbers and used as they are: only float64 rounding is left, 2^-52 times some hundred operations
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_loudest_of_shared_channels_decides() -> None:
    sharing = HeadSharing(repeats=2, width=2)
    assert sharing.largest(torch.tensor([1.0, 2.0, 5.0, 0.0, 3.0, 3.0, 4.0, 1.0])).tolist() == [5, 2, 4, 3]


def test_largest_magnitude_over_batches() -> None:
    statistics = InputStatistics(2)
    statistics.update(torch.tensor([[1.0, -7.0], [2.0, 0.5]]))
    statistics.update(torch.zeros(0, 2))
    statistics.update(torch.tensor([[-3.0, 1.0]]))
    assert statistics.largest_magnitude().tolist() == [3, 7]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, True, float("nan"), "half"])
def test_alpha_out_of_range(alpha: object) -> None:
    with pytest.raises(ArgumentError, match=r"alpha must be in \[0, 1\], got"):
        SmoothQuant(alpha=alpha)  # type: ignore[arg-type]


def test_the_scheme_is_w8a8_per_channel() -> None:
    assert str(SmoothQuant().scheme) == "w8a8_channel"
    assert str(SmoothQuant(4, 128).scheme) == "w4a8_g128"
