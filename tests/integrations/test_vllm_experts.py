"""Routed experts through the vLLM plug-in, on layers that behave as vLLM's do, without vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import load, replace_linear, save
from qkernels.checkpoint import open_checkpoint
from qkernels.errors import CheckpointError
from tests.golden_experts import golden
from tests.integrations.fake_vllm import RoutedExperts, config_of
from tests.moe_models import tiny_moe

TOKENS, CHOSEN = 9, 2


def written(tmp_path: Path, family: str, format: str, scheme: str = "w4a16_g8", **changes: Any) -> Path:
    model = tiny_moe(family, num_hidden_layers=1, **changes)
    replace_linear(model, scheme, include="*experts")
    save(model, tmp_path / "out", format=format)
    return tmp_path / "out"


def stream(directory: Path, prefix: str, config: Any, here: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """What vLLM gives a layer: names below it, as the mapper of the plug-in spells them; a loader uses its memory again. Tensors
    of single experts of other ranks (`here`: -1) are not read."""
    checkpoint, mapper = open_checkpoint(directory), config.get_checkpoint_weight_mapper()
    source = checkpoint.source  # type: ignore[attr-defined]
    for name in source.names():
        if name.startswith(f"{prefix}."):
            expert = name.removeprefix(f"{prefix}.").partition(".")[0]
            if here is not None and expert.isdecimal() and here[int(expert)] < 0:
                continue
            tensor = source.read(name)
            yield mapper.map(name).removeprefix(f"{prefix}."), tensor
            tensor.view(torch.uint8).zero_()


def filled(plugin: Any, directory: Path, prefix: str, layer: RoutedExperts) -> Any:
    """A layer through the life that vLLM gives it."""
    config = config_of(plugin, directory)
    method = config.get_quant_method(layer, prefix)
    hidden = load(directory, dtype=torch.float32).config.get_text_config().hidden_size
    count = layer.global_num_experts if layer.expert_map is None else int((layer.expert_map >= 0).sum())
    assert method.maybe_roundup_sizes(hidden, layer.width, torch.bfloat16, None) == (hidden, layer.width)
    method.create_weights(layer, count, hidden, layer.width, torch.float32, weight_loader=None)
    assert list(layer.load_weights(stream(directory, prefix, config, layer.expert_map)))  # type: ignore[operator]
    method.process_weights_after_loading(layer)
    return method


def routed(hidden: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:CHOSEN] for _ in range(TOKENS)]).int()
    return torch.randn(TOKENS, hidden, generator=generator), torch.rand(TOKENS, CHOSEN, generator=generator), ids


def place(directory: Path) -> tuple[str, Any, str]:
    """(the name of the experts in the model, the module that `load` makes of them, their name in the files)."""
    model = load(directory, dtype=torch.float32)
    name, module = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "QuantExperts")
    source = open_checkpoint(directory).source  # type: ignore[attr-defined]
    spelled = next(n for n in source.names() if ".experts." in n)
    return name, module, f"{spelled.partition('.experts.')[0]}.experts"


def expected(module: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x, ids.long(), weights)
    return y


FILES = [
    ("qwen3_moe", "native", "w4a16_g8"), ("qwen3_moe", "gptq", "w4a16_g8"), ("mixtral", "awq", "w4a16_g8_asym"),
    ("mixtral", "compressed-tensors", "w4a16_g8"), ("qwen3_moe", "native", "w4a8_g8"), ("nemotron_h", "native", "w4a16_g8"),
]  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32},
    "mixtral": {"intermediate_size": 32},
    "nemotron_h": {"moe_intermediate_size": 32, "layers_block_type": ["moe"]},
}
ACTIVATION = {"nemotron_h": "relu2_no_mul"}


@pytest.mark.parametrize(
    ("family", "format", "scheme", "world", "by_expert"),
    [(*file, world, False) for file in FILES for world in (1, 2)] + [(*file, 2, True) for file in FILES[:2]],
)
def test_ranks_together_are_the_experts(
    plugin: Any, tmp_path: Path, family: str, format: str, scheme: str, world: int, by_expert: bool
) -> None:
    """Each with a part of every expert's width, or with some of the experts."""
    directory = written(tmp_path, family, format, scheme, **CHANGES[family])
    _, module, prefix = place(directory)
    form, total = module.form, torch.zeros(TOKENS, module.hidden_size)
    x, weights, ids = routed(form.hidden, form.experts)
    for rank in range(world):
        kind = ACTIVATION.get(family, "silu")
        if by_expert:
            each = form.experts // world
            local = [e - rank * each if e // each == rank else -1 for e in range(form.experts)]
            layer = RoutedExperts(form.experts, form.width, activation=kind, expert_map=torch.tensor(local))
        else:
            layer = RoutedExperts(form.experts, form.width // world, rank, world, kind)
        method = filled(plugin, directory, prefix, layer)
        total += method.apply(layer, x, weights, ids, None, None)
        assert not list(layer.parameters())
        assert layer.qkernels_up.experts == (form.experts // world if by_expert else form.experts)
    if world == 1:
        assert torch.equal(total, expected(module, x, weights, ids))
    rounded = (
        0.05 if scheme.startswith("w4a8") else 1e-5
    )  # a rank rounds its part of a row to 8 bits by its own largest value
    torch.testing.assert_close(total, expected(module, x, weights, ids), rtol=rounded, atol=rounded)


@pytest.mark.parametrize("kind", ["int4", "int4_stacked", "fp8_stacked", "nvfp4"])
def test_experts_that_compressed_tensors_wrote(plugin: Any, tmp_path: Path, kind: str) -> None:
    golden(kind, tmp_path)
    _, module, prefix = place(tmp_path)
    layer = RoutedExperts(module.form.experts, module.form.width)
    method = filled(plugin, tmp_path, prefix, layer)
    x, weights, ids = routed(module.form.hidden, module.form.experts)
    assert torch.equal(method.apply(layer, x, weights, ids), expected(module, x, weights, ids))


def test_ids_of_nobody_add_nothing(plugin: Any, tmp_path: Path) -> None:
    directory = written(tmp_path, "qwen3_moe", "native", **CHANGES["qwen3_moe"])
    _, module, prefix = place(directory)
    layer = RoutedExperts(8, 32, expert_map=torch.arange(8))
    method = filled(plugin, directory, prefix, layer)
    x, weights, ids = routed(32, 8)
    assert not method.apply(layer, x, weights, torch.full_like(ids, -1)).any()
    assert torch.equal(method.apply(layer, x, weights, ids), expected(module, x, weights, ids))


def test_a_layer_is_packed_with_its_last_tensor(plugin: Any, tmp_path: Path) -> None:
    directory = written(tmp_path, "qwen3_moe", "gptq", **CHANGES["qwen3_moe"])
    _, _, prefix = place(directory)
    config, layer = config_of(plugin, directory), RoutedExperts(8, 32)
    method = config.get_quant_method(layer, prefix)
    method.create_weights(layer, 8, 32, 32, torch.float32)
    tensors = [(name, tensor.clone()) for name, tensor in stream(directory, prefix, config)]
    for index, one in enumerate(tensors):
        waiting = rf"{len(tensors) - index} are missing, first {prefix}\."
        with pytest.raises(CheckpointError, match=rf"^{prefix}: not all .* {waiting}"):
            method.process_weights_after_loading(layer)
        list(layer.load_weights([one]))  # type: ignore[operator]
    assert not hasattr(layer, "qkernels_loading")
    method.process_weights_after_loading(layer)


def test_a_model_that_loads_experts_by_itself(plugin: Any, tmp_path: Path) -> None:
    """DeepSeek's class in vLLM looks for parameters by the names that vLLM gives to all experts at once."""
    directory = written(tmp_path, "qwen3_moe", "gptq", **CHANGES["qwen3_moe"])
    _, module, prefix = place(directory)
    config, layer = config_of(plugin, directory), RoutedExperts(8, 32)
    method = config.get_quant_method(layer, prefix)
    method.create_weights(layer, 8, 32, 32, torch.float32)
    parameters, shards = dict(layer.named_parameters()), {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, tensor in stream(directory, prefix, config):
        expert, part, suffix = name.split(".")
        hole = parameters[f"{'w2' if part == 'down_proj' else 'w13'}_{suffix}"]
        loaded = hole.weight_loader(
            hole, tensor, name, shard_id=shards[part], expert_id=int(expert), return_success=True
        )
        assert loaded is True
    method.process_weights_after_loading(layer)
    x, weights, ids = routed(32, 8)
    assert torch.equal(method.apply(layer, x, weights, ids), expected(module, x, weights, ids))
    assert not list(layer.parameters())


def test_names_that_vllm_gives_to_tensors_are_followed(plugin: Any, tmp_path: Path) -> None:
    """Mixtral's class in vLLM calls what is down_proj in a file w2, of tensors and so of stacks, too."""
    directory = written(tmp_path, "mixtral", "native", **CHANGES["mixtral"])
    _, module, prefix = place(directory)
    config, layer = config_of(plugin, directory), RoutedExperts(4, 32)

    class Renaming:
        def apply_list(self, names: list[str]) -> list[str]:
            return [name.replace(".down_proj.", ".w2.") for name in names]

    config.apply_vllm_mapper(Renaming())
    method = config.get_quant_method(layer, prefix)
    method.create_weights(layer, 4, 32, 32, torch.float32)
    tensors = stream(directory, prefix, config)
    list(layer.load_weights((Renaming().apply_list([f".{name}"])[0][1:], t) for name, t in tensors))  # type: ignore[operator]
    method.process_weights_after_loading(layer)
    x, weights, ids = routed(32, 4)
    assert torch.equal(method.apply(layer, x, weights, ids), expected(module, x, weights, ids))


REFUSED = {
    "activation 'situ'": lambda layer: setattr(layer.activation, "value", "situ"),
    "a limit of the activation": lambda layer: setattr(layer, "swiglu_limit", 7.0),
    "biases of experts": lambda layer: setattr(layer.moe_config, "has_bias", True),
    "routing weights on the input": lambda layer: setattr(layer, "apply_router_weight_on_input", True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused(plugin: Any, tmp_path: Path, what: str) -> None:
    directory = written(tmp_path, "qwen3_moe", "native")
    layer = RoutedExperts(8, 24)
    REFUSED[what](layer)
    method = config_of(plugin, directory).get_quant_method(layer, "model.layers.0.mlp.experts")
    with pytest.raises(CheckpointError, match=rf"experts: not served through vLLM yet: {what}; .*qkernels serve"):
        method.create_weights(layer, 8, 32, 24, torch.float32)


def test_some_of_the_experts_are_refused(plugin: Any, tmp_path: Path) -> None:
    directory = written(tmp_path, "qwen3_moe", "gptq")
    config, prefix = config_of(plugin, directory), "model.layers.0.mlp.experts"
    del config.tensors[f"{prefix}.3.up_proj"]
    layer = RoutedExperts(8, 24)
    with pytest.raises(CheckpointError, match="15 of 16 matrices of gate_up_proj are quantized"):
        config.get_quant_method(layer, prefix).create_weights(layer, 8, 32, 24, torch.float32)
    config.tensors[f"{prefix}.9.up_proj"] = ("qweight",)  # of eight
    with pytest.raises(CheckpointError, match=r"experts\.9\.up_proj: quantized, and no part"):
        config.get_quant_method(layer, prefix).create_weights(layer, 8, 32, 24, torch.float32)


def test_widths_that_do_not_fit_are_refused(plugin: Any, tmp_path: Path) -> None:
    directory = written(tmp_path, "qwen3_moe", "native")
    with pytest.raises(CheckpointError, match=r"gate_up_proj: an expert needs \[64, 32\], got \[48, 32\]"):
        filled(plugin, directory, "model.layers.0.mlp.experts", RoutedExperts(8, 32))
    with pytest.raises(CheckpointError, match=r"down_proj over 2 ranks: .*group"):  # 24 columns in groups of 8
        filled(plugin, directory, "model.layers.0.mlp.experts", RoutedExperts(8, 12, 0, 2))


def test_a_tensor_that_no_header_lists_is_refused(plugin: Any, tmp_path: Path) -> None:
    directory = written(tmp_path, "qwen3_moe", "native")
    config, layer, prefix = config_of(plugin, directory), RoutedExperts(8, 24), "model.layers.0.mlp.experts"
    config.get_quant_method(layer, prefix).create_weights(layer, 8, 32, 24, torch.float32)
    with pytest.raises(CheckpointError, match=rf"{prefix}\.3\.down_proj\.qweight: .* no header lists"):
        list(layer.load_weights([("3.down_proj.qweight", torch.zeros(1))]))  # type: ignore[operator]


def test_float_experts_stay_vllms(plugin: Any, tmp_path: Path) -> None:
    model = tiny_moe("qwen3_moe", num_hidden_layers=1)
    replace_linear(model, "w4a16_g8", include="*_proj", exclude=("*experts*",))
    save(model, tmp_path / "out")
    config = config_of(plugin, tmp_path / "out")
    assert config.get_quant_method(RoutedExperts(8, 24), "model.layers.0.mlp.experts") is None
    config.tensors["model.layers.0.mlp.experts.up_proj"] = ("qweight",)
    with pytest.raises(
        CheckpointError, match=r"experts \(Module\) is neither a linear layer nor vLLM's routed experts"
    ):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts")


def test_stacks_are_found_in_headers_alone(plugin: Any, tmp_path: Path) -> None:
    """As of a model on the Hub, whose files vLLM fetches itself: the same modules as of a directory."""
    golden("int4_stacked", tmp_path)
    config = config_of(plugin, tmp_path)
    names = open_checkpoint(tmp_path).source.names()  # type: ignore[attr-defined]
    assert plugin.grouped(names, config.format) == config.tensors
    assert "model.layers.0.mlp.experts.down_proj" in config.tensors
