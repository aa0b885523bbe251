"""Quantized experts and files: the native format (stacked) and those of others (expert by expert), both loaders, every family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qkernels import RTN, QuantTensor, load, replace_linear, save
from qkernels.checkpoint import convert
from qkernels.errors import CheckpointError, ConversionError, UnsupportedProblem
from qkernels.formats import FORMATS
from qkernels.integrations.transformers import QKernelsConfig, enable
from qkernels.models.experts import experts_of, members_of
from qkernels.models.naming import FileNames, into_model
from qkernels.nn import QuantExperts, QuantStack
from qkernels.planning import plan
from qkernels.scheme import CODEBOOKS
from tests.moe_models import FAMILIES, edited, shipped, tiny_moe

TOKENS = torch.tensor([[1, 5, 9, 33, 12, 40, 7, 2]])
SCHEMES = {"gptq": "w4a16_g8", "awq": "w4a16_g8_asym", "compressed-tensors": "w4a16_g8", "native": "w4a16_g8"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def quantized(family: str, scheme: str, **changes: Any) -> Any:
    model = tiny_moe(family, **changes)
    replace_linear(model, scheme, include="*experts")
    return model


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_native_files_of_every_family(family: str, tmp_path: Path) -> None:
    model = quantized(family, "w4a16_g8")
    save(model, tmp_path / "ours")
    assert any(name.endswith(".experts.down_proj.qweight") for name in tensors_of(tmp_path / "ours"))
    routers = [
        name.partition(".block_sparse_moe.")[0]
        for name in tensors_of(tmp_path / "ours")
        if ".block_sparse_moe." in name
    ]
    stacks = [name for name in tensors_of(tmp_path / "ours") if name.endswith(".experts.down_proj.qweight")]
    assert all(
        ".block_sparse_moe." in name for name in stacks if name.partition(".mlp.")[0] in routers
    )  # as Mixtral's files
    model.save_pretrained(tmp_path / "theirs")
    assert tensors_of(tmp_path / "theirs").keys() == tensors_of(tmp_path / "ours").keys()
    for directory in ("ours", "theirs"):
        for back in (load(tmp_path / directory), AutoModelForCausalLM.from_pretrained(tmp_path / directory)):
            assert any(isinstance(module, QuantExperts) for module in back.modules())
            torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h", "gpt_oss", "granitemoe", "llama4"]
)
@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_files_expert_by_expert(family: str, format: str, tmp_path: Path) -> None:
    # AWQ and GPTQ pack eight codes to a word along N or K
    changes = {"mixtral": {"intermediate_size": 40}, "nemotron_h": {}, "gpt_oss": {}}.get(family, {})
    model = quantized(family, SCHEMES[format], **changes)
    save(model, tmp_path, format=format)
    names = tensors_of(tmp_path)
    leaf = {"mixtral": "block_sparse_moe.experts.3.w1"}.get(
        family, "experts.3.up_proj" if family == "nemotron_h" else "experts.3.gate_proj"
    )
    assert any(f"{leaf}.{FORMATS[format].required[0]}" in name for name in names)
    enable()
    for back in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v2"])
def test_quantized_while_loading(family: str, tmp_path: Path) -> None:
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    while_loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QKernelsConfig("w4a16_g8", include="*experts")
    )
    report = replace_linear(model, "w4a16_g8", include="*experts")
    assert while_loading.hf_quantizer.report.stacks == report.stacks
    torch.testing.assert_close(logits(while_loading), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w8a8z_channel", "w8a8w_channel"])
def test_int8_activations_of_experts(scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the file asks, with zero points, too; but a static scale, of which each expert has its own, stays in 16 bits."""
    model = quantized("mixtral", scheme)
    save(model, tmp_path / "ct", format="compressed-tensors")
    back = load(tmp_path / "ct", activations="file")
    stacks = {str(module.scheme) for module in back.modules() if isinstance(module, QuantStack)}
    assert stacks == {scheme}
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)

    def static(tensors: dict[str, Tensor]) -> None:
        for i, name in enumerate([name for name in tensors if name.endswith(".weight_scale")]):
            module = name.removesuffix(".weight_scale")
            tensors[f"{module}.input_scale"] = torch.tensor([0.01 * (i + 1)])
            tensors[f"{module}.input_zero_point"] = torch.zeros(1, dtype=torch.int8)

    edited(tmp_path / "ct", static)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    of_x = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    of_x |= {"strategy": "tensor", "dynamic": False}
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    caplog.clear()
    back = load(tmp_path / "ct")
    assert {str(m.scheme) for m in back.modules() if isinstance(m, QuantStack)} == {"w8a16_channel"}
    assert "one scale" in caplog.text
    assert "for each expert" in caplog.text
    with pytest.raises(CheckpointError, match=r'which stacked experts have not; load it with activations="16bit"'):
        load(tmp_path / "ct", activations="file")
    assert plan(str(tmp_path / "ct"), context=16).rows


