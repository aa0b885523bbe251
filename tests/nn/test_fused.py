"""Fused layers: the bits, names and states of the layers alone, whatever happens between and around their calls."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import QuantLinear, load, replace_linear
from qkernels.nn import fuse_linear, unfuse_linear
from qkernels.nn.fused import DECODE_TOKENS, FusedGroup
from tests.nn.test_linear import ALLOCATIONS, COPIES, torch_ops_of
from tests.strategies import random_weight, same_weight

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
SIZES = {"hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 99, "max_position_embeddings": 64}  # fmt: skip


def tiny(kind: str, scheme: str = "w4a16_g32", fuse: bool = False, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide a bias that lands in the wrong place
            nn.init.normal_(parameter)
    model.requires_grad_(False)
    report = replace_linear(model, scheme, fuse=fuse, progress=False)
    if fuse:
        assert len(report.fusing.fused) == 4, report
        assert not report.fusing.unfused
    return model


@torch.no_grad()
def logits_of(model: Any, tokens: int = 10, prompt: int = 12) -> list[Tensor]:
    ids = torch.arange(prompt)[None] * 7 % 99
    made = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    assert len(made.logits) == tokens
    return list(made.logits)


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every part that a product with a whole gave."""
    rows: list[int] = []
    multiply = FusedGroup.multiply

    def counting(self: FusedGroup, part: QuantLinear, x: Tensor) -> Tensor | None:
        y = multiply(self, part, x)
        if y is not None:
            rows.append(part.out_features)
        return y

    monkeypatch.setattr(FusedGroup, "multiply", counting)
    return rows


def group_of(rows: tuple[int, ...] = (64, 32, 33), K: int = 96, bias: bool = False, **weight: Any) -> list[QuantLinear]:
    """Layers that form one matrix."""
    layers = layers_of(rows, K, bias, **weight)
    group = FusedGroup(tuple(layers))
    assert not group.reasons()
    group.lay_out()
    for layer in layers:
        layer.fused = group
    return layers


def layers_of(
    rows: tuple[int, ...] = (64, 32, 33),
    K: int = 96,
    bias: bool = False,
    scheme: str = "w4a16_g32",
    act_order: bool = False,
) -> list[QuantLinear]:
    made = []
    for i, N in enumerate(rows):
        torch.manual_seed(i)
        b = torch.randn(N, dtype=torch.bfloat16) if bias else None
        qt = random_weight(scheme, N, K, seed=i)
        if act_order:
            qt = replace(qt, group_index=random_weight(scheme, 1, K, act_order=True).group_index)
        made.append(QuantLinear.from_quant_tensor(qt, b, dtype=torch.bfloat16).requires_grad_(False))
    return made


