"""The choice of a kernel: every choice can run, says what it is, and follows the crossovers that it claims."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.cuda import calls, emulator

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
CARDS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KB that one block may have
cards = pytest.mark.parametrize("sm", CARDS)


def choose(M: int, N: int, K: int, sm: int, **more: int) -> tuple[list[int], float, str]:
    """Config's fields, predicted nanoseconds, both values printed."""
    config, ns, text = (
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(512, dtype=torch.uint8),
    )
    problem = {
        "M": M, "N": N, "K": K, "bits": 4, "group_bytes": 128, "half": 0, "aligned": 1, "sm": sm, "multiprocessors": CARDS[sm],
        "half_accumulate": 0, "decode_only": 0, **more,
    }  # fmt: skip
    emulator.run(calls.UNIT, emulator.Call("choose", {"config": config, "ns": ns, "text": text}, problem))
    return config.tolist(), float(ns), bytes(text.tolist()).split(b"\0")[0].decode()


def shared_bytes(M: int, K: int, config: list[int], bits: int, group_bytes: int) -> int:
    path, tokens, warps_n, warps_k, splits, _ = config
    stage = (2048 if bits <= 4 else 4096) + group_bytes
    if path == 0:
        steps = -(-K // 64)
        return -(-steps // splits) * M * 128 + warps_n * warps_k * max(4 * stage, tokens * 68 * 4)
    if path == 3:
        return 1024 + 6 * (-(-(tokens * 128 + 2 * stage) // 1024) * 1024 + 16)
    strips = 4 if tokens == 32 else 2
    return (4 if bits <= 4 else 3) * (-(-strips * stage // 128) * 128 + tokens * 128)


@cards
def test_every_choice_can_run(sm: int) -> None:
    for M in (1, 8, 9, 16, 17, 32, 33, 100, 128, 1000, 8192):
        for N, K in ((1, 1), (64, 0), (4096, 4096), (8192, 28672), (500, 200000)):
            for bits, group_bytes in ((4, 128), (8, 64 * 4 * 8)):
                config, ns, text = choose(M, N, K, sm, bits=bits, group_bytes=group_bytes)
                path, tokens, warps_n, warps_k, splits, _ = config
                assert 0 < ns < 1e12, text
                if path == 2:
                    assert M > 32
                    continue
                assert shared_bytes(M, K, config, bits, group_bytes) <= SHARED[sm] * 1024, text
                assert 1 <= splits <= 64
                assert tokens >= min(M, 32)
                assert (
                    path == 1
                    or (path == 3 and sm == 90 and M > 32)
                    or (warps_n * warps_k in (4, 8, 16) and tokens >= M)
                )


@cards
def test_decode_keeps_enough_bytes_on_their_way(sm: int) -> None:
    """Bandwidth times latency (1 us) is 36 KB a multiprocessor on an H200, 19 KB on an A100, 8 to 11 KB on RTX cards; twice
    that on Hopper, so that it does not depend on a guess of the latency. Except for 8 tokens there: x takes 128 KB of shared
    memory where K is 8192 and not split, which leaves room for 8 warps, and the model prefers 51 KB to a second launch."""
    needs = {80: 19, 86: 11, 89: 8, 90: 64, 120: 11}
    limit = {80: 164, 86: 100, 89: 100, 90: 228, 120: 100}[sm] * 1024
    for (N, K), bits in itertools.product([(8192, 8192), (28672, 8192), (8192, 28672)], (4, 8)):
        for M in (1, 4, 8):
            config, _, text = choose(M, N, K, sm, bits=bits)
            _, tokens, warps_n, warps_k, splits, _ = config
            warps, stage = warps_n * warps_k, (2048 if bits == 4 else 4096) + 128
            shared = shared_bytes(M, K, config, bits, 128) + 1024
            blocks = math.ceil(N / 64 / warps_n) * splits
            resident = min(limit // shared, 65536 // (128 * 32 * warps), -(-blocks // CARDS[sm]))
            assert tokens == 8
            need = 50 if (sm, M, K) == (90, 8, 8192) else needs[sm]
            assert resident * warps * 3 * stage >= need * 1024, text


@cards
def test_paths_by_tokens(sm: int) -> None:
    assert choose(1, 8192, 8192, sm)[0][0] == 0
    assert choose(16, 8192, 8192, sm)[0][0] == 0
    assert choose(64, 8192, 8192, sm)[0][0] == (3 if sm == 90 else 1)
    assert choose(8192, 8192, 8192, sm)[0][0] == 2
    assert choose(32, 8192, 8192, sm, decode_only=1)[0][0] == 0


def test_fp16_accumulation_only_where_it_is_allowed() -> None:
    assert choose(128, 8192, 8192, 89, half=1, half_accumulate=1)[0][5] == 1
    assert choose(128, 8192, 8192, 89, half=1)[0][5] == 0
    assert choose(128, 8192, 8192, 89, half_accumulate=1)[0][5] == 0
    assert choose(128, 8192, 8192, 89, half=1, half_accumulate=1, bits=8)[0][5] == 0


def test_values_print_themselves() -> None:
    text = choose(1, 8192, 8192, 90)[2]
    assert text.startswith("M=1 N=8192 K=8192, 4 bit, bfloat16, sm90 with 132 multiprocessors: decode, 8 tokens, ")
    assert choose(4096, 64, 64, 90, aligned=0)[2].count("x is copied or gathered") == 1


def test_the_log_says_what_the_model_says() -> None:
    from tests.cuda import kernel_log

    text = kernel_log.LOG.read_text()
    assert kernel_log.with_tables(text) == text, "run `python -m tests.cuda.kernel_log`"
