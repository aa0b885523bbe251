"""The choice for int8 activations: every choice can run, and follows the crossovers that docs/kernel-log.md claims."""

from __future__ import annotations

import pytest

from tests.cuda import calls
from tests.cuda.calls import PATHS
from tests.cuda.cards import CARDS

from .test_heuristics import choose as choose_config

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
cards = pytest.mark.parametrize("sm", CARDS)
GEMM, SM90 = PATHS["gemm_a8"], PATHS["gemm_a8_sm90"]


def choose(M: int, N: int, K: int, sm: int, bits: int = 8, group: int | None = None) -> tuple[list[int], float]:
    """Path, tokens and splits; predicted nanoseconds. `group`: None for one scale a row."""
    groups = 1 if group is None or group >= K else -(-K // group)
    steps = max(1, -(-K // 64))
    config, ns, _ = choose_config(
        M, N, K, sm, bits=bits, act_bits=8, groups=groups,
        groups_per_step=64 // group if groups > 1 and group is not None and group < 64 else 1,
        steps_per_group=steps if groups == 1 else max(1, (group or 0) // 64),
        group_bytes=128 * (64 // group if groups > 1 and group is not None and group < 64 else 1),
    )  # fmt: skip
    return [config[0], config[1], config[4]], ns


@cards
def test_every_choice_can_run(sm: int) -> None:
    for M in (1, 31, 32, 33, 64, 65, 128, 129, 4096, 100000):
        for N, K in ((1, 1), (64, 0), (4096, 4096), (500, 131072), (28672, 8192)):
            for bits, group in ((4, 32), (8, 64), (4, None), (8, None)):
                (path, tokens, splits), ns = choose(M, N, K, sm, bits, group)
                assert 0 < ns < 1e12
                assert path == GEMM or sm == 90
                one_group = group is None or group >= K
                assert tokens in ((32, 64, 128) if path == GEMM else (64, 128, 256) if one_group else (64, 128))
                assert 1 <= splits <= max(1, -(-K // 64) // 8)  # of eight steps at least


@cards
def test_time_grows_with_the_problem(sm: int) -> None:
    """By a fifth of a block's start at most it may fall: where a larger M is what makes the next tile worth it."""
    for bits, group in ((4, 128), (8, None)):
        for M in (16, 64, 256, 1024, 4096):
            assert choose(2 * M, 4096, 4096, sm, bits, group)[1] >= choose(M, 4096, 4096, sm, bits, group)[1] - 300
            assert choose(M, 8192, 4096, sm, bits, group)[1] >= choose(M, 4096, 4096, sm, bits, group)[1] - 300


@pytest.mark.parametrize("bits", [4, 8])
def test_hopper_takes_wgmma_for_many_tokens(bits: int) -> None:
    for M in (1024, 4096, 8192):
        assert choose(M, 8192, 8192, 90, bits)[0] == [SM90, 256, 1]
        assert choose(M, 8192, 8192, 90, bits, 128)[0] == [SM90, 128, 1]
    assert choose(1, 4096, 4096, 90, bits)[0][0] == GEMM


def test_few_blocks_are_split() -> None:
    for sm in CARDS:
        (_, _, splits), _ = choose(1, 4096, 8192, sm)
        assert splits > 1
        assert choose(4096, 4096, 4096, sm)[0][2] == 1
