"""`QuantLinear.weight`: what it answers for nothing, what it computes, and that it cannot be written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qkernels import QuantLinear, replace_linear
from qkernels.errors import ArgumentError
from qkernels.nn.weight import PackedWeight
from tests.ops.helpers import integers
from tests.strategies import random_weight

N, K = 40, 96


@pytest.fixture
def layer() -> QuantLinear:
    return QuantLinear.from_quant_tensor(
        random_weight("w4a16_g32_asym", N, K, exact=True), integers(N), dtype=torch.float32
    )


def test_it_answers_without_making_values(layer: QuantLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *_: pytest.fail("no values were asked for"))
    w = layer.weight
    assert isinstance(w, torch.Tensor)
    assert (w.dtype, w.device, w.shape, w.ndim) == (torch.float32, torch.device("cpu"), (N, K), 2)
    assert (w.size(0), w.dim(), w.numel(), w.stride(), w.element_size(), len(w)) == (N, 2, N * K, (K, 1), 4, N)
    assert (
        not w.requires_grad and w.grad is None and not w.is_cuda and w.is_floating_point() and torch.numel(w) == N * K
    )
    assert repr(w) == f"PackedWeight([{N}, {K}], dtype=torch.float32, device=cpu)"
    assert w.detach().shape == w.data.shape == w.requires_grad_(False).shape == (N, K)
    assert torch.overrides.has_torch_function((w,))  # what nn.TransformerEncoder asks before its fast path
    assert layer.half().weight.dtype == torch.float16
    assert layer.to("meta").weight.is_meta


def test_parameters_and_state_dict_do_not_know_it(layer: QuantLinear) -> None:
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert "weight" not in layer.state_dict()
    _ = layer.weight
    assert "weight" not in {**layer._parameters, **layer._buffers, **vars(layer)}


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w.T,
        lambda w, x: torch.matmul(x, w.t()),
        lambda w, x: (w @ x.T).T,
        lambda w, x: nn.functional.linear(x, w),
        lambda w, x: nn.functional.linear(x, weight=w.data, bias=None),
        lambda w, x: nn.functional.linear(x.double(), w.double()).float(),
        lambda w, x: torch.einsum("mk,nk->mn", x, w),
        lambda w, x: nn.functional.linear(x, torch.cat([w[:10], w.data[10:]])),
        lambda w, x: nn.functional.linear(x, w.clone()),
        lambda w, x: nn.functional.linear(x, copy.deepcopy(w)),
        lambda w, x: nn.functional.linear(x, w.to(torch.float32)),
        lambda w, x: nn.functional.linear(x, torch.zeros(N, K).add_(w)),
        lambda w, x: nn.functional.linear(x, torch.zeros(N, K).copy_(w.detach())),
    ],
)
def test_what_computes_with_it_gets_the_dequantized_weight(layer: QuantLinear, use: object) -> None:
    x = integers(3, K)
    y = use(layer.weight, x)  # type: ignore[operator]
    assert type(y) is torch.Tensor
    assert torch.equal(y, x @ layer.dequantize().T)


def test_gradients_pass_through_what_it_is_used_for(layer: QuantLinear) -> None:
    for use in (lambda x: nn.functional.linear(x, layer.weight), lambda x: x @ layer.weight.T):
        x = integers(3, K).requires_grad_()
        use(x).sum().backward()
        assert torch.equal(x.grad, layer.dequantize().sum(0).expand(3, K))


def test_a_product_with_it_runs_on_the_kernel(layer: QuantLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *_: pytest.fail("dequantized"))
    x = integers(2, 3, K)
    assert torch.equal(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(nn.functional.linear(x[0, 0], layer.weight, layer.bias), layer(x[0, 0]))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(N, K)),
        lambda w: w.data.normal_(),
        lambda w: w.detach().mul_(2),
        lambda w: w.__setitem__(0, 0),
        lambda w: w.__iadd__(1),
        lambda w: nn.init.normal_(w),
        lambda w: nn.init.kaiming_uniform_(w),
        lambda w: torch.add(torch.zeros(N, K), 1, out=w),
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: setattr(w, "data", torch.zeros(N, K)),
        lambda w: nn.Parameter(w),
        lambda w: w[0].zero_(),
        lambda w: w.data[2:5].copy_(torch.ones(3, K)),
        lambda w: w.T[1].add_(1),
        lambda w: w.view(-1).__setitem__(3, 7.0),
        lambda w: w.chunk(2)[1].fill_(0),
        lambda w: nn.init.zeros_(w[:, :4]),
        lambda w: torch.mul(torch.ones(K), 2, out=w[0]),
    ],
)
def test_it_cannot_be_written(layer: QuantLinear, write: object) -> None:
    before = layer.dequantize()
    with (
        torch.no_grad(),
        pytest.raises(ArgumentError, match="the weight of a QuantLinear is packed, so it cannot be written"),
    ):
        write(layer.weight)  # type: ignore[operator]
    assert torch.equal(layer.dequantize(), before)


def test_what_is_computed_from_a_part_of_it_is_an_ordinary_tensor(layer: QuantLinear) -> None:
    part, x = layer.weight[:3], torch.ones(2, K)
    for made in (part + 1, part.clone(), torch.cat([part, part]), x @ part.T, x.expand_as(part[:2])):
        assert type(made) is torch.Tensor
        made.clone().zero_()
    x[:1] *= 2  # an argument beside it is not the weight's
    assert torch.equal(part, layer.dequantize()[:3])


@pytest.mark.parametrize("value", [torch.zeros(N, K), nn.Parameter(torch.zeros(N, K)), None])
def test_it_cannot_be_replaced(layer: QuantLinear, value: torch.Tensor | None) -> None:
    with pytest.raises(ArgumentError, match="put a new layer in its place"):
        layer.weight = value
    assert isinstance(layer.weight, PackedWeight)


class Looking(nn.Module):
    """A T5 feed-forward's question, and Mamba's product."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.wo, self.dt_proj = layer, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x) + (self.dt_proj.weight @ x.T).T


def test_models_that_look_at_it_compile_to_one_graph(layer: QuantLinear) -> None:
    model, x = Looking(layer), integers(3, K)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (3, 7):
        assert torch.equal(compiled(integers(M, K)), model(integers(M, K)))
    torch._dynamo.reset()
    assert torch.equal(model(x), layer(x) + x @ layer.dequantize().T)


def test_the_encoder_of_torch_with_and_without_padding() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x), model(x, src_key_padding_mask=mask)
        report = replace_linear(model, "w8a16_g32", progress=False)
        after = model(x), model(x, src_key_padding_mask=mask)
    assert (after[0] - before[0]).norm() <= 0.02 * before[0].norm()
    assert (after[1] - before[1])[~mask].norm() <= 0.02 * before[1][~mask].norm()
    assert (
        report.skipped["layers.0.self_attn.out_proj"] == "nn.MultiheadAttention reads its weight instead of calling it"
    )
