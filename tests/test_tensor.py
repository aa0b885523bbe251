"""`QuantTensor`: the definition of truth against a formula written out, refusals, sharding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import QuantScheme, QuantTensor
from qkernels.codebooks import CODEBOOKS
from qkernels.errors import ArgumentError, TensorError
from qkernels.group_index import natural_group_index, validated_group_index
from tests.strategies import random_weight, same_weight, schemes


def weight_by_hand(qt: QuantTensor) -> torch.Tensor:
    """Element by element in Python floats: slow, and obviously right."""
    groups = qt.column_groups().tolist()
    w = torch.empty(qt.N, qt.K, dtype=torch.float64)
    for n in range(qt.N):
        for k, g in enumerate(groups):
            code, scale = int(qt.codes[n, k]), float(qt.scales[n, g])
            if qt.scheme.codebook:
                w[n, k] = float(torch.tensor(CODEBOOKS[qt.scheme.codebook][code])) * scale
            elif qt.zeros is None:
                w[n, k] = (code - 2 ** (qt.scheme.bits - 1)) * scale
            elif qt.scheme.zeros == "offset":
                w[n, k] = code * scale + float(qt.zeros[n, g])
            else:
                w[n, k] = (code - float(qt.zeros[n, g])) * scale
    return w


@given(schemes(), st.integers(1, 5), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_dequantize_is_the_formula(scheme: QuantScheme, N: int, K: int, act_order: bool, seed: int) -> None:
    qt = random_weight(scheme, N, K, seed, act_order)
    # fp32 rounds each of at most two operations once
    expected = weight_by_hand(qt)
    bound = 2**-23 * (expected.abs() + 2 * (0 if qt.zeros is None else qt.zeros.double().abs().max()))
    assert ((qt.dequantize().double() - expected).abs() <= bound).all()


def test_dequantize_of_exact_values_is_exact_in_any_dtype() -> None:
    qt = random_weight("w4a16_g8_asym", 6, 24, exact=True, act_order=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(qt.dequantize(dtype).double(), weight_by_hand(qt))


def test_experts_dequantize_one_by_one() -> None:
    qt = random_weight("w4a16_g8_asym", 4, 16, experts=(3,))
    for e in range(3):
        one = QuantTensor(qt.codes[e], qt.scales[e], qt.zeros[e], None, qt.scheme)
        assert torch.equal(one.dequantize(), qt.dequantize()[e])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": torch.zeros(4, 16, dtype=torch.int32)}, r"codes must be uint8 \[..., N, K\], got int32 \[4, 16\]"),
        ({"codes": torch.full((4, 16), 16, dtype=torch.uint8)}, r"codes must be 0 … 15 for w4a16_g8_asym, got 16"),
        (
            {"scales": torch.ones(4, 3)},
            r"scales must be .* = \[4, 2\] for w4a16_g8_asym and K=16, got float32 \[4, 3\]",
        ),
        ({"scales": torch.ones(4, 2, dtype=torch.float64)}, "got float64"),
        ({"scales": torch.tensor([[1.0, float("nan")]] * 4)}, "scales must be finite, got 4 NaN or infinite entries"),
        ({"scales": torch.tensor([[float("inf"), 1.0]] * 4)}, "scales must be finite"),
        ({"zeros": None}, "zeros must be given for w4a16_g8_asym, got None"),
        ({"zeros": torch.zeros(4, 2)}, r"zeros must be uint8 .* got float32 \[4, 2\]"),
        ({"zeros": torch.full((4, 2), 16, dtype=torch.uint8)}, "zeros must be 0 … 15"),
        ({"group_index": torch.zeros(16)}, r"group_index must be int32 \[K\] = \[16\], got float32 \[16\]"),
        ({"group_index": torch.zeros(16, dtype=torch.int32)}, "group_index gives group 0 16 members, expected 8"),
        ({"group_index": torch.arange(16, dtype=torch.int32)}, r"group_index must lie in 0 … 1 \(G=2\), got 15"),
        ({"group_index": -torch.ones(16, dtype=torch.int32)}, r"group_index must lie in 0 … 1 \(G=2\), got -1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(TensorError, match=message):
        replace(random_weight("w4a16_g8_asym", 4, 16), **fields)


def test_symmetric_takes_no_zeros_and_per_tensor_one_scale() -> None:
    with pytest.raises(TensorError, match="zeros must be None for w4a16_g8"):
        replace(random_weight("w4a16_g8", 4, 16), zeros=torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(TensorError, match="must all be equal"):
        replace(random_weight("w8a16_tensor", 2, 8), scales=torch.tensor([[1.0], [2.0]]))


def test_devices_must_agree() -> None:
    with pytest.raises(TensorError, match=re.escape("must be on one device, got ['cpu', 'meta']")):
        replace(random_weight("w4a16_g8", 4, 16), scales=torch.ones(4, 2, device="meta"))


def test_negative_and_zero_scales_are_valid() -> None:
    qt = replace(random_weight("w4a16_g8", 4, 16), scales=torch.tensor([[-1.0, 0.0]] * 4))
    assert torch.equal(qt.dequantize()[:, 8:], torch.zeros(4, 8))


def test_bytes_are_those_of_the_information() -> None:
    # 4 x 16 codes of 3 bits, 8 fp16 scales, 8 zero points of 3 bits, 16 int32
    qt = random_weight("w3a16_g8_asym", 4, 16, act_order=True)
    assert qt.nbytes == (4 * 16 * 3 + 8 * 16 + 8 * 3) // 8 + 64


def test_a_natural_group_index_is_dropped() -> None:
    scheme = QuantScheme(4, 8)
    assert validated_group_index(natural_group_index(20, scheme), 20, scheme) is None
    shuffled = natural_group_index(20, scheme).flip(0)
    with pytest.raises(TensorError, match="gives group 0 4 members, expected 8"):  # the short group must be the last
        validated_group_index(2 - natural_group_index(20, scheme), 20, scheme)
    assert torch.equal(validated_group_index(shuffled, 20, scheme), shuffled)


def test_k_order_sorts_columns_by_group() -> None:
    qt = random_weight("w4a16_g8", 2, 20, act_order=True)
    order = qt.k_order().long()
    assert torch.equal(qt.group_index[order], natural_group_index(20, qt.scheme))


@pytest.mark.parametrize("scheme", ["w4a16_g8", "w4a16_g8_asym", "w8a16_channel", "w8a16_tensor", "nf4_g8"])
@pytest.mark.parametrize(("dim", "axis"), [("N", 0), ("K", 1)])
def test_shards_are_slices_of_the_weight(scheme: str, dim: str, axis: int) -> None:
    qt = random_weight(scheme, 8, 32)
    parts = [qt.shard(dim, rank, 2).dequantize() for rank in range(2)]
    assert torch.equal(torch.cat(parts, axis), qt.dequantize())
    assert same_weight(qt.shard(dim, 0, 1), qt)


def test_shard_refuses_to_cut() -> None:
    with pytest.raises(
        ArgumentError, match="has 12 columns and would cut a group of 8; use a group_size that divides 12"
    ):
        random_weight("w4a16_g8", 8, 24).shard("K", 0, 2)
    with pytest.raises(ArgumentError, match="K=24 does not divide into 5 equal parts"):
        random_weight("w4a16_g8", 8, 24).shard("K", 0, 5)
    with pytest.raises(ArgumentError, match="cannot cut K of an act-order weight"):
        random_weight("w4a16_g8", 8, 32, act_order=True).shard("K", 0, 2)
    with pytest.raises(ArgumentError, match='dim must be "N"'):
        random_weight("w4a16_g8", 8, 32).shard("M", 0, 2)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="got rank=2, world=2"):
        random_weight("w4a16_g8", 8, 32).shard("N", 2, 2)


def test_meta_tensors_carry_shapes_only() -> None:
    qt = random_weight("w4a16_g8_asym", 4, 16).to("meta")
    assert qt.dequantize().shape == (4, 16)
    assert qt.dequantize().is_meta


@pytest.mark.parametrize(
    "scheme", ["w4a16_g32", "w4a16_g32_asym", "w4a16_g64_offset", "nf4_g64", "w8a16_channel", "w8a16_tensor"]
)
def test_concat_joins_rows_exactly(scheme: str) -> None:
    parts = [random_weight(scheme, rows, 75) for rows in (8, 0, 3)]
    whole = QuantTensor.concat(parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert str(whole.scheme) == scheme.replace("tensor", "channel")  # each part had a scale of its own


def test_concat_and_stack_are_the_inverse_of_shard_and_indexing() -> None:
    weight = random_weight("w4a16_g32_asym", 12, 64, act_order=True)
    again = QuantTensor.concat([weight.shard("N", rank, 3) for rank in range(3)])
    assert same_weight(again, weight)
    experts = [random_weight("w4a16_g32_asym", 12, 64) for _ in range(3)]
    stacked = QuantTensor.stack(experts)
    assert stacked.codes.shape == (3, 12, 64)
    assert torch.equal(stacked.dequantize(), torch.stack([expert.dequantize() for expert in experts]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: random_weight("w4a16_g64", 4, 64),
            r"one scheme, got w4a16_g32 \(the first\) and w4a16_g64 \(number 1\)",
        ),
        (lambda: random_weight("w4a16_g32", 4, 96), r"one experts and K, got \[64\] \(the first\) and \[96\]"),
        (lambda: random_weight("w4a16_g32", 4, 64, act_order=True), r"one order of columns, got False .* and True"),
    ],
)
def test_weights_that_differ_are_not_joined(other: Callable[[], QuantTensor], message: str) -> None:
    weight = random_weight("w4a16_g32", 4, 64)
    with pytest.raises(ArgumentError, match=message):
        QuantTensor.concat([weight, other()])
    if other().K != 64:
        with pytest.raises(ArgumentError, match=r"one shape, got \[4, 64\]"):
            QuantTensor.stack([weight, other()])


def test_joining_nothing_or_two_orders_is_refused() -> None:
    with pytest.raises(ArgumentError, match="at least one weight"):
        QuantTensor.concat([])
    a, b = (random_weight("w4a16_g32", 4, 64, act_order=True, seed=seed) for seed in (0, 1))
    with pytest.raises(ArgumentError, match="one group_index"):
        QuantTensor.concat([a, b])
