"""Ways into a model of `QuantLinear` from outside: as for `nn.Linear`, or an error; never "matched" with nothing loaded."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qkernels import QuantLinear, replace_linear
from tests.ops.helpers import integers, layer_in
from tests.strategies import random_weight, same_weight

SCHEME = "w4a16_g32_asym"


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
    replace_linear(model, SCHEME, progress=False)
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(QuantLinear(64, 32, scheme=SCHEME), nn.ReLU(), QuantLinear(32, 8, False, scheme=SCHEME))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a(integers(3, 64)), b(integers(3, 64)))


@pytest.mark.parametrize("made", [lambda: model_of(1), on_meta])
def test_assign_takes_the_tensors_themselves(made: object) -> None:
    source, target = model_of(0), made()  # type: ignore[operator]
    state = source.state_dict()
    assert str(target.load_state_dict(state, assign=True)) == "<All keys matched successfully>"
    assert all(t.device.type == "cpu" for t in (*target.parameters(), *target.buffers()))
    assert target[0].qweight.data_ptr() == state["0.qweight"].data_ptr()
    assert target[0].bias.data_ptr() == state["0.bias"].data_ptr()
    assert target[0].bias.requires_grad
    assert equal(source, target)


def test_assign_of_another_layout_is_repacked_where_the_tensors_are() -> None:
    weight = random_weight(SCHEME, 32, 64)
    with torch.device("meta"):
        target = QuantLinear(64, 32, bias=False, scheme=SCHEME)
    target.load_state_dict(layer_in("reference", weight).state_dict(), assign=True)
    assert target.layout == "cpu_tile_a16"
    assert same_weight(target.quant_tensor(), weight)


def test_a_copy_into_meta_is_an_error() -> None:
    """nn.Linear warns that it is a no-op; a model that was never loaded must not look loaded."""
    with pytest.raises(RuntimeError, match=r"0: the layer is on meta, so a copy would load nothing; pass assign=True"):
        on_meta().load_state_dict(model_of(0).state_dict())
    with pytest.raises(RuntimeError, match="the state dict is on meta and has no values to load"):
        model_of(0).load_state_dict(on_meta().state_dict())
    assert on_meta().load_state_dict(on_meta().state_dict()) == ([], [])


def test_a_bias_alone_is_loaded() -> None:
    model = model_of(0)
    weight = model[0].quant_tensor()
    result = model.load_state_dict({"0.bias": integers(32)}, strict=False)
    assert torch.equal(model[0].bias, integers(32))
    assert result.missing_keys == ["0.qweight", "0.scales", "2.qweight", "2.scales"]
    assert same_weight(model[0].quant_tensor(), weight)


def test_a_weight_without_a_bias_names_the_bias() -> None:
    source, target = model_of(0), model_of(1)
    kept = target[0].bias.clone()
    result = target.load_state_dict({k: v for k, v in source.state_dict().items() if k != "0.bias"}, strict=False)
    assert result.missing_keys == ["0.bias"]
    assert torch.equal(target[0].bias, kept)
    assert same_weight(target[0].quant_tensor(), source[0].quant_tensor())


@pytest.mark.parametrize("absent", ["qweight", "scales", "zeros"])
def test_a_part_of_a_packed_weight_is_refused(absent: str) -> None:
    model, state = model_of(1), model_of(0).state_dict()
    weight = model[0].quant_tensor()
    del state[f"0.{absent}"]
    message = "zeros must be .* got absent" if absent == "zeros" else "loaded together, got .* without"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=False)
    assert same_weight(model[0].quant_tensor(), weight)


def test_a_float_state_dict_names_both_sides() -> None:
    model = model_of(0)
    result = model.load_state_dict({"0.weight": torch.zeros(32, 64), "0.bias": torch.zeros(32)}, strict=False)
    assert "0.weight" in result.unexpected_keys
    assert "0.qweight" in result.missing_keys
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"0.qweight".*Unexpected key.*"0.weight"'):
        model.load_state_dict({"0.weight": torch.zeros(32, 64)})


def test_hooks_before_loading_run() -> None:
    model, source = model_of(1), model_of(0)
    state = {key.replace("0.", "0.old_"): t for key, t in source.state_dict().items()}

    def rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old_")]:
            state[key.replace("old_", "")] = state.pop(key)

    model[0].register_load_state_dict_pre_hook(rename)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert equal(model, source)


def test_accelerate_loads_tensor_by_tensor(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    source, file = model_of(0), tmp_path / "model.safetensors"
    save_file(source.state_dict(), file, metadata={"format": "pt"})
    for target, device_map in ((model_of(1), {"": "cpu"}), (model_of(1), None), (on_meta(), {"": "cpu"})):
        accelerate.load_checkpoint_in_model(target, str(file), device_map=device_map, strict=True)
        assert equal(source, target)
    accelerate.utils.set_module_tensor_to_device(target, "0.bias", "cpu", integers(32))
    assert torch.equal(target[0].bias, integers(32))
    other = nn.Sequential(QuantLinear(64, 32, scheme="w8a16_g32"))
    with pytest.raises(ValueError, match="shape"):
        accelerate.load_checkpoint_in_model(other, str(file), device_map={"": "cpu"})


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    source, target = model_of(0), model_of(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state_dict.get_model_state_dict(source), checkpoint_id=tmp_path / "dcp", no_dist=True)
        state = state_dict.get_model_state_dict(target)
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        state_dict.set_model_state_dict(target, state)
    assert equal(source, target)


def test_the_extra_state_is_a_buffer() -> None:
    layer = model_of(0)[0]
    assert torch.equal(layer.state_dict()["_extra_state"], dict(layer.named_buffers())["_extra_state"])
    with pytest.raises(RuntimeError, match="get_extra_state"):  # as of nn.Linear: there is none beside the buffers
        layer.get_extra_state()


def test_peft_adapters_on_all_linear_layers_and_all_biases() -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from qkernels.integrations.peft import on_quantized

    def tuned() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )  # its q, k and v have biases
        model = transformers.Qwen2ForCausalLM(config)
        replace_linear(model, "w8a16_g32", exclude=(), progress=False)
        return get_peft_model(model, on_quantized(LoraConfig(r=4, target_modules="ALL-linear", bias="all")))

    model, again = tuned(), tuned()
    layers = [name for name, module in model.named_modules() if type(module).__name__ == "QuantLoraLinear"]
    assert sorted(name.rpartition(".")[2] for name in layers) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    biases = {name: p for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.bias")}
    assert len(biases) == 1 and all(p.requires_grad for p in biases.values())
    with torch.no_grad():
        for bias in biases.values():
            bias.fill_(3)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert all(torch.equal(again.get_parameter(name), p) for name, p in biases.items())
