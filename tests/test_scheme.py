"""`QuantScheme`: valid values, the short form, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given

from qkernels.errors import SchemeError
from qkernels.scheme import CODEBOOKS, QuantScheme
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
        ("w4a8_g128", QuantScheme(4, 128, act_bits=8)),
        ("w8a8_channel_asym", QuantScheme(8, "channel", "int", act_bits=8)),
        ("w4a8_g32_offset", QuantScheme(4, 32, "offset", act_bits=8)),
        ("nf4_g64", QuantScheme(4, 64, codebook="nf4")),
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
        ({"act_bits": 16}, r"act_bits must be None \(16-bit activations\) or 8, got 16"),
        ({"act_bits": 8, "codebook": "nf4"}, "int8 activations need integer codes .no codebook., got codebook='nf4'"),
        ({"codebook": "nf3"}, "codebook must be one of nf4, fp4, got 'nf3'"),
        ({"codebook": "nf4", "bits": 3}, "codebook 'nf4' has 16 entries"),
        ({"codebook": "nf4", "zeros": "int"}, 'takes zeros="none"'),
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
