"""The method of the benchmark suite: intervals, verdicts, rotation, rounds, and that a wrong output gets no number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as full_set
from benchmarks.kernels import quick, roofs, shapes, weights
from benchmarks.kernels import sweep as kernels
from benchmarks.kernels.checking import checked_rows, mismatch
from benchmarks.method import environment, results, timing
from benchmarks.method.comparison import compare, to_markdown
from benchmarks.method.results import Row, Run
from benchmarks.method.statistics import median_interval, ratio_interval, verdict
from benchmarks.peers import CONTROL, PEERS, Peer, Prepared, torch_int4pack, torch_linear
from qkernels.errors import ArgumentError
from qkernels.kernels.catalogue import Problem
from qkernels.nn.huge_pages import HUGE_PAGE, begins_huge_page, on_huge_pages
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

CPU = torch.device("cpu")
LIMITS = roofs.Roofs(copy_gbs=10.0, read_gbs=20.0, matrix_tflops={"bfloat16": 1.0})
SCHEME = QuantScheme()
CASE = kernels.Case(shapes.Layer("test", "layer", 64, 256), (1, 5), SCHEME, torch.bfloat16)
PROBLEM = Problem(64, 256, SCHEME, torch.bfloat16)


def noisy(rng: random.Random, rounds: int, median: float, spread: float = 0.05) -> list[float]:
    """Times as a busy machine gives them: a skewed spread, and one round in ten takes half as long again."""
    return [median * (1 + spread * rng.expovariate(1)) * (1.5 if rng.random() < 0.1 else 1) for _ in range(rounds)]


# --- statistics ------------------------------------------------------------------------------------------------------------


def test_interval_of_a_median_covers_it() -> None:
    """99 % intervals of 15 samples: ranks 3 and 13 (1 - 2 * 121 / 2^15 = 99.26 %)."""
    assert median_interval([float(i) for i in range(1, 16)]) == median_interval([float(i) for i in range(15, 0, -1)])
    found = median_interval([float(i) for i in range(1, 16)])
    assert (found.low, found.median, found.high) == (3, 8, 13)
    rng = random.Random(0)
    missed = sum(
        not i.low <= 0 <= i.high for i in (median_interval([rng.gauss(0, 1) for _ in range(15)]) for _ in range(3000))
    )
    assert missed < 3000 * 0.0074 + 4 * (3000 * 0.0074) ** 0.5
    assert median_interval([3.0, 1.0]).low == 1.0  # too few for an interval: the range
    with pytest.raises(ValueError, match="at least one sample"):
        median_interval([])


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down threefold in the middle of a run changes no ratio."""
    slow = [1.0] * 8 + [3.0] * 8
    assert ratio_interval([2 * s for s in slow], slow) == median_interval([2.0] * 16)


def test_noise_is_not_flagged() -> None:
    rng = random.Random(1)
    words = [
        verdict(noisy(rng, 15, 100), noisy(rng, 15, 100), noisy(rng, 15, 700), noisy(rng, 15, 700)).word
        for _ in range(400)
    ]
    assert words.count("slower") + words.count("faster") <= 4  # 1 %
    assert words.count("same") + words.count("unclear") >= 396


def test_a_slower_kernel_is_flagged_and_a_slower_machine_is_not() -> None:
    rng = random.Random(2)
    slower, faster, machine = [], [], []
    for _ in range(50):
        control, again = noisy(rng, 25, 700), noisy(rng, 25, 700)
        slower.append(verdict(noisy(rng, 25, 100), noisy(rng, 25, 130), control, again).word)
        faster.append(verdict(noisy(rng, 25, 130), noisy(rng, 25, 100), control, again).word)
        machine.append(verdict(noisy(rng, 25, 100), noisy(rng, 25, 130), control, noisy(rng, 25, 910)))
    # 30 % under this noise: found nearly always, and never taken for its opposite or for nothing
    assert slower.count("slower") >= 45
    assert faster.count("faster") >= 45
    assert set(slower) <= {"slower", "unclear"}
    assert set(faster) <= {"faster", "unclear"}
    assert {v.word for v in machine} <= {"same", "unclear"}
    assert all("control moved by +" in v.why for v in machine)


