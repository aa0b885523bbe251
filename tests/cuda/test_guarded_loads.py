"""A load behind a condition stays behind it in what nvcc makes of the kernels.

Plain `asm` of a load is a pure function to nvcc, which may run it early: it once took the loads of a bias that is not there (a
null pointer) out of the loop over tokens of gemm_a8. The emulator compiles the kernels for the host and cannot see that.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.strategies import random_weight

from .calls_a8 import expected, multiply_call, noise
from .compiled import needs_nvcc
from .emulator import CUDA, WHY_NOT
from .interpreted import interpret


def test_no_load_is_a_pure_function() -> None:
    texts = {path.name: path.read_text() for path in CUDA.glob("*.cuh")}
    loads = [(name, found) for name, text in texts.items() for found in re.findall(r'asm( volatile)?\(\s*"ld\.', text)]
    assert len(loads) >= 5
    assert {name for name, volatile in loads if not volatile} == set()


@needs_nvcc
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_bias_that_is_not_there_is_not_read() -> None:
    pytest.importorskip("numpy", minversion="2.0")
    weight, x = random_weight("w4a8_g64", 70, 64, exact=True), noise(17, 64, torch.float16)
    call = multiply_call(weight, x, None, 32, 1)
    launches = interpret("mma_tile", call)  # raises on an access outside the call's buffers
    assert torch.equal(call.buffers["y"], expected(weight, x, None, 1))  # type: ignore[arg-type]
    assert all(one.outcome.races == set() for one in launches)
