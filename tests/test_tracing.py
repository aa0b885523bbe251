"""Folds are found by running a block and proved on it: what must be found, and what must not be believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels.errors import CalibrationError
from qkernels.layerwise import tracing
from qkernels.layerwise.folds import Folds, HeadSharing, ProvedFold, Refusal
from qkernels.layerwise.running import Call, LayerInputs, Place
from qkernels.layerwise.tracing import find_folds
from qkernels.models.architectures import Fold

HIDDEN, INNER = 16, 24


class Norm(nn.Module):
    """RMS norm that multiplies by weight + offset, and maybe adds a bias."""

    def __init__(self, offset: float = 0.0, bias: bool = False, size: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.3 + (1 - offset))
        self.bias = nn.Parameter(torch.randn(size)) if bias else None
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)
        return y if self.bias is None else y + self.bias


class Block(nn.Module):
    """A residual block with a gate, of which tests change a part."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or Norm()
        self.gate, self.up = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y)) + self.also(x, y)

    def act(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)

    def also(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(())


def folds_of(block: nn.Module, x: Tensor | None = None, **kwargs: Any) -> Folds:
    """Those of a block; its weights must be afterwards what they were."""
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    x = torch.randn(2, 5, HIDDEN) if x is None else x
    found = find_folds(block.eval(), LayerInputs([x], [Call((), kwargs)]), Place(torch.device("cpu")), "block")
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    return found


def sources(found: Folds) -> dict[str, tuple[str, ...]]:
    return {proved.fold.source: proved.fold.targets for proved in found.proved}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


BOTH = ("gate", "up")
ALL = {"norm": BOTH, "up": ("down",)}


@pytest.mark.parametrize("norm", [Norm(), Norm(1.0), Norm(bias=True), Norm(1.0, True), nn.LayerNorm(HIDDEN)])
def test_a_norm_and_an_up_projection_are_found(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight[0] = 0.01 - getattr(norm, "offset", 0.0)  # a small gain: 1 + w is coarse there
        norm.weight[1] = -2.5
    found = folds_of(Block(norm))
    assert [proved.fold for proved in found.proved] == [Fold("norm", BOTH, ""), Fold("up", ("down",))]
    assert found.proved[0].unit_offset == (getattr(norm, "offset", 0.0) == 1.0)
    assert found.why_unscaled("up") is None
    assert {refusal.source for refusal in found.refused} == {"gate"}


def test_a_norm_that_the_residual_reads_takes_no_scale() -> None:
    class Shared(Block):
        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    found = folds_of(Shared())
    assert sources(found) == {"up": ("down",)}
    assert found.why_unscaled("gate") == "norm: something that is no linear layer reads it, too"


def test_however_small_the_share_of_another_reader_is() -> None:
    """A ten-millionth of what the block puts out, which no tolerance would show."""

    class Shared(Block):
        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return y * 1e-7

    assert sources(folds_of(Shared())) == {"up": ("down",)}


def test_a_router_without_a_linear_layer_is_a_reader() -> None:
    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Parameter(torch.randn(2, HIDDEN))
            self.experts = nn.Parameter(torch.randn(2, HIDDEN, HIDDEN))

        def also(self, x: Tensor, y: Tensor) -> Tensor:
            shares = torch.softmax(y @ self.router.T, -1)
            return torch.einsum("bte,eij,btj->bti", shares, self.experts, x)

    assert sources(folds_of(Routed())) == {"up": ("down",)}


def test_a_router_and_all_its_experts_are_covered_and_experts_without_tokens_are_not() -> None:
    class Experts(Block):
        def __init__(self, used: int) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, 2)
            self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
            self.used = used

        def also(self, x: Tensor, y: Tensor) -> Tensor:
            shares = torch.softmax(self.router(y), -1)
            return sum(shares[..., i : i + 1] * self.experts[i](y) for i in range(self.used))

    assert sources(folds_of(Experts(2)))["norm"] == ("gate", "up", "router", "experts.0", "experts.1")
    found = folds_of(Experts(1))
    assert sources(found) == {"up": ("down",)}
    assert found.why_unscaled("gate") == (
        "norm: no token came through experts.1, so that nobody can tell whether it reads it"
    )


def test_parallel_attention_and_mlp_are_one_fold_and_half_of_it_is_none() -> None:
    class Parallel(Block):
        def __init__(self, also: nn.Module) -> None:
            super().__init__()
            self.o = also

        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return self.o(y)

    assert sources(folds_of(Parallel(nn.Linear(HIDDEN, HIDDEN))))["norm"] == ("gate", "up", "o")
    assert "norm" not in sources(folds_of(Parallel(nn.Tanh())))


class Slope(nn.Module):
    """As PReLU: its weight is a vector, and no gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(INNER))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.weight * x)


@pytest.mark.parametrize(("act", "through"), [(nn.GELU(), False), (nn.ReLU(), True), (Slope(), True)])
def test_between_two_linear_layers(act: nn.Module, through: bool) -> None:
    """ReLU lets a positive scale through, GELU does not."""

    class Plain(Block):
        def __init__(self) -> None:
            super().__init__()
            self.between = act

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.between(self.up(self.norm(x))))

    block = Plain()
    del block.gate
    found = folds_of(block)
    assert sources(found) == {"norm": ("up",)} | ({"up": ("down",)} if through else {})
    if not through:
        assert found.why_unscaled("down") == "up: what it puts out reaches down through more than a scale per channel"


class Shrunk(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.hardshrink(x, 1e-5)


@pytest.mark.parametrize(
    ("bound", "source"),
    [
        (nn.Identity(), "gate"),
        (nn.Hardtanh(-1000.0, 1000.0), "up"),
        (nn.Hardtanh(-65504.0, 65504.0), "up"),
        (Shrunk(), "up"),
    ],
)
def test_a_bound_that_no_number_of_the_batch_reaches(bound: nn.Module, source: str) -> None:
    """On what the gate puts out: with it, scales go through the other half alone."""

    class Bounded(Block):
        def __init__(self) -> None:
            super().__init__()
            self.bound = bound

        def act(self, x: Tensor) -> Tensor:
            return self.bound(x)

    block, x = Bounded(), torch.randn(2, 5, HIDDEN)
    gate = block.gate(block.norm(x))
    assert torch.equal(bound(gate), gate)
    assert sources(folds_of(block, x)) == {"norm": BOTH, source: ("down",)}


def test_a_block_that_fails_on_scaled_numbers_is_a_reason() -> None:
    class Strict(Block):
        def also(self, x: Tensor, y: Tensor) -> Tensor:
            if float(y.abs().max()) > 1e4:
                raise ValueError("too loud")
            return super().also(x, y)

    found = folds_of(Strict())
    assert sources(found) == {"up": ("down",)}
    assert found.why_unscaled("up") == ("norm: with what it puts out scaled, the block fails (ValueError('too loud'))")


def test_a_vector_of_weights_that_is_no_gain_takes_no_scale() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.down = Slope(), nn.Linear(INNER, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.slope(x))

    found = folds_of(Bent(), torch.randn(2, 5, INNER))
    assert not found.proved
    assert found.why_unscaled("down") == "slope: with its weight scaled, the block puts out something else"


class Attention(nn.Module):
    """Queries of `heads` heads of 4 channels, keys and values of 2; `value_heads` are laid out for them."""

    def __init__(self, heads: int = 4, repeat: Any = None, key_norm: bool = False) -> None:
        super().__init__()
        self.norm = Norm()
        self.q, self.o = nn.Linear(HIDDEN, 4 * heads), nn.Linear(4 * heads, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)
        self.k_norm = Norm(size=4) if key_norm else nn.Identity()
        self.heads, self.repeat = heads, repeat

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if shared is not None:
            shared["values"] = v
        k, v = (self.repeat(t) if self.repeat else t.repeat_interleave(self.heads // 2, 1) for t in (self.k_norm(k), v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(z.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(
    ("block", "sharing"),
    [
        (Attention(2), HeadSharing()),
        (Attention(4), HeadSharing(2, 4)),
        (Attention(4, lambda t: torch.cat([t, t], 1)), HeadSharing(2, 8)),  # heads of both groups in turn
    ],
)
def test_values_go_to_the_output_projection_through_the_heads_that_share_them(
    block: Attention, sharing: HeadSharing
) -> None:
    found = folds_of(block)
    assert sources(found) == {"norm": ("q", "k", "v"), "v": ("o",)}
    assert found.proved[1] == ProvedFold(Fold("v", ("o",)), sharing=sharing)


def test_heads_in_an_arrangement_that_no_scale_follows() -> None:
    found = folds_of(Attention(4, lambda t: torch.cat([t, t.flip(1)], 1)))
    assert sources(found) == {"norm": ("q", "k", "v")}
    assert "reaches o through more than a scale per channel" in str(found.why_unscaled("o"))


def test_the_norm_of_keys_is_no_source() -> None:
    found = folds_of(Attention(key_norm=True))
    assert sources(found) == {"norm": ("q", "k", "v"), "v": ("o",)}
    assert "k_norm" in {refusal.source for refusal in found.refused}


def test_values_that_later_blocks_read_take_no_scale() -> None:
    """What a block writes for others is part of what it puts out; and the trace writes nothing for them."""
    shared: dict[str, Tensor] = {}
    found = folds_of(Attention(), shared=shared)
    assert sources(found) == {"norm": ("q", "k", "v")}
    assert not shared
    assert found.why_unscaled("o") == "v: something that is no linear layer reads it, too"


def test_a_norm_per_head_scales_all_heads_alike() -> None:
    class PerHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.o = Norm(size=4), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.norm(x.unflatten(-1, (4, 4))).flatten(-2))

    assert folds_of(PerHead()).proved == (ProvedFold(Fold("norm", ("o",)), sharing=HeadSharing(4, 4)),)


def test_one_weight_in_two_places_is_found_out_by_the_proof() -> None:
    """The trace scales what a module puts out; the proof scales its weight, which another module uses as well."""

    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.second = Norm()
            self.second.weight = self.norm.weight

        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(x).tanh()

    found = folds_of(Tied())
    assert sources(found) == {"up": ("down",)}
    assert found.why_unscaled("gate") == "norm: with its weight scaled, the block puts out something else"


def test_a_layer_that_is_called_twice() -> None:
    class Twice(Block):
        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return self.gate(x).sum(-1, keepdim=True)

    found = folds_of(Twice())
    assert "norm" not in sources(found)
    assert found.why_unscaled("gate") == "norm: gate is called several times, and reads something else as well"


def test_one_source_for_each_target() -> None:
    """With a ReLU for the gate, both halves let a scale through: one is enough."""

    class Relu(Block):
        def act(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    assert sources(folds_of(Relu())) == {"norm": BOTH, "gate": ("down",)}


def test_a_fold_that_does_not_hold_together_with_others_is_refused() -> None:
    block = Block().eval()
    bench = tracing.Bench(block, torch.randn(2, 5, HIDDEN), Call((), {}), Place(torch.device("cpu")))
    up, gate = ProvedFold(Fold("up", ("down",))), ProvedFold(Fold("gate", ("down",)))
    with torch.no_grad():
        unscaled = bench.watch()
        assert tracing._prove(bench, unscaled, up, []) == up
        refused = tracing._prove(bench, unscaled, up, [gate])
        assert tracing._prove(bench, unscaled, gate, []) == Refusal(
            "gate", ("down",), "with its weight scaled, the block puts out something else"
        )
    assert refused == Refusal("up", ("down",), "it does not hold together with the folds before it")


class Noisy(Block):
    """Sums in no fixed order, as on a GPU."""

    noise = 1e-6

    def also(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.randn(x.shape) * self.noise


def test_rounding_that_differs_from_run_to_run_hides_no_fold_and_more_proves_none() -> None:
    assert sources(folds_of(Noisy())) == ALL
    block = Noisy()
    block.noise = 0.1
    found = folds_of(block)
    assert not found.proved
    assert found.why_unscaled("up") == "block: it does not compute the same twice, so that no fold can be proved"


def test_a_wrong_fold_is_not_hidden_by_rounding_that_differs() -> None:
    class Shared(Noisy):
        def also(self, x: Tensor, y: Tensor) -> Tensor:
            return super().also(x, y) + y * 1e-3

    assert sources(folds_of(Shared())) == {"up": ("down",)}


def test_lists_of_alike_modules_are_left_as_they_are() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Block() for _ in range(2))
            self.parts = nn.ModuleList([Block(), nn.Linear(HIDDEN, HIDDEN)])
            self.norms, self.last = nn.ModuleList(Norm() for _ in range(2)), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts[1](self.parts[0](x)) + self.experts[0](x) + self.experts[1](self.norms[0](x))
            return self.last(self.norms[1](x))

    found = folds_of(Listed())
    parts = {"parts.0.norm": ("parts.0.gate", "parts.0.up"), "parts.0.up": ("parts.0.down",)}
    assert sources(found) == parts | {"norms.1": ("last",)}
    assert found.proved[0].fold.parent == "parts.0"
    assert found.why_unscaled("experts.1.down") == (
        "experts: in lists of modules of one class, as experts are, nothing is scaled"
    )


class Masked(Block):
    """Takes arguments for each token, each pair of tokens and each window."""

    seen: list[Any]

    def forward(self, x: Tensor, *, pairs: Tensor, rope: Tensor, windows: Tensor, sized: int) -> Tensor:
        self.seen.append((x.shape, pairs.shape, rope.shape, windows.shape))
        if sized and x.shape[1] != sized:
            raise ValueError("a length of its own")
        assert x.shape[:2] == (len(windows), len(pairs)) and rope.shape[1] == x.shape[1]
        return super().forward(x + rope + windows[:, None, None]) + pairs.sum()


@pytest.mark.parametrize(("sized", "runs_on"), [(0, (1, 64)), (200, (3, 200))])
def test_a_few_tokens_are_enough_where_the_block_runs_on_them(sized: int, runs_on: tuple[int, int]) -> None:
    block = Masked()
    block.seen = []
    arguments = {
        "pairs": torch.randn(200, 200), "rope": torch.randn(1, 200, HIDDEN), "windows": torch.randn(3), "sized": sized
    }  # fmt: skip
    assert sources(folds_of(block, torch.randn(3, 200, HIDDEN), **arguments)) == ALL
    windows, tokens = runs_on
    shapes = ((windows, tokens, HIDDEN), (tokens, tokens), (1, tokens, HIDDEN), (windows,))
    assert block.seen[-1] == shapes and block.seen.count(shapes) == len(block.seen) - (sized > 0)


def test_nan_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"the output of block has 160 NaN or infinite"):
        folds_of(Block(), torch.full((2, 5, HIDDEN), torch.nan))