def test_a_crowded_machine_is_no_slower_kernel() -> None:
    """Stalls of 8 ms hit a kernel of 0.2 ms far harder than a control of 1.5 ms: the ratio does not cancel them."""
    rng = random.Random(3)
    quiet = [noisy(rng, 15, us) for us in (200, 1500)]
    crowded = [[t + 8000 * (rng.random() < 0.8) for t in noisy(rng, 15, us)] for us in (200, 1500)]
    found = verdict(quiet[0], crowded[0], quiet[1], crowded[1])
    assert found.word == "unclear"
    assert "not the machine that it was" in found.why


def test_without_a_control_the_verdict_says_what_it_cannot_know() -> None:
    found = verdict([100.0] * 9, [130.0] * 9)
    assert found.word == "slower"
    assert "a change of the machine would look the same" in found.why


# --- shapes ----------------------------------------------------------------------------------------------------------------


def test_shapes_of_models() -> None:
    assert [(layer.name, layer.N, layer.K) for layer in shapes.layers_of("llama-3-8b")] == [
        ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336),
    ]  # fmt: skip
    whole, parts = shapes.layers_of("llama-3-70b"), shapes.layers_of("llama-3-70b", 8)
    assert all(8 * part.N * part.K == layer.N * layer.K for part, layer in zip(parts, whole, strict=True))
    assert parts[3].K == 28672 // 8
    assert parts[3].N == 8192
    assert "expert down" in {layer.name for layer in shapes.layers_of("mixtral-8x7b")}
    assert all(shapes.layers_of(*entry) for entry in shapes.FULL_SET)
    with pytest.raises(ArgumentError, match="shards must divide 32 heads, 8 key-value heads"):
        shapes.layers_of("llama-3-8b", 3)
    with pytest.raises(ArgumentError, match="model must be one of llama-3-8b, .*, got 'gpt-2'"):
        shapes.layers_of("gpt-2")


def test_the_full_set_has_every_model_and_both_ends_of_m() -> None:
    cases = quick.full_cases(torch.device("cuda"))
    assert {case.layer.model for case in cases} >= {"llama-3-8b", "llama-3-70b-tp8", "qwen3-32b", "mixtral-8x7b"}
    assert cases[0].tokens[0] == 1
    assert cases[0].tokens[-1] == 8192
    assert {case.scheme.act for case in cases} == {None, "int8"}
    on_a_cpu = quick.full_cases(CPU)
    assert len(on_a_cpu) < len(cases) / 2
    assert len(quick.full_cases(CPU, models=("llama-3-70b",))) == 3 * 4 * len(quick.FULL_SCHEMES)  # 1, 2 and 8 shards


