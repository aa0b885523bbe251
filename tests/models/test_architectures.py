"""The table of architectures: every entry is held against a tiny random model of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qkernels.errors import ArgumentError, CheckpointError
from qkernels.layerwise.running import LayerInputs, Place, run_layer
from qkernels.layerwise.scaling import HeadSharing, apply_fold
from qkernels.models.architectures import (
    ARCHITECTURES,
    block_lists,
    decoder_layers,
    foldable_architecture,
    head_dim,
    known_architectures,
)
from qkernels.models.building import empty_model, empty_to_meta
from qkernels.models.linears import linear_of
from qkernels.storage import TensorSource
from tests.tiny_models import VOCABULARY, first_inputs, tiny_model

pytest.importorskip("transformers")


def first_layer_outputs(model: Any) -> tuple[nn.Module, LayerInputs, Place]:
    name, layers = decoder_layers(model)
    chain = first_inputs(model, torch.arange(24).view(2, 12) % VOCABULARY, torch.float64)
    assert chain.names == [f"{name}.{index}" for index in range(len(layers))] and not chain.follows
    return layers[0], LayerInputs(chain.hidden, chain.calls[f"{name}.0"]), Place(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("model_type", known_architectures())
def test_names_in_the_table_exist(model_type: str) -> None:
    model = tiny_model(model_type)
    architecture = foldable_architecture(model)
    name, layers = decoder_layers(model)
    assert name == architecture.layers
    assert len(layers) == 2
    assert model.get_submodule(architecture.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(architecture.head) is model.get_output_embeddings()
    assert model.get_submodule(architecture.final_norm) is not None
    for fold in architecture.folds:
        assert all(linear_of(layers[0], target).in_features for target in fold.targets)
        layers[0].get_submodule(fold.parent or "")


@pytest.mark.parametrize("model_type", known_architectures())
def test_folds_leave_the_function_as_it_is(model_type: str) -> None:
    """With random scales from 1/8 to 8 on every fold of a layer, grouped-query attention included. The model is in fp64, but
    transformers computes norms and softmax in fp32 whatever the dtype: the bound is 32 roundings of that."""
    model = tiny_model(model_type).double()
    architecture = foldable_architecture(model)
    layer, inputs, place = first_layer_outputs(model)
    with torch.no_grad():
        before = torch.cat(list(run_layer(layer, inputs, place)))
        for fold in architecture.folds:
            source, target = layer.get_submodule(fold.source), linear_of(layer, fold.targets[0])
            channels = source.out_features if isinstance(source, nn.Linear) else target.in_features
            sharing = HeadSharing(target.in_features // channels, head_dim(model))
            scales = torch.exp2(torch.rand(channels, dtype=torch.float64) * 6 - 3)
            apply_fold(layer, fold, scales, sharing, architecture.unit_offset_norms, torch.float64)
        after = torch.cat(list(run_layer(layer, inputs, place)))
    assert float((after - before).abs().max()) <= 32 * torch.finfo(torch.float32).eps * float(before.abs().max())


@pytest.mark.parametrize("model_type", known_architectures())
def test_a_layer_is_run_as_the_model_runs_it(model_type: str) -> None:
    """With eager attention, which is causal by the mask alone: GPT-2 passes that by position."""
    model = tiny_model(model_type, attn_implementation="eager").double()
    layer, inputs, place = first_layer_outputs(model)
    with torch.no_grad():
        (output,) = run_layer(layer, inputs, place)
        expected = model(torch.arange(24).view(2, 12) % VOCABULARY, output_hidden_states=True).hidden_states[1]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "opt"])
def test_a_wrong_fold_is_noticed(model_type: str) -> None:
    """Negative control: the norm's scales given to the wrong half of the consumers."""
    model = tiny_model(model_type).double()
    layer, inputs, place = first_layer_outputs(model)
    fold = foldable_architecture(model).folds[0]
    with torch.no_grad():
        before = torch.cat(list(run_layer(layer, inputs, place)))
        scales = torch.exp2(torch.rand(32, dtype=torch.float64) * 6 - 3)
        wrong = type(fold)(fold.source, fold.targets[:1], fold.parent)
        apply_fold(layer, wrong, scales, HeadSharing(), False, torch.float64)
        after = torch.cat(list(run_layer(layer, inputs, place)))
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_head_sharing_repeats_heads_and_not_channels() -> None:
    sharing = HeadSharing(repeats=2, width=3)
    spread = sharing.spread(torch.arange(6.0))
    assert spread.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert torch.equal(sharing.gather(spread), torch.arange(6.0))
    assert torch.equal(HeadSharing().gather(spread), spread)
    assert torch.equal(HeadSharing().spread(spread), spread)


@pytest.mark.parametrize("model_type", known_architectures())
def test_empty_model_has_no_weights_but_the_buffers(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    bare = empty_model(TensorSource.open(tmp_path).config, torch.float32, tmp_path)
    assert all(parameter.is_meta for parameter in bare.parameters())
    buffers = dict(bare.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert not bare.training


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers .* knows no model_type 'no_such_model'"):
        empty_model({"model_type": "no_such_model"}, torch.float32, tmp_path)


def test_empty_to_meta_frees_parameters_only() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    empty_to_meta(module)
    assert all(p.is_meta for p in module.parameters())
    assert not any(b.is_meta for b in module.buffers())


def test_an_unknown_architecture_is_named_for_awq() -> None:
    class Other(nn.Module):
        config = type("Config", (), {"model_type": "mamba"})()

    with pytest.raises(
        ArgumentError, match=r"AWQ folds scales .* known for gemma, .*qwen3, got mamba; use GPTQ or RTN"
    ):
        foldable_architecture(Other())
    with pytest.raises(ArgumentError, match="got Linear; use GPTQ or RTN"):
        foldable_architecture(nn.Linear(2, 2))


def test_a_variant_that_does_not_fold_is_named() -> None:
    model = tiny_model("opt", activation_function="gelu")
    with pytest.raises(
        ArgumentError, match=r"opt models with activation_function='relu' only, got 'gelu'; use GPTQ or RTN"
    ):
        foldable_architecture(model)


class Block(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))


def test_blocks_are_the_outermost_lists_and_the_decoder_is_not_guessed() -> None:
    model = nn.Module()
    model.encoder = nn.ModuleList(Block(1) for _ in range(2))
    model.decoder = nn.Module()
    model.decoder.blocks = nn.ModuleList(Block(9) for _ in range(3))
    model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(20))
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    assert block_lists(model) == {"encoder": model.encoder, "decoder.blocks": model.decoder.blocks}
    with pytest.raises(ArgumentError, match=r"Module has several lists of layers \(encoder, decoder.blocks\)"):
        decoder_layers(model)
    model.get_decoder = lambda: model.decoder
    assert decoder_layers(model) == ("decoder.blocks", model.decoder.blocks)


def test_a_model_without_layers_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"Sequential has no list of decoder layers .* use replace_linear"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_every_entry_covers_other_model_types() -> None:
    names = [name for architecture in ARCHITECTURES for name in architecture.model_types]
    assert len(names) == len(set(names))
