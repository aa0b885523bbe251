"""The searches for GGUF blocks: the bytes of llama.cpp's own quantizers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from qkernels import extension
from qkernels.errors import ArgumentError
from qkernels.formats.gguf import WRITABLE_TYPES, dequantize, gguf_blocks, search
from qkernels.formats.gguf.better import BEST
from qkernels.formats.gguf.search import PLAIN, Search, blocks_searched
from qkernels.storage.gguf_types import GGML_TYPES
from tests.gguf_golden import FILES
from tests.gguf_weights import COLUMNS, digest, made_equals, made_importance, made_weight

GOLDEN = json.loads((FILES / "quantized.json").read_text())
WEIGHTS = {"blocks": made_weight, "equals": made_equals}


def test_every_writable_type_has_golden_blocks() -> None:
    assert set(GOLDEN["blocks"]) == set(GOLDEN["equals"]) == set(WRITABLE_TYPES)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", ["plain", "importance"])
@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_the_bytes_are_those_of_llama_cpp(type: str, kind: str, weight: str) -> None:
    importance = made_importance() if kind == "importance" else None
    assert digest(gguf_blocks(WEIGHTS[weight](), type, importance)) == GOLDEN[weight][type][kind]


def made_tiny() -> Tensor:
    """Down to numbers whose reciprocal is infinite."""
    return made_weight()[9:] * 2.0 ** -torch.arange(100, 145, 3)[:, None].float()


def made_sparse() -> Tensor:
    """With zeros of both signs, in 16 bits."""
    weight = made_weight()
    return (weight * (weight > 0) * torch.tensor([-1.0, 1.0, 1.0]).repeat(8)[:, None])[:, :768].bfloat16()


@pytest.fixture
def isas() -> Iterator[Iterator[str]]:
    """The instruction sets, each in use when it is yielded."""
    now = extension.status().isa

    def each() -> Iterator[str]:
        for isa in extension.status().isas:
            extension.use_isa(isa)
            yield isa

    yield each()
    if now is not None:
        extension.use_isa(now)


WORST = [made_weight, made_equals, made_tiny, made_sparse, lambda: made_weight().half()[:5]]


@pytest.mark.parametrize("searches", [PLAIN, BEST], ids=["plain", "best"])
@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_the_op_and_its_twin_find_the_same(type: str, searches: Mapping[str, Search], isas: Iterator[str]) -> None:
    """And what is wrong: nothing here."""
    cases = [
        (weight, importance, blocks_searched(weight, type, importance, searches))
        for weight in (made() for made in WORST)
        for importance in (None, made_importance()[: weight.shape[1]])
    ]
    for isa in isas:
        for weight, importance, expected in cases:
            found = torch.ops.qkernels.gguf_blocks(weight, importance, GGML_TYPES[type].id, searches is BEST)
            assert torch.equal(found[0], expected[0]), isa
            assert found[1].tolist() == expected[1].tolist() == [[len(weight)] * 2]


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_what_is_wrong_is_found_by_both(type: str) -> None:
    weight = made_weight()[:, :512]
    weight[7, 300], weight[9, 3], weight[11] = float("inf"), float("nan"), weight[11] * 2.0**40
    (_, expected), (_, found) = (
        blocks_searched(weight, type, None, PLAIN),
        torch.ops.qkernels.gguf_blocks(weight, None, GGML_TYPES[type].id, False),
    )
    assert found[0, 0] == expected[0, 0] == 7
    weight[7, 300], weight[9, 3] = 0, 0
    found = torch.ops.qkernels.gguf_blocks(weight, None, GGML_TYPES[type].id, False)[1]
    assert found.tolist() == blocks_searched(weight, type, None, PLAIN)[1].tolist()
    assert found.tolist() == [[24, 24 if type == "MXFP4" else 11]]


def test_the_op_by_the_rules_of_torch() -> None:
    torch.library.opcheck(torch.ops.qkernels.gguf_blocks.default, (made_weight(), made_importance(), 12, False))
    with pytest.raises(RuntimeError, match="no search for the GGUF type 16"):
        torch.ops.qkernels.gguf_blocks(made_weight(), None, 16, False)
    with pytest.raises(RuntimeError, match="a multiple of 256"):
        torch.ops.qkernels.gguf_blocks(made_weight()[:, :96], None, 12, False)
    with pytest.raises(RuntimeError, match=r"importance must be float32 \[1024\]"):
        torch.ops.qkernels.gguf_blocks(made_weight(), made_importance()[:3], 12, False)


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_slices_experts_and_16_bit_weights_change_nothing(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made_weight()[:6].bfloat16()
    whole = gguf_blocks(weight.float(), type, made_importance())
    experts = gguf_blocks(weight.view(2, 3, COLUMNS), type, made_importance())
    assert experts.shape == (2, 3, whole.shape[-1]) and torch.equal(experts.view(6, -1), whole)
    monkeypatch.setattr(search, "_SLICE", 2 * COLUMNS)
    assert torch.equal(blocks_searched(weight, type, made_importance(), PLAIN)[0], whole)


def test_each_expert_has_its_importance() -> None:
    weight, importance = made_weight().view(2, 12, COLUMNS), torch.stack([made_importance(), made_importance().flip(0)])
    both = gguf_blocks(weight, "Q4_K", importance)
    assert torch.equal(both[1], gguf_blocks(weight[1], "Q4_K", importance[1]))
    assert not torch.equal(both[1], gguf_blocks(weight[1], "Q4_K", importance[0]))


def error(blocks: Tensor, type: str, weight: Tensor, importance: Tensor | None) -> float:
    squares = (dequantize(blocks, type) - weight).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("type", sorted(set(WRITABLE_TYPES) - {"Q8_0", "MXFP4"}))
def test_importance_lowers_the_weighted_error(type: str) -> None:
    weight, importance = made_weight()[9:], made_importance()
    found, without = (gguf_blocks(weight, type, given) for given in (importance, None))
    assert error(found, type, weight, importance) < error(without, type, weight, importance)


@pytest.mark.parametrize("given", [False, True], ids=["alike", "importance"])
@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_the_better_search_lowers_it_more(type: str, given: bool) -> None:
    """By 2 % at least, on weights near Gaussian; in rows of one sign, with outliers, on a grid or of zeros it never rises."""
    weight, importance = made_weight(), made_importance().clamp(min=1e-5) if given else None
    plain, best = (gguf_blocks(weight, type, importance, search) for search in ("plain", "best"))
    assert error(best[9:], type, weight[9:], importance) < 0.98 * error(plain[9:], type, weight[9:], importance)
    for row in range(9):
        found, before = (error(blocks[row], type, weight[row], importance) for blocks in (best, plain))
        assert found <= 1.0001 * before, row


def test_silent_columns_and_no_importance_at_all() -> None:
    """A column whose input was always 0 is rounded all the same, and importance of zeros is as none."""
    weight, importance = made_weight()[9:], made_importance()
    importance[:512] = 0
    values = dequantize(gguf_blocks(weight, "Q4_K", importance, "best"), "Q4_K")
    relative = (values - weight)[:, :512].norm() / weight[:, :512].norm()
    assert relative < 0.09
    zeros = gguf_blocks(weight, "Q4_K", torch.zeros(COLUMNS), "best")
    assert torch.equal(zeros, gguf_blocks(weight, "Q4_K", None, "best"))


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_no_rows(type: str) -> None:
    assert gguf_blocks(torch.zeros(0, 256), type).shape[0] == 0


def test_refusals() -> None:
    weight = made_weight()
    with pytest.raises(ArgumentError, match="GGUF types that can be written are .*got 'IQ1_S'"):
        gguf_blocks(weight, "IQ1_S")
    with pytest.raises(ArgumentError, match="search must be .*got 'worst'"):
        gguf_blocks(weight, "Q4_K", search="worst")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="multiple of 256"):
        gguf_blocks(weight[:, :96], "Q4_K")
    with pytest.raises(ArgumentError, match=r"importance must be floating point \[1024\]"):
        gguf_blocks(weight, "Q4_K", torch.ones(3))
    with pytest.raises(ArgumentError, match="importance must be finite and not negative"):
        gguf_blocks(weight, "Q4_K", -torch.ones(1024))
    with pytest.raises(ArgumentError, match="row 0 with weights up to .* float16 cannot hold"):
        gguf_blocks(weight * 2.0**30, "Q4_0")
    weight[11, 3] = float("nan")
    with pytest.raises(ArgumentError, match="row 11 holds inf or NaN"):
        gguf_blocks(weight, "Q6_K")
