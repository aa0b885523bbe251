"""Tuning of the Triton kernels: with a timer of our own, and as a whole with compiled PTX in the place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import tune
from benchmarks.kernels.tune import Config, Shape, candidates, shape_of
from qkernels import QuantScheme
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, UnsupportedProblem
from qkernels.kernels.triton import table

SCHEME = QuantScheme.parse("w4a16_g64")


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "triton.json"
    monkeypatch.setenv(table.USER_TABLE, str(path))
    return path


def likes(wanted: Callable[[Config], float]) -> tune.Timer:
    """A timer without a clock: tiles of 128 rows of the weight do not run."""

    def timer(_: Shape, configs: Sequence[Config]) -> tuple[dict[Config, float], dict[Config, str]]:
        runs = {config: wanted(config) for config in configs if config.block_n < 128}
        return runs, {config: "too much shared memory" for config in configs if config not in runs}

    return timer


def test_the_fastest_that_runs_is_taken_for_each_shape() -> None:
    said: list[str] = []
    timer = likes(lambda config: 1e-6 * (abs(config.block_n - 64) + abs(config.num_stages - 3) + 1))
    one, many = tune.tune([Shape(1, 64, 64), Shape(300, 64, 128)], timer, said.append)
    assert ((one.M, one.N, one.K), (many.M, many.N, many.K)) == ((1, 64, 64), (300, 64, 128))
    for entry in (one, many):
        assert (entry.config.block_n, entry.config.num_stages) == (64, 3)
    assert said[1].startswith("300x64x128: 1.0 us with Config(kernel='gemm'")
    assert "do not run: too much shared memory)" in said[1]


def test_of_equal_times_the_first_is_taken() -> None:
    configs = candidates(1)
    assert tune.fastest(dict.fromkeys(configs, 1.0)) == configs[0]
    assert tune.fastest(dict.fromkeys(configs, 1.0) | {configs[7]: 0.5}) == configs[7]


def test_where_nothing_runs_every_reason_is_told_once() -> None:
    with pytest.raises(UnsupportedProblem, match="no configuration runs 1x64x64: out of memory$"):
        tune.tune([Shape(1, 64, 64)], lambda _, configs: ({}, dict.fromkeys(configs, "out of memory")))


@pytest.mark.parametrize("M", [1, 8, 9, 16, 33, 64, 100, 2048])
def test_candidates_fit_the_number_of_tokens(M: int, own_table: Path) -> None:
    found = candidates(M)
    assert len(set(found)) == len(found) <= 100  # a second or two each to compile
    assert any(config.kernel == "gemv" for config in found) == (M <= 8)
    assert all(config.block_m <= max(16, 2 * M) for config in found)
    table.write(own_table, {"sm90": tuple(table.Entry(i + 1, 64, 64, config) for i, config in enumerate(found))})
    assert [entry.config for entry in table.read(own_table)["sm90"]] == list(found)  # all of them a table may hold


@pytest.mark.parametrize("text", ["1x2", "1x2x3x4", "0x64x64", "axbxc", "-1x64x64", ""])
def test_a_shape_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ArgumentError, match="a shape must be MxNxK"):
        shape_of(text)
    assert shape_of("1x4096X14336") == Shape(1, 4096, 14336)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(own_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ([], ["--device", "cpu"]):
        assert main(["bench", "--tune", "1x4096x4096", *device]) != 0
        said = capsys.readouterr().err
        assert "needs a CUDA device of compute capability 8.0 or later and Triton" in said
        assert "this torch sees no GPU" in said
    assert not own_table.exists()


def test_options_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tune", "1x64x64", "--save", "x.json"]) != 0
    assert "leave out --compare and --save" in capsys.readouterr().err


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "require_gpu", lambda device: None)
    monkeypatch.setattr(tune, "arch_of", lambda device: "sm90")


def test_the_winners_are_added_to_the_users_table(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    shipped = table.TABLE.read_bytes()
    kept = table.Entry(5, 6, 7, candidates(64)[0])
    table.write(own_table, {"sm80": (kept,), "sm90": (kept,)})
    monkeypatch.setattr(tune, "measured", lambda device, scheme, shape, configs: ({configs[3]: 1e-6}, {}))
    said: list[str] = []
    tune.run(torch.device("cpu"), [Shape(64, 4096, 4096)], SCHEME, said.append)
    won = candidates(64)[3]
    assert table.read(own_table) == {"sm80": (kept,), "sm90": (kept, table.Entry(64, 4096, 4096, won))}
    assert table.choose("sm90", 64, 4096, 4096) == won
    assert table.TABLE.read_bytes() == shipped
    assert said[-1] == f"written to {own_table}"


def test_a_table_that_is_none_is_told_before_anything_is_measured(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_gpu(monkeypatch)
    own_table.write_text("{}")
    monkeypatch.setattr(tune, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(ArgumentError, match="'cards' is missing"):
        tune.run(torch.device("cpu"), [Shape(1, 64, 64)], SCHEME)
    assert own_table.read_text() == "{}"


class Counting:
    """A clock that says how many copies of the weight it got, and calls each."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        for call in calls:
            assert call().shape == (3, 32)
        return lambda: float(len(calls))


def test_measuring_checks_the_output_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On compiled PTX in its interpreter: one kernel is right; the other is mutated, then refused."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime.errors import OutOfResources

    from qkernels.kernels.triton import jit
    from tests.triton.executed import Executed

    class Full:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise OutOfResources(200_000, 166_912, "shared memory")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "gemv", Executed(jit.gemv))
    monkeypatch.setattr(tune.environment, "cache_bytes", lambda device: 1 << 11)
    gemv, gemm = Config("gemv", 1, 16, 64, 0, 4, 2), Config("gemm", 16, 32, 64, 0, 4, 2)
    call = (torch.device("cpu"), QuantScheme.parse("w4a16_g64_asym"), Shape(3, 32, 64), (gemv, gemm), Counting())
    for kernel, why in (
        (Executed(jit.gemm, mutate=lambda ptx: ptx.replace(", 491520;", ", 229376;")), "its output does not match"),
        (Full(), "out of resource: shared memory, Required: 200000, Hardware limit: 166912"),
    ):
        monkeypatch.setattr(jit, "gemm", kernel)
        seconds, failed = tune.measured(*call)
        assert seconds == {gemv: 4.0}  # copies of 2.2 KB, which exceed a cache of 2 KiB four times
        assert failed.keys() == {gemm}
        assert why in failed[gemm]


@pytest.mark.gpu
def test_on_a_gpu(own_table: Path) -> None:
    tune.run(torch.device("cuda:0"), [Shape(1, 4096, 4096)], SCHEME)
    (entries,) = table.read(own_table).values()
    assert [(entry.M, entry.N, entry.K) for entry in entries] == [(1, 4096, 4096)]
