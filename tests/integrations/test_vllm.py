"""The vLLM plug-in on layers that behave as vLLM's do, without vLLM: what is collected, cut, packed, refused."""

from __future__ import annotations

import ast
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import GPTQ, RTN, QuantLinear, load, quantize, replace_linear, save
from qkernels.checkpoint import open_checkpoint
from qkernels.errors import ArgumentError, CheckpointError
from qkernels.storage.files import DTYPES
from tests.checkpoints import plain_checkpoint, small_llama
from tests.integrations.fake_vllm import (
    LinearBase,
    Mapper,
    ParallelLMHead,
    RowParallelLinear,
    UnquantizedLinearMethod,
    config_of,
    headers,
)  # fmt: skip
from tests.tiny_models import token_windows

SOURCES = sorted((Path(qkernels.__file__).parent / "integrations").glob("vllm*.py"))


def filled(
    config: Any, layer: nn.Module, prefix: str, directory: Path, sizes: Sequence[int], attribute: bool = True
) -> Any:
    """A layer through the life that vLLM gives it: method, empty parameters, tensors as they stream by, the end."""
    method = config.get_quant_method(layer, prefix)
    method.create_weights(layer, 0, list(sizes), 0, 0, torch.float32)
    source, mapper = open_checkpoint(directory), config.get_checkpoint_weight_mapper()
    parameters = dict(layer.named_parameters())
    shards = ("q", "k", "v") if prefix.endswith("qkv_proj") else range(len(method.parts))
    for shard, part in zip(shards, method.parts, strict=True):
        for name in source.parts(part):
            leaf = mapper.map(name).removeprefix(f"{part}.")
            tensor = source.source.read(name)  # type: ignore[attr-defined]
            parameter = parameters[leaf]
            if len(method.parts) == 1:
                parameter.weight_loader(parameter, tensor)
            elif attribute:
                tensor.shard_id = shard
                parameter.weight_loader(parameter, tensor)
            else:
                parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    return method


def checkpoint(tmp_path: Path, scheme: str = "w4a16_g32", format: str = "native", **options: Any) -> Path:
    model = small_llama()
    replace_linear(model, scheme, **options)
    save(model, tmp_path / format, format=format)
    return tmp_path / format


def expected(directory: Path, parts: Sequence[str], x: Tensor) -> Tensor:
    model = load(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model.get_submodule(part)(x) for part in parts], -1)


QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
ATTENTION = "model.layers.0.self_attn.qkv_proj"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("format", "scheme"),
    [("native", "w4a16_g32"), ("native", "w4a8_g32"), ("native", "w3a16_g32_fzero"), ("gptq", "w4a16_g32_asym"),
     ("awq", "w4a16_g32_asym"), ("compressed-tensors", "w4a16_g32")],
)  # fmt: skip
@pytest.mark.parametrize("attribute", [True, False])
def test_merged_layer_computes_its_parts(
    plugin: Any, tmp_path: Path, format: str, scheme: str, attribute: bool
) -> None:
    directory = checkpoint(tmp_path, scheme, format)
    layer = LinearBase()
    method = filled(config_of(plugin, directory), layer, ATTENTION, directory, [64, 32, 32], attribute)
    assert torch.equal(method.apply(layer, X), expected(directory, QKV, X))
    bias = torch.randn(128)
    assert torch.allclose(method.apply(layer, X[None], bias), expected(directory, QKV, X)[None] + bias, atol=1e-5)
    assert len(layer.qkernels) == 1
    assert layer.qweight is layer.qkernels[0].qweight
    assert not list(layer.parameters())


def test_mixed_widths_stay_parts(plugin: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, overrides={"*.v_proj": "w8a16_g32"})
    layer = LinearBase()
    method = filled(config_of(plugin, directory), layer, ATTENTION, directory, [64, 32, 32])
    assert len(layer.qkernels) == 3
    bias = torch.randn(128)
    assert torch.allclose(method.apply(layer, X, bias), expected(directory, QKV, X) + bias, atol=1e-5)


