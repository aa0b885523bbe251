"""State dicts and packed checkpoints of every layout that is packed on this machine: taken, and refused where they lie.

Layouts of other devices are packed by plain PyTorch, so that all of this runs on the CPU.
"""

from __future__ import annotations

import json

import pytest
import torch

from qkernels import QuantLinear
from qkernels.checkpoint.packed import packed_format
from qkernels.errors import CheckpointError, TensorError
from qkernels.formats import Written
from qkernels.layouts import LAYOUTS, get_layout
from tests.ops.helpers import layer_in
from tests.strategies import random_weight, same_weight, scheme_taken

N, K = 70, 128
# Layouts whose bytes are a kernel's; the canonical ones have no version to be wrong about that another test lacks.
NAMES = ["mma_tile", "kpack", "cpu_tile_a16", "mma_tile_a8", "cpu_tile_a8"]
layouts = pytest.mark.parametrize("name", NAMES)


def scheme_of(name: str) -> str:
    return scheme_taken(get_layout(name), "w4a16_g32_asym", "w4a8_g32")


def state_of(name: str) -> tuple[QuantLinear, dict[str, torch.Tensor]]:
    """A layer, and its state dict with the buffers of that layout."""
    layer = layer_in(name, random_weight(scheme_of(name), N, K, act_order=True))
    state = layer.state_dict()
    assert json.loads(bytes(state["_extra_state"].tolist()))["layout"] == name
    return layer, state


def target_of(name: str) -> QuantLinear:
    return QuantLinear(K, N, bias=False, scheme=scheme_of(name), ordered=True)


def test_every_layout_of_a_kernel_is_here() -> None:
    assert set(NAMES) == {name for name, layout in LAYOUTS.items() if layout.backend != "torch"}


@layouts
def test_a_state_dict_of_any_layout_is_taken(name: str) -> None:
    layer, state = state_of(name)
    target = target_of(name)
    assert target.load_state_dict(state) == ([], [])
    assert same_weight(target.quant_tensor(), layer.quant_tensor())


@layouts
@pytest.mark.parametrize("change", [1, -1, 98])
def test_a_layout_of_another_version_is_refused(name: str, change: int) -> None:
    change = -get_layout(name).version if change < 0 else change  # those between may be read (`Layout.upgrades`)
    state = state_of(name)[1]
    packing = json.loads(bytes(state["_extra_state"].tolist()))
    here = packing["version"]
    packing["version"] += change
    state["_extra_state"] = torch.tensor(list(json.dumps(packing).encode()), dtype=torch.uint8)
    target = target_of(name)
    message = f"packed as {name} version {here + change}, this qkernels reads version {here}; pack the checkpoint again"
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    assert not target.qweight.any(), "a refused state dict must change nothing"


@layouts
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qweight", lambda t: t[:, :-16].contiguous(), "qweight must be uint8"),
        ("qweight", lambda t: t.view(torch.int8), "qweight must be uint8"),
        ("scales", lambda t: t[:-1], "scales must be"),
        ("scales", lambda t: torch.full_like(t, float("nan")), "scales must be finite"),
        ("k_order", lambda t: t + 1, "k_order must be a permutation of 0 … 127"),
        ("k_order", lambda t: t.clone().fill_(1 << 30), "k_order must be a permutation"),
        ("k_order", lambda t: -t, "k_order must be a permutation"),
        ("k_order", lambda t: t[:-1], "k_order must be"),
    ],
)
def test_a_hostile_state_dict_is_refused(name: str, key: str, change: object, message: str) -> None:
    state = state_of(name)[1]
    state[key] = change(state[key])  # type: ignore[operator]
    target = target_of(name)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    assert not target.qweight.any(), "a refused state dict must change nothing"


@layouts
def test_packed_checkpoints_of_another_version_are_refused(name: str) -> None:
    layout, weight = get_layout(name), random_weight(scheme_of(name), N, K, act_order=True)
    form = packed_format(layout)
    config = form.config_of(Written(weight.scheme, {}, act_order=True))
    tensors = form.write(weight)
    assert same_weight(form.parse("layer", tensors, config).weight, weight)
    for version in (layout.version + 1, 0, None, "1"):
        with pytest.raises(CheckpointError, match=f"layer.*version {version!r} of layout {name}.*reads version"):
            form.parse("layer", tensors, {**config, "layout_version": version})


@layouts
def test_a_packed_group_index_out_of_range_is_refused(name: str) -> None:
    """Both where a weight is packed and where packed buffers come from a file."""
    weight = random_weight(scheme_of(name), N, K, act_order=True)
    for entry in (-1, K // 32, 1 << 30):
        index = weight.group_index.clone()  # type: ignore[union-attr]
        index[3] = entry
        with pytest.raises(TensorError, match="group_index"):
            type(weight)(weight.codes, weight.scales, weight.zeros, index, weight.scheme)
    form = packed_format(get_layout(name))
    config, tensors = form.config_of(Written(weight.scheme, {}, act_order=True)), form.write(weight)
    tensors["k_order"][5] = K
    with pytest.raises((CheckpointError, TensorError), match="k_order must be a permutation"):
        form.parse("layer", tensors, config)