def test_a_stopped_full_set_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second of three cases: the file has the first, the next run measures the other two, a third one nothing."""
    cases = [replace(CASE, layer=shapes.Layer("test", name, 64, 256)) for name in "abc"]
    taken: list[str] = []

    def run_cases(cases, device, rounds, seconds, progress):  # type: ignore[no-untyped-def]
        rows: list[Row] = []
        for case in cases:
            if case.layer.name == "b" and not taken.count("b"):
                taken.append("b")
                raise KeyboardInterrupt
            taken.append(case.layer.name)
            blank = Row("test", case.layer.name, 64, 256, 1, str(case.scheme), "bfloat16", "qkernels k", True, us=1.0)
            rows += [replace(blank, M=M) for M in case.tokens]
            now = Run(environment.describe(CPU), LIMITS.to_json(), list(rows), {"peer": "not installed"})
            progress(now)
        return now

    monkeypatch.setattr(full_set, "full_cases", lambda *_, **__: cases)
    monkeypatch.setattr(full_set, "run_cases", run_cases)
    out = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        full_set.main(["--out", str(out)])
    assert [row.layer for row in results.read(out).rows] == ["a", "a"]
    full_set.main(["--out", str(out)])
    full_set.main(["--out", str(out)])
    assert taken == ["a", "b", "b", "c"]
    assert [row.layer for row in results.read(out).rows] == ["a", "a", "b", "b", "c", "c"]
    monkeypatch.setattr(environment, "commit", lambda: "0123456789ab")
    full_set.main(["--out", str(out)])
    assert taken[4:] == ["a", "b", "c"]


# --- timing ----------------------------------------------------------------------------------------------------------------


def test_weights_rotate_over_four_caches() -> None:
    assert timing.copies_needed(8 << 20, 32 << 20, 1 << 40) == 16
    assert timing.copies_needed(1 << 30, 32 << 20, 1 << 40) == 2  # even a large weight is not met twice in a row
    assert timing.copies_needed(8 << 20, 32 << 20, 40 << 20) == 5  # never more than memory allows
    used: list[int] = []
    sample = timing.WallClock(sample_seconds=0.0).prepare([lambda i=i: used.append(i) for i in range(3)])  # type: ignore[misc]
    used.clear()
    for _ in range(7):
        sample()
    assert used == [0, 1, 2, 0, 1, 2, 0]


def test_memory_is_read_from_a_buffer_far_beyond_the_caches() -> None:
    """Four reported caches are no memory: a virtual machine's cores may lie on chiplets with a cache each."""
    assert roofs.buffer_bytes(32 << 20, 16 << 30) == 1 << 30
    assert roofs.buffer_bytes(256 << 20, 64 << 30) == 4 << 30
    assert roofs.buffer_bytes(32 << 20, 1 << 30) == 256 << 20  # a small machine
    read: list[tuple[int, int]] = []

    class Noted:
        def prepare(self, calls):  # type: ignore[no-untyped-def]
            read.extend((call.__self__.data_ptr(), call.__self__.nbytes) for call in calls)
            return lambda: 0.25

    available = 64 << 20  # of the buffer: a quarter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "available_bytes", lambda device: available)
        sample = roofs.read_sampler(CPU, 1 << 20, Noted())
    assert [b - a for (a, _), (b, _) in pairwise(read)] == [nbytes for _, nbytes in read[:-1]]  # each byte once
    assert sum(nbytes for _, nbytes in read) == available // 4
    assert sample() == pytest.approx(0.25 / (available // 4 / roofs.PIECES))


def test_the_share_of_the_memory_is_taken_within_rounds() -> None:
    """Memory that halves its rate for the last 6 of 16 rounds, and a kernel at 80 % of it: the share stays 80 %."""
    moved = 64 * 256 * 2 + (64 + 256) * 2

    def nanoseconds_a_byte() -> Iterator[float]:
        return iter([1.0] * 10 + [2.0] * 6)

    class Bound:
        def prepare(self, calls):  # type: ignore[no-untyped-def]
            rate = nanoseconds_a_byte()
            return lambda: next(rate) * 1e-9 * moved / 0.8

    memory = nanoseconds_a_byte()
    who = [c for c in kernels.candidates(PROBLEM, CPU, [torch_linear.PEER]) if not c.ours]
    (row,) = kernels.measure_case(
        replace(CASE, tokens=(1,)), CPU, LIMITS, who, rounds=16, clock=Bound(), cache=1 << 16,
        read=lambda: next(memory) * 1e-9,
    )  # fmt: skip
    assert row.read_percent == pytest.approx([80, 80, 80])
    assert row.us_high == pytest.approx(2 * row.us)  # type: ignore[operator]  # what an unpaired share would rest on


def test_a_last_level_cache_in_every_chiplet_counts(tmp_path: Path) -> None:
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "48K", cpu),
                (1, "Instruction", "32K", cpu),
                (2, "Unified", "1M", cpu),
                (3, "Unified", "32M", cpu // 2),
            ]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)]:
                (folder / name).write_text(f"{value}\n")
    assert environment.cpu_caches(tmp_path) == {"L1d": 48 << 10, "L2": 1 << 20, "L3": 64 << 20}
    assert environment.cpu_caches(tmp_path / "cpu0") == {}


def test_copies_share_no_memory() -> None:
    original = {"a": torch.zeros(3), "b": (torch.ones(2), None)}
    copied = timing.copy_tensors(original)
    copied["a"].fill_(7)
    assert original["a"].sum() == 0
    assert copied["b"][0].data_ptr() != original["b"][0].data_ptr()


def test_copies_lie_on_pages_of_the_same_size() -> None:
    plain = torch.zeros(HUGE_PAGE, dtype=torch.uint8)
    assert not begins_huge_page(timing.copy_tensors(plain))
    assert begins_huge_page(timing.copy_tensors(on_huge_pages(plain)))


