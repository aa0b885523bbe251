"""Mixes of GGUF types: the type of each tensor is the one that llama.cpp's own quantizer chose."""

from __future__ import annotations

import json

import pytest

from qkernels.errors import ArgumentError
from qkernels.models.gguf_mixes import FILE_TYPE_OF, MIXES, Chosen, Facts, types_of
from qkernels.storage.gguf_types import GGML_TYPES
from tests.gguf_golden import FILES
from tests.gguf_mix_shapes import MIX_MODELS, in_short

GOLDEN = json.loads((FILES / "mixes.json").read_text(encoding="utf-8"))
WAYS = ("plain", "importance", "pure", "override")
LLAMA = {"token_embd.weight": (32, 256), "output.weight": (32, 256), "blk.0.ffn_down.weight": (256, 512)}
FACTS = Facts("llama", 1, 4, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("title", MIX_MODELS)
def test_types_are_those_of_llama_cpp(title: str, way: str) -> None:
    model, golden = MIX_MODELS[title], GOLDEN["types"][title][way]
    pattern, _, override = GOLDEN["override"].rpartition("=")
    options = {
        "pure": way == "pure", "importance": way == "importance",
        "overrides": [(pattern, override)] if way == "override" else [],
    }  # fmt: skip
    for mix, expected in golden.items():
        chosen = types_of(model.tensors, mix, model.facts, **options)
        assert in_short({name: found.type for name, found in chosen.items()}) == expected, mix


def test_golden_data_covers_every_mix() -> None:
    floats = {mix for mix in MIXES if GGML_TYPES[MIXES[mix].type].dtype is not None}
    for found in GOLDEN["types"].values():
        assert set(found["plain"]) == set(MIXES) == set(found["override"]) | floats
    assert GOLDEN["types"].keys() == MIX_MODELS.keys()
    assert set(MIXES) <= FILE_TYPE_OF.keys()


def test_the_first_override_decides_before_the_rules() -> None:
    given = [(r"ffn_down", "Q8_0"), (r"blk\..*weight", "Q2_K"), (r"^output\.weight$", "F16")]
    chosen = types_of(LLAMA, "Q4_K_M", FACTS, overrides=given)
    assert {name: found.type for name, found in chosen.items()} == {
        "output.weight": "F16", "token_embd.weight": "Q4_K", "blk.0.ffn_down.weight": "Q8_0",
    }  # fmt: skip
    assert types_of(LLAMA, "F16", FACTS, overrides=given[:1])["blk.0.ffn_down.weight"].type == "Q8_0"
    assert types_of(LLAMA, "Q4_K_M", FACTS, pure=True)["output.weight"] == Chosen("Q4_K")


def test_rows_that_blocks_do_not_divide_say_what_was_wanted() -> None:
    narrow = {"output.weight": (32, 96), "blk.0.attn_v.weight": (32, 96), "blk.0.attn_q.weight": (40, 40)}
    chosen = types_of(narrow, "Q4_K_M", FACTS)
    assert chosen["blk.0.attn_v.weight"] == Chosen("Q8_0", "Q6_K")
    assert chosen["blk.0.attn_q.weight"] == Chosen("F16", "Q4_K")
    assert chosen["output.weight"] == Chosen("Q8_0")


@pytest.mark.parametrize(
    ("mix", "overrides", "message"),
    [
        ("Q4_K_XL", [], "the type of a file must be one of F32, F16, .*, got 'Q4_K_XL'"),
        ("Q4_K", [], "must be one of .*, got 'Q4_K'"),
        ("Q4_K_M", [("ffn_down", "Q4_K_M")], "ffn_down=Q4_K_M: there is no type 'Q4_K_M' of tensors"),
        ("Q4_K_M", [("ffn_(", "Q8_0")], "'ffn_\\(' is no regular expression"),
        ("Q4_K_M", [("ffn_dwon", "Q8_0")], "no tensor that is quantized has 'ffn_dwon' in its name .*ffn_dwon=Q8_0"),
    ],
)
def test_what_makes_no_sense_is_named(mix: str, overrides: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        types_of(LLAMA, mix, FACTS, overrides=overrides)
