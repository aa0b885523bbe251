"""Derivatives that `requires_grad` says nothing of, and FLOPs: as through a float layer, or an error; never 0 in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from qkernels import QuantLinear
from qkernels.errors import ArgumentError
from qkernels.layouts import LAYOUTS
from tests.ops.helpers import integers, layer_in
from tests.strategies import random_weight

N, K = 24, 64


def pair(scheme: str = "w4a16_g32_asym", act_order: bool = True) -> tuple[QuantLinear, nn.Linear]:
    """A layer, and the float one that computes the same."""
    layer = QuantLinear.from_quant_tensor(
        random_weight(scheme, N, K, act_order=act_order, exact=True), integers(N), dtype=torch.float32
    )
    twin = nn.Linear(K, N)
    twin.weight.data, twin.bias.data = layer.dequantize(), integers(N)
    return layer, twin


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "of",
    [
        lambda f: torch.func.jvp(f, (integers(3, K),), (integers(3, K, seed=1),)),
        lambda f: torch.func.vjp(f, integers(3, K))[1](integers(3, N)),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(integers(K)),
        lambda f: torch.func.jacrev(f)(integers(K)),
        lambda f: torch.func.jacfwd(f)(integers(2, K)),
        lambda f: torch.func.hessian(lambda x: f(x).square().sum())(integers(K)),
        lambda f: torch.func.vmap(f)(integers(5, K)),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(integers(5, K)),
        lambda f: torch.func.functional_call(f, {"bias": integers(N, seed=2)}, (integers(3, K),)),
        lambda f: torch.autograd.functional.jvp(f, integers(3, K), integers(3, K, seed=1)),
    ],
)
def test_transforms_are_those_of_a_float_layer(of: object, grad: bool) -> None:
    layer, twin = pair()
    with torch.set_grad_enabled(grad or "autograd" in of.__code__.co_names):  # type: ignore[attr-defined]
        got, expected = of(layer), of(twin)  # type: ignore[operator]
    for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
        assert torch.equal(a, b)


def test_forward_mode_outside_of_transforms() -> None:
    layer, twin = pair()
    ad = torch.autograd.forward_ad
    for requires_grad in (False, True):
        tangents = []
        for module in (layer, twin):
            with ad.dual_level():
                x = ad.make_dual(integers(3, K).requires_grad_(requires_grad), integers(3, K, seed=1))
                tangents.append(ad.unpack_dual(module(x)).tangent)
        assert torch.equal(*tangents)
        assert tangents[0].any()


def test_a_gradient_of_a_gradient() -> None:
    results = []
    for module in pair():
        x = integers(3, K).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.sum(), x)[0])
    assert torch.equal(*results)


def test_int8_activations_have_no_such_derivative() -> None:
    layer = QuantLinear.from_quant_tensor(random_weight("w4a8_g32", N, K), dtype=torch.float32)
    for of in (
        lambda: torch.func.jvp(layer, (integers(3, K),), (integers(3, K),)),
        lambda: torch.func.jacrev(layer)(integers(K)),
    ):
        with pytest.raises(ArgumentError, match=r"know no derivative of activations in int8 .* use backward\(\)"):
            of()


def flops(layer: nn.Module, backward: bool) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(5, K, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = layer(x)
        if backward:
            y.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("layout", ["reference", "cpu_tile_a16", "cpu_tile_a8"])
def test_flops_are_counted(layout: str) -> None:
    scheme = "w4a8_g32" if None not in LAYOUTS[layout].acts else "w4a16_g32"
    layer = layer_in(layout, random_weight(scheme, N, K), dtype=torch.float32)
    assert flops(layer, backward=False) == 2 * 5 * N * K
    assert flops(layer, backward=True) == 2 * 2 * 5 * N * K
    with torch.inference_mode():
        assert flops(layer, backward=False) == 2 * 5 * N * K


def test_the_counter_may_come_before_or_after() -> None:
    """It imports Triton, so this package does not import it; whoever does finds the formulas."""
    count = (
        "import sys; assert 'torch.utils.flop_counter' not in sys.modules or first\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "import torch; assert torch.ops.qkernels.gemm_reference in flop_registry, len(flop_registry)\n"
    )
    for code in (
        "first = 0; import qkernels.ops\n" + count,
        "first = 1; import torch.utils.flop_counter, qkernels.ops\n" + count,
    ):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
