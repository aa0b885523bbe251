"""Bit-exactness of the CPU kernels, on every instruction set: integer inputs and power-of-two scales leave the rounding of
the output as the only one, so that any wrong code, zero, scale, column or row shows in the bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from qkernels import QuantTensor
from tests.ops.helpers import DTYPES, arguments, exact_product, integers, multiply
from tests.strategies import random_weight

# 5 … 8 use the decode path with one tile, 9 … the path through a panel; 33 has remainders of 6 and of 12, 70 two blocks
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 70]
ZEROS = ["", "_asym", "_fzero", "_offset"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("scheme", [f"w{bits}a16_g32{zeros}" for bits in (4, 8) for zeros in ZEROS])
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
def test_every_number_of_tokens(isa: str, scheme: str, act_order: bool, dtype: torch.dtype) -> None:
    N, K = 70, 168  # a short last tile, an odd number of tiles, a short last group
    weight = random_weight(scheme, N, K, act_order=act_order, exact=True)
    for M in TOKENS:
        x, bias = integers(M, K, dtype=dtype), integers(N, dtype=dtype)
        assert torch.equal(multiply(weight, x, bias), exact_product(weight, x, bias)), M


@pytest.mark.parametrize("group", ["g8", "g16", "g24", "g64", "g128", "g136", "channel", "tensor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_group(isa: str, bits: int, group: str) -> None:
    """Odd N and K, K not a multiple of 8, runs of a whole and of a broken 128 columns."""
    for zeros, (N, K), M in itertools.product(ZEROS, [(33, 299), (1, 7), (97, 408)], (1, 9)):
        weight = random_weight(f"w{bits}a16_{group}{zeros}", N, K, seed=bits, act_order=M == 9, exact=True)
        dtype = DTYPES[(bits + M) % 3]
        x = integers(M, K, dtype=dtype, most=2)
        assert torch.equal(multiply(weight, x), exact_product(weight, x)), (zeros, N, K, M)


@dtypes
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_every_dtype_of_scales_zeros_and_bias(isa: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for zeros, bias_dtype, M in itertools.product(ZEROS, (None, *DTYPES), (2, 12)):
        weight = random_weight(f"w4a16_g32{zeros}", 40, 96, dtype=scale_dtype, exact=True)
        x, bias = integers(M, 96, dtype=dtype), None if bias_dtype is None else integers(40, dtype=bias_dtype)
        assert torch.equal(multiply(weight, x, bias), exact_product(weight, x, bias)), (zeros, bias_dtype, M)


def test_every_pair_of_code_and_zero_point(isa: str) -> None:
    """All 16 x 16 and 256 x 256 differences, the extremes of ±255 in bf16 included."""
    for bits in (4, 8):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat_interleave(8)  # one group of 8 columns a code
        zeros = torch.arange(2**bits, dtype=torch.uint8)[:, None].expand(-1, 2**bits).contiguous()
        scheme = random_weight(f"w{bits}a16_g8_asym", 1, 8).scheme
        weight = QuantTensor(
            codes.expand(2**bits, -1).contiguous(), torch.ones(zeros.shape, dtype=torch.float16), zeros, None, scheme
        )
        x = torch.zeros(2**bits, 8 * 2**bits, dtype=torch.bfloat16)
        x[torch.arange(2**bits), torch.arange(2**bits) * 8 + 5] = 1
        y = multiply(weight, x)  # y[code, zero] = code - zero
        difference = torch.arange(2**bits)[:, None] - torch.arange(2**bits)
        assert torch.equal(y.int(), difference.int())


def test_empty_shapes(isa: str) -> None:
    for N, K, M in [(0, 64, 3), (40, 64, 0), (0, 0, 0), (0, 64, 0)]:
        y = multiply(random_weight("w4a16_g32", N, K), torch.zeros(M, K))
        assert list(y.shape) == [M, N]
    for zeros, M in itertools.product(ZEROS, (1, 9)):  # no columns: only the bias is left
        y = multiply(random_weight(f"w4a16_g32{zeros}", 40, 0), torch.zeros(M, 0), integers(40))
        assert torch.equal(y, integers(40).expand(M, 40))


@dtypes
@pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
def test_strided_activations(isa: str, dtype: torch.dtype, act_order: bool) -> None:
    """Rows and columns picked out of a larger tensor whose other entries are NaN."""
    N, K = 40, 96
    weight = random_weight("w4a16_g32_fzero", N, K, act_order=act_order, exact=True)
    for M in (1, 3, 11):
        x = integers(M, K, dtype=dtype)
        room = torch.full((2 * M + 1, 3 * K + 5), float("nan"), dtype=dtype)
        views = [
            room[1::2, 5 : 5 + K],
            room[:M, 4 : 4 + 3 * K : 3],
            room.T[2 : 2 + K, :M].T,
            room.T[: 3 * K : 3, 1::2].T,
        ]
        for view in views:
            room.fill_(float("nan"))
            view.copy_(x)
            assert torch.equal(multiply(weight, view), exact_product(weight, x)), (M, view.stride())
    row = integers(1, K, dtype=dtype)
    assert torch.equal(multiply(weight, row.expand(10, K)), exact_product(weight, row.expand(10, K)))


@pytest.mark.usefixtures("poisoned_memory")
@dtypes
def test_nothing_uninitialized_is_used_or_left(isa: str, dtype: torch.dtype) -> None:
    """Outputs and workspaces start as NaN."""
    for scheme, K, M in itertools.product(["w4a16_g32_offset", "w8a16_g32", "w4a16_channel"], (91, 128), (1, 5, 20)):
        weight = random_weight(scheme, 45, K, act_order=K == 91, exact=True)
        x = integers(M, K, dtype=dtype)
        assert torch.equal(multiply(weight, x), exact_product(weight, x)), (scheme, K, M)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w8a16_g32"])
def test_one_flipped_bit_is_noticed(isa: str, scheme: str) -> None:
    """Negative control: the tests above see a single bit of any byte of qweight, in both paths."""
    weight = random_weight(scheme, 33, 40, exact=True)
    for M, byte in itertools.product((1, 9), (0, 1, 2, 3, 127, 300)):
        args = list(arguments(weight, torch.ones(M, 40)))
        damaged = args[1].clone()  # type: ignore[attr-defined]
        damaged[0, byte] ^= 16
        args[1] = damaged
        y = torch.ops.qkernels.gemm_cpu_tile_a16(*args)
        assert (y != exact_product(weight, torch.ones(M, 40))).sum() == M


def test_the_decode_op_is_the_decode_path(isa: str) -> None:
    weight = random_weight("w4a16_g32_asym", 70, 168)
    for M in range(1, 9):
        x = torch.randn(M, 168, generator=torch.Generator().manual_seed(M))
        assert torch.equal(multiply(weight, x, op="gemv_cpu_tile_a16"), multiply(weight, x))


def test_column_orders_from_outside_cannot_read_outside(isa: str) -> None:
    """A permutation is validated when it is loaded; should a wrong one get here all the same, it is clamped."""
    weight = random_weight("w4a16_g32", 40, 96, act_order=True, exact=True)
    args = list(arguments(weight, integers(3, 96)))
    order = args[4].clone()  # type: ignore[attr-defined]
    order[0], order[1], order[2] = -1, 2**31 - 1, -(2**31)
    args[4] = order
    clamped = [*args[:4], order.clamp(0, 95), *args[5:]]
    assert torch.equal(torch.ops.qkernels.gemm_cpu_tile_a16(*args), torch.ops.qkernels.gemm_cpu_tile_a16(*clamped))
