"""Every kernel instance that ships is executed and right, bit for bit: the table of which call reaches which is made here."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from . import calls, emulator
from .emulator import SCHEDULES
from .instances import FAMILIES, Forced, forced, kernels_of, shipped

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))


@cache
def table() -> dict[str, Forced]:
    """The first call that launches each instance. Recorded: nothing runs."""
    reached: dict[str, Forced] = {}
    for call in forced():
        for kernel in kernels_of(call.call()):
            reached.setdefault(kernel, call)
    return reached


def of_family(family: str) -> list[Forced]:
    marked = f"_ZN8qkernels4cuda{len(family)}{family}"
    calls_of = [call for kernel, call in table().items() if kernel.startswith((f"{marked}I", f"{marked}E"))]
    return list(dict.fromkeys(calls_of))


def test_the_table_names_every_instance_that_ships() -> None:
    """dequantize_tiles and dequantize_planes have no configuration: tests that call `dequantize` run the five."""
    missing = shipped() - table().keys()
    assert {name for name in missing if "dequantize_" not in name} == set()
    assert len(missing) == 5
    assert table().keys() <= shipped()
    assert len(table()) == 191  # of 196, with those of dequantize


@pytest.mark.parametrize("family", [family for family in FAMILIES if "dequantize" not in family])
def test_every_instance_is_right(family: str) -> None:
    """Each in one of the four schedules, in turn."""
    chosen = of_family(family)
    assert chosen
    for number, case in enumerate(chosen):
        call = case.call()
        emulator.run(calls.UNIT, call, SCHEDULES[number % len(SCHEDULES)])
        torch.testing.assert_close(
            call.buffers["y"], case.expected(), rtol=0, atol=0, msg=lambda m, c=case: f"{c}: {m}"
        )


def test_a_configuration_that_does_not_exist_is_refused() -> None:
    case = next(forced())
    for wrong in (
        {"tokens": 24},
        {"path": 2},
        {"path": 9},
        {"splits": 0},
        {"path": 3, "tokens": 64, "stages": 1},
        {"stages": 1},
        {"stages": 7},
    ):
        call = case.call()
        with pytest.raises(RuntimeError, match="multiply returned error 1"):
            emulator.run(calls.UNIT, emulator.Call(call.launcher, call.buffers, {**call.integers, **wrong}))


@pytest.mark.parametrize("stages", [2, 3, 5, 6])
def test_a_ring_of_another_length_gives_the_same_bits(stages: int) -> None:
    configs = (
        ("w4a16_g64", calls.Config("decode", 8, 1, 1, stages=stages)),
        ("w4a16_g64", calls.Config("decode", 32, 1, 1, stages=stages)),
        ("w4a16_g64", calls.Config("gemm_sm90", 64, stages=stages)),
        ("w8a8_g64", calls.Config("gemm_a8_sm90", 64, stages=stages)),
    )
    for scheme, config in configs:
        case = Forced(scheme, config, torch.float16, K=520)
        call = case.call()
        emulator.run(calls.UNIT, call, "random")
        torch.testing.assert_close(call.buffers["y"], case.expected(), rtol=0, atol=0)
