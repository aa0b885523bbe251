"""`QuantScheme`: valid values, the short form, refusals."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given

from qkernels import RTN, SmoothQuant
from qkernels.errors import SchemeError
from qkernels.scheme import ACTIVATIONS, CODEBOOKS, QuantScheme
from tests.strategies import schemes


@given(schemes())
def test_short_form_round_trips(scheme: QuantScheme) -> None:
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w4a16_g128", QuantScheme(4, 128)),
        ("w4a16_g128_asym", QuantScheme(4, 128, "int")),
        ("w3a16_g64_fzero", QuantScheme(3, 64, "float")),
        ("w4a16_g32_offset", QuantScheme(4, 32, "offset")),
        ("w8a16_channel", QuantScheme(8, "channel")),
        ("w8a16_tensor", QuantScheme(8, "tensor")),
        ("w4a8_g128", QuantScheme(4, 128, act="int8")),
        ("w8a8w_channel", QuantScheme(8, "channel", act="int8_wide")),
        ("w4a8z_g32_asym", QuantScheme(4, 32, "int", act="int8_zero")),
        ("w8a8o6_channel", QuantScheme(8, "channel", act="int8_outliers")),
        ("w8a8s_channel", QuantScheme(8, "channel", act="int8_static")),
        ("w4a8sz_g32_asym", QuantScheme(4, 32, "int", act="int8_static_zero")),
        ("iq4nl_g32_a8w", QuantScheme(4, 32, act="int8_wide", codebook="iq4nl")),
        ("w8a8_channel_asym", QuantScheme(8, "channel", "int", act="int8")),
        ("w4a8_g32_offset", QuantScheme(4, 32, "offset", act="int8")),
        ("nf4_g64", QuantScheme(4, 64, codebook="nf4")),
        ("mxfp4_g32", QuantScheme(4, 32, codebook="e2m1")),
        ("iq4nl_g32_a8", QuantScheme(4, 32, act="int8", codebook="iq4nl")),
        ("fp8_channel", QuantScheme(8, "channel", codebook="e4m3")),
        ("fp8_block128", QuantScheme(8, 128, codebook="e4m3", rows=128)),
        ("e5m2_tensor", QuantScheme(8, "tensor", codebook="e5m2")),
        ("nvfp4_g16", QuantScheme(4, 16, codebook="e2m1", factors="nvfp4")),
        ("q4_k", QuantScheme(4, 32, "offset", factors="k45")),
        ("q5_k_a8", QuantScheme(5, 32, "offset", act="int8", factors="k45")),
        ("iq4_xs", QuantScheme(4, 32, codebook="iq4nl", factors="iq4xs")),
        (" W4A16_G128 ", QuantScheme(4, 128)),
    ],
)
def test_the_short_forms_of_the_documentation(text: str, scheme: QuantScheme) -> None:
    assert QuantScheme.parse(text) == scheme
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text", ["int4", "w4a16", "w4a16_g", "w4a16_g-1", "w4a16_g128_sym", "w4a4_g128", "w4a16 g128", ""]
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(SchemeError, match="a scheme looks like w4a16_g128"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("text", ["nf3_g64", "int4_g64", "w4a16_g128_a8", "q7_k", "q4_k_g32"])
def test_unknown_codebooks_and_types_are_refused(text: str) -> None:
    with pytest.raises(SchemeError, match=f"got '{text}'"):
        QuantScheme.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, got 1"),
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"bits": 4.0}, "bits must be an integer from 2 to 8, got 4.0"),
        ({"group_size": 0}, 'group_size must be a positive integer, "channel" or "tensor", got 0'),
        ({"group_size": -1}, 'the -1 of GPTQ configs is spelled "channel" here'),
        ({"group_size": "row"}, "got 'row'"),
        ({"zeros": "asym"}, "zeros must be one of none, int, float, offset, got 'asym'"),
        ({"act": 16}, r'act must be None \(16-bit activations\) or "int8" or "int8_wide" or .*, got 16'),
        ({"act": "fp8"}, r'act must be None \(16-bit activations\) or "int8" or .*, got \'fp8\''),
        ({"act": ["int8"]}, r"act must be None .*, got \['int8'\]"),
        ({"act_bits": 8}, r'act_bits is called act: None for 16-bit .*, "int8" for int8 ones; .*w4a8_g128'),
        ({"act_bits": None}, "act_bits is called act"),
        (
            {"act": "int8", "codebook": "nf4"},
            "int8 activations need integer codes .no codebook, or one of integers: e2m1, iq4nl., got codebook='nf4'",
        ),
        ({"codebook": "nf3"}, "codebook must be one of nf4, fp4, e2m1, iq4nl, e4m3, e5m2, got 'nf3'"),
        ({"codebook": "nf4", "bits": 3}, "codebook 'nf4' has 16 entries"),
        ({"codebook": "nf4", "zeros": "int"}, 'takes zeros="none"'),
        ({"codebook": "e4m3", "bits": 4}, "codebook 'e4m3' has 256 entries"),
        ({"rows": 64}, "rows must be 1, or group_size for square blocks, got 64 and 128"),
        ({"factors": "k7"}, "factors must be one of k2, k3, k45, k6, iq4xs, nvfp4, nvfp4m, got 'k7'"),
        ({"factors": "k45"}, "factors 'k45' are those of q4_k and q5_k: bits 4 or 5, group_size=32, zeros='offset'"),
        ({"bits": 5, "group_size": 16, "factors": "k6"}, "factors 'k6' are those of q6_k: .*got bits=5"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantScheme(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group_size", "K", "groups"), [(128, 4096, 32), (128, 100, 1), (32, 100, 4), ("channel", 77, 1), (8, 0, 1)]
)
def test_number_of_groups(group_size: int, K: int, groups: int) -> None:
    assert QuantScheme(4, group_size).num_groups(K) == groups


def test_nf4_is_sorted_has_an_exact_zero_and_reaches_both_ends() -> None:
    table = CODEBOOKS["nf4"]
    assert list(table) == sorted(table)
    assert (table[0], table[7], table[15]) == (-1.0, 0.0, 1.0)


# --- activations ------------------------------------------------------------------------------------------------------------


def test_every_activation_has_one_spelling() -> None:
    spellings = [activation.spelling for activation in ACTIVATIONS.values()]
    assert len(set(spellings)) == len(spellings)
    for name, activation in ACTIVATIONS.items():
        assert QuantScheme.parse(f"w4a{activation.spelling}_g128") == QuantScheme(4, 128, act=name)
        assert activation.spelling.startswith(str(activation.bits))


def as_before(value: object) -> bytes:
    """A scheme's or a method's pickle as it was when `act` was an integer called act_bits."""
    fields = dict(value.__dict__)
    fields["act_bits"] = None if fields.pop("act") is None else 8
    old = copy.copy(value)
    old.__dict__.clear()
    old.__dict__.update(fields)
    return pickle.dumps(old)


@pytest.mark.parametrize("value", [QuantScheme(), QuantScheme.parse("w8a8_channel"), RTN(4, act="int8"), SmoothQuant()])
def test_pickles_of_act_bits_load(value: object) -> None:
    """Not as a scheme that has quietly lost its int8 activations: the class has a default for what an instance lacks."""
    old = as_before(value)
    assert b"act_bits" in old
    loaded = pickle.loads(old)
    assert loaded == value
    assert not hasattr(loaded, "act_bits")
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


def test_signatures_are_those_of_the_fields() -> None:
    assert list(inspect.signature(QuantScheme).parameters) == [
        "bits", "group_size", "zeros", "act", "codebook", "rows", "factors",
    ]  # fmt: skip
    assert list(inspect.signature(RTN).parameters)[:3] == ["bits", "group_size", "symmetric"]


@pytest.mark.parametrize("method", [RTN, SmoothQuant])
def test_methods_say_what_became_of_act_bits(method: type[RTN]) -> None:
    with pytest.raises(SchemeError, match="act_bits is called act: .*w4a8_g128"):
        method(act_bits=8)  # type: ignore[call-arg]
