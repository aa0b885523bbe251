"""Which layers are plain enough to be replaced, what is carried over, and that an error leaves everything as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from qkernels import QuantLinear, quantize, replace_linear
from qkernels.errors import ArgumentError
from qkernels.quantizers import RTN
from qkernels.quantizers.options import Options

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def beside_another(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(layer, nn.Linear(32, 8)).eval()


def replaced(model: nn.Module, **options: object) -> object:
    return replace_linear(model, "w8a16_g16", progress=False, **options)  # type: ignore[arg-type]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 0.02 * b.norm())


# --- subclasses -----------------------------------------------------------------------------------------------------------


class Falcon(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Cast(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return nn.functional.linear(x.view(-1, self.in_features), self.weight.to(x.dtype), self.bias).view(
            *x.shape[:-1], self.out_features
        )


class Named(nn.Linear):
    """Another name, and no forward of its own."""


@pytest.mark.parametrize("kind", [Falcon, Cast, Named])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_subclasses_that_compute_a_linear_layer_are_taken(kind: type[nn.Linear], bias: bool, training: bool) -> None:
    model = beside_another(kind(32, 32, bias=bias)).train(training)
    before, state = model(X), torch.get_rng_state()
    report = replaced(model)
    assert list(report.replaced) == ["0", "1"]
    assert near(model(X), before)
    assert torch.equal(torch.get_rng_state(), state)
    on_meta = nn.Sequential(kind(32, 32, bias=bias, device="meta"), nn.Linear(32, 8))
    assert "0" in replaced(on_meta).replaced


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DropsInTraining(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class WithBiasApart(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


class TwoInputs(nn.Linear):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + y)


class WithAdapter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)
        self.adapter = nn.Linear(32, 32)


class WithScale(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)
        self.register_buffer("scale", torch.ones(32))


def patched() -> nn.Linear:
    layer = nn.Linear(32, 32)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]
    return layer


def with_state_hook() -> nn.Linear:
    layer = nn.Linear(32, 32)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def pruned(leaf: str) -> nn.Module:
    return prune.l1_unstructured(nn.Linear(32, 32), leaf, 0.5)


def parametrized_bias() -> nn.Module:
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "bias", nn.ReLU())
    return layer


OWN = "is a subclass of nn.Linear with a forward of its own"
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "doubled": (lambda: Doubled(32, 32), f"Doubled {OWN}"),
    "dropout": (lambda: DropsInTraining(32, 32), f"DropsInTraining {OWN}"),
    "tuple": (lambda: WithBiasApart(32, 32), f"WithBiasApart {OWN}"),
    "two inputs": (lambda: TwoInputs(32, 32), f"TwoInputs {OWN}"),
    "child": (WithAdapter, "WithAdapter has adapter beside weight and bias"),
    "buffer": (WithScale, "WithScale has scale beside weight and bias"),
    "patched": (patched, "its forward was replaced on the object"),
    "state hook": (with_state_hook, "it has hooks on its state dict"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(32, 32)), "its weight is computed from weight_g, weight_v"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(32, 32)), "its weight is computed from weight_orig"),
    "new weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 32)), "its weight is parametrized"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(32, 32)), "its weight is parametrized"),
    "bias": (parametrized_bias, "its bias is parametrized"),
    "pruned": (lambda: pruned("weight"), "its weight is computed from weight_orig, weight_mask"),
    "pruned bias": (lambda: pruned("bias"), "its bias is computed from bias_orig, bias_mask"),
    "lazy": (lambda: nn.LazyLinear(32), "LazyLinear has no weight before its first forward; run the model once"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_plain_is_left_alone_with_the_reason(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old forms of weight_norm, lazy modules
        layer = make()
    model = beside_another(layer)
    report = replaced(model)
    assert report.skipped["0"].startswith(reason)
    assert model[0] is layer
    assert list(report.replaced) == [*(["0.adapter"] if name == "child" else []), "1"]


def test_a_weight_that_is_free_of_its_norm_is_taken() -> None:
    layer = parametrizations.weight_norm(nn.Linear(32, 32))
    parametrize.remove_parametrizations(layer, "weight")
    assert "0" in replaced(beside_another(layer)).replaced
    pruned_weight = pruned("weight")
    prune.remove(pruned_weight, "weight")
    assert "0" in replaced(beside_another(pruned_weight)).replaced


# --- hooks, names, the root -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [replaced, lambda model: quantize(model, RTN(8, 16), progress=False)])
def test_hooks_of_a_layer_stay_and_can_be_removed(call: Callable[[nn.Module], object]) -> None:
    model, seen = beside_another(nn.Linear(32, 32)), []
    plain = copy.deepcopy(model)
    handles = [
        model[0].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True),
        model[0].register_forward_hook(lambda module, args, y: y * 2),
        model[0].register_full_backward_hook(lambda module, dx, dy: seen.append(type(module))),
    ]
    before = model(X)
    call(model)
    assert isinstance(model[0], QuantLinear)
    y = model(X)
    assert near(y, before)
    y.sum().backward()
    assert seen == [QuantLinear]
    for handle in handles:
        handle.remove()
    assert near(model(X), plain(X))


def test_accelerate_s_hook_goes_with_the_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class PlusOne(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, x: torch.Tensor) -> tuple[tuple[torch.Tensor], dict[str, object]]:
            return (x + 1,), {}

    model = beside_another(nn.Linear(32, 32))
    hooks.add_hook_to_module(model[0], PlusOne())
    before = model(X)
    assert list(replaced(model).replaced) == ["0", "1"]
    assert near(model(X), before)
    hooks.remove_hook_from_module(model[0])
    assert not near(model(X), before)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(32, 32), nn.ModuleDict({"again": nn.Linear(32, 32)})
        self.block["again"] = self.first
        self.twice = nn.ModuleList([self.block, self.block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.block["again"](x)


@pytest.mark.parametrize("call", ["replace_linear", "quantize"])
def test_one_layer_under_several_names_is_replaced_under_all(call: str) -> None:
    model = Shared().eval()
    before = model(X)
    if call == "quantize":
        made = quantize(model, RTN(8, 16), progress=False)
        names, skipped = [module.name for module in made.modules], made.skipped
    else:
        report = replaced(model)
        names, skipped = list(report.replaced), report.skipped
    assert names == ["first"]
    assert skipped == {}
    assert isinstance(model.first, QuantLinear)
    assert model.first is model.block["again"] is model.twice[1]["again"]
    assert near(model(X), before)


def test_patterns_know_every_name_of_a_layer() -> None:
    with pytest.raises(ArgumentError, match="first: excluded"):
        replaced(Shared(), exclude="block.again")
    model = Shared()
    report = replaced(model, include="twice.*.again", overrides={"again": "w4a16_g16"})
    assert str(report.replaced["first"].scheme) == "w4a16_g16"


def test_two_layers_with_one_weight_are_left_alone() -> None:
    model = beside_another(nn.Linear(32, 32))
    model.append(nn.Linear(32, 32))
    model[2].weight = model[0].weight
    assert replaced(model).skipped == {"0": "its weight is shared with 2", "2": "its weight is shared with 0"}


@pytest.mark.parametrize("kind", [nn.Linear, Falcon, Doubled])
@pytest.mark.parametrize("call", [replaced, lambda model: quantize(model, RTN(8, 16), progress=False)])
def test_a_layer_is_no_model(kind: type[nn.Linear], call: Callable[[nn.Module], object]) -> None:
    layer = kind(32, 32)
    with pytest.raises(ArgumentError, match="is itself the layer; QuantLinear.from_linear"):
        call(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(layer.children()) == []


@pytest.mark.parametrize(
    ("exclude", "message"),
    [("clasifier", "matches nothing in the model; did you mean classifier"), ("head.*", "names look like body")],
)
def test_a_misspelt_exclude_is_named(exclude: str, message: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "classifier": nn.Linear(32, 8), "norm": nn.LayerNorm(32)})
    with pytest.raises(ArgumentError, match=f"exclude pattern '{exclude[:4]}.* {message}"):
        replaced(model, exclude=["body", exclude])
    assert list(replaced(model, exclude=("lm_head", "classifier", "norm")).replaced) == ["body"]


# --- all or nothing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    class Failing(RTN):
        def quantize(self, weight: torch.Tensor, *args: object, **kwargs: object) -> object:
            if weight.shape[0] == 8:
                raise error
            return super().quantize(weight, *args, **kwargs)  # type: ignore[arg-type]

    method: Options = Failing()
    model = beside_another(nn.Linear(32, 32))
    modules, state = list(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error):
        replaced(model, method=method)
    assert list(model) == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# --- reports --------------------------------------------------------------------------------------------------------------


def test_only_experts_are_called_experts() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
            self.pos_embed = nn.Parameter(torch.zeros(1, 17, 64))
            self.kernel = nn.Parameter(torch.zeros(3, 17, 64))
            self.fc = nn.Linear(64, 64)
            self.experts = nn.Parameter(torch.zeros(2, 8, 64))

    assert replaced(Vision()).skipped == {
        "pos_embed": "a tensor ([1, 17, 64], 4,352 bytes) of Vision, which is not an nn.Linear",
        "kernel": "a tensor ([3, 17, 64], 13,056 bytes) of Vision, which is not an nn.Linear",
        "experts": "stacked experts ([2, 8, 64], 4,096 bytes) are not supported yet",
    }
