"""A load behind a condition stays behind it in what nvcc makes of the kernels.

Plain `asm` of a load is a pure function to nvcc, which may run it early: it once took the loads of a bias that is not there (a
null pointer) out of the loop over tokens of gemm_a8. The emulator compiles the kernels for the host and cannot see that; the
interpreted kernels can (test_interpreted_kernels.py, int8 products without a bias), where they are run.
"""

from __future__ import annotations

import re

from .emulator import CUDA


def test_no_load_is_a_pure_function() -> None:
    texts = {path.name: path.read_text() for path in CUDA.glob("*.cuh")}
    loads = [(name, found) for name, text in texts.items() for found in re.findall(r'asm( volatile)?\(\s*"ld\.', text)]
    assert len(loads) >= 5
    assert {name for name, volatile in loads if not volatile} == set()
