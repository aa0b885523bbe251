"""GPTQ to the bit: an independent packer, the minus one of v1, labels that lie, rules of `dynamic`, broken tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import Written, gptq
from tests.strategies import random_weight, same_weight

FORMATS = {1: gptq.V1, 2: gptq.V2}
BOTH = pytest.mark.parametrize("version", [1, 2])
WIDTHS = pytest.mark.parametrize("bits", [2, 3, 4, 8])

# The zero points of the first 8 rows of a group, with two true zeros among them.
TRUE_ZEROS = [0, 5, 8, 8, 0, 7, 15, 3]


def stream(rows: list[list[int]], bits: int) -> Tensor:
    """Pack each row as one long little-endian number: the definition, in Python integers."""
    words = []
    for row in rows:
        number = sum(code << (bits * i) for i, code in enumerate(row))
        words.append([number >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))])
    return torch.tensor(words, dtype=torch.int64).int()


def hexadecimal(words: Tensor) -> list[str]:
    return [f"{int(word) & 0xFFFFFFFF:08X}" for word in words.flatten()]


def weight_with_zeros(zeros: list[int], bits: int = 4, K: int = 32) -> QuantTensor:
    N = len(zeros)
    codes = torch.arange(N * K).reshape(N, K).to(torch.uint8) & (2**bits - 1)
    scales = torch.linspace(0.5, 1, N, dtype=torch.float16)[:, None]
    return QuantTensor(
        codes, scales, torch.tensor(zeros, dtype=torch.uint8)[:, None], None, QuantScheme(bits, "channel", "int")
    )


def config(version: int = 1, **fields: Any) -> dict[str, Any]:
    label = {1: "gptq", 2: "gptq_v2"}[version]
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": label} | fields


def tensors_of(scheme: str = "w4a16_g32_asym", N: int = 64, K: int = 96, act_order: bool = False) -> dict[str, Tensor]:
    return gptq.V1.write(random_weight(scheme, N, K, act_order=act_order))


def with_tensor(tensors: Mapping[str, Tensor], **changes: Tensor) -> dict[str, Tensor]:
    return {**tensors, **changes}


@BOTH
@WIDTHS
def test_the_words_are_those_of_an_independent_packer(version: int, bits: int) -> None:
    weight = random_weight(QuantScheme(bits, 32, "int"), 64, 96, act_order=True)
    assert weight.zeros is not None
    tensors = FORMATS[version].write(weight)
    assert torch.equal(tensors["qweight"], stream(weight.codes.tolist(), bits).T)
    words = stream(weight.zeros.T.tolist(), bits)
    if version == 1:
        if bits == 3:
            words = stream([[(z - 1) % 8 for z in group] for group in weight.zeros.T.tolist()], bits)
        else:
            ones = sum(1 << (bits * i) for i in range(32 // bits))
            words = ((words.long() - ones) & 0xFFFFFFFF).int()
    assert torch.equal(tensors["qzeros"], words)
    assert torch.equal(tensors["scales"], weight.scales.T)
    assert torch.equal(tensors["g_idx"], weight.group_index)


def test_true_zero_points_of_zero_in_v1() -> None:
    weight = weight_with_zeros(TRUE_ZEROS)
    v1, v2 = gptq.V1.write(weight), gptq.V2.write(weight)
    assert hexadecimal(v2["qzeros"]) == ["3F708850"]
    assert hexadecimal(v1["qzeros"]) == ["2E5F773F"]  # 0x3F708850 - 0x11111111, with two borrows
    one_by_one = [((0x2E5F773F >> (4 * i)) + 1) & 15 for i in range(8)]
    assert one_by_one == [0, 4, 8, 8, 0, 6, 15, 3]  # what a reader of single fields makes of it
    for version, tensors in ((1, v1), (2, v2)):
        back = FORMATS[version].parse("m", tensors, config(version, group_size=-1)).weight
        assert back.zeros is not None
        assert back.zeros.flatten().tolist() == TRUE_ZEROS
        assert same_weight(back, weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_runs_of_zero_points_of_zero_borrow_through_a_word(bits: int) -> None:
    count = 32 // bits
    for zeros in ([0] * count, [0, 1] * (count // 2), [1] + [0] * (count - 1), [0] + [1] * (count - 1)):
        weight = weight_with_zeros(zeros, bits)
        assert same_weight(gptq.V1.parse("m", gptq.V1.write(weight), config(bits=bits, group_size=-1)).weight, weight)


def test_3_bit_zero_points_are_read_one_by_one() -> None:
    zeros = [0, 1, 2, 3, 4, 5, 6, 7] * 4
    tensors = gptq.V1.write(weight_with_zeros(zeros, 3))
    assert torch.equal(tensors["qzeros"], stream([[(z - 1) % 8 for z in zeros]], 3))
    back = gptq.V1.parse("m", tensors, config(bits=3, group_size=-1)).weight
    assert back.zeros is not None
    assert back.zeros.flatten().tolist() == zeros


@BOTH
@pytest.mark.parametrize(
    ("bits", "v1", "v2"), [(2, "55555555", "AAAAAAAA"), (4, "77777777", "88888888"), (8, "7F7F7F7F", "80808080")]
)
def test_symmetric_words(version: int, bits: int, v1: str, v2: str) -> None:
    tensors = FORMATS[version].write(
        random_weight(QuantScheme(bits, 32), 40, 64)
    )  # 40: the last word is partial at 2 bits
    assert set(hexadecimal(tensors["qzeros"])) == {v1 if version == 1 else v2}


@BOTH
def test_symmetric_3_bit_fields(version: int) -> None:
    tensors = FORMATS[version].write(random_weight("w3a16_g32", 32, 64))
    assert torch.equal(tensors["qzeros"], stream([[2 + version] * 32] * 2, 3))


@BOTH
@WIDTHS
@pytest.mark.parametrize("sym", [True, None])
def test_a_label_that_lies_about_symmetric_zeros_is_not_believed(version: int, bits: int, sym: bool | None) -> None:
    weight = random_weight(QuantScheme(bits, 32), 40, 64)
    honest, liar = config(version, bits=bits, sym=sym), config(3 - version, bits=bits, sym=sym)
    tensors = FORMATS[version].write(weight)
    assert same_weight(FORMATS[version].parse("m", tensors, honest).weight, weight)
    assert FORMATS[version].parse("m", tensors, honest).oddities == ()
    assert same_weight(FORMATS[3 - version].parse("m", tensors, liar).weight, weight)
    (oddity,) = FORMATS[3 - version].parse("m", tensors, liar).oddities
    names = {1: "gptq", 2: "gptq_v2"}
    assert oddity.kind == f"zero points are stored as {names[version]} although the config says {names[3 - version]}"


def test_the_label_decides_where_the_config_says_asymmetric() -> None:
    weight = weight_with_zeros([8] * 8)
    assert same_weight(gptq.V2.parse("m", gptq.V2.write(weight), config(2, group_size=-1)).weight, weight)
    as_v1 = gptq.V1.parse("m", gptq.V2.write(weight), config(1, group_size=-1)).weight
    assert as_v1.zeros is not None
    assert as_v1.zeros.unique().tolist() == [9]


def test_asymmetric_data_under_a_symmetric_config() -> None:
    weight = weight_with_zeros(TRUE_ZEROS)
    says_sym = config(group_size=-1, sym=True)
    assert same_weight(gptq.V1.parse("m", gptq.V1.write(weight), says_sym).weight, weight)
    kinds = [oddity.kind for oddity in gptq.V1.parse("m", gptq.V1.write(weight), says_sym).oddities]
    assert "asymmetric zero points although the config says sym" in kinds


@pytest.mark.parametrize(
    ("zeros", "word"), [([5, 8, 8, 0, 3, 3, 3, 3], 0xFFFFF774), ([0, 4, 4, 4, 4, 4, 4, 4], 0xFFFFFFFF)]
)
def test_the_overflow_of_autogptq_is_reported(zeros: list[int], word: int) -> None:
    """AutoGPTQ ORed a sign-extended -1 into the word: everything from the field with zero point 0 upwards is ones."""
    damaged = 0
    for i, zero in enumerate(zeros):
        damaged |= (zero - 1) << (4 * i)
    assert damaged & 0xFFFFFFFF == word
    tensors = with_tensor(gptq.V1.write(weight_with_zeros(zeros)), qzeros=torch.tensor([[damaged & 0xFFFFFFFF]]).int())
    (oddity,) = gptq.V1.parse("m", tensors, config(group_size=-1)).oddities
    assert "damaged by AutoGPTQ" in oddity.kind
    assert "1 of 1 words" in oddity.detail
    trusted = config(group_size=-1, meta={"quantizer": ["gptqmodel:2.2.0"]})
    assert gptq.V1.parse("m", tensors, trusted).oddities == ()


def test_one_zero_point_of_zero_at_the_top_is_no_damage() -> None:
    assert (
        gptq.V1.parse("m", gptq.V1.write(weight_with_zeros([5, 8, 8, 3, 3, 3, 3, 0])), config(group_size=-1)).oddities
        == ()
    )


def test_g_idx_absent_natural_or_in_act_order() -> None:
    tensors = tensors_of()
    plain = gptq.V1.parse("m", tensors, config(desc_act=True)).weight
    assert plain.group_index is None  # static order: the config says desc_act, the columns are natural
    without = {name: tensor for name, tensor in tensors.items() if name != "g_idx"}
    assert same_weight(gptq.V1.parse("m", without, config()).weight, plain)
    assert gptq.V1.parse("m", without, config(desc_act=False)).oddities == ()
    ordered = tensors_of(act_order=True)
    assert torch.equal(gptq.V1.parse("m", ordered, config()).weight.group_index, ordered["g_idx"])
    (oddity,) = gptq.V1.parse("m", ordered, config(desc_act=False)).oddities
    assert oddity.kind == "g_idx is in act-order although the config says desc_act: false"


def test_int64_g_idx_and_bf16_scales() -> None:
    weight = random_weight("w4a16_g32_asym", 64, 96, act_order=True, dtype=torch.bfloat16)
    tensors = gptq.V1.write(weight)
    tensors["g_idx"] = tensors["g_idx"].long()
    assert same_weight(gptq.V1.parse("m", tensors, config()).weight, weight)


@WIDTHS
def test_narrow_qzeros_of_autogptq(bits: int) -> None:
    """It gives rows beyond the last multiple of 32 no zero points, which a symmetric weight does not need."""
    N, fields = 48, config(bits=bits, sym=True)
    weight = random_weight(QuantScheme(bits, 32), N, 64)
    tensors = gptq.V1.write(weight)
    narrow = with_tensor(tensors, qzeros=tensors["qzeros"][:, : N // 32 * bits].contiguous())
    assert same_weight(gptq.V1.parse("m", narrow, fields).weight, weight)
    tensors = gptq.V1.write(random_weight(QuantScheme(bits, 32, "int"), N, 64))
    narrow = with_tensor(tensors, qzeros=tensors["qzeros"][:, : N // 32 * bits].contiguous())
    with pytest.raises(
        CheckpointError, match="m: qzeros holds zero points for 32 of N=48 rows, and they are not symmetric"
    ):
        gptq.V1.parse("m", narrow, fields)


def test_synonyms_in_the_config() -> None:
    fields = {"method": "gptq", "w_bit": 4, "q_group_size": 32, "sym": False}
    assert same_weight(
        gptq.V1.parse("m", tensors_of(), fields).weight, gptq.V1.parse("m", tensors_of(), config()).weight
    )


@BOTH
def test_mixed_schemes_become_rules(version: int) -> None:
    default, other = QuantScheme(4, 32), QuantScheme(8, "channel", "int")
    schemes = {"model.layers.0.a": default, "model.layers.1.a": other, "model.layers.10.a": default}
    written = FORMATS[version].config_of(Written(default, schemes, act_order=True, unquantized=("model.layers.0.b",)))
    assert written["dynamic"] == {
        r"-:^model\.layers\.0\.b$": {},
        r"+:^model\.layers\.1\.a$": {"bits": 8, "group_size": -1, "sym": False},
    }
    assert written["desc_act"] is True
    for name, scheme in schemes.items():
        weight = random_weight(scheme, 16, 64)
        assert same_weight(FORMATS[version].parse(name, FORMATS[version].write(weight), written).weight, weight)
    with pytest.raises(CheckpointError, match=r"model.layers.0.b: quantization_config excludes it \('-:\^model"):
        FORMATS[version].parse("model.layers.0.b", FORMATS[version].write(random_weight(default, 16, 64)), written)


def test_the_first_rule_that_matches_the_beginning_of_a_name_wins() -> None:
    rules = {r"+:.*\.down_proj": {"bits": 8}, r".*\.down_proj": {"bits": 2}, r"mlp": {"bits": 2}}
    weight = random_weight("w8a16_g32", 16, 64)
    fields = config(sym=True, dynamic=rules)
    assert same_weight(gptq.V1.parse("x.mlp.down_proj", gptq.V1.write(weight), fields).weight, weight)
    weight = random_weight("w4a16_g32", 16, 64)
    assert same_weight(
        gptq.V1.parse("x.mlp.up_proj", gptq.V1.write(weight), fields).weight, weight
    )  # "mlp" is not its beginning


def test_config_of_refuses_what_write_refuses() -> None:
    with pytest.raises(ConversionError, match=r"gptq cannot store this weight: nf4_g64 has a codebook"):
        gptq.V1.config_of(Written(QuantScheme(), {"m": QuantScheme.parse("nf4_g64")}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8 in a GPTQ file, got 5"),
        ({"bits": "4"}, "needs an integer bits or w_bit, got '4'"),
        ({"bits": None}, "needs an integer bits or w_bit, got None"),
        ({"bits": True}, "needs an integer bits or w_bit, got True"),
        ({"group_size": 0}, r"needs a group_size of 1 … 2\^31 - 1, or -1, got 0"),
        (
            {"group_size": 64},
            r"scales must be float16 or bfloat16 or float32 \[2, 64\] \(K=96, group_size 64\), got float16 \[3",
        ),
        ({"bits": 8}, r"qweight must be int32 \[24, 64\] \(8 bits, K=96, N=64\), got int32 \[12, 64\]"),
        ({"sym": "yes"}, "needs sym to be true or false, got 'yes'"),
        ({"pack_dtype": "int64"}, "pack_dtype must be int32, got 'int64'"),
        ({"dynamic": ["x"]}, "needs dynamic to map patterns to fields"),
        ({"dynamic": {"+:(": {}}}, r"invalid pattern '\+:\(' in dynamic"),
        ({"dynamic": {"m": 3}}, "needs fields for the pattern 'm', got 3"),
        ({"dynamic": {"m" * 2000: {}}}, "a pattern of 2000 characters"),
        ({"dynamic": {"-:m": {}}}, r"excludes it \('-:m'\)"),
    ],
)
def test_configs_that_contradict_the_data(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        gptq.V1.parse("m", tensors_of(), config(**fields))


def _g_idx(change: Any) -> Tensor:
    index = tensors_of(act_order=True)["g_idx"]
    change(index)
    return index


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qweight": torch.zeros(11, 64, dtype=torch.int32)},
            r"qweight must be int32 \[12, 64\] .*got int32 \[11, 64\]",
        ),
        ({"qweight": torch.zeros(12, 64)}, r"qweight must be int32 \[12, 64\] .*got float32 \[12, 64\]"),
        ({"qweight": torch.zeros(12, dtype=torch.int32)}, r"qweight must be \[ceil\(K \* bits / 32\), N\], got \[12\]"),
        (
            {"qzeros": torch.zeros(3, 9, dtype=torch.int32)},
            r"qzeros must be int32 \[3, 8\] \(4 bits, N=64\), got int32 \[3, 9\]",
        ),
        ({"qzeros": torch.zeros(3, 8)}, r"qzeros must be int32 .*got float32"),
        ({"qzeros": torch.zeros(24, dtype=torch.int32)}, r"qzeros must be int32 \[3, 8\] .*got int32 \[24\]"),
        ({"scales": torch.ones(3, 63)}, r"qweight must be int32 \[12, 63\]"),
        ({"scales": torch.ones(64)}, r"scales must be \[G, N\], got \[64\]"),
        ({"scales": torch.ones(3, 64, dtype=torch.int32)}, "scales must be float16 or bfloat16 or float32"),
        (
            {"scales": torch.full((3, 64), float("nan"))},
            "scales must be finite, got 192 NaN or infinite entries of 192",
        ),
        ({"scales": torch.ones(3, 64) / torch.arange(64)}, "scales must be finite, got 3 NaN or infinite"),
        ({"scales": torch.zeros(3, 64)}, "scales must not all be zero"),
        ({"g_idx": _g_idx(lambda t: t.__setitem__(5, 3))}, r"g_idx must lie in 0 … 2 \(G=3\), got 3"),
        ({"g_idx": _g_idx(lambda t: t.__setitem__(5, -1))}, r"g_idx must lie in 0 … 2 \(G=3\), got -1"),
        ({"g_idx": torch.zeros(96, dtype=torch.int32)}, "g_idx gives group 0 96 members, expected 32"),
        ({"g_idx": torch.zeros(96)}, r"g_idx must be int32 \[K\] = \[96\], got float32"),
        ({"g_idx": torch.zeros(2, 48, dtype=torch.int32)}, r"g_idx must be \[K\], got \[2, 48\]"),
        ({"g_idx": torch.zeros(90, dtype=torch.int32)}, "g_idx gives group 0 90 members, expected 32"),
    ],
)
def test_broken_tensors(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*({message})"):
        gptq.V1.parse("m", with_tensor(tensors_of(), **changes), config())


def test_k_that_nothing_tells() -> None:
    tensors = gptq.V1.write(random_weight("w3a16_channel", 32, 40))
    del tensors["g_idx"]
    with pytest.raises(
        CheckpointError, match="m: qweight has 4 rows, not a whole number of 3-bit codes; no g_idx tells K"
    ):
        gptq.V1.parse("m", tensors, config(bits=3, group_size=-1))
