"""`QuantExperts` in the place of transformers' experts modules: every family, and what a module has to do."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import replace_linear
from qkernels.errors import ArgumentError, UnsupportedProblem
from qkernels.nn import QuantExperts, QuantLinear
from qkernels.scheme import QuantScheme
from tests.moe_models import FAMILIES, tiny_moe

SCHEME = "w4a16_g8"
TOKENS = torch.tensor([[1, 5, 9, 33, 12, 40, 7, 2]])


def with_float_experts(model: nn.Module) -> nn.Module:
    """The same model with dequantized weights in modules of transformers."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, QuantExperts):
            plain: Any = copy.copy(module.shell)
            plain._parameters = {n: nn.Parameter(t, False) for n, t in module.dequantize(torch.float32).items()}
            setattr(found.get_submodule(parent), leaf, plain)
        elif isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = module.dequantize(torch.float32)
            if module.bias is not None:
                linear.bias.data = module.bias.data
            setattr(found.get_submodule(parent), leaf, linear)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_its_dequantized_experts_do(family: str) -> None:
    model = tiny_moe(family)
    report = replace_linear(model, SCHEME, on_unsupported="reference")
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    assert experts
    assert report.stacks == {n for n in report.replaced if ".experts." in n}
    assert len(report.stacks) == 2 * len(experts)
    plain = with_float_experts(model)
    assert not any(isinstance(module, QuantExperts) for module in plain.modules())
    with torch.no_grad():
        assert (model(TOKENS).logits - plain(TOKENS).logits).abs().max() < 1e-5
        tokens = [m.generate(TOKENS, max_new_tokens=6, do_sample=False, min_new_tokens=6) for m in (model, plain)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_and_are_named(family: str) -> None:
    model = tiny_moe(family)
    report = replace_linear(model, SCHEME, on_unsupported="reference")
    routers = [name for name, why in report.skipped.items() if why.startswith("a router")]
    blocks = sum(isinstance(module, QuantExperts) for module in model.modules())
    shared_gates = blocks if family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe") else 0
    assert len(routers) == blocks + shared_gates
    assert not any(isinstance(model.get_submodule(name.removesuffix(".weight")), QuantLinear) for name in routers)


def mixtral_experts(**changes: Any) -> Any:
    return tiny_moe("mixtral", **changes).model.layers[0].mlp.experts


def a_call(experts: Any, T: int = 5, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(experts.num_experts)[:k] for _ in range(T)]) if T else torch.zeros(0, k).long()
    return torch.randn(T, 32), ids, torch.rand(T, k)


