"""The choice of a kernel: every choice can run, says what it is, and follows the crossovers that it claims."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

import pytest
import torch

from benchmarks.kernels.shapes import FULL_SET, layers_of
from tests.cuda import calls, emulator
from tests.cuda.cards import CARDS, SHARED

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
cards = pytest.mark.parametrize("sm", CARDS)
# 4-bit codes in groups of 128 with 16-bit scales.
PROBLEM = {
    "bits": 4, "act_bits": 16, "group_bytes": 128, "half": 0, "aligned": 1, "groups_per_step": 1, "steps_per_group": 2,
    "groups": 32, "float_zeros": 0, "half_accumulate": 0, "decode_only": 0,
}  # fmt: skip


def choose(M: int, N: int, K: int, sm: int, **more: int) -> tuple[list[int], float, str]:
    """Config's fields, predicted nanoseconds, both values printed."""
    config, ns, text = (
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(512, dtype=torch.uint8),
    )
    problem = {**PROBLEM, "M": M, "N": N, "K": K, "sm": sm, "multiprocessors": CARDS[sm], **more}
    emulator.run(calls.UNIT, emulator.Call("choose", {"config": config, "ns": ns, "text": text}, problem))
    return config.tolist(), float(ns), bytes(text.tolist()).split(b"\0")[0].decode()


def predict(M: int, N: int, K: int, sm: int, config: list[int], **more: int) -> float:
    """Predicted nanoseconds of a given configuration, 4 bit."""
    ns = torch.zeros(1, dtype=torch.float64)
    problem = {**PROBLEM, "M": M, "N": N, "K": K, "sm": sm, "multiprocessors": CARDS[sm], **more}
    fields = dict(zip(("path", "tokens", "warps_n", "warps_k", "splits", "half_accumulate"), config))
    emulator.run(calls.UNIT, emulator.Call("predict", {"ns": ns}, {**problem, **fields}))
    return float(ns)


