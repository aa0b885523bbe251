"""`GPTQ(aim="model")`: layers make up for the errors of those before them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qkernels import GPTQ, RTN, load
from qkernels.calibrate import preview, quantize
from qkernels.errors import ArgumentError
from qkernels.layerwise import quantizing, walking
from qkernels.layerwise.quantizing import quantize_layer
from qkernels.layerwise.running import Call, LayerInputs, LayerJob, Place
from qkernels.quantizers.gptq import aimed
from tests.moe_models import lively
from tests.tiny_models import VOCABULARY, divergence, loud_model, run, token_windows

AIMED = GPTQ(3, 16, aim="model")
CPU = Place(torch.device("cpu"))


def test_the_aimed_weight_is_the_best_real_one() -> None:
    """The least squares of `W' x̂ = W x`, with next to no damping."""
    torch.manual_seed(0)
    x = torch.randn(200, 24, dtype=torch.float64)
    changed = x + 0.3 * torch.randn_like(x) @ torch.randn(24, 24, dtype=torch.float64) / 24**0.5
    weight = torch.randn(8, 24, dtype=torch.float64)
    moments, cross = (2 / 200 * left.T @ changed for left in (changed, x - changed))
    best = aimed(weight, GPTQ(aim="model", damping=1e-12).prepared(moments), cross)
    expected = torch.linalg.lstsq(changed, x @ weight.T).solution.T
    torch.testing.assert_close(best, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(best, weight, atol=1e-2)
    assert torch.equal(aimed(weight, GPTQ(aim="model").prepared(moments), torch.zeros_like(cross)), weight)


def test_a_column_that_was_always_0_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    x[:, 3] = 0
    weight = torch.randn(4, 8)
    best = aimed(weight, AIMED.prepared(x.T @ x), (0.1 * x).T @ x)
    assert torch.equal(best[:, 3], weight[:, 3])
    assert not torch.equal(best, weight)


class Two(nn.Module):
    """One linear layer after another; the second gets the first `rows` of every batch alone."""

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        for linear in (self.first, self.second):
            linear.weight.data = torch.randn(16, 16, generator=generator)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()[:, : self.rows])


def of_two(aim: Any, rows: int | None = None, inputs: LayerInputs | None = None) -> tuple[nn.Module, LayerInputs]:
    """Quantized, and what it left in its inputs."""
    if inputs is None:
        hidden = list(torch.randn(3, 2, 40, 16, generator=torch.Generator().manual_seed(1)))
        inputs = LayerInputs([*hidden], [Call((), {})] * 3, [*hidden] if aim == "model" else None)
    layer, names = Two(rows), ("first", "second")
    methods = {"first": GPTQ(2, 8, aim=aim), "second": GPTQ(8, 8, aim=aim)}
    with torch.no_grad():
        quantize_layer(layer, inputs, LayerJob("layer", methods, {f"{n}.weight": torch.float32 for n in names}, CPU))
    return layer, inputs


@pytest.mark.parametrize("held", [True, False])
def test_the_second_layer_makes_up_for_the_first(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are nearer to the float ones; the first, before which nothing is quantized, is the same; and the float hidden
    states go on beside."""
    if not held:
        monkeypatch.setattr(walking, "HELD_BYTES", 0)
    plain, without = of_two("layer")
    better, inputs = of_two("model")
    assert torch.equal(better.first.weight, plain.first.weight)
    x = torch.randn(3, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = Two()(x)
        errors = [float((layer(x) - expected).square().mean()) for layer in (plain, better)]
    assert errors[1] < 0.8 * errors[0]
    assert inputs.exact is not None and without.exact is None
    assert torch.equal(torch.stack(inputs.exact), expected)
    with torch.no_grad():
        assert torch.equal(torch.stack(inputs.hidden), better(x))


def test_rows_of_some_tokens_only_are_not_taken_for_those_of_others() -> None:
    assert torch.equal(of_two("model", rows=20)[0].second.weight, of_two("layer", rows=20)[0].second.weight)


def test_held_batches_give_the_numbers_of_runs_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud_model()
    again = copy.deepcopy(model)
    run(model, AIMED)
    monkeypatch.setattr(walking, "HELD_BYTES", 0)
    run(again, AIMED)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("scales", ["none", "awq"])
def test_a_directory_gives_the_same_as_memory(scales: Any, tmp_path: Path) -> None:
    """And less of the float model is lost than without."""
    method = GPTQ(3, 16, symmetric=False, scales=scales, aim="model")
    model = loud_model()
    original, other = copy.deepcopy(model), copy.deepcopy(model)
    model.save_pretrained(tmp_path / "source")
    run(tmp_path / "source", method, save_to=tmp_path / "out", calibration=token_windows(64))
    run(model, method, calibration=token_windows(64))
    run(other, GPTQ(3, 16, symmetric=False, scales=scales), calibration=token_windows(64))
    expected = model.state_dict()
    for name, value in load(tmp_path / "out", on_unsupported="reference").state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert divergence(model, original) < divergence(other, original)


def test_a_run_that_goes_on_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lanes of activations are there again."""
    source = tmp_path / "source"
    loud_model().save_pretrained(source)
    run(source, AIMED, save_to=tmp_path / "whole")
    one_block, blocks = quantizing._one_block, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        blocks.append(args[2])
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return one_block(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "_one_block", failing)
        with pytest.raises(KeyboardInterrupt):
            run(source, AIMED, save_to=tmp_path / "parts")
    run(source, AIMED, save_to=tmp_path / "parts", resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


def test_experts_aim_too() -> None:
    """A layer whose attention is coarse: experts make up for it, and their down projection for their up."""
    model, windows = lively("mixtral"), torch.randint(2, 60, (24, 16), generator=torch.Generator().manual_seed(0))
    errors, quantized = {}, {}
    for aim in ("layer", "model"):
        quantized[aim] = copy.deepcopy(model)
        method: Any = GPTQ(3, 8, aim=aim)
        quantize(quantized[aim], method, calibration=windows, seq_len=16, progress=False)
        errors[aim] = divergence(quantized[aim], model)
    assert errors["model"] < errors["layer"]
    stacks = [
        {name: value for name, value in one.state_dict().items() if "experts" in name and name.endswith("qweight")}
        for one in quantized.values()
    ]
    assert stacks[0] and any(not torch.equal(stacks[0][name], stacks[1][name]) for name in stacks[0])


def test_blocks_that_pass_on_more_than_hidden_states_say_so(caplog: pytest.LogCaptureFixture) -> None:
    """T5's second chain starts with what the first, quantized, put out."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes)).eval()
    with caplog.at_level(logging.WARNING):
        run(model, AIMED)
    assert "aims at its own output" in caplog.text


def test_memory_and_disk_are_told(tmp_path: Path) -> None:
    loud_model().save_pretrained(tmp_path / "source")
    plain, both = (preview(tmp_path / "source", GPTQ(3, 16, aim=aim), seq_len=16) for aim in ("layer", "model"))
    assert both.host_bytes == 2 * plain.host_bytes
    assert both.disk_bytes - plain.disk_bytes == 2 * plain.host_bytes
    assert both.device_bytes > plain.device_bytes


def test_what_it_is_not() -> None:
    with pytest.raises(ArgumentError, match='aim must be "layer" or "model"'):
        GPTQ(aim="output")  # type: ignore[arg-type]
    assert not GPTQ().aims and not RTN().aims
