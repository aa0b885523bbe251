"""Experts that compressed-tensors itself compressed (tests/golden/experts), one by one and stacked, in files of a whole model;
and stacks in other formats that hold one matrix a module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qkernels import QuantScheme, QuantTensor, inspect, load
from qkernels.errors import CheckpointError
from qkernels.integrations.transformers import enable
from qkernels.nn import QuantExperts
from qkernels.planning import plan
from tests.golden_experts import EXPERTS, KINDS, golden, write
from tests.moe_models import tiny_moe


def experts_of(model: Any) -> QuantExperts:
    module = model.get_submodule(EXPERTS)
    assert isinstance(module, QuantExperts)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_compressed_tensors_bit_for_bit(kind: str, tmp_path: Path) -> None:
    expected = golden(kind, tmp_path)
    enable()
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        found = experts_of(loader(tmp_path))
        assert tuple(str(stack.scheme) for stack in found.stacks.values()) == KINDS[kind]
        weights = found.dequantize(torch.bfloat16)
        assert weights.keys() == expected.keys()
        for projection, weight in weights.items():
            assert torch.equal(weight, expected[projection]), projection
    layers = inspect(tmp_path).layers
    assert sum(layer.weights for layer in layers) == sum(t.numel() for t in expected.values())


def stacked_differently(edit: Any, tmp_path: Path) -> None:
    golden("int4_stacked", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})


def test_suffixes_of_a_module_and_shapes_of_each_expert(tmp_path: Path) -> None:
    """The same stack as `gate_up_proj.weight_packed` and so on, with the shape of each expert."""
    expected = golden("int4_stacked", tmp_path)

    def renamed(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            leaf, _, suffix = name.rpartition("_")
            value = tensors.pop(name)
            tensors[f"{leaf}.weight_{suffix}"] = value if suffix != "shape" else value[1:].repeat(3, 1)

    stacked_differently(renamed, tmp_path)
    assert torch.equal(experts_of(load(tmp_path)).dequantize(torch.bfloat16)["down_proj"], expected["down_proj"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({f"{EXPERTS}.down_proj_shape": torch.tensor([4, 32, 32])}), r"must be \[E, N, K\] with E = 3"),
        (
            lambda t: t.update({f"{EXPERTS}.down_proj_scale": t[f"{EXPERTS}.down_proj_scale"][:2].contiguous()}),
            "must have 3 experts in front, got bfloat16",
        ),
        (lambda t: t.pop(f"{EXPERTS}.down_proj_scale"), "down_proj lacks weight_scale"),
        (
            lambda t: t.update({f"{EXPERTS}.down_proj": torch.zeros(3, 32, 32)}),
            "has both a float weight and weight_packed",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if f"{EXPERTS}.down_proj" in name],
            "gate_up_proj .* is quantized in the files and .*down_proj is not",
        ),
    ],
)  # fmt: skip
def test_stacks_that_do_not_fit_are_errors(edit: Any, message: str, tmp_path: Path) -> None:
    stacked_differently(edit, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_fp8_stacks_as_transformers_keeps_them(tmp_path: Path) -> None:
    """`gate_up_proj` in FP8 beside `gate_up_proj_scale_inv`, blocks of 16 x 16."""
    model = tiny_moe("qwen3_moe", num_hidden_layers=1, num_experts=3, moe_intermediate_size=32, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    experts, expected = {}, {}
    for leaf, shape in (("gate_up_proj", (3, 64, 32)), ("down_proj", (3, 32, 32))):
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        scales = torch.rand(3, shape[1] // 16, 2) + 0.5
        experts |= {f"{EXPERTS}.{leaf}": codes, f"{EXPERTS}.{leaf}_scale_inv": scales}
        expected[leaf] = codes.float() * scales.repeat_interleave(16, 1).repeat_interleave(16, 2)
    write(tmp_path, experts, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"})
    found = experts_of(load(tmp_path)).dequantize(torch.float32)
    assert all(torch.equal(found[leaf], expected[leaf]) for leaf in expected)
    write(tmp_path, {n: t for n, t in experts.items() if "scale" not in n}, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="has no tensor|has no weight_scale_inv"):
        load(tmp_path)


def test_stacks_of_torchao(tmp_path: Path) -> None:
    """`Int4Tensor` of the parameter itself: codes [E, N, K / 2], scales and zeros [E, K / g, N]."""
    model = tiny_moe("qwen3_moe", num_hidden_layers=1, num_experts=3, moe_intermediate_size=32, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(6)
    experts, said, expected = {}, {}, {}
    for leaf, shape in (("gate_up_proj", (3, 64, 32)), ("down_proj", (3, 32, 32))):
        codes = torch.randint(-8, 8, shape)
        scales = (torch.rand(3, 2, shape[1]) + 0.5).bfloat16()
        packed = ((codes[..., 1::2] & 15) << 4 | codes[..., ::2] & 15).to(torch.uint8).view(torch.int8)
        named = {"qdata": packed, "scale": scales, "zero_point": torch.zeros_like(scales)}
        experts |= {f"{EXPERTS}._{leaf}_{part}": t for part, t in named.items()}
        fields = {"block_size": [1, 1, 16], "shape": list(shape)}
        said[f"{EXPERTS}.{leaf}"] = json.dumps(
            {"_type": "Int4Tensor", "_data": fields, "_tensor_data_names": list(named)}
        )
        expected[leaf] = codes * scales.float().transpose(1, 2).repeat_interleave(16, 2)
    write(tmp_path, experts, {"quant_method": "torchao", "quant_type": {}}, **said)
    found = experts_of(load(tmp_path))
    assert found.down_proj.scheme == QuantScheme(4, 16)
    assert all(torch.equal(found.dequantize(torch.float32)[leaf], expected[leaf]) for leaf in expected)


def test_stacks_whose_rows_have_no_known_order_are_refused(tmp_path: Path) -> None:
    """gpt-oss keeps its parameters transposed, gate and up in turns: a stack of matrices may be in either order."""
    model = tiny_moe("gpt_oss", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    experts: dict[str, Tensor] = {}
    kept = load_file(tmp_path / "model.safetensors")
    weight = QuantTensor.stack(
        [
            QuantTensor(torch.randint(16, (64, 32)).byte(), torch.ones(64, 1), None, None, QuantScheme(4, 32))
            for _ in range(4)
        ]
    )
    for leaf, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        words = weight.codes[:, :rows].view(4, rows, 4, 8).int()
        packed = sum(words[..., i] << (4 * i) for i in range(8))
        assert isinstance(packed, Tensor)
        experts |= {f"{EXPERTS}.{leaf}_packed": packed, f"{EXPERTS}.{leaf}_scale": torch.ones(4, rows, 1)}
        experts[f"{EXPERTS}.{leaf}_shape"] = torch.tensor([4, rows, 32])
        experts[f"{EXPERTS}.{leaf}_bias"] = kept[f"{EXPERTS}.{leaf}_bias"]
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}
    write(tmp_path, experts, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
    })  # fmt: skip
    with pytest.raises(CheckpointError, match="files do not say which order theirs have"):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_planned_as_they_are_loaded(kind: str, tmp_path: Path) -> None:
    golden(kind, tmp_path)
    row = plan(str(tmp_path), context=8).rows[0]
    model = load(tmp_path)
    held = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert row.verdict == "fits" and abs(row.weights - held) <= 256 * sum(1 for _ in model.modules())
    assert row.kernels == {"cpu.cpu_tile_a16": 2}
