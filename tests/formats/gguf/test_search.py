"""The searches for GGUF blocks: the bytes of llama.cpp's own quantizers, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from qkernels.errors import ArgumentError
from qkernels.formats.gguf import dequantize, search
from qkernels.formats.gguf.search import WRITABLE_TYPES, gguf_blocks
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


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_slices_experts_and_16_bit_weights_change_nothing(type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = made_weight()[:6].bfloat16()
    whole = gguf_blocks(weight.float(), type, made_importance())
    monkeypatch.setattr(search, "_SLICE", 2 * COLUMNS)
    sliced = gguf_blocks(weight.view(2, 3, COLUMNS), type, made_importance())
    assert sliced.shape == (2, 3, whole.shape[-1]) and torch.equal(sliced.view(6, -1), whole)


@pytest.mark.parametrize("type", sorted(set(WRITABLE_TYPES) - {"Q8_0", "MXFP4"}))
def test_importance_lowers_the_weighted_error(type: str) -> None:
    weight, importance = made_weight()[9:], made_importance()

    def error(blocks: torch.Tensor) -> float:
        return float(((dequantize(blocks, type) - weight).square() * importance).double().sum())

    assert error(gguf_blocks(weight, type, importance)) < error(gguf_blocks(weight, type))


@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_no_rows(type: str) -> None:
    assert gguf_blocks(torch.zeros(0, 256), type).shape[0] == 0


def test_refusals() -> None:
    weight = made_weight()
    with pytest.raises(ArgumentError, match="GGUF types that can be written are .*got 'IQ1_S'"):
        gguf_blocks(weight, "IQ1_S")
    with pytest.raises(ArgumentError, match="multiple of 256"):
        gguf_blocks(weight[:, :96], "Q4_K")
    with pytest.raises(ArgumentError, match=r"importance must be floating point \[1024\]"):
        gguf_blocks(weight, "Q4_K", torch.ones(3))
    with pytest.raises(ArgumentError, match="importance must be finite and not negative"):
        gguf_blocks(weight, "Q4_K", -torch.ones(1024))
    with pytest.raises(ArgumentError, match="float16 cannot hold"):
        gguf_blocks(weight * 2.0**30, "Q4_0")
    weight[11, 3] = float("nan")
    with pytest.raises(ArgumentError, match="rows 0 … 23 hold inf or NaN"):
        gguf_blocks(weight, "Q6_K")