def test_a_router_that_a_file_quantized_is_dequantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the official GPTQ files of Qwen3-30B-A3B."""
    model = quantized("qwen3_moe", "w4a16_g8")
    save(model, tmp_path, format="gptq")
    routers = [RTN(4, 8).quantize(layer.mlp.gate.weight.detach()) for layer in model.model.layers]

    def quantize_routers(tensors: dict[str, Tensor]) -> None:
        for index, weight in enumerate(routers):
            name = f"model.layers.{index}.mlp.gate"
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{suffix}": t for suffix, t in FORMATS["gptq"].write(weight).items()})
            model.model.layers[index].mlp.gate.weight.data = weight.dequantize()

    edited(tmp_path, quantize_routers)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["dynamic"]  # where our files name what is not quantized
    (tmp_path / "config.json").write_text(json.dumps(config))
    enable()
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(logits(loader(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)
        assert "a router that the file quantized is dequantized: 2 modules" in caplog.text
        caplog.clear()


def test_act_order_of_each_expert_runs_on_the_reference(tmp_path: Path) -> None:
    model = quantized("mixtral", "w4a16_g8")
    save(model, tmp_path, format="gptq")
    torch.manual_seed(3)
    orders = {}

    def give_orders(tensors: dict[str, Tensor]) -> None:
        for name in sorted(tensors):
            if name.endswith("g_idx") and "experts" in name:
                key = name.replace(".w3.", ".w1.")  # gate and up of an expert saw the same tokens
                orders.setdefault(key, tensors[name][torch.randperm(len(tensors[name]))])
                tensors[name] = orders[key].clone()

    edited(tmp_path, give_orders)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedProblem, match="an order of columns of its own"):
        load(tmp_path)
    back = load(tmp_path, on_unsupported="reference")
    experts = back.model.layers[0].mlp.experts
    weight: QuantTensor = experts.down_proj.quant_tensor()
    assert weight.group_index is not None
    assert weight.group_index.shape == (4, 40)
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    parts = {suffix: tensors_of(tmp_path)[f"{name}.{suffix}"] for suffix in ("qweight", "scales", "qzeros", "g_idx")}
    one = FORMATS["gptq"].parse(name, parts, config["quantization_config"]).weight
    assert torch.equal(weight[2].dequantize(), one.dequantize())
    assert logits(back).isfinite().all()
    save(back, tmp_path / "native")
    assert torch.equal(logits(load(tmp_path / "native", on_unsupported="reference")), logits(back))
    with pytest.raises(ConversionError, match="one order of columns"):
        save(back, tmp_path / "packed", format="cpu_tile_a16")


def test_experts_of_two_schemes_are_refused(tmp_path: Path) -> None:
    save(quantized("mixtral", "w4a16_g8"), tmp_path, format="gptq")

    def coarser(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.experts.1.w3"
        weight = RTN(4, 16).quantize(torch.randn(40, 32))
        for suffix, t in FORMATS["gptq"].write(weight).items():
            tensors[f"{name}.{suffix}"] = t

    edited(tmp_path, coarser)
    with pytest.raises(CheckpointError, match=r"experts\.1\.w3"):
        load(tmp_path)


def test_mxfp4_as_gpt_oss_ships_it(tmp_path: Path) -> None:
    """Bit for bit what transformers' own reader dequantizes to, gate and up taking turns there; and the same logits."""
    floats = shipped(tmp_path / "shipped")
    back = load(tmp_path / "shipped")
    plain = tiny_moe("gpt_oss", intermediate_size=64)
    for name, value in floats.items():
        experts, _, leaf = name.rpartition(".")
        assert torch.equal(back.get_submodule(experts).dequantize(torch.float32)[leaf], value)
        plain.get_parameter(name).data = value
    assert str(back.model.layers[0].mlp.experts.down_proj.scheme) == "mxfp4_g32"
    torch.testing.assert_close(logits(back), logits(plain), rtol=1e-5, atol=1e-5)
    save(back, tmp_path / "native")
    assert torch.equal(logits(load(tmp_path / "native")), logits(back))
    convert(tmp_path / "shipped", tmp_path / "converted")
    assert torch.equal(logits(load(tmp_path / "converted")), logits(back))


