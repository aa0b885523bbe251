"""The guard: figures of the compiled kernels have not risen, and it knows when they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import guard, guard_cuda, guard_triton


@pytest.mark.slow
def test_instruction_counts_and_compiler_figures_have_not_risen(tmp_path: Path) -> None:
    if lacking := guard.missing():
        pytest.skip(f"SKIPPED: no {', no '.join(lacking)}")
    if "avx2" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        pytest.skip("SKIPPED: this CPU has no AVX2")
    figures = guard.measure(tmp_path)
    assert guard.regressions(guard.committed(), figures, guard.compiler()) == []
    # Negative control: the scalar code in place of the AVX2 code is over even the widest bound.
    count = guard.instructions(tmp_path / "counted", guard.CASES["decode 4-bit"], tmp_path, isa="scalar")
    slow = {**figures, "instructions per weight": {**figures["instructions per weight"], "decode 4-bit": count}}
    assert len(guard.regressions(guard.committed(), slow, "another compiler")) == 1


def test_the_guard_knows_compilers_and_lost_figures() -> None:
    committed = {"compiler": "g++ 12", "figures": {"instructions per weight": {"a": 1.0}, "spills": {"avx2": 100.0}}}
    fine = {"instructions per weight": {"a": 1.02}, "spills": {"avx2": 100.0}}
    assert guard.regressions(committed, fine, "g++ 12") == []
    assert guard.regressions(committed, {**fine, "instructions per weight": {"a": 1.2}}, "g++ 14") == []
    assert (
        "bound 1.03 (same compiler)"
        in guard.regressions(committed, {**fine, "instructions per weight": {"a": 1.2}}, "g++ 12")[0]
    )
    assert "no longer measured" in guard.regressions(committed, {"spills": {"avx2": 1.0}}, "g++ 12")[0]
    added = {**fine, "spills": {"avx2": 100.0, "new": 0.0}}
    assert guard.regressions(committed, added, "g++ 12") == [
        "spills, new: not committed; python -m tools.guard --update"
    ]


@pytest.mark.slow
def test_cuda_figures_have_not_risen() -> None:
    """Half a minute: the SASS of all kernels for two architectures is read, and 16 loops are followed along their paths."""
    if lacking := guard_cuda.missing():
        pytest.skip(f"SKIPPED: no {', no '.join(lacking)}")
    figures, mixes = guard_cuda.measure()
    committed = guard.committed()["cuda"]
    assert guard.regressions(committed, figures, guard_cuda.compiler()) == []
    assert all(mix["tensor core"] for mix in mixes.values())
    # Negative control: a tenth more registers and one spilled register are over the bound.
    kernel = next(iter(figures["cuda registers"]))
    worse = {
        **figures,
        "cuda registers": {**figures["cuda registers"], kernel: committed["figures"]["cuda registers"][kernel] * 1.1},
    }
    worse["cuda spill bytes"] = {**figures["cuda spill bytes"], kernel: 8.0}
    assert len(guard.regressions(committed, worse, committed["compiler"])) == 2


@pytest.mark.slow
def test_triton_figures_have_not_risen_and_what_is_under_way_has_not_fallen() -> None:
    if lacking := guard_triton.missing():
        pytest.skip(f"SKIPPED: no {', no '.join(lacking)}")
    figures, _ = guard_triton.measure()
    committed = guard.committed()["triton"]
    assert guard.regressions(committed, figures, guard_triton.compiler()) == []
    assert all(figures[guard_triton.COPIES][f"gemv M=1 {card}"] >= 12 for card in guard_triton.CARDS)
    # Negative control: a loop that waits for each of its loads, as the loop for one token did.
    name = next(iter(figures[guard_triton.COPIES]))
    worse = {kind: {**values, name: 0.0} for kind, values in figures.items() if kind in guard_triton.AT_LEAST}
    assert len(guard.regressions(committed, {**figures, **worse}, "another Triton")) == 2


PTX = """
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
        cp.async.commit_group;
        @%p1 cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4;
        cp.async.commit_group;
$L__BB0_1:
        cp.async.wait_group 1;
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
        @%p2 bra $L__BB0_1;
"""


def test_copies_ahead_are_those_before_the_first_wait() -> None:
    assert guard_triton.copies_ahead(PTX) == 2
    assert guard_triton.copies_ahead("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];") == 0


def test_programs_of_a_multiprocessor_fit_its_registers_and_its_shared_memory() -> None:
    assert guard_triton.resident_programs(127, 64, 7680, 232448) == 8  # 128 registers of 64 threads, eight times
    assert guard_triton.resident_programs(32, 64, 50000, 166912) == 3


SASS = """
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""


def test_the_inner_loop_is_found_in_sass() -> None:
    lines = SASS.splitlines()
    assert guard_cuda.loops(lines) == [(1, 3), (0, 5), (8, 8)]
    assert guard_cuda.inner_loop(lines) == ["LDS", "HMMA", "BRA"]
    assert guard_cuda.mix(guard_cuda.inner_loop(lines)) == {"other": 1, "shared": 1, "tensor core": 1}
    assert guard_cuda.inner_loop(["        /*0000*/                   EXIT ;"]) == []