def act_order(tmp_path: Path) -> Path:
    plain_checkpoint(tmp_path / "float")
    method = GPTQ(bits=4, group_size=32, act_order="group")
    options: dict[str, Any] = {"calibration": token_windows(), "seq_len": 16, "progress": False, "format": "gptq"}
    quantize(tmp_path / "float", method, save_to=tmp_path / "ordered", **options)
    return tmp_path / "ordered"


def test_act_order_is_kept_and_refused_where_k_is_cut(plugin: Any, tmp_path: Path, ranks: SimpleNamespace) -> None:
    directory = act_order(tmp_path)
    config = config_of(plugin, directory)
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map("model.layers.0.mlp.up_proj.g_idx") == "model.layers.0.mlp.up_proj.g_idx"
    layer = LinearBase()
    method = filled(config, layer, ATTENTION, directory, [64, 32, 32])
    assert any(linear.k_order is not None for linear in layer.qkernels)
    assert torch.equal(method.apply(layer, X), expected(directory, QKV, X))
    rows, o_proj = RowParallelLinear(), "model.layers.0.self_attn.o_proj"
    assert torch.equal(filled(config, rows, o_proj, directory, [64]).apply(rows, X), expected(directory, [o_proj], X))
    assert rows.qkernels[0].k_order is not None
    ranks.world = 2
    with pytest.raises(ArgumentError, match=r"model\.layers\.0\.self_attn\.o_proj over 2 ranks: .*act-order"):
        filled(config, RowParallelLinear(), "model.layers.0.self_attn.o_proj", directory, [64])