def token(K: int = 96, seed: int = 0, tokens: int = 1) -> Tensor:
    return torch.randn(1, tokens, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


# --- whole models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])  # qwen2 has biases, qwen3 norms on q and k
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8_channel"])
def test_prompt_and_decode_keep_their_bits(picked: list[int], kind: str, scheme: str) -> None:
    expected = logits_of(tiny(kind, scheme))
    assert not picked
    assert_same_bits(logits_of(tiny(kind, scheme, fuse=True)), expected)
    assert picked == [128, 32, 32, 224, 224] * 2 * 9  # q, k, v, gate, up; layers; tokens after the prompt of 12


@pytest.mark.skipif(not DEMO.exists(), reason="the bundled model is not here")
def test_the_bundled_model_loaded_and_generating(picked: list[int], tmp_path: Path) -> None:
    models = [load(DEMO, fuse=fuse) for fuse in (False, True)]  # float layers: nothing to fuse, and it says so
    for model, fuse in zip(models, (False, True), strict=True):
        replace_linear(model, "w4a16_g128", fuse=fuse, progress=False)
    with torch.inference_mode():
        assert_same_bits(logits_of(models[0], 4), logits_of(models[1], 4))
    assert picked


def test_states_travel_both_ways_and_fusing_is_undone() -> None:
    alone, fused = tiny("qwen2"), tiny("qwen2", fuse=True)
    state, fused_state = alone.state_dict(), fused.state_dict()
    assert list(state) == list(fused_state)
    assert all(torch.equal(t, fused_state[name]) for name, t in state.items())
    other = tiny("qwen2")
    for layer in other.modules():
        if isinstance(layer, QuantLinear):
            layer.scales.mul_(0.5)
    expected = logits_of(other, 3)
    for model in (alone, fused):
        model.load_state_dict(other.state_dict())
        assert_same_bits(logits_of(model, 3), expected)
    q, k = fused.model.layers[0].self_attn.q_proj, fused.model.layers[0].self_attn.k_proj
    assert q.qweight.untyped_storage().data_ptr() == k.qweight.untyped_storage().data_ptr()  # fused again
    alone.load_state_dict(fused.state_dict())
    unfuse_linear(fused)
    assert q.qweight.untyped_storage().data_ptr() != k.qweight.untyped_storage().data_ptr()
    assert not any(layer.fused for layer in fused.modules() if isinstance(layer, QuantLinear))
    assert_same_bits(logits_of(alone, 3), expected)
    assert_same_bits(logits_of(fused, 3), expected)


def test_safetensors_take_the_state_dict(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny("llama", fuse=True, tie_word_embeddings=False)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("change", ["deepcopy", "pickle", "cast", "share_memory"])
def test_a_changed_model_fuses_again(picked: list[int], change: str) -> None:
    alone, fused = tiny("qwen2"), tiny("qwen2", fuse=True)

    def changed(model: Any) -> Any:
        if change == "deepcopy":
            return copy.deepcopy(model)
        if change == "cast":
            return model.to(torch.float32)
        if change == "share_memory":
            return model.share_memory()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    alone, fused = changed(alone), changed(fused)
    with torch.inference_mode():
        assert_same_bits(logits_of(fused, 3), logits_of(alone, 3))
    assert len(picked) == 20
    assert not any(layer.qweight.is_inference() for layer in fused.modules() if isinstance(layer, QuantLinear))


def test_no_weight_is_held_twice() -> None:
    """A model that leaves its fused memory frees it then, not at the next decode step."""
    q, _, v = layers = group_of()
    memory = weakref.ref(q.fused._whole.qweight)
    nn.ModuleList(layers).eval().to("cpu")  # changes nothing
    assert memory() is not None
    assert q.fused._matrix() is not None
    states = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for layer, state in zip(layers, states, strict=True):
        layer.load_state_dict(state)
    assert memory() is None
    q(token())
    assert q.qweight.untyped_storage().data_ptr() == v.qweight.untyped_storage().data_ptr()


# --- what may happen between the calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, DECODE_TOKENS, DECODE_TOKENS + 1])
@pytest.mark.parametrize(
    "weight",
    [
        {},
        {"bias": True},
        {"act_order": True},
        *({"scheme": s} for s in ("w4a16_g32_asym", "w8a8_g32", "w4a8_g32_asym")),
    ],
)
def test_parts_are_what_the_layers_give(picked: list[int], tokens: int, weight: dict[str, Any]) -> None:
    alone, fused = layers_of(**weight), group_of(**weight)
    x = token(tokens=tokens)
    for a, f in zip(alone, fused, strict=True):
        expected, y = a(x), f(x)
        assert torch.equal(y, expected)
        assert y.is_contiguous()
        assert same_weight(f.quant_tensor(), a.quant_tensor())
    assert len(picked) == (0 if tokens > DECODE_TOKENS else 3)


@torch.no_grad()
def test_three_layers_are_one_product() -> None:
    layers, x = group_of(), token().float()  # which no instruction set has to convert
    ops = torch_ops_of(lambda: [layer(x) for layer in layers])
    assert ops["qkernels::gemm_cpu_tile_a16"] == ops[ALLOCATIONS] == 1
    assert not COPIES & ops.keys()


def other_input_between(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    q(x), q(token(seed=5))
    return k(x)


def equal_but_not_the_same(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    q(x)
    return k(x.clone())


def changed_in_place(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    q(x.neg_())
    return k(x.neg_())


def in_the_wrong_order(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    y = k(x)
    q(x)
    return y


def twice(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    q(x), k(x).zero_()
    return k(x)


def with_a_hook_on_the_first(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    handle = q.register_forward_hook(lambda module, args, y: y.zero_())
    q(x)
    handle.remove()
    return k(x)


def with_a_hook_on_the_second(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    handle = k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    q(x / 2)
    y = k(x / 2)
    handle.remove()
    return y


def across_threads(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    ys: list[Tensor] = []
    q(x)
    thread = threading.Thread(target=lambda: ys.append(k(x)))
    thread.start()
    thread.join()
    return ys[0]


def loaded_between(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    state = copy.deepcopy(k.state_dict())
    k.scales.zero_()
    q(x)
    k.load_state_dict(state)
    return k(x)


def moved_between_modes(q: QuantLinear, k: QuantLinear, x: Tensor) -> Tensor:
    with torch.inference_mode():
        q(x)
    y = k(x)
    assert not y.is_inference()
    return y


BETWEEN = [other_input_between, equal_but_not_the_same, changed_in_place, in_the_wrong_order, twice, with_a_hook_on_the_first,
           with_a_hook_on_the_second, across_threads, loaded_between, moved_between_modes]  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_nothing_between_the_calls_matters(between: Callable[[QuantLinear, QuantLinear, Tensor], Tensor]) -> None:
    alone, (q, k, _) = layers_of(), group_of()
    assert torch.equal(between(q, k, token()), alone[1](token()))


def test_autocast_in_between() -> None:
    alone, (q, k, _) = layers_of(), group_of()
    x = token().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q(x)
    assert torch.equal(k(x), alone[1](x))
    assert k(x).dtype == torch.float32


def test_many_threads_at_once() -> None:
    alone, fused = layers_of(), group_of()
    wrong = []

    def work(seed: int) -> None:
        for i in range(50):
            x = token(seed=100 * seed + i)
            if not all(torch.equal(f(x), a(x)) for f, a in zip(fused, alone, strict=True)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_take_each_others_product_away(picked: list[int]) -> None:
    q, k, _ = group_of()
    x = token()
    q(x)
    thread = threading.Thread(target=lambda: q(token(seed=1)))
    thread.start()
    thread.join()
    k(x)
    assert picked == [64, 64, 32]


def test_a_deleted_model_is_gone_though_nobody_picked_up() -> None:
    layers = group_of()
    alive = [weakref.ref(layer) for layer in layers]
    layers[0](token())
    del layers
    gc.collect()
    assert not any(ref() for ref in alive)


# --- gradients and graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_gradients_are_those_of_the_layers_alone(picked: list[int], checkpointed: bool | None) -> None:
    results = []
    for layers in (layers_of(bias=True), group_of(bias=True)):
        layers[1].bias.requires_grad_(True)

        def run(x: Tensor, layers: list[QuantLinear] = layers) -> Tensor:
            return torch.cat([layer(x) for layer in layers], -1)

        x = token().requires_grad_()
        y = run(x) if checkpointed is None else torch.utils.checkpoint.checkpoint(run, x, use_reentrant=checkpointed)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, layers[1].bias.grad])
        layers[1].bias.data.add_(1)  # as an optimizer does
        with torch.no_grad():
            results[-1].append(run(token(seed=3)))
    assert_same_bits(*results)
    assert len(picked) >= 3


def test_compiles_to_one_graph() -> None:
    alone, fused = layers_of(), group_of()
    compiled = torch.compile(lambda x: [layer(x) for layer in fused], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(token()), [layer(token()) for layer in alone])


# --- what cannot be fused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": "w8a16_g32"}, "schemes differ: w4a16_g32, w8a16_g32"),
        ({"K": 128}, "in_features differ: 96, 128"),
        ({"bias": True}, "dtypes of bias differ: none, bfloat16"),
        ({"act_order": True}, "order of columns (act-order) of its own"),
    ],
)
def test_layers_that_differ_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    first, second = layers_of((64,))[0], layers_of((64,), **changes)[0]
    assert reason in "; ".join(FusedGroup((first, second)).reasons())


def test_rows_and_layouts_have_reasons() -> None:
    odd, even = layers_of((33, 64))
    assert not FusedGroup((even, odd)).reasons()
    assert FusedGroup((odd, even)).reasons() == ["[33, 64] rows do not end where tiles of 32 do"]
    plain = [QuantLinear(32, 32, scheme="nf4_g32", on_unsupported="reference") for _ in range(2)]
    assert "layout reference on cpu" in "; ".join(FusedGroup(tuple(plain)).reasons())


def test_the_report_names_what_is_left() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 224)
    report = fuse_linear(model)
    assert report.unfused == {
        "model.layers.0.mlp: gate_proj, up_proj": "all must be QuantLinear, got QuantLinear, Linear"
    }
    assert len(report.fused) == 3
    assert "not fused model.layers.0.mlp" in str(report)
    mixed = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    fusing = replace_linear(mixed, "w4a16_g32", overrides={"*.v_proj": "w8a16_g32"}, fuse=True, progress=False).fusing
    assert len(fusing.unfused) == 2
    assert "schemes differ" in fusing.unfused["model.layers.0.self_attn: q_proj, k_proj, v_proj"]


def test_an_unknown_architecture_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    report = replace_linear(model, "w4a16_g32", fuse=True, progress=False)
    assert "known for gemma" in report.fusing.unfused["Sequential"]
    assert "not for None" in str(report)