def test_rounds_are_interleaved_and_turn() -> None:
    order: list[str] = []
    samplers = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}  # type: ignore[misc, func-returns-value]
    samples = timing.interleaved(samplers, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_deadline_leaves_enough_rounds_for_an_interval() -> None:
    clock = iter(range(1000))
    assert len(timing.interleaved({"a": lambda: 1.0}, 100, deadline=-1, now=lambda: next(clock))["a"]) == 8


# --- outputs are compared first --------------------------------------------------------------------------------------------


def test_a_right_output_matches_and_small_errors_do_not_pass() -> None:
    weight = weights.random_weight(64, 512, SCHEME, torch.bfloat16).dequantize(torch.float32)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    y = (x.double() @ weight.double().T).bfloat16()
    assert mismatch(y, x, weight) is None
    swapped = y.clone()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    assert "does not match" in str(mismatch(swapped, x, weight))
    assert "does not match" in str(mismatch(y * 1.1, x, weight))
    assert "NaN" in str(mismatch(y.clone().fill_(float("nan")), x, weight))
    assert "expected [9, 64]" in str(mismatch(y.T, x, weight))
    one = mismatch((y * 3)[:1, :1], x[:1], weight[:1])  # a single entry, where a standard deviation would be NaN
    assert one is not None


def test_the_bound_for_int8_activations_tells_wrong_from_quantized() -> None:
    """What our kernels and the coarsest peer make of x passes; a wrong row, a scale off by a tenth and 4-bit codes do not."""
    weight = weights.random_weight(256, 512, SCHEME, torch.bfloat16).dequantize(torch.float32)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(3)).bfloat16()

    def product(largest: Tensor, steps: int) -> Tensor:
        codes = (x.double() / largest * steps).round()
        return (codes * largest / steps @ weight.double().T).bfloat16()

    by_row, whole = x.double().abs().amax(1, keepdim=True), x.double().abs().max()
    assert mismatch(product(by_row, 127), x, weight, 8) is None
    assert mismatch(product(whole, 64), x, weight, 8) is None  # per tensor, one bit in reserve
    for wrong in (product(by_row, 127).roll(1, 1), product(by_row, 127) * 1.1, product(by_row, 7)):
        assert "does not match" in str(mismatch(wrong, x, weight, 8))


def test_rows_at_both_ends_are_compared() -> None:
    rows = checked_rows(8192).tolist()
    assert rows[:16] == list(range(16))
    assert rows[-16:] == list(range(8176, 8192))
    assert checked_rows(5).tolist() == [0, 1, 2, 3, 4]


def _peer(name: str, run) -> Peer:  # type: ignore[no-untyped-def]
    def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
        return Prepared(weight.dequantize(dtype), run, 1000)

    return Peer(name, lambda device: None, lambda problem: None, prepare)