@pytest.mark.parametrize("copies", [1, 2])
def test_ranks_together_are_the_layer(plugin: Any, tmp_path: Path, ranks: SimpleNamespace, copies: int) -> None:
    """Columns of ranks beside each other, keys and values perhaps on two ranks; rows of ranks added."""
    directory = checkpoint(tmp_path)
    config = config_of(plugin, directory)
    ranks.world = 2
    parts: list[list[Tensor]] = [[], [], []]
    total = torch.zeros(3, 64)
    for ranks.rank in range(2):
        layer = LinearBase()
        layer.num_kv_head_replicas = copies
        sizes = [32, 16 * copies, 16 * copies]
        method = filled(config, layer, ATTENTION, directory, sizes)
        for found, part in zip(parts, method.apply(layer, X).split(sizes, -1), strict=True):
            found.append(part)
        rows = RowParallelLinear()
        o_proj = filled(config, rows, "model.layers.0.self_attn.o_proj", directory, [64])
        total += o_proj.apply(rows, X[:, ranks.rank * 32 :][:, :32])
    for index, (name, found) in enumerate(zip(QKV, parts, strict=True)):
        y = torch.cat(found, -1) if copies == 1 or index == 0 else found[0]
        assert torch.equal(y, expected(directory, [name], X))
        assert copies == 1 or index == 0 or torch.equal(found[0], found[1])
    assert torch.allclose(total, expected(directory, ["model.layers.0.self_attn.o_proj"], X), atol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_rows_merged_in_the_file_are_cut_part_by_part(
    plugin: Any, tmp_path: Path, ranks: SimpleNamespace, world: int
) -> None:
    """Phi-3's qkv_proj: rank 1 needs the second half of q and that of k and v, not the second half of all rows."""
    weight = RTN().with_scheme("w4a16_g32").quantize(torch.randn(128, 64))
    whole = QuantLinear.from_quant_tensor(weight)(X)
    sizes = [64, 32, 32]
    ranks.world = world
    shares = []
    for ranks.rank in range(world):
        pieces = [piece.shard("N", ranks.rank, world) for piece in plugin.rows_of(weight, sizes)]
        shares.append([QuantLinear.from_quant_tensor(piece)(X) for piece in pieces])
    for index, part in enumerate(whole.split(sizes, -1)):
        assert torch.equal(torch.cat([share[index] for share in shares], -1), part)
    with pytest.raises(CheckpointError, match=r"rows must be 64 \+ 32 = 96, got 128"):
        plugin.rows_of(weight, [64, 32])


def test_a_layer_is_packed_with_its_last_tensor(plugin: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    config = config_of(plugin, directory)
    layer, name = LinearBase(), "model.layers.0.mlp.down_proj"
    method = config.get_quant_method(layer, name)
    method.create_weights(layer, 0, [64], 0, 0, torch.float32)
    parameters, source = dict(layer.named_parameters()), open_checkpoint(directory)
    waiting = list(source.parts(name))
    while waiting:
        with pytest.raises(CheckpointError, match=rf"{name}: .* {len(waiting)} are missing, first {name}\."):
            method.process_weights_after_loading(layer)
        tensor = waiting.pop()
        hole = parameters[tensor.removeprefix(f"{name}.")]
        hole.weight_loader(hole, source.source.read(tensor))  # type: ignore[attr-defined]
    assert not hasattr(layer, "qkernels_loading")
    method.process_weights_after_loading(layer)


def test_head(plugin: Any, tmp_path: Path, ranks: SimpleNamespace) -> None:
    """vLLM pads a head to 64 rows more than this vocabulary of 60 has; its logits are those of the tokens."""
    model = small_llama(vocab_size=60)
    replace_linear(model, "w4a16_g32", exclude=())
    save(model, tmp_path / "head")
    config, layer = config_of(plugin, tmp_path / "head"), ParallelLMHead()
    method = filled(config, layer, "lm_head", tmp_path / "head", [64])
    assert torch.equal(method.apply(layer, X), expected(tmp_path / "head", ["lm_head"], X))
    assert method.tie_weights(layer, nn.Embedding(60, 64)) is layer
    ranks.world = 2
    with pytest.raises(CheckpointError, match="lm_head: rank 0 of 2 needs 32 rows, got 30"):
        filled(config, ParallelLMHead(), "lm_head", tmp_path / "head", [32])


def test_config_survives_a_process(plugin: Any, tmp_path: Path) -> None:
    config = config_of(plugin, checkpoint(tmp_path))
    assert set(vars(config)) == {"config", "tensors", "spelled", "dtypes", "packed_modules_mapping"}
    again = pickle.loads(pickle.dumps({k: v for k, v in vars(config).items()}))
    assert again == vars(config)


def test_what_stays_float(plugin: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, exclude=("lm_head", "*.o_proj", "model.layers.1.self_attn.v_proj"))
    config = config_of(plugin, directory)
    assert isinstance(config.get_quant_method(LinearBase(), "model.layers.0.self_attn.o_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    with pytest.raises(CheckpointError, match=r"computes .*v_proj as one layer, but only .*k_proj are quantized"):
        config.get_quant_method(LinearBase(), "model.layers.1.self_attn.qkv_proj")


def test_names_of_the_model_are_taken(plugin: Any, tmp_path: Path) -> None:
    config = config_of(plugin, checkpoint(tmp_path))
    config.tensors = {f"language_model.{name}": suffixes for name, suffixes in config.tensors.items()}
    config.apply_vllm_mapper(Mapper())
    assert isinstance(config.get_quant_method(LinearBase(), ATTENTION), plugin.VllmLinearMethod)


def test_a_scheme_is_looked_up_by_the_name_in_the_file(plugin: Any, tmp_path: Path) -> None:
    """w4a8 and w4a16 have the same bytes: under the name of vLLM the wrong one would be taken in silence."""
    directory, name = checkpoint(tmp_path, overrides={"*.1.mlp.down_proj": "w4a8_g32"}), "model.layers.1.mlp.down_proj"
    config, layer = config_of(plugin, directory), LinearBase()
    config.config = config.config | {"modules": {f"language_model.{name}": "w4a8_g32"}}
    config.tensors = {f"language_model.{module}": suffixes for module, suffixes in config.tensors.items()}
    config.apply_vllm_mapper(Mapper())
    filled(config, layer, name, directory, [64])
    assert str(layer.qkernels[0].scheme) == "w4a8_g32"


def test_suffixes_with_dots_get_names_that_parameters_can_have(plugin: Any) -> None:
    config = plugin.VllmConfig({"quant_method": "bitsandbytes", "load_in_4bit": True})
    mapper, module = config.get_checkpoint_weight_mapper(), nn.Module()
    for suffix in config.format.suffixes:
        module.register_parameter(plugin.parameter_name(suffix), None)
        assert mapper.map(f"a.{suffix}") == f"a.{plugin.parameter_name(suffix)}"


def test_gguf_is_refused_with_the_way_out(plugin: Any, tmp_path: Path) -> None:
    config = plugin.VllmConfig({"quant_method": "qkernels"})
    for name in ("model-Q4_K_M.gguf", "nobody/nothing"):
        with pytest.raises((ArgumentError, CheckpointError), match=r"qkernels pack model\.gguf dir/"):
            config.maybe_update_config(name)
    with pytest.raises(CheckpointError, match="nothing is quantized"):
        config.maybe_update_config(str(plain_checkpoint(tmp_path / "float")))


def test_a_gguf_file_is_refused_before_vllm_reads_it(plugin: Any, tmp_path: Path) -> None:
    """It takes the file for a config.json and says that it is no valid JSON."""
    args = sys.modules["vllm.engine.arg_utils"].EngineArgs
    plugin.register()
    for quantization in (None, "qkernels"):
        with pytest.raises(ArgumentError, match=r"^a/Model-Q4_K_M\.GGUF: .* `qkernels pack model\.gguf dir/` writes"):
            args("a/Model-Q4_K_M.GGUF", quantization).create_engine_config()
    assert args("a/model", "qkernels").create_engine_config("us") == "an engine of a/model for us"
    plugin.QUANTIZATION_METHODS.append("gguf")  # another plug-in reads them
    assert args("a/m.gguf").create_engine_config() == "an engine of a/m.gguf for None"
    with pytest.raises(ArgumentError, match="pack"):
        args("a/m.gguf", "qkernels").create_engine_config()


def test_parameters_have_the_dtypes_of_the_files(plugin: Any, tmp_path: Path) -> None:
    """Else vLLM warns of every tensor of an unmerged layer. Of a merged one the first part's count."""
    directory = checkpoint(tmp_path)
    config, stored = config_of(plugin, directory), headers(str(directory))
    for prefix, sizes, first in (
        ("model.layers.0.mlp.down_proj", [64], "down_proj"),
        (ATTENTION, [64, 32, 32], "q_proj"),
    ):
        layer = LinearBase()
        config.get_quant_method(layer, prefix).create_weights(layer, 0, sizes, 0, 0, torch.bfloat16)
        for suffix in config.format.required:
            name = f"{prefix.rpartition('.')[0]}.{first}.{suffix}"
            assert layer.get_parameter(suffix).dtype == DTYPES[stored[name]["dtype"]], name
    assert torch.uint8 in {p.dtype for p in layer.parameters()}


def test_who_is_taken(plugin: Any) -> None:
    ask = plugin.VllmConfig.override_quantization_method
    assert ask({"quant_method": "qkernels"}, None) == "qkernels"
    assert ask({"quant_method": "gptq"}, "qkernels") == "qkernels"
    assert ask({"quant_method": "gptq"}, None) is None
    for config in (
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "mxfp4"}, {"quant_method": "hqq"}, {"quant_method": "torchao"},
    ):  # fmt: skip
        assert ask(config, "qkernels") == "qkernels" and ask(config, None) is None
    with pytest.raises(CheckpointError, match="declares {'quant_method': 'bitblas'}, a kind that is not read yet"):
        ask({"quant_method": "bitblas"}, "qkernels")
    with pytest.raises(CheckpointError, match="quantization_config declares"):
        plugin.VllmConfig.from_config({"quant_method": "nobody"})
    plugin.register()
    plugin.register()
    assert plugin.registered == {"qkernels": plugin.VllmConfig}


def test_entry_point_is_declared() -> None:
    declared = (SOURCES[0].parent.parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nqkernels = "qkernels.integrations.vllm:register"' in declared


def private(source: str) -> list[str]:
    """Names with an underscore that are imported from, or asked of, somebody else."""
    tree = ast.parse(source)
    imported = [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    asked = [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and not (isinstance(n.value, ast.Name) and n.value.id == "self")
    ]
    return [name for name in (*imported, *asked) if name.startswith("_") and not name.endswith("__")]


def test_only_the_public_face_is_used() -> None:
    assert [path.stem for path in SOURCES] == ["vllm", "vllm_experts", "vllm_weights"]
    assert {path.stem: private(path.read_text()) for path in SOURCES} == {path.stem: [] for path in SOURCES}
    assert private("from x import _y\nlinear._buffers") == ["_y", "_buffers"]