@pytest.mark.parametrize("layout", ["cpu_tile_a16", "mma_tile", "kpack"])
def test_packed_ahead_of_time(layout: str, tmp_path: Path) -> None:
    model = quantized("mixtral", "w4a16_g32", hidden_size=64, intermediate_size=64)
    save(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "packed", layout)
    assert "model.layers.0.block_sparse_moe.experts.down_proj.qweight" in tensors_of(tmp_path / "packed")
    torch.testing.assert_close(logits(load(tmp_path / "packed")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "nemotron_h", "gpt_oss", "granitemoe", "llama4"])
def test_converted_to_experts_one_by_one_and_back(family: str, tmp_path: Path) -> None:
    """The same files as `save` writes, tensor by tensor, and stacked again."""
    changes = {"mixtral": {"intermediate_size": 40}}.get(family, {})
    model = quantized(family, "w4a16_g8", **changes)
    for format in ("native", "gptq"):
        save(model, tmp_path / format, format=format)
    save(load(tmp_path / "native"), tmp_path / "loaded", format="gptq")
    convert(tmp_path / "native", tmp_path / "apart", "gptq")
    convert(tmp_path / "apart", tmp_path / "again", "native")
    convert(tmp_path / "native", tmp_path / "same", "native")
    for made, wanted in (("loaded", "gptq"), ("apart", "gptq"), ("again", "native"), ("same", "native")):
        found, expected = tensors_of(tmp_path / made), tensors_of(tmp_path / wanted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (made, wanted)]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_auto_round_expert_by_expert(tmp_path: Path) -> None:
    model = quantized("qwen3_moe", "w4a16_g8")
    save(model, tmp_path, format="gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 8, "sym": True,
        "data_type": "int",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


def nf4_as_bitsandbytes(weight: QuantTensor) -> dict[str, Tensor]:
    """The even code in the high half, row by row; the state as JSON."""
    codes = weight.codes.flatten()
    state = {"quant_type": "nf4", "blocksize": 32, "dtype": "float16", "shape": [weight.N, weight.K]}
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": weight.scales.flatten(),
        "weight.quant_map": torch.tensor(CODEBOOKS["nf4"], dtype=torch.float32),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def test_bitsandbytes_expert_by_expert(tmp_path: Path) -> None:
    """Names as transformers 4 gave them, when experts were linear layers."""
    model = quantized("qwen3_moe", "nf4_g32", moe_intermediate_size=32)
    save(model, tmp_path, format="native")
    moved: dict[str, Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        for projection, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            weight = getattr(experts, projection).quant_tensor()
            for expert in range(8):
                for part, leaf in enumerate(leaves):
                    one = weight[expert].shard("N", part, len(leaves))
                    one = QuantTensor(one.codes, one.scales.float(), None, None, one.scheme)
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                    moved |= {f"{name}.{suffix}": t for suffix, t in nf4_as_bitsandbytes(one).items()}

    def replaced(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors.update(moved)

    edited(tmp_path, replaced)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_names_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    """What `save_pretrained` writes expert by expert, our table places, all of it: a release with other names fails here."""
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    forms = experts_of(model)
    weights = [name for name in tensors_of(tmp_path) if re.search(r"experts\.\d+\.", name)]
    if not weights:
        assert family in ("gpt_oss", "llama4", "granitemoe")  # 3-D in files, too
        return
    quantized_there = [name.removesuffix(".weight") for name in weights]
    others = {name: t.to("meta") for name, t in tensors_of(tmp_path).items() if name not in weights}
    stacks = into_model(model, others, quantized_there).stacks
    assert stacks.keys() == {f"{name}.{p}" for name, form in forms.items() for p in (form.up, form.down)}
    for stack, members in stacks.items():
        assert sorted(members) == members_of(stack, forms)
        names = FileNames(model)
        assert {names.expert(stack, *member) for member in members} == set(members.values())
