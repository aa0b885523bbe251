"""The kernels as nvcc compiles them, interpreted: the same exact results, no races, and no bank conflicts where it counts."""

from __future__ import annotations

import pytest
import torch

from tests.strategies import random_weight

from .calls import TYPES, weight_arguments
from .calls_a8 import expected as expected_a8
from .calls_a8 import multiply_call as multiply_a8_call
from .calls_a8 import noise
from .cases import CASES, Case
from .emulator import WHY_NOT, Call
from .interpreted import interpret
from .units import needs_nvcc

pytest.importorskip("numpy", minversion="2.0")
pytestmark = [needs_nvcc, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

# What the loop over K does: x fragments, codes and scales from shared memory, and the copies into it.
HOT = ("ldmatrix", "ld.shared", "cp.async")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compiled_kernels_give_the_exact_product(case: Case) -> None:
    call, expected = case.call()
    launches = interpret("mma_tile", call)
    torch.testing.assert_close(call.buffers["y"], expected, rtol=0, atol=0)
    for one in launches:
        assert one.outcome.races == set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_are_no_bank_conflicts(case: Case) -> None:
    for one in interpret("mma_tile", case.call()[0]):
        traffic = {opcode: one.shared(opcode) for opcode in HOT}
        factors = {opcode: t.used / t.least for opcode, t in traffic.items() if t.least}
        assert set(factors.values()) <= {1.0}, (one.launch.kernel, factors)


@pytest.mark.parametrize(
    ("scheme", "M", "K", "tokens", "splits"),
    [("w4a8_g32", 20, 128, 32, 1), ("w8a8_g128", 40, 192, 64, 2)],
)
def test_int8_products_are_exact(scheme: str, M: int, K: int, tokens: int, splits: int) -> None:
    """Quantization, m16n8k32.s8 and the sums of splits: y bit for bit, no races, no bank conflicts."""
    weight, x = random_weight(scheme, 70, K, exact=True), noise(M, K, torch.float16)
    call = multiply_a8_call(weight, x, None, tokens, splits)
    launches = interpret("mma_tile", call)
    assert len(launches) == (2 if splits == 1 else 3)
    assert torch.equal(call.buffers["y"], expected_a8(weight, x, None, splits))  # type: ignore[arg-type]
    for one in launches:
        assert one.outcome.races == set()
    factors = {opcode: t.used / t.least for opcode in HOT if (t := launches[1].shared(opcode)).least}
    assert set(factors.values()) <= {1.0}, factors


@pytest.mark.parametrize(
    ("scheme", "K", "splits", "launched"),
    [("w8a8o6_channel", 136, 1, 5), ("w4a8z_g32", 100, 2, 3), ("w4a8sz_channel", 136, 1, 3), ("w4a8s_g64", 136, 2, 3)],
)
def test_what_is_added_to_int8_products_is_exact(scheme: str, K: int, splits: int, launched: int) -> None:
    """Zero points, outliers in 35 columns, scales from a file: y bit for bit and no races, of what nvcc makes of them."""
    weight, x = random_weight(scheme, 70, K, exact=True), noise(20, K, torch.bfloat16)
    x[torch.arange(35) % 20, torch.arange(35) * 2] = 8.0
    call = multiply_a8_call(weight, x, None, 32, splits)
    launches = interpret("mma_tile", call)
    assert len(launches) == launched
    assert torch.equal(call.buffers["y"], expected_a8(weight, x, None, splits))  # type: ignore[arg-type]
    for one in launches:
        assert one.outcome.races == set()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_writes_whole_sectors(bits: int, dtype: torch.dtype) -> None:
    """Of each 32 bytes of a line that a store of a warp touches it writes all, and the weight is right."""
    weight = random_weight(f"w{bits}a16_g32_asym", 70, 192, exact=True)
    buffers, integers = weight_arguments(weight)
    to = torch.full((70, 192), float("nan"), dtype=dtype)
    more = {"first": 0, "count": 2, "columns": 192, "type": TYPES[dtype]}
    (one,) = interpret("mma_tile", Call("dequantize", {**buffers, "k_order": None, "to": to}, {**integers, **more}))
    assert torch.equal(to, weight.dequantize().to(dtype))
    stores = one.sectors("st.global")
    assert stores.used == stores.least > 0