def wgmma_ring(tokens: int, stage: int) -> tuple[int, int]:
    """Stages and bytes of each: as many as fit, 16 at most; two blocks of the small tiles share a multiprocessor."""
    one = -(-(tokens * 128 + (1 if tokens <= 32 else 2) * stage) // 1024) * 1024
    room = 228 * 1024 // (2 if tokens <= 32 else 1) - 1024
    return min(16, (room - 1024) // (one + 16)), one


def shared_bytes(M: int, K: int, config: list[int], bits: int, group_bytes: int) -> int:
    path, tokens, warps_n, warps_k, splits, _ = config
    stage = (2048 if bits <= 4 else 4096) + group_bytes
    if path == 0:
        steps = -(-K // 64)
        stages = 5 if tokens == 32 and bits <= 4 else 4
        return -(-steps // splits) * M * 128 + warps_n * warps_k * max(stages * stage, tokens * 68 * 4)
    if path == 3:
        stages, one = wgmma_ring(tokens, stage)
        return 1024 + max(stages * (one + 16), (1 if tokens <= 32 else 2) * tokens * 68 * 4)
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
                    or (path == 3 and sm == 90 and M > 32 and wgmma_ring(tokens, 2048 if bits == 4 else 4096)[0] >= 4)
                    or (warps_n * warps_k in (4, 8, 16) and tokens >= M)
                )


@dataclass(frozen=True)
class OnTheWay:
    """Bytes that a busy multiprocessor waits for, how many multiprocessors are busy, and an even share of the weight."""

    bytes: float
    busy: int
    share: float


def on_the_way(M: int, N: int, K: int, sm: int, config: list[int], bits: int) -> OnTheWay:
    """Groups of 128 with 16-bit scales; from the kernels' text, not from the heuristics'."""
    path, tokens, warps_n, warps_k, splits, _ = config
    stage, strips, steps = (2048 if bits <= 4 else 4096) + 128, -(-N // 64), -(-K // 64)
    limit = SHARED[sm] * 1024 + 1024  # of a multiprocessor; each block takes 1 KB more than it asks for
    shared = shared_bytes(M, K, config, bits, 128) + 1024
    block_steps = -(-steps // splits)
    if path == 0:
        warps, registers = warps_n * warps_k, 128 if tokens <= 16 else 200
        ahead = min(4 if tokens == 32 and bits <= 4 else 3, -(-block_steps // warps_k))
        blocks, one = -(-strips // warps_n) * splits, warps * ahead * stage
    else:
        assert path == 1
        warps, registers = (8 if tokens == 128 else 4), 200
        block_strips = 4 if tokens == 32 else 2
        blocks = -(-strips // block_strips) * splits * -(-M // tokens)
        one = (3 if bits <= 4 else 2) * (block_strips * stage + tokens * 128)
    resident = min(limit // shared, 65536 // (registers * 32 * warps), -(-blocks // CARDS[sm]))
    return OnTheWay(resident * one, min(blocks, CARDS[sm]), strips * steps * stage / CARDS[sm])


@cards
def test_decode_keeps_enough_bytes_on_their_way(sm: int) -> None:
    """Bandwidth times latency (1 us) is 36 KB a multiprocessor on an H200, 19 KB on an A100, 8 to 11 KB on RTX cards; on Hopper
    64 KB, so that it does not depend on a guess of the latency. For every linear layer of the benchmarks; a layer that has less
    for each multiprocessor has all of it on its way."""
    needs = {80: 19, 86: 11, 89: 7.5, 90: 64, 120: 10}[sm] * 1024
    shapes = {(layer.N, layer.K) for model, shards in FULL_SET for layer in layers_of(model, shards)} | {(8192, 8192)}
    assert len(shapes) > 20
    for (N, K), bits, M in itertools.product(sorted(shapes), (4, 8), (*range(1, 9), 16, 32)):
        if M == 32 and sm in (86, 89, 120):  # x takes most of what an RTX card has; test_every_choice_can_run covers it
            continue
        config, _, text = choose(M, N, K, sm, bits=bits)
        found = on_the_way(M, N, K, sm, config, bits)
        assert found.bytes >= min(needs, found.share), (text, found)


def test_too_few_bytes_would_be_seen() -> None:
    """What was chosen before the choice asked for 64 KB: x of 8 tokens leaves room for 8 warps where K is not split."""
    found = on_the_way(8, 8192, 8192, 90, [0, 8, 1, 8, 1, 0], 4)
    assert found.bytes == 8 * 3 * 2176 < 64 * 1024 < found.share


def test_few_strips_and_waves() -> None:
    """4096 x 4096 has 64 strips for 132 multiprocessors. For one token half of them keep 104 KB each under way, which the model
    takes for as good as a split of K over 128 that pays a second launch; without that launch (2 us) the split would win. From 16
    tokens on, x is too large for that, and K is split until nearly all multiprocessors work."""
    config, ns, text = choose(1, 4096, 4096, 90)
    found = on_the_way(1, 4096, 4096, 90, config, 4)
    assert config == [0, 8, 1, 16, 1, 0], text
    assert found == OnTheWay(16 * 3 * 2176, 64, 64 * 64 * 2176 / 132)
    split = predict(1, 4096, 4096, 90, [0, 8, 1, 16, 2, 0])
    assert split - 2000 < ns < split
    for M in (16, 32):
        config, _, text = choose(M, 4096, 4096, 90)
        assert on_the_way(M, 4096, 4096, 90, config, 4).busy >= 120, text


@cards
def test_paths_by_tokens(sm: int) -> None:
    assert choose(1, 8192, 8192, sm)[0][0] == 0
    assert choose(16, 8192, 8192, sm)[0][0] == 0
    assert choose(64, 8192, 8192, sm)[0][0] == (3 if sm == 90 else 1)
    assert choose(8192, 8192, 8192, sm)[0][0] == 2
    assert choose(32, 8192, 8192, sm, decode_only=1)[0][0] == 0


def test_every_tile_of_gemm_sm90_is_chosen_somewhere() -> None:
    """64 x 16 and 64 x 32 where K is short, so that a split would cost more than it brings; 128 x 256 where M fills it."""
    problems = {
        16: (40, 5120, 512),
        32: (64, 4096, 1024),
        64: (64, 8192, 8192),
        128: (96, 14336, 4096),
        256: (512, 8192, 8192),
    }
    for tokens, (M, N, K) in problems.items():
        config, _, text = choose(M, N, K, 90)
        assert config[:2] == [3, tokens], text


@pytest.mark.parametrize(
    "kind",
    [{"groups_per_step": 4, "steps_per_group": 1, "group_bytes": 512}, {"float_zeros": 1, "group_bytes": 256}],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_short_groups_and_float_zeros_go_where_the_prediction_says(bits: int, kind: dict[str, int]) -> None:
    """From 33 to 256 tokens to gemm_sm90, which scales fragments for them, though more instructions move the choice of the tile;
    and no tile of gemm_sm80 is predicted to be faster."""
    for M in (48, 64, 128, 256):
        config, ns, text = choose(M, 8192, 8192, 90, bits=bits, **kind)
        assert config[0] == 3, text
        others = [[1, tokens, 0, 0, splits, 0] for tokens in (32, 64, 128) for splits in (1, 2, 3, 4, 6, 8)]
        assert ns < min(predict(M, 8192, 8192, 90, other, bits=bits, **kind) for other in others), text
    assert choose(16, 8192, 8192, 90, bits=bits, **kind)[0][0] == 0
    plain = predict(64, 8192, 8192, 90, [3, 64, 0, 0, 2, 0], bits=bits)
    assert predict(64, 8192, 8192, 90, [3, 64, 0, 0, 2, 0], bits=bits, **kind) > 1.1 * plain


@pytest.mark.parametrize("capacity", [31, 32])
def test_clusters_are_counted_as_the_device_has_room_for_them(capacity: int) -> None:
    """4096 x 4096 for 33 to 64 tokens in clusters of four is 32 clusters of 128 blocks. A board that holds 31 would run the last
    one by itself, as long as all the others together; so there another way is chosen, whose blocks fit."""
    of_four = [3, 64, 0, 0, 4, 0]
    active = {"active_1_2": 66, "active_1_3": 42, "active_1_4": capacity, "active_1_8": 16}
    at_once = predict(64, 4096, 4096, 90, of_four, active_1_4=32)
    config, ns, text = choose(64, 4096, 4096, 90, **active)
    assert ns <= predict(64, 4096, 4096, 90, of_four, **active)
    if capacity == 32:
        assert config == of_four, text
        assert ns == at_once
    else:
        assert config != of_four, text
        assert predict(64, 4096, 4096, 90, of_four, **active) > at_once + 2000  # a second wave, and its start
        assert at_once < ns < at_once + 2000


def test_the_model_has_the_counts_of_the_guard() -> None:
    """kDecodeRounds: [4 bit, 8 bit][groups of 64 and more, of 32, of 16][8, 16, 32 tokens][16-bit scales, integer zeros, any]."""
    text = (emulator.CUDA / "heuristics.h").read_text().split("kDecodeRounds[2][3][3][3] =")[1].split(";")[0]
    rounds = [int(number) for number in re.findall(r"\d+", text)]
    assert len(rounds) == 54
    counted = json.loads((emulator.ROOT / "tools" / "guard.json").read_text())["cuda"]["figures"][
        "cuda instructions a round"
    ]
    places = {
        "decode w4 g128": (0, 0, 0, 0), "decode w4 g128, integer zeros": (0, 0, 0, 1),
        "decode w4 g128, float zeros": (0, 0, 0, 2), "decode w4 g128, 16 tokens": (0, 0, 1, 0),
        "decode w4 g128, 32 tokens": (0, 0, 2, 0), "decode w4 g32": (0, 1, 0, 0),
        "decode w4 g16": (0, 2, 0, 0), "decode w8 g128": (1, 0, 0, 0),
    }  # fmt: skip
    coded = {"decode nf4 g64": (0, 0), "decode mxfp4 g32": (1, 1), "decode fp8 channel": (2, 0)}
    planes = {
        "decode w3 g64": (0, 0), "decode w3 g16": (0, 1), "decode q4_k": (1, 1), "decode w6 g64": (2, 0), "decode w6 g16": (2, 1),
    }  # fmt: skip
    assert {*places, *coded, *planes} == {name for name in counted if name.startswith("decode")}
    text = (emulator.CUDA / "heuristics.h").read_text().split("kCodedRounds[3][2][2] =")[1].split(";")[0]
    of_codebooks = [
        int(number) for number in re.findall(r"\d+", text)
    ]  # [coding][groups of 64 and more, shorter][8, 32 tokens]
    for name, (coding, short) in coded.items():
        assert of_codebooks[(coding * 2 + short) * 2] == counted[name], name
    text = (emulator.CUDA / "heuristics.h").read_text().split("kPlanesRounds[3][2] =")[1].split(";")[0]
    of_planes = [int(number) for number in re.findall(r"\d+", text)]
    for name, (width, short) in planes.items():
        assert of_planes[width * 2 + short] == counted[name], name
    for name, (bits, groups, tokens, kind) in places.items():
        assert rounds[((bits * 3 + groups) * 3 + tokens) * 3 + kind] == counted[name], name


def test_every_number_of_a_card_has_a_source() -> None:
    text = (emulator.CUDA / "card.h").read_text()
    numbers = re.findall(r"\{[-0-9.e *\/]+, (\w+|\"[^\"]+\")\}", text)
    named = {"kSheet", "kSass", "kGuess", "kClusters", "kMeasured"}
    assert len(numbers) > 50
    assert {source for source in numbers if not source.startswith('"')} == named
    assert all(re.search("sheet|guess", source) for source in numbers if source.startswith('"'))


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
