"""Infinities, NaN and huge numbers in x give what a float layer gives, by every kernel of 16-bit activations."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import assert_like_a_float_layer

from . import calls, emulator
from .nonfinite import problems
from .units import in_full

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))


@pytest.mark.parametrize("path", ["decode", "gemm", "gemm_sm90"])
def test_as_a_float_layer(path: str) -> None:
    chosen = [problem for problem in problems() if problem[0].path == path]
    assert len(chosen) >= 32
    for number, (config, weight, x) in enumerate(chosen):
        y = calls.multiply(weight, calls.in_room(x), config, schedule=emulator.SCHEDULES[number % 4])
        assert_like_a_float_layer(y, weight, x)
        assert y[3].isnan().all()
        assert not y[4:].isnan().any()


@pytest.mark.parametrize(
    "bug", ["DECODE_NOT_AGAIN", *(pytest.param(bug, marks=in_full) for bug in ("GEMM_NOT_AGAIN", "WGMMA_NOT_AGAIN"))]
)
def test_sums_that_are_left_as_they_are_would_be_seen(bug: str) -> None:
    path = {"DECODE": "decode", "GEMM": "gemm", "WGMMA": "gemm_sm90"}[bug.split("_")[0]]
    config, weight, x = next(
        problem for problem in problems()
        if problem[0].path == path and problem[1].scheme.zeros != "none" and problem[2].dtype == torch.bfloat16
    )  # fmt: skip
    call = calls.multiply_call(weight, calls.in_room(x), config)
    healthy, broken = (emulator.replay(calls.UNIT, call, "program", bug=one).buffers["y"] for one in (None, bug))
    assert_like_a_float_layer(healthy, weight, x)
    with pytest.raises(AssertionError):
        assert_like_a_float_layer(broken, weight, x)
