"""Batches held between the steps of a block: the numbers of running it again, in one pass; and what does not go by the same way
in every batch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qkernels import GPTQ
from qkernels.errors import CalibrationError
from qkernels.layerwise import walking
from qkernels.layerwise.quantizing import Quantized, quantize_layer
from qkernels.layerwise.running import Call, LayerInputs, LayerJob, Place

CPU = Place(torch.device("cpu"))


class Chain(nn.Module):
    """Three linear layers; `second` and `third` change places for a batch that begins with a negative number, and `third` is
    left out where the first number is above 10."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(16, 16, bias=False) for _ in range(3))
        for linear in (self.first, self.second, self.third):
            linear.weight.data = torch.randn(16, 16, generator=generator)
        self.runs: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.runs["starts"] += 1
        backwards, short = bool(x[0, 0, 0] < 0), bool(x[0, 0, 0] > 10)
        x = self.first(x).relu()
        for linear in (self.third, self.second) if backwards else (self.second, self.third):
            if not (short and linear is self.third):
                x = linear(x).tanh()
        self.runs["ends"] += 1
        return x


def batches(*firsts: float) -> LayerInputs:
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(2, 20, 16, generator=generator) for _ in firsts]
    for x, first in zip(hidden, firsts, strict=True):
        x[0, 0, 0] = first
    return LayerInputs(hidden, [Call((), {}) for _ in firsts])


def quantized(layer: nn.Module, inputs: LayerInputs) -> dict[str, Quantized]:
    names = ("first", "second", "third")
    method = GPTQ(3, 8)
    job = LayerJob("layer", dict.fromkeys(names, method), {f"{n}.weight": torch.float32 for n in names}, CPU)
    with torch.no_grad():
        return quantize_layer(layer, inputs, job)[0]


def run_again(monkeypatch: pytest.MonkeyPatch, *firsts: float) -> tuple[Mapping[str, Quantized], list[Tensor]]:
    inputs = batches(*firsts)
    with monkeypatch.context() as patch:
        patch.setattr(walking, "HELD_BYTES", 0)
        return quantized(Chain(), inputs), inputs.hidden


@pytest.mark.parametrize(
    "firsts", [(1.0, 2.0, 3.0), (1.0, -2.0, 3.0), (1.0, 2.0, 11.0), (11.0, 2.0, 3.0), (-1.0, 11.0)], ids=str
)
def test_held_batches_give_the_numbers_of_runs_from_the_start(
    monkeypatch: pytest.MonkeyPatch, firsts: tuple[float, ...]
) -> None:
    """Also where a batch comes to the layers in another order, or not to all of them."""
    expected, outputs = run_again(monkeypatch, *firsts)
    inputs = batches(*firsts)
    got = quantized(Chain(), inputs)
    for name, result in expected.items():
        assert torch.equal(got[name].tensor.codes, result.tensor.codes), name
        assert torch.equal(got[name].tensor.scales, result.tensor.scales), name
        assert (got[name].error, got[name].fallback) == (result.error, result.fallback), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(inputs.hidden, outputs, strict=True))


def test_a_held_batch_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Chain()
    quantized(layer, batches(1.0, 2.0, 3.0))
    assert layer.runs == {"starts": 3 + 1, "ends": 3}  # and once for the order of its layers, up to the last of them
    layer = Chain()
    with monkeypatch.context() as patch:
        patch.setattr(walking, "HELD_BYTES", 0)
        quantized(layer, batches(1.0, 2.0, 3.0))
    assert layer.runs == {"starts": 1 + 4 * 3, "ends": 3}


def test_grad_mode_is_that_of_the_caller() -> None:
    modes = []

    class Watching(Chain):
        def forward(self, x: Tensor) -> Tensor:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().forward(x)

    quantized(Watching(), batches(1.0, 2.0))
    assert set(modes) == {(False, False)}


def test_an_error_in_a_batch_is_raised_and_no_thread_stays() -> None:
    class Failing(Chain):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            if self.runs["ends"] > 2:  # the second of the held ones
                raise CalibrationError("the mask does not fit")
            return result

    before = threading.active_count()
    with pytest.raises(CalibrationError, match="the mask does not fit"):
        quantized(Failing(), batches(1.0, 2.0, 3.0))
    assert threading.active_count() == before


def test_large_calibrations_are_not_held() -> None:
    assert walking.held_bytes(16384, 4096, 11008) == 4 * 16384 * (3 * 4096 + 11008)
    assert walking.held_bytes(128 * 2048, 4096, 11008) == 0