def test_ids_of_other_ranks_add_exactly_nothing() -> None:
    experts = QuantExperts.from_experts(mixtral_experts(), SCHEME)
    x, ids, weights = a_call(experts)
    ids[1, 0], ids[2] = experts.num_experts, experts.num_experts + 3
    weights[2] = torch.nan
    for wanted in (False, True):  # the fused op, and the two products of the way with gradients
        y = experts(x.clone().requires_grad_(wanted), ids, weights)
        assert torch.equal(y[2], torch.zeros(32))
        alone = experts(x[1:2], ids[1:2, 1:], weights[1:2, 1:])
        torch.testing.assert_close(y[1:2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    experts = QuantExperts.from_experts(mixtral_experts().to(dtype), SCHEME)
    x, ids, weights = a_call(experts, 0)
    y = experts(x.to(dtype), ids, weights)
    assert (y.shape, y.dtype) == ((0, 32), dtype)


def test_gradients_reach_x_and_the_routing_weights() -> None:
    source = mixtral_experts()
    experts = QuantExperts.from_experts(source, SCHEME)
    plain: Any = copy.copy(experts.shell)
    plain._parameters = {n: nn.Parameter(t, False) for n, t in experts.dequantize().items()}
    x, ids, weights = a_call(experts)
    found = []
    for module in (experts, plain):
        inputs = [t.clone().requires_grad_() for t in (x, weights)]
        module(inputs[0], ids, inputs[1]).square().sum().backward()
        found.append([t.grad for t in inputs])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_it_compiles_to_one_graph_for_any_number_of_tokens() -> None:
    experts = QuantExperts.from_experts(mixtral_experts(), SCHEME)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 3, 9):
        call = a_call(experts, T)
        torch.testing.assert_close(compiled(*call), experts(*call))
        x = call[0].clone().requires_grad_()
        compiled(x, *call[1:]).sum().backward()
        assert x.grad is not None


def test_state_dict_deepcopy_and_meta() -> None:
    experts = QuantExperts.from_experts(mixtral_experts(), SCHEME)
    other = QuantExperts.from_experts(tiny_moe("mixtral").model.layers[1].mlp.experts, SCHEME)
    call = a_call(experts)
    assert not torch.equal(experts(*call), other(*call))
    other.load_state_dict(experts.state_dict())
    assert torch.equal(experts(*call), other(*call))
    assert torch.equal(experts(*call), copy.deepcopy(experts)(*call))
    assert all(t.is_meta for t in copy.deepcopy(experts).to("meta").state_dict().values())
    wrong = experts.state_dict() | {"down_stack.qweight": experts.state_dict()["down_stack.qweight"][:2]}
    with pytest.raises(RuntimeError, match="qweight must be"):
        other.load_state_dict(wrong)


def test_patterns_mean_modules_and_projections() -> None:
    model = tiny_moe("mixtral")
    report = replace_linear(
        model, SCHEME, overrides={"*.experts.down_proj": "w8a16_g8"}, exclude="*.layers.1.mlp.experts"
    )
    assert str(report.replaced["model.layers.0.mlp.experts.down_proj"].scheme) == "w8a16_g8"
    assert str(report.replaced["model.layers.0.mlp.experts.gate_up_proj"].scheme) == SCHEME
    assert report.skipped["model.layers.1.mlp.experts.gate_up_proj"] == "excluded"


def test_experts_on_a_gpu_run_on_cuda_or_triton_or_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels import extension
    from qkernels.kernels.catalogue import Problem, list_kernels, select
    from qkernels.ops import backends

    monkeypatch.setattr(backends, "missing_triton", lambda: None)
    problem = Problem(96, 64, "w4a16_g32", torch.bfloat16, "sm90", experts=8)
    status = replace(extension.status(), cuda=True, architectures=())  # of a build for every card
    with monkeypatch.context() as built:
        built.setattr(extension, "status", lambda: status)
        assert select(problem).name == "cuda.mma_tile"
        assert select(replace(problem, scheme=QuantScheme.parse("q4_k"))).name == "cuda.mma_tile"
        assert select(replace(problem, scheme=QuantScheme.parse("w4a16_g24"))).name == "triton.kpack"
    status = replace(status, cuda=False)
    monkeypatch.setattr(extension, "status", lambda: status)
    assert select(problem).name == "triton.kpack"
    why = dict(list_kernels(problem).rows)["cuda.mma_tile_a8"]
    assert "has no grouped kernels for stacked experts yet (got 8)" in why
    with pytest.raises(UnsupportedProblem, match="no grouped kernels for stacked experts yet"):
        select(replace(problem, scheme=QuantScheme.parse("w4a8_g32")))
    with pytest.raises(UnsupportedProblem, match=r"an order of columns of its own \(act-order\)"):
        select(replace(problem, own_orders=True))


def test_what_is_no_experts_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no experts module"):
        QuantExperts.from_experts(nn.Linear(8, 8), SCHEME)


def test_adapters_on_linear_layers_leave_experts_alone() -> None:
    """target_modules are ends of names: "down_proj" means the shared expert's here, not the stack of the others."""
    peft = pytest.importorskip("peft")
    from qkernels.integrations.peft import on_quantized

    model = tiny_moe("qwen2_moe")
    replace_linear(model, SCHEME)
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    adapted = peft.get_peft_model(model, on_quantized(config))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".experts." in name for name in trained)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    first = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
    assert first is not None
    assert float(first.abs().sum()) > 0  # through the experts of both layers
