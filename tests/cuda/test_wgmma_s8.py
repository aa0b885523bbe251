"""The twin of wgmma s8 against a plain integer product, and the bytes of `mma_tile_a8` against its A fragments.

Where a lane's registers lie in a and d: PTX manual, "Register Fragments for wgmma.mma_async.m64nNk32"; how 64 bytes are
swizzled: "Swizzling Modes" of tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkernels.layouts import get_layout
from tests.cuda import emulator
from tests.cuda.emulator import Call
from tests.strategies import random_weight

pytestmark = pytest.mark.skipif(emulator.WHY_NOT is not None, reason=str(emulator.WHY_NOT))

THREADS = torch.arange(128)
WARP, LANE = THREADS // 32, THREADS % 32
POISON = 0x4B7FFFFF  # async_host.h


def fragments(a: Tensor) -> Tensor:
    """int8 `[64, 32 i]` to `[128 threads, i, 4 registers, 4 bytes]`: register r of a thread has four columns of one row."""
    register, byte = torch.arange(4)[:, None], torch.arange(4)
    rows = (16 * WARP + LANE // 4)[:, None, None] + 8 * (register % 2)
    columns = (LANE % 4 * 4)[:, None, None] + 16 * (register // 2) + byte
    return torch.stack([a[rows, columns + k] for k in range(0, a.shape[1], 32)], 1)


def of_accumulators(d: Tensor) -> Tensor:
    """`[128 threads, n / 2]` to `[64, n]`: registers 4 j, 4 j + 1 are columns 8 j + 2 c of row r, the next two of row r + 8."""
    register = torch.arange(d.shape[1])
    rows = (16 * WARP + LANE // 4)[:, None] + 8 * (register // 2 % 2)
    columns = (LANE % 4 * 2)[:, None] + 8 * (register // 4) + register % 2
    result = torch.full((64, 2 * d.shape[1]), -1, dtype=d.dtype)
    result[rows, columns] = d
    return result


def swizzled(b: Tensor) -> Tensor:
    """Rows of 64 bytes as TMA leaves them: bits 4 and 5 of an address are XORed with bits 7 and 8."""
    address = torch.arange(b.numel())
    result = torch.empty(b.numel(), dtype=b.dtype)
    result[address ^ (address >> 3 & 0x30)] = b.flatten()
    return result


@pytest.mark.parametrize("rows", ["all", "some"])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_the_twin_is_the_integer_product(tokens: int, rows: str) -> None:
    """Of all int8 values, in two instructions; rows of b past its end are zeros; and nothing is there before the wait."""
    generator = torch.Generator().manual_seed(tokens)
    M = tokens if rows == "all" else tokens - 27
    a, b = (torch.randint(-128, 128, (n, 64), generator=generator).to(torch.int8) for n in (64, M))
    early, d = (torch.zeros(128, tokens // 2, dtype=torch.int32) for _ in range(2))
    tile = torch.zeros(tokens * 64, dtype=torch.int8)
    buffers: dict[str, Tensor | None] = {"a": fragments(a).contiguous(), "b": b, "tile": tile, "early": early, "d": d}
    emulator.run("wgmma", Call("wgmma_s8", buffers, {"tokens": tokens, "rows": M}))
    padded = torch.nn.functional.pad(b, (0, 0, 0, tokens - M))
    assert torch.equal(tile, swizzled(padded))
    assert (early == POISON).all()
    assert torch.equal(of_accumulators(d).long(), a.long() @ padded.long().T)


def test_a_tile_of_one_of_many_matrices_has_the_rows_that_end_there() -> None:
    """Each matrix begins a row behind the one before: of the 64 rows in front of row r a block sees its last, and zeros behind
    them, which are read from nowhere. So experts' blocks are read (gemm_sm90.cuh)."""
    b = torch.randint(-128, 128, (64 + 90, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for count, end in ((1, 1), (64, 64), (17, 40), (64, 90), (1, 90)):
        early, d = (torch.zeros(128, 32, dtype=torch.int32) for _ in range(2))
        tile, a = torch.full((64 * 64,), 77, dtype=torch.int8), torch.ones(64, 64, dtype=torch.int8)
        buffers: dict[str, Tensor | None] = {
            "a": fragments(a).contiguous(),
            "b": b,
            "tile": tile,
            "early": early,
            "d": d,
        }
        numbers = {"tokens": 64, "rows": 64, "matrices": 91, "row": 64 - count, "matrix": end}
        emulator.run("wgmma", Call("wgmma_s8", buffers, numbers))
        rows = b[64:][end - count : end]
        assert torch.equal(tile, swizzled(torch.nn.functional.pad(rows, (0, 0, 0, 64 - count)))), (count, end)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_of_the_layout_holds_a_fragment(bits: int) -> None:
    """Four tiles of 16 rows are the four warps' rows, and the columns of 16 lie as quantize_a8.cuh puts those of x."""
    weight = random_weight(f"w{bits}a8_channel", 64, 64)
    qweight = get_layout("mma_tile_a8").pack(weight)["qweight"]
    assert qweight is not None
    if bits == 4:  # [tile][lane][16 columns][byte of a word]: row r is in the low nibbles, row r + 8 in the high ones
        word = qweight.view(4, 32, 4, 4)
        rows = torch.stack([word & 15, word >> 4], 3)  # [tile][lane][16 columns][row][4]
    else:  # [32 columns][tile][lane][16 columns][two words]: bytes a0 a2 a1 a3 | a4 a6 a5 a7
        word = qweight.view(2, 4, 32, 2, 8).permute(1, 2, 0, 3, 4).reshape(4, 32, 4, 8)
        rows = torch.stack([word[..., [0, 4, 2, 6]], word[..., [1, 5, 3, 7]]], 3)
    held = rows.reshape(128, 2, 4, 4)  # [thread][instruction][register][byte]
    order = torch.tensor([16 * s + 2 * c + j for s in range(4) for c in range(4) for j in (0, 8, 1, 9)])
    assert torch.equal(held, fragments(weight.codes[:, order]))