def _raises(w: Tensor, x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nand more lines")


def test_no_match_no_number() -> None:
    peers = [
        torch_linear.PEER,
        _peer("wrong", lambda w, x: x @ w.T * 1.25),
        _peer("transposed scales", lambda w, x: x @ w.roll(1, 0).T),
        _peer("broken", _raises),
        replace(torch_linear.PEER, name="absent", available=lambda device: "not installed (pip install absent)"),
    ]
    who = kernels.candidates(PROBLEM, CPU, peers)
    rows = kernels.measure_case(CASE, CPU, LIMITS, who, rounds=8, clock=timing.WallClock(1e-5), cache=1 << 16)
    found = {(row.M, row.candidate): row for row in rows}
    for M in CASE.tokens:
        assert found[M, "torch linear"].us is not None
        for name, reason in [
            ("wrong", "does not match"), ("transposed scales", "does not match"),
            ("broken", "RuntimeError: no kernel image is available"), ("absent", "pip install absent"),
        ]:  # fmt: skip
            row = found[M, name]
            assert row.us is None
            assert row.samples_us == []
            assert reason in str(row.reason)
    mine = [row for row in rows if row.ours and row.us is not None]
    assert all(set(row.ratios) == {"torch linear"} for row in mine)
    assert kernels.absent_peers(rows).keys() >= {"wrong", "broken", "absent"}


def test_a_row_is_plain_arithmetic() -> None:
    def clock_of_2_us(calls):  # type: ignore[no-untyped-def]
        return lambda: 2e-6

    clock = timing.WallClock()
    object.__setattr__(clock, "prepare", clock_of_2_us)
    who = kernels.candidates(PROBLEM, CPU, [torch_linear.PEER])
    row = kernels.measure_case(CASE, CPU, LIMITS, who, rounds=8, clock=clock, cache=1 << 16)[-1]
    moved = 64 * 256 * 2 + 5 * (64 + 256) * 2
    assert row.gbs == pytest.approx(moved / 2e-6 / 1e9)
    assert row.tflops == pytest.approx(2 * 5 * 64 * 256 / 2e-6 / 1e12)
    assert row.roof_percent == pytest.approx(100 * moved / 20e9 / 2e-6)  # bandwidth is the lower roof here
    assert row.cold_bytes >= 4 << 16


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g32", "w4a16_g128_asym", "w8a16_channel"])
def test_what_torch_has_matches_and_so_do_we(scheme: str) -> None:
    """Every adapter of torch's own kernels that takes a scheme computes the right thing."""
    case = replace(CASE, scheme=QuantScheme.parse(scheme), layer=shapes.Layer("t", "l", 64, 512))
    problem = Problem(64, 512, case.scheme, case.dtype)
    who = [c for c in kernels.candidates(problem, CPU) if c.reason is None and (c.ours or c.name.startswith("torch "))]
    rows = kernels.measure_case(case, CPU, LIMITS, who, rounds=8, clock=timing.WallClock(1e-5), cache=1 << 16)
    assert {row.candidate: row.reason for row in rows if row.us is None} == {}
    expected = "torch int8pack" if scheme.startswith("w8") else "torch int4pack"
    assert expected in {row.candidate for row in rows if row.us is not None} or "asym" in scheme


def test_every_peer_answers_without_being_installed() -> None:
    for peer in PEERS:
        for device in (CPU, torch.device("cuda")):
            reason = peer.why_not(replace(PROBLEM, arch="cpu" if device.type == "cpu" else "sm90"), device)
            assert reason is None or len(reason) > 5
    assert (
        torch_int4pack.PEER.reason(replace(PROBLEM, dtype=torch.float16))
        == "takes bfloat16 activations, got torch.float16"
    )
    assert CONTROL in {peer.name for peer in PEERS}


# --- comparison over time --------------------------------------------------------------------------------------------------


def _run(ours_us: float, control_us: float, seed: int) -> Run:
    rng = random.Random(seed)
    row = Row(
        "m", "l", 64, 256, 1, "w4a16_g128", "bfloat16", "qkernels k", True, us=1.0, samples_us=noisy(rng, 20, ours_us)
    )
    control = replace(row, candidate=CONTROL, ours=False, samples_us=noisy(rng, 20, control_us))
    return Run({"machine": "here", "torch": "2", "threads": 2, "isa": "avx2"}, LIMITS.to_json(), [row, control])


def test_compare_flags_a_slowed_down_kernel_and_not_noise() -> None:
    assert [row.candidate for row in compare(_run(100, 700, 0), _run(140, 700, 1)).slower] == ["qkernels k"]
    assert compare(_run(100, 700, 0), _run(100, 700, 1)).slower == []
    assert compare(_run(100, 700, 0), _run(140, 980, 1)).slower == []
    assert "**slower**" in to_markdown(compare(_run(100, 700, 0), _run(140, 700, 1)))


def test_compare_names_what_differs_and_what_is_gone() -> None:
    old, new = _run(100, 700, 0), _run(100, 700, 1)
    gone = replace(new, rows=[replace(new.rows[0], M=2), new.rows[1]], environment={**new.environment, "threads": 8})
    shown = to_markdown(compare(old, gone))
    assert "threads: 2 then, 8 now" in shown
    assert "no longer measured: m l M=1" in shown
    assert "new: m l M=2" in shown


def test_a_slowed_down_kernel_is_flagged_end_to_end() -> None:
    """Measured twice through `measure_case`, on a clock that only the candidates move: a busy machine cannot interfere."""
    now = [0.0]
    rng = random.Random(4)

    class Virtual:
        def prepare(self, calls):  # type: ignore[no-untyped-def]
            def sample() -> float:
                begin = now[0]
                for call in calls:
                    call()
                return (now[0] - begin) / len(calls)

            return sample

    def taking(seconds: float):  # type: ignore[no-untyped-def]
        def run(w: Tensor, x: Tensor) -> Tensor:
            now[0] += seconds * (1 + 0.05 * rng.expovariate(1))
            return x @ w.T

        return run

    def run(seconds: float) -> Run:
        prepare = _peer("", taking(seconds)).prepare
        who = [
            kernels.Candidate("qkernels k", True, lambda weight: prepare(weight, torch.bfloat16, CPU)),
            *[c for c in kernels.candidates(PROBLEM, CPU, [_peer(CONTROL, taking(7e-4))]) if not c.ours],
        ]
        rows = kernels.measure_case(
            replace(CASE, tokens=(1,)), CPU, LIMITS, who, rounds=15, clock=Virtual(), cache=1 << 16
        )
        return Run({}, LIMITS.to_json(), rows)

    before = run(1e-4)
    assert len(compare(before, run(1.2e-4)).slower) == 1
    assert compare(before, run(1e-4)).slower == []
