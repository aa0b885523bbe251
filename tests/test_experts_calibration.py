"""Experts in `quantize`: in memory, from directories, with the tokens that the router sends to each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import AWQ, GPTQ, RTN, SmoothQuant, load, quantize
from qkernels.calibrate import preview
from qkernels.errors import ArgumentError
from qkernels.layerwise import walking
from qkernels.nn import QuantExperts
from qkernels.quantizers import rounding_of
from tests.moe_models import FAMILIES, lively

torch.manual_seed(0)
WINDOWS = torch.randint(2, 60, (24, 16))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(WINDOWS[:4]).logits
    return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
@pytest.mark.parametrize("method", [RTN(4, 8), GPTQ(4, 8), AWQ(4, 8, grid=4)], ids=["rtn", "gptq", "awq"])
def test_a_directory_is_quantized_as_a_model_is(family: str, method: Any, tmp_path: Path) -> None:
    model = lively(family)
    model.save_pretrained(tmp_path / "float")
    options: dict[str, Any] = {} if method.needs == "weight" else {"calibration": WINDOWS, "seq_len": 16}
    mine = copy.deepcopy(model)
    report = quantize(mine, method, progress=False, **options)
    stacks = [
        m
        for m in report.modules
        if m.name.rpartition(".")[2] in ("gate_up_proj", "up_proj", "down_proj") and ".experts." in m.name
    ]
    assert len(stacks) == 2 * sum(isinstance(m, QuantExperts) for m in mine.modules())
    assert all(0 < m.error < 0.5 for m in stacks)
    planned = preview(tmp_path / "float", method, seq_len=16)
    assert {m.name: m.bytes_after for m in planned.modules if ".experts." in m.name} == {
        m.name: m.bytes_after for m in stacks
    }
    quantize(tmp_path / "float", method, save_to=tmp_path / "out", progress=False, **options)
    assert torch.equal(logits(load(tmp_path / "out")), logits(mine))


def test_gptq_keeps_more_of_what_experts_put_out_than_rounding() -> None:
    model = lively("mixtral")
    errors = {}
    for name, method in (("rtn", RTN(3, 8)), ("gptq", GPTQ(3, 8))):
        made = copy.deepcopy(model)
        quantize(made, method, include="*experts", calibration=WINDOWS, seq_len=16, progress=False)
        errors[name] = float((logits(made) - logits(model)).square().mean())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def loud(family: str) -> Any:
    """A few channels of every norm are louder than the others, as in models that were trained."""
    model = lively(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter[::7] *= 12
            elif name.endswith(("gate.weight", "router.weight")):
                parameter /= 4
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_shared_by_all_that_read_them(family: str) -> None:
    """One scale for experts, router and shared experts: the model computes what it did; 8 bits show it. A scale that the router
    did not get would send most tokens to other experts."""
    model = loud(family)
    made = copy.deepcopy(model)
    report = quantize(
        made, AWQ(8, 8, grid=2), calibration=WINDOWS, seq_len=16, progress=False, on_unsupported="reference"
    )
    stacks = [m for m in report.modules if m.name.endswith((".experts.gate_up_proj", ".experts.up_proj"))]
    assert stacks and all(m.unscaled is None and m.method == "awq" for m in stacks)
    assert all(m.unscaled for m in report.modules if m.name.endswith(".experts.down_proj"))
    changed = [
        name
        for name, module in made.named_modules()
        if name.endswith(("post_attention_layernorm", ".norm"))
        and not torch.equal(module.weight, model.get_submodule(name).weight)  # type: ignore[arg-type]
    ]
    assert changed, "no scale was taken"
    far = (logits(made) - logits(model)).abs() > 0.05 * logits(model).abs().max()
    assert float(far.float().mean()) < 0.05  # a token between two experts may go to the other one


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "llama4"])
def test_awq_keeps_more_of_loud_channels_than_rounding(family: str) -> None:
    model = loud(family)
    errors = {}
    for name, method in (("rtn", RTN(3, 8, symmetric=False)), ("awq", AWQ(3, 8, clip="none", grid=8))):
        made = copy.deepcopy(model)
        options: dict[str, Any] = {"calibration": WINDOWS, "seq_len": 16} if name == "awq" else {}
        quantize(made, method, include="*experts", progress=False, on_unsupported="reference", **options)
        errors[name] = float((logits(made) - logits(model)).square().mean())
    assert errors["awq"] < 0.9 * errors["rtn"], errors


def test_smoothquant_scales_experts_too() -> None:
    model = loud("qwen2_moe")
    made = copy.deepcopy(model)
    quantize(made, SmoothQuant(), calibration=WINDOWS, seq_len=16, progress=False, on_unsupported="reference")
    plain = copy.deepcopy(model)
    quantize(plain, RTN(8, "channel", act="int8"), progress=False, on_unsupported="reference")
    errors = [float((logits(m) - logits(model)).square().mean()) for m in (made, plain)]
    assert errors[0] < 0.8 * errors[1], errors


def test_one_expert_has_the_bits_of_a_linear_layer_with_its_tokens() -> None:
    model = lively("mixtral")
    block = model.model.layers[0].mlp
    taken: list[tuple[Tensor, Tensor]] = []
    handle = block.experts.register_forward_pre_hook(lambda m, args: taken.append((args[0], args[1])))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    x, ids = taken[0]
    rows = x[(ids == 2).any(1)]
    weight = block.experts.gate_up_proj[2].detach()
    expected = GPTQ(4, 8, act_order="static").quantize(weight, 2 / len(rows) * rows.T @ rows)
    made = copy.deepcopy(model)
    quantize(made, GPTQ(4, 8), include="*layers.0.mlp.experts", calibration=WINDOWS, seq_len=16, progress=False)
    got = made.model.layers[0].mlp.experts.gate_up_proj.quant_tensor()[2]
    assert got.group_index is None
    assert float((got.codes == expected.codes).float().mean()) > 0.999  # sums in another order


def test_all_tokens_through_every_expert() -> None:
    """One set of second moments for up, of all tokens; no expert is too rare; what it costs shows on the tokens that come."""
    model = lively("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[:] = 0
            layer.mlp.gate.weight[0] = (
                5  # of half of the tokens experts 1, 2, 3 are the best, by a tie that goes to 1 and 2
            )
    inputs: list[tuple[Tensor, Tensor]] = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: inputs.append(args[:2]))
    logits(model)
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    x, ids = inputs[-1]
    absent = [e for e in range(4) if not bool((ids == e).any())]
    assert absent, "every expert has tokens"
    made = {routing: copy.deepcopy(model) for routing in ("routed", "all")}
    options: dict[str, Any] = {
        "include": "*layers.0.mlp.experts",
        "calibration": WINDOWS,
        "seq_len": 16,
        "progress": False,
    }
    reports = {routing: quantize(m, GPTQ(4, 8), routing=routing, **options) for routing, m in made.items()}
    assert all(m.few for m in reports["routed"].modules) and not any(m.few for m in reports["all"].modules)
    assert not any(m.fallback for report in reports.values() for m in report.modules)
    assert "routing='all'" in reports["all"].options and "routing" not in reports["routed"].options
    weight = model.model.layers[0].mlp.experts.gate_up_proj[absent[0]].detach()
    expected = GPTQ(4, 8, act_order="static").quantize(weight, 2 / len(x) * x.T @ x)
    got = made["all"].model.layers[0].mlp.experts.gate_up_proj.quant_tensor()[absent[0]]
    assert float((got.codes == expected.codes).float().mean()) > 0.999
    inner = x @ expected.dequantize().T
    inner = torch.nn.functional.silu(inner[:, :40]) * inner[:, 40:]
    down = model.model.layers[0].mlp.experts.down_proj[absent[0]].detach()
    expected = GPTQ(4, 8, act_order="static").quantize(down, 2 / len(x) * inner.T @ inner)
    stacks = {routing: m.model.layers[0].mlp.experts.down_proj.quant_tensor() for routing, m in made.items()}
    assert float((stacks["all"][absent[0]].codes == expected.codes).float().mean()) > 0.99
    assert torch.equal(stacks["routed"][absent[0]].codes, stacks["all"][absent[0]].codes)
    assert not torch.equal(stacks["routed"].codes, stacks["all"].codes)
    with pytest.raises(ArgumentError, match='routing must be "routed" or "all"'):
        quantize(model, GPTQ(4, 8), routing="some", **options)  # type: ignore[arg-type]


def test_a_dry_run_says_what_hessians_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One set at a time, whatever the number of experts; and what goes into the experts, for all of the calibration, or what is
    held of it before that, if it is more."""
    lively("mixtral").save_pretrained(tmp_path)
    held = preview(tmp_path, GPTQ(4, 8), samples=8, seq_len=16)
    monkeypatch.setattr(walking, "HELD_BYTES", 0)
    few, many = (preview(tmp_path, GPTQ(4, 8), samples=samples, seq_len=16) for samples in (8, 16))
    assert few.moments_bytes == 4 * (3 * 40**2 + 32**2)
    assert many.device_bytes - few.device_bytes == 4 * 8 * 16 * 32
    layer = sum(p.numel() for p in lively("mixtral").model.layers[0].parameters())
    assert few.device_bytes == 4 * layer + few.moments_bytes + 4 * 8 * 16 * 32 + 4 * (2 * 80 * 32 + 32 * 40)
    assert held.device_bytes == 4 * layer + held.moments_bytes + 4 * 8 * 16 * (3 * 32 + 32)
    assert "of them for Hessians" in few.to_markdown()
    assert preview(tmp_path, RTN(4, 8)).moments_bytes == 0


def test_experts_that_see_few_tokens_are_calibrated_with_all_and_listed() -> None:
    model = lively("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] *= 0.01

    def away_from_3(module: nn.Module, args: Any, output: Any) -> Any:
        scores, weights, ids = output
        return scores, weights, torch.where(ids == 3, (ids[:, :1] + 1) % 3, ids)

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(away_from_3)
    made = copy.deepcopy(model)
    report = quantize(made, GPTQ(4, 8), include="*experts", calibration=WINDOWS, seq_len=16, progress=False)
    for module in report.modules:
        assert module.few == (
            "1 of 4 experts saw fewer than 128 of 384 tokens, and are calibrated with 384 of all: 3 (0 tokens)"
        )
        assert (module.method, module.fallback) == ("gptq", None)
        assert f"- {module.name}: {module.few}" in report.to_markdown()
    stack = made.model.layers[0].mlp.experts.down_proj.quant_tensor()
    rounded = rounding_of(GPTQ(4, 8)).quantize(model.model.layers[0].mlp.experts.down_proj[3].detach())
    assert not torch.equal(stack[3].codes, rounded.codes)
