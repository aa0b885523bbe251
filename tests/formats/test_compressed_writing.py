"""compressed-tensors files of floats as we write them: the bytes of the tool itself, whole checkpoints, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qkernels import RTN, QuantTensor, inspect, load, quantize, replace_linear, save
from qkernels.checkpoint import open_checkpoint
from qkernels.checkpoint.registry import detect
from qkernels.cli.main import main
from qkernels.errors import ConversionError
from qkernels.formats.compressed_writing import PACKED
from qkernels.storage import read_json, write_json
from tests.checkpoints import logits, plain_checkpoint, rewritten, small_llama
from tests.strategies import random_weight

GOLDEN = Path(__file__).parent.parent / "golden" / "files" / "compressed_floats.safetensors"
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
FLOATS = {
    "mxfp4_g32": "mxfp4-pack-quantized",
    "nvfp4_g16": "nvfp4-pack-quantized",
    "fp8_channel": "float-quantized",
    "fp8_tensor": "float-quantized",
    "fp8_block32": "float-quantized",
}


def test_the_bytes_of_compressed_tensors_itself() -> None:
    """Read from its file and written again; MXFP8 is read only."""
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
    modules = [name.removeprefix("expected.") for name in tensors if name.startswith("expected.")]
    assert len(modules) == 7
    for module in modules:
        stored = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        weight = detect(config).parse(module, stored, config).weight
        if module == "mxfp8":
            with pytest.raises(ConversionError, match="fp8_g32 has a codebook"):
                PACKED.write(weight)
            continue
        written = PACKED.write(weight)
        assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in stored.items()}, module
        for name, t in written.items():
            assert t.shape == stored[name].shape, (module, name)
            assert torch.equal(t.view(torch.uint8), stored[name].view(torch.uint8)), (module, name)


@pytest.mark.parametrize("scheme", FLOATS)
def test_a_model_written_loads_as_it_was(scheme: str, tmp_path: Path) -> None:
    """What runs is what the dequantized weights compute, to fp32's rounding in sums of 96."""
    model = small_llama()
    replace_linear(model, scheme)
    save(model, tmp_path / "out", format="compressed-tensors")
    found = inspect(tmp_path / "out")
    assert found.schemes == {scheme: 14}
    assert found.oddities == ()
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["format"] == FLOATS[scheme]
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    plain = small_llama()
    for name, layer in again.named_modules():
        if name.endswith("_proj"):
            plain.get_submodule(name).weight.data = layer.dequantize()
    torch.testing.assert_close(logits(again), logits(plain), rtol=1e-4, atol=1e-5)


def test_blocks_as_deepseek_has_them_run(tmp_path: Path) -> None:
    """Of 128, of which a side of 64 or 96 has one short one."""
    expected = small_llama()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = RTN(scale_dtype=torch.float32).with_scheme("fp8_block128").quantize(tensors[name])
            tensors[name] = weight.codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = weight.scales[::128].contiguous()
            expected.get_parameter(name).data = weight.dequantize()

    path = rewritten(plain_checkpoint(tmp_path / "plain"), tmp_path / "fp8", change)
    write_json(path / "config.json", read_json(path / "config.json") | {"quantization_config": DEEPSEEK})
    model = load(path)
    assert str(model.model.layers[0].mlp.up_proj.scheme).startswith("fp8_block128")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)


def test_several_formats_are_mixed_precision(tmp_path: Path) -> None:
    model = small_llama()
    replace_linear(model, "nvfp4_g16", overrides={"*.down_proj": "fp8_channel", "*.up_proj": "w4a16_g32"})
    save(model, tmp_path / "out", format="compressed-tensors")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "nvfp4-pack-quantized",
        "float-quantized",
        "pack-quantized",
    ]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_the_command_line_makes_them(tmp_path: Path) -> None:
    plain = plain_checkpoint(tmp_path / "plain")
    arguments = ["--method", "rtn", "--scheme", "mxfp4_g32", "--format", "compressed-tensors"]
    assert main(["quantize", str(plain), str(tmp_path / "out"), *arguments]) == 0
    source = open_checkpoint(tmp_path / "out")
    weight = small_llama().model.layers[0].mlp.up_proj.weight.data
    read = source.weight("model.layers.0.mlp.up_proj").weight
    assert torch.equal(read.codes, RTN().with_scheme("mxfp4_g32").quantize(weight).codes)


def test_schemes_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="compressed-tensors cannot store this weight: nf4_g64 has a codebook"):
        quantize(
            plain_checkpoint(tmp_path / "plain"),
            RTN().with_scheme("nf4_g64"),
            save_to=tmp_path / "out",
            format="compressed-tensors",
        )


def ordered(weight: QuantTensor) -> QuantTensor:
    index = torch.arange(weight.K, dtype=torch.int32).flip(0) // 32
    return QuantTensor(weight.codes, weight.scales, None, index, weight.scheme)


POWERS = random_weight("mxfp4_g32", 8, 64, dtype=torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight("mxfp4_g32", 8, 64), "scales of mxfp4 are float8_e8m0fnu, got float16"),
        (random_weight("mxfp4_g32", 8, 80, dtype=torch.float8_e8m0fnu), "K=80 is not a multiple of group_size 32"),
        (ordered(POWERS), "weight_g_idx goes with integer codes"),
        (random_weight("nvfp4_g16", 8, 64), "weight_global_scale is one positive float32 for the whole weight"),
        (random_weight("nvfp4m_g16", 8, 64), "scales are products of factors in nvfp4m_g16"),
        (random_weight("fp8_channel", 8, 64, dtype=torch.float8_e8m0fnu), "16- or 32-bit floats, got float8_e8m0fnu"),
        (random_weight("fp8_g32", 8, 64), "fp8_g32 has a codebook"),
        (random_weight("fp8_channel", 8, 64, experts=(2,)), r"one \[N, K\] weight a module, got \[2, 8, 64\]"),
    ],
)
def test_what_is_refused(weight: QuantTensor, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        PACKED.write(weight)
