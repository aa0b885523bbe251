"""Infinities, NaN and huge numbers in x: y is what a float layer gives, at the same places."""

from __future__ import annotations

import pytest
import torch

from qkernels import QuantLinear
from qkernels.layouts import LAYOUTS
from tests.ops.helpers import assert_like_a_float_layer, integers
from tests.strategies import random_weight

SCHEMES = [
    "w4a16_g32",
    "w4a16_g32_asym",
    "w4a16_g32_fzero",
    "w4a16_g32_offset",
    "w8a16_channel",
    "w8a16_g32_fzero",
    "w3a16_g32",
]
INF = float("inf")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 3, 12])
@torch.no_grad()
def test_as_a_float_layer(scheme: str, act_order: bool, dtype: torch.dtype, M: int) -> None:
    weight = random_weight(scheme, 70, 96, act_order=act_order)
    layer = QuantLinear.from_quant_tensor(weight, integers(70, dtype=dtype), dtype=dtype)
    values: list[dict[int, float]] = [
        {5: INF},
        {5: -INF},
        {5: INF, 60: INF},
        {5: INF, 6: -INF},
        {7: float("nan")},
        {5: INF, 9: float("nan")},
    ]
    if dtype != torch.float16:
        values += [{k: 1e36 for k in range(96)}, {3: 3e38}, {3: -1e37, 70: 1e37}]
    for special in values:
        x = torch.randn(M, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
        for k, value in special.items():
            x[M // 2, k] = value
        y = layer(x)
        assert_like_a_float_layer(y, layer.quant_tensor(), x, layer.bias)
        others = torch.arange(M) != M // 2
        assert y[others].isfinite().all()


def test_every_compiled_layout_of_this_machine_is_meant() -> None:
    """Int8 activations have their own rule: a row with an infinity is NaN (`quantize_rows`)."""
    assert {name for name, layout in LAYOUTS.items() if layout.backend == "cpu"} == {"cpu_tile_a16", "cpu_tile_a8"}
    layer = QuantLinear.from_quant_tensor(random_weight("w4a8_g32", 40, 64), dtype=torch.float32)
    x = integers(3, 64)
    x[1, 2] = INF
    assert layer(x).isnan().any(1).tolist() == [False, True, False]
