"""The table of architectures: every entry is held against a tiny random model of transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qkernels.errors import ArgumentError, CheckpointError
from qkernels.layerwise.folds import HeadSharing, ProvedFold, apply_fold
from qkernels.layerwise.running import LayerInputs, Place, first_output, propagate
from qkernels.layerwise.tracing import find_folds
from qkernels.models.architectures import (
    ARCHITECTURES,
    Fold,
    block_lists,
    decoder_layers,
    expected_folds,
    find_architecture,
    folds_of_layer,
)
from qkernels.models.building import empty_model, empty_to_meta
from qkernels.storage import TensorSource
from tests.tiny_models import KINDS, VOCABULARY, first_inputs, in_float64, tiny_model

pytest.importorskip("transformers")


def layers_with_inputs(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, LayerInputs]]:
    """The layers of a decoder in a dtype, each with what goes into it. It is run when the next is asked for, so that
    what it writes for others is there."""
    name, layers = decoder_layers(model)
    chain = first_inputs(model, torch.arange(24).view(2, 12) % VOCABULARY, dtype)
    assert chain.names == [f"{name}.{index}" for index in range(len(layers))] and not chain.follows
    for leaf, layer in zip(chain.names, layers, strict=True):
        inputs = LayerInputs(chain.hidden, chain.calls[leaf])
        yield leaf, layer, inputs
        with torch.no_grad():
            propagate(layer, inputs, place(dtype), leaf)


def place(dtype: torch.dtype) -> Place:
    return Place(torch.device("cpu"), dtype)


def outputs(layer: nn.Module, inputs: LayerInputs, dtype: torch.dtype) -> torch.Tensor:
    """What a layer puts out, without a trace in what it is called with."""
    with torch.no_grad():
        return first_output(inputs.calls[0].outcome(layer, inputs.hidden[0], place(dtype))[0])


def settings(fold: Fold) -> tuple[str, frozenset[str], str | None]:
    return fold.source, frozenset(fold.targets), fold.parent


KNOWN = sorted(name for architecture in ARCHITECTURES for name in architecture.model_types)
VARIANTS = [
    *((model_type, {}) for model_type in KNOWN),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("deepseek_v2", {"q_lora_rank": 16}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    ("gemma4_text", {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": KINDS * 2}),
    ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}),
    ("qwen2", {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize("model_type", KNOWN)
def test_names_in_the_table_exist(model_type: str) -> None:
    model = tiny_model(model_type)
    architecture = find_architecture(model_type)
    assert architecture is not None
    assert decoder_layers(model)[0] == architecture.layers
    assert model.get_submodule(architecture.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(architecture.head) is model.get_output_embeddings()
    assert model.get_submodule(architecture.final_norm) is not None
    assert expected_folds(model) == architecture.folds
    variants = [tiny_model(model_type, **changes) for name, changes in VARIANTS if name == model_type]
    layers_of_all = [layer for variant in variants for layer in decoder_layers(variant)[1]]
    used = {fold for layer in layers_of_all for fold in folds_of_layer(architecture.folds, layer)}
    assert used == set(architecture.folds)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_tracing_finds_what_the_table_says_and_scaled_layers_compute_what_they_did(
    model_type: str, changes: dict[str, Any]
) -> None:
    """Every layer of a model, nothing more and nothing less. Then random scales from 1/8 to 8 on every fold, in fp64; but
    transformers computes norms and softmax in fp32 whatever the dtype: the bound is 32 roundings of that."""
    model = tiny_model(model_type, **changes)
    expected = expected_folds(model)
    found = {}
    for name, layer, inputs in layers_with_inputs(model, torch.float32):
        found[name] = find_folds(layer, inputs, place(torch.float32), name).proved
        assert [*map(settings, folds_of_layer(expected, layer))] == [settings(proved.fold) for proved in found[name]]
    for name, layer, inputs in layers_with_inputs(in_float64(model), torch.float64):
        before = outputs(layer, inputs, torch.float64)
        for proved in found[name]:
            source = layer.get_submodule(proved.fold.source)
            channels = source.out_features if isinstance(source, nn.Linear) else source.weight.numel()
            scales = torch.exp2(torch.rand(channels, dtype=torch.float64) * 6 - 3)
            apply_fold(layer, proved, scales, torch.float64)
        after = outputs(layer, inputs, torch.float64)
        assert float((after - before).abs().max()) <= 32 * torch.finfo(torch.float32).eps * float(before.abs().max())


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_layer_is_run_as_the_model_runs_it(model_type: str) -> None:
    """With eager attention, which is causal by the mask alone: GPT-2 passes that by position."""
    model = in_float64(tiny_model(model_type, attn_implementation="eager"))
    _, layer, inputs = next(layers_with_inputs(model, torch.float64))
    output = outputs(layer, inputs, torch.float64)
    with torch.no_grad():
        expected = model(torch.arange(24).view(2, 12) % VOCABULARY, output_hidden_states=True).hidden_states[1]
    assert torch.equal(output, expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "opt"])
def test_a_wrong_fold_is_noticed(model_type: str) -> None:
    """Negative control of the bound: the norm's scales given to one of the consumers only."""
    model = tiny_model(model_type).double()
    _, layer, inputs = next(layers_with_inputs(model, torch.float64))
    fold = expected_folds(model)[0]
    before = outputs(layer, inputs, torch.float64)
    scales = torch.exp2(torch.rand(32, dtype=torch.float64) * 6 - 3)
    apply_fold(layer, ProvedFold(Fold(fold.source, fold.targets[:1])), scales, torch.float64)
    after = outputs(layer, inputs, torch.float64)
    assert float((after - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_head_sharing_repeats_heads_and_not_channels() -> None:
    sharing = HeadSharing(repeats=2, width=3)
    spread = sharing.spread(torch.arange(6.0))
    assert spread.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert torch.equal(sharing.gather(spread), torch.arange(6.0))
    assert torch.equal(HeadSharing().gather(spread), spread)
    assert torch.equal(HeadSharing().spread(spread), spread)


@pytest.mark.parametrize("model_type", KNOWN)
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


def test_nothing_is_expected_of_what_the_table_does_not_have() -> None:
    class Other(nn.Module):
        config = type("Config", (), {"model_type": "mamba"})()

    assert expected_folds(Other()) == expected_folds(nn.Linear(2, 2)) == ()
    assert expected_folds(tiny_model("opt")) and not expected_folds(tiny_model("opt", activation_function="gelu"))


def test_a_transposed_matrix_is_a_source_as_well() -> None:
    model = tiny_model("gpt2", activation_function="relu")
    _, layer, inputs = next(layers_with_inputs(model, torch.float32))
    *_, found = find_folds(layer, inputs, place(torch.float32), "0").proved
    assert settings(found.fold) == ("mlp.c_fc", frozenset({"mlp.c_proj"}), None)
    before = outputs(layer, inputs, torch.float32)
    apply_fold(layer, found, torch.exp2(torch.arange(layer.mlp.c_fc.weight.shape[1]) % 5 - 2.0), torch.float32)
    assert torch.equal(outputs(layer, inputs, torch.float32), before)


@pytest.mark.parametrize(
    ("model_type", "changes", "sources"),
    [
        ("opt", {"activation_function": "gelu"}, ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm"]),
        ("opt", {"do_layer_norm_before": False}, ["self_attn.v_proj", "fc1"]),
        ("falcon", {"parallel_attn": False}, ["input_layernorm", "post_attention_layernorm"]),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, []),
        ("stablelm", {}, ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("stablelm", {"use_parallel_residual": True}, ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"]),
        ("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, ["ln_1", "attn.v_proj"]),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, ["norm_1", "norm_2"]),
        ("mamba", {}, ["norm"]),
        ("olmo", {}, ["self_attn.v_proj", "mlp.up_proj"]),
        ("olmo", {"clip_qkv": 8.0}, ["mlp.up_proj"]),
        ("mixtral", {"num_local_experts": 4}, ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm"]),
    ],
    ids=str,
)
def test_what_has_no_entry_is_found(model_type: str, changes: dict[str, Any], sources: list[str]) -> None:
    """Other settings of known architectures, and others. A router and experts read one scale; OLMo may clamp
    values, and no number here is near the bound."""
    model = tiny_model(model_type, **changes)
    assert expected_folds(model) == ()
    for name, layer, inputs in layers_with_inputs(model, torch.float32):
        found = find_folds(layer, inputs, place(torch.float32), name)
        assert [proved.fold.source for proved in found.proved] == sources


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
