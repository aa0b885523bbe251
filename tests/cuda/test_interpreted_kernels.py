"""The kernels as nvcc compiles them, interpreted: the same exact results, no races, and no bank conflicts where it counts."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, Case
from .compiled import needs_nvcc
from .emulator import WHY_NOT
from .interpreted import interpret

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
