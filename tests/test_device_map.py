"""`load(device_map=…)`: which part goes where, and what brings activations to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import load
from qkernels.checkpoint.placing import Placement, _Bring, _moved, filled, layers_on_gpu
from qkernels.errors import ArgumentError

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo_model"
CPU, OTHER, GPU = torch.device("cpu"), torch.device("cpu", 1), torch.device("cuda", 0)


def brought(model: Any) -> dict[str, torch.device]:
    """The device that each module's inputs are brought to, by name."""
    return {
        name: hook.device
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, _Bring)
    }


@pytest.mark.parametrize("source", [DEMO, ROOT / "tests" / "golden" / "own" / "native"], ids=["floats", "native"])
def test_a_spread_model_computes_the_same(source: Path) -> None:
    """Two names of the CPU stand for two devices: what is brought where is looked at, since it is one memory."""
    plain, spread = load(source), load(source, device_map={"": "cpu", "model.layers.1": OTHER})
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, spread(ids).logits)
    found = brought(spread)
    assert found["model.layers.1"] == OTHER and found["model.norm"] == CPU and found[""] == CPU
    assert not any(name.startswith("model.layers.1.") for name in found)
    assert brought(plain) == {}
    assert spread.hf_device_map == {"": "cpu", "model.layers.1": "cpu:1"}


def test_whatever_a_part_is_called_with_is_moved() -> None:
    meta = torch.device("meta")
    t = torch.ones(2)
    args, kwargs = _Bring(meta)(torch.nn.Identity(), (t, (t, [t])), {"mask": t, "more": {"x": (t, None)}, "flag": True})
    assert args[0].is_meta and args[1][0].is_meta and args[1][1][0].is_meta
    assert kwargs["mask"].is_meta and kwargs["more"]["x"][0].is_meta and kwargs["flag"] is True
    assert kwargs["more"]["x"][1] is None and _moved("text", meta) == "text"


def test_the_longest_beginning_says_where() -> None:
    place = Placement({"": CPU, "model.layers.1": GPU, "model.layers.1.mlp": OTHER})
    assert place("model.layers.1.self_attn.q_proj") == GPU
    assert place("model.layers.1.mlp.up_proj.weight") == OTHER
    assert place("model.layers.10.mlp") == CPU and place("lm_head") == CPU


def test_layers_on_a_gpu_are_the_first() -> None:
    place = layers_on_gpu(load(DEMO), 3, GPU)
    assert [place(f"model.layers.{i}.mlp").type for i in range(4)] == ["cuda", "cuda", "cuda", "cpu"]
    assert place("model.embed_tokens") == place("lm_head") == GPU
    with pytest.raises(ArgumentError, match="this model has 4 layers, got 5"):
        layers_on_gpu(load(DEMO), 5, GPU)
    model = load(DEMO, device_map=0)  # none on a GPU needs none
    assert {p.device for p in model.parameters()} == {CPU} and brought(model) == {}


def test_devices_are_filled_in_order() -> None:
    two = [(GPU, 25), (torch.device("cuda", 1), 10)]
    place = filled("h", [10, 10, 10, 10], 5, two)
    assert [str(place(f"h.{i}")) for i in range(4)] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    none = filled("h", [10], 30, two)  # not even what is outside of the layers
    assert none("h.0") == none("lm_head") == CPU


@pytest.mark.parametrize(
    ("device_map", "why"),
    [
        ({"": "disk"}, 'everything on "disk", and packed weights stay in memory'),
        ({"": "cpu", "model.layers.9": "cpu"}, "names 'model.layers.9', which LlamaForCausalLM does not have"),
        ({"model.embed_tokens": "cpu"}, 'no device for model.layers.0.* "" stands for everything'),
        ({"": "nowhere"}, "needs devices such as cpu, cuda:0 or 0, got 'nowhere'"),
        ({"": "cuda:77"}, "everything on cuda:77, and this torch sees"),
        ("balanced", 'must be "auto", a number of layers or a mapping'),
    ],
)
def test_maps_that_cannot_be(device_map: Any, why: str) -> None:
    with pytest.raises(ArgumentError, match=why):
        load(DEMO, device_map=device_map)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_layers_on_both() -> None:
    plain, spread = load(DEMO, "cuda", torch.bfloat16), load(DEMO, dtype=torch.bfloat16, device_map=2)
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        there, here = plain(ids.cuda()).logits.float().cpu(), spread(ids).logits.float().cpu()
    assert next(spread.model.layers[3].parameters()).device == CPU
    assert (there - here).abs().max() < 0.05 * there.abs().max()
