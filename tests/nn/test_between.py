"""`fuse`: modules of transformers compute in one op what they did in many, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from qkernels import extension
from qkernels.nn import between

pytestmark = pytest.mark.skipif(not extension.status().loaded, reason="no compiled extension")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What becomes of an architecture's classes: norms, gated MLPs, attention.
MODELS = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "gemma2": (9, 2, 0),
    "gemma3_text": (13, 2, 2),
    "phi3": (5, 0, 0),
    "mixtral": (5, 0, 2),
}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {} if kind in ("qwen2", "phi3") else {"head_dim": 32}
    own |= {"num_attention_heads": 2, "num_key_value_heads": 1} if kind == "qwen2" else {}
    own |= {"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | own)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    return model.to(dtype)


def logits(model: Any) -> torch.Tensor:
    """Of a padded batch, prompt and eight tokens."""
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    found = model.generate(
        ids,
        attention_mask=seen,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits)


@pytest.mark.parametrize("kind", MODELS)
def test_fused_models_compute_the_same(kind: str) -> None:
    model = model_of(kind)
    before, names = logits(model), [type(m).__name__ for m in model.modules()]
    found = between.fuse(model)
    counts = [
        sum(isinstance(m, k) for m in model.modules()) for k in (between._Norm, between._Gated, between._Attention)
    ]
    assert tuple(counts) == MODELS[kind] and sum(found.values()) == sum(counts)
    assert [type(m).__name__ for m in model.modules()] == names and between.fuse(model) == {}
    after = logits(model)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, before) == (MODELS[kind][2] == 0), (
        "in float32 a batch keeps all bits but those of attention"
    )
    between.unfuse(model)
    assert torch.equal(logits(model), before)
    ids, low = torch.arange(3, 40)[None], model.bfloat16()
    with torch.no_grad():
        for given in (ids, ids[:, :1]):
            before = low(given).logits.float()
            between.fuse(low)
            error = (low(given).logits.float() - before).norm() / before.norm()
            between.unfuse(low)
            assert error < 2e-2, "a value in a thousand is rounded to its neighbour, 2^-8 away"


def test_small_copies_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the threads that were there are there again, whatever happened."""
    seen, product = [], nn.functional.linear

    def watched(*tensors: Any) -> Any:
        seen.append(torch.get_num_threads())
        return product(*tensors)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = model_of("llama")
        monkeypatch.setattr(nn.functional, "linear", watched)
        between.fuse(made)
        assert seen
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(between, "_tried", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        between.unfuse(made)
        with pytest.raises(KeyboardInterrupt):
            between.fuse(made)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_copies_pickles_and_state_dicts_are_as_before() -> None:
    model = model_of("llama")
    keys, mlp = list(model.state_dict()), type(model.model.layers[0].mlp)
    between.fuse(model)
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(again.model.layers[0].mlp, between._Gated) and isinstance(again.model.layers[0].mlp, mlp)
        assert torch.equal(logits(again), expected) and list(again.state_dict()) == keys
        nn.init.zeros_(again.model.norm.weight)
    assert torch.equal(logits(model), expected)


def test_gradients_other_dtypes_and_compilers_see_the_modules_that_were_there() -> None:
    model = model_of("llama")
    ids = torch.arange(3, 9)[None]
    plain = model(ids).logits
    between.fuse(model)
    model(ids, labels=ids).loss.backward()
    norm = model.model.layers[0].input_layernorm
    assert norm.weight.grad.abs().sum() > 0 and torch.equal(model(ids).logits, plain)
    with torch.no_grad():
        wide = torch.ones(1, 64, dtype=torch.double)
        assert torch.equal(norm(wide), type(norm)._source.forward(norm, wide))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids).logits
            between.unfuse(model)
            assert torch.equal(mixed, model(ids).logits)
            between.fuse(model)
        step = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
        x = torch.randn(1, 3, 64)
        assert torch.equal(step(x), type(model.model.layers[0].mlp)._source.forward(model.model.layers[0].mlp, x))


class Shifted(nn.Module):
    """A norm that is none: it adds its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) + self.weight


class Late(Shifted):
    """The weight is multiplied before the only rounding, which 16 bits tell from Llama's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("module", [Shifted(), Late(), Relu(), nn.RMSNorm(32)], ids=lambda m: type(m).__name__)
def test_modules_that_compute_something_else_are_left_alone(module: nn.Module) -> None:
    kind = type(module)
    between.fuse(nn.Sequential(module))
    assert type(module) is kind


def test_eager_attention_and_prompts_go_the_old_way() -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    before = logits(model)
    between.fuse(model)
    assert all(not isinstance(m, between._Attention) for m in model.modules()) or torch.allclose(
        logits(model), before, atol=1e-5
    )
    found = model(torch.arange(3, 9)[None], output_attentions=True)
    assert len(found.attentions) == 2 and found.attentions[0].shape[-1] == 6


def test_caches_of_another_kind_go_the_old_way() -> None:
    """As that of continuous batching, whose pages belong to many sequences."""
    from transformers import DynamicCache

    class Pages:
        def __init__(self) -> None:
            self.inner, self.given = DynamicCache(), list[dict[str, Any]]()

        def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, **named: Any) -> Any:
            self.given.append(named)
            return self.inner.update(keys, values, layer)

    model = model_of("llama")
    between.fuse(model)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 1, 64)
    turn = (torch.ones(1, 1, 32), torch.zeros(1, 1, 32))
    name = "cache" if "cache" in inspect.signature(type(attention)._source.forward).parameters else "past_key_values"
    with torch.no_grad():
        pages = Pages()
        found, _ = attention(x, turn, None, **{name: pages})
        assert pages.given and pages.given[0], "transformers tells a cache more than the ops do"
        expected, _ = attention(x, turn, None, **{name: DynamicCache()})
    assert torch.allclose(found, expected, atol=1e-5)
