"""The PTX interpreter itself, on the lab's own kernels: right results, twins that agree, and every planted bug found."""

from __future__ import annotations

import pytest
import torch

from .emulator import WHY_NOT, run
from .interpreted import Interpreted, interpret
from .ptx.memory import Traffic, count_sectors, count_wavefronts
from .ptx.program import PtxError, parse
from .sample.calls import sample_call, wrappers_call
from .units import needs_nvcc

np = pytest.importorskip("numpy", minversion="2.0")
recorded = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))  # launches come from the host build


def sample(bug: str | None = None, M: int = 16, arch: str = "80") -> tuple[bool, Interpreted]:
    """Whether the result is right, and what was seen on the way."""
    call, expected = sample_call(M, 256)
    (seen,) = interpret("sample", call, arch, bug)
    return torch.equal(call.given()["y"], expected), seen


@needs_nvcc
@recorded
@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_the_compiled_sample_is_right(arch: str) -> None:
    right, seen = sample(M=21, arch=arch)
    assert right
    assert seen.outcome.races == set()
    assert seen.launch.grid == (2, 1, 1)


@needs_nvcc
@recorded
def test_the_host_twins_do_what_the_instructions_do() -> None:
    """Two implementations of each instruction, one in C++ and one in numpy, on what nvcc made of the same calls."""
    on_host, as_ptx = wrappers_call(), wrappers_call()
    run("sample", on_host)
    interpret("sample", as_ptx)
    left, right = on_host.given()["out"], as_ptx.given()["out"]
    written = (left != -1).any(dim=2).any(dim=0)
    assert int(written.sum()) == 48  # all that wrappers.cuh puts
    differ = ((left != right).any(dim=2).any(dim=0)).nonzero()[:, 0].tolist()
    assert differ == []


@needs_nvcc
@recorded
@pytest.mark.parametrize(
    ("bug", "right"),
    [("NO_BARRIER", True), ("EARLY_PREFETCH", True), ("SHORT_WAIT", False)],
    ids=["no barrier", "early prefetch", "short wait"],
)
def test_a_race_is_reported(bug: str, right: bool) -> None:
    """Warps advance together, so that only the race check finds the first two."""
    was_right, seen = sample(bug)
    assert seen.outcome.races
    assert was_right == right


@needs_nvcc
@recorded
@pytest.mark.parametrize(
    ("bug", "message"),
    [("NO_ROW_MASK", "global access out of bounds: thread"), ("DIVERGENT", "divergent barrier: ")],
)
def test_what_a_kernel_must_not_do_is_an_error(bug: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        sample(bug, M=21)


@needs_nvcc
@recorded
@pytest.mark.parametrize(("bug", "factor"), [(None, 1), ("NO_SWIZZLE", 4)])
def test_bank_conflicts_are_counted(bug: str | None, factor: int) -> None:
    """Eight rows of 64 bytes: without the swizzle four of them meet in the same banks."""
    right, seen = sample(bug)
    traffic = seen.shared("ldmatrix")
    assert right
    assert traffic.requests > 0
    assert traffic.used == factor * traffic.least


def test_wavefronts_of_known_patterns() -> None:
    everyone, lane = np.ones(32, bool), np.arange(32)
    for addresses, size, used, least in [
        (lane * 4, 4, 1, 1),
        (lane * 128, 4, 32, 1),  # all in bank 0
        (lane * 0, 4, 1, 1),  # one word for all
        (lane * 16, 16, 4, 4),
        (lane * 32, 16, 8, 4),
    ]:
        traffic = Traffic()
        count_wavefronts(traffic, addresses, size, everyone)
        assert (traffic.requests, traffic.used, traffic.least) == (1, used, least)


def test_sectors_of_known_patterns() -> None:
    everyone, lane = np.ones(32, bool), np.arange(32)
    for addresses, size, used, least in [(lane * 4, 4, 4, 4), (lane * 32, 4, 32, 4), (lane * 16, 16, 16, 16)]:
        traffic = Traffic()
        count_sectors(traffic, addresses, size, everyone)
        assert (traffic.requests, traffic.used, traffic.least) == (1, used, least)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (".local .align 4 .b8 depot[8];\nret;", "local memory"),
        ("ld.shared.u32 %r1, [nowhere];\nret;", "operand not understood: nowhere"),
        (".unknown 1;\nret;", "unknown directive"),
    ],
)
def test_what_is_not_understood_is_an_error(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        parse(f".visible .entry kernel(.param .u64 p) {{\n.reg .b32 %r<3>;\n{body}\n}}", "kernel")


def test_an_unknown_instruction_is_an_error_when_it_runs() -> None:
    from .ptx.interpreter import launch

    program = parse(".entry kernel() {\n.reg .b32 %r<3>;\nmatch.any.sync.b32 %r1, %r2;\nret;\n}", "kernel")
    with pytest.raises(PtxError, match="unsupported: match"):
        launch(program, (1, 1, 1), (32, 1, 1), 0, [], [])


def run_ptx(body: str, shared: int, out: np.ndarray) -> set[str]:
    """One block of two warps; %rd1 is where `out` lies, %r1 the thread, %rd2 its place there."""
    from .ptx.interpreter import launch

    text = f"""
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 p)
.reqntid 64
{{
.reg .b32 %r<20>;
.reg .b64 %rd<20>;
.loc 1 2 3
ld.param.b64 %rd1, [p];
.loc 1 3 4
mov.u32 %r1, %tid.x;
mad.wide.u32 %rd2, %r1, 16, %rd1;
{body}
ret;
}}"""
    pointer = out.ctypes.data.to_bytes(8, "little")
    return launch(parse(text, "kernel"), (1, 1, 1), (64, 1, 1), shared, [pointer], [out.view(np.uint8)]).races


@pytest.mark.parametrize(("value", "kind"), [("0", "repeated write"), ("%r1", "write")])
def test_two_warps_that_store_the_same_are_told_apart(value: str, kind: str) -> None:
    races = run_ptx(
        f"and.b32 %r2, %r1, 31;\nshl.b32 %r2, %r2, 2;\nmov.b32 %r3, {value};\nst.shared.b32 [%r2], %r3;",
        128,
        np.zeros(256, np.uint32),
    )
    assert races == {f"{kind}: st.shared.b32 [%r2], %r3"}


def test_pairs_of_floats_and_mixed_sums() -> None:
    """sm100 and later: two fp32 in 64 bits, and a half added to a float."""
    out = np.zeros(256, np.uint32)
    body = """
.reg .b16 %h<3>;
cvt.rn.f32.u32 %r2, %r1;
mov.b64 %rd3, {%r2, 0f3F000000};
fma.rn.f32x2 %rd4, %rd3, %rd3, %rd3;
sub.f32x2 %rd5, %rd4, %rd3;
mov.b64 {%r3, %r4}, %rd5;
cvt.rn.bf16x2.f32 %r5, %r2, %r2;
mov.b32 {%h1, %h2}, %r5;
add.rn.f32.bf16 %r8, %h1, %r4;
st.global.v4.b32 [%rd2], {%r3, %r4, %r8, 0};"""
    run_ptx(body, 0, out)
    thread = np.arange(64, dtype=np.float32)
    x = out.view(np.float32).reshape(64, 4)
    assert (x[:, 0] == thread * thread).all()
    assert (x[:, 1] == 0.25).all()
    assert (x[:, 2] == thread + 0.25).all()


def test_sums_of_warps_shuffles_upwards_and_powers_of_two() -> None:
    out = np.zeros(256, np.uint32)
    body = """
redux.sync.add.s32 %r2, %r1, -1;
shfl.sync.up.b32 %r3, %r1, 3, 0, -1;
cvt.rn.f32.u32 %r4, %r1;
neg.f32 %r4, %r4;
ex2.approx.ftz.f32 %r5, %r4;
st.global.v4.b32 [%rd2], {%r2, %r3, %r5, 0};"""
    run_ptx(body, 0, out)
    thread = np.arange(64)
    lane, found = thread % 32, out.reshape(64, 4)
    assert (found[:, 0] == np.where(thread < 32, 31 * 16, 31 * 16 + 32 * 32)).all()
    assert (found[:, 1] == np.where(lane < 3, thread, thread - 3)).all()
    assert (found[:, 2].copy().view(np.float32) == 0.5 ** thread.astype(np.float32)).all()


def test_stmatrix_is_the_way_back_from_ldmatrix() -> None:
    out = np.zeros(256, np.uint32)
    body = """
shl.b32 %r2, %r1, 4;
st.shared.v4.b32 [%r2], {%r1, %r2, 7, %r1};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];
xor.b32 %r7, %r2, 128;
bar.sync 0;
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r7], {%r3, %r4, %r5, %r6};
bar.sync 0;
ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r2];
st.global.v4.b32 [%rd2], {%r8, %r9, %r10, %r11};"""
    assert run_ptx(body, 1024, out) == set()
    thread = np.arange(64) ^ 8  # the matrices went to one another's places
    assert (out.reshape(64, 4) == np.stack([thread, 16 * thread, 0 * thread + 7, thread], axis=1)).all()


@pytest.mark.parametrize("gathers", [True, False])
def test_lanes_that_took_a_way_behind_are_waited_for(gathers: bool) -> None:
    """Odd lanes do their part behind the meeting place, where the compiler puts what is seldom."""
    out = np.zeros(256, np.uint32)
    body = f"""
.reg .pred %p<4>;
and.b32 %r2, %r1, 1;
setp.ne.s32 %p1, %r2, 0;
@%p1 bra $seldom;
mov.b32 %r3, 5;
$meet:
{"bar.warp.sync -1;" if gathers else ""}
redux.sync.add.s32 %r4, %r3, -1;
st.global.v4.b32 [%rd2], {{%r4, 0, 0, 0}};
ret;
$seldom:
mov.b32 %r3, 7;
bra.uni $meet;"""
    if not gathers:
        with pytest.raises(PtxError, match="divergent warp in: redux"):
            run_ptx(body, 0, out)
        return
    run_ptx(body, 0, out)
    assert (out.reshape(64, 4)[:, 0] == 16 * (5 + 7)).all()


def test_lanes_that_never_meet_are_an_error() -> None:
    body = """
.reg .pred %p<4>;
and.b32 %r2, %r1, 1;
setp.ne.s32 %p1, %r2, 0;
@%p1 bra $other;
bar.warp.sync -1;
ret;
$other:
bar.sync 0;"""
    with pytest.raises(PtxError, match="divergent barrier|wait at bar.warp.sync"):
        run_ptx(body, 0, np.zeros(256, np.uint32))


def test_warps_in_part_do_not_gather() -> None:
    with pytest.raises(PtxError, match="only whole warps"):
        run_ptx("bar.warp.sync 15;", 0, np.zeros(256, np.uint32))
