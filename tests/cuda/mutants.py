"""Bugs that are planted in copies of the kernels, to show that the checks would find them.

A mutant changes one line. The line must be there exactly once, so that no control goes stale unseen when a kernel changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    source: str  # the .cu file that has to be compiled again
    header: str
    healthy: str
    broken: str


DECODE = ("decode_f16.cu", "decode.cuh")
GEMM = ("gemm_sm80_f16.cu", "gemm_sm80.cuh")
A8 = ("gemm_a8.cu", "gemm_a8.cuh")
QUANTIZE = ("gemm_a8.cu", "quantize_a8.cuh")
APART = ("gemm_a8.cu", "apart_a8.cuh")
WGMMA = ("gemm_sm90.cu", "gemm_sm90.cuh")
IGMMA = ("gemm_a8_sm90.cu", "gemm_a8_sm90.cuh")
EXPERTS = ("experts.cu", "experts.cuh")
NO_ROW_MASK = ("output.cuh", "if (m < out.M && n < out.N_pad) store", "if (n < out.N_pad) store")

MUTANTS: dict[str, Mutant] = {
    # Scales are copied by some lanes for all, and slots are reused: without the warp's barrier lanes race.
    "DECODE_NO_WARP_BARRIER": Mutant(*DECODE, "__syncwarp();  // all lanes' copies of this slot", "// "),
    "DECODE_SHORT_WAIT": Mutant(*DECODE, "    cp_async_wait<kUsual - 2>();", "    cp_async_wait<kUsual - 1>();"),
    "DECODE_NO_WAIT_FOR_X": Mutant(*DECODE, "cp_async_wait<0>();  // x, the youngest", "cp_async_wait<1>();  // "),
    "DECODE_NOT_AGAIN": Mutant(
        "decode_bf16.cu",
        "decode.cuh",
        "if (!all_finite(low, high)) {",
        "if (false) {",
    ),
    "GEMM_NO_BARRIER": Mutant(*GEMM, "__syncthreads();  // everybody's copies of the next slot", "// "),
    # The slot that is read next, instead of the one that is free.
    "GEMM_COPIES_TOO_EARLY": Mutant(*GEMM, "copy_step(step + kStages, slot);", "copy_step(step + kStages, next_slot);"),
    # The free slot is filled before everybody is done with it: the barrier comes too late.
    "GEMM_WAITS_AFTER_COPYING": Mutant(
        *GEMM,
        "    auto prepare_next = [&] {\n",
        "    auto prepare_next = [&] {\n      if (step + kStages < end) copy_step(step + kStages, slot);\n",
    ),
    "GEMM_SHORT_WAIT": Mutant(*GEMM, "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    # In the first file that is linked: the function is inline, and the linker keeps one of equal names.
    "DECODE_NO_CLAMP": Mutant(
        "decode_bf16.cu", "copy.cuh", "return column < 0 ? 0 : column >= K ? K - 1 : column;", "return column + 0 * K;"
    ),
    "GEMM_NOT_AGAIN": Mutant(
        "gemm_sm80_bf16.cu", "gemm_sm80.cuh", "if (!is_finite(low) || !is_finite(high)) again |=", "if (false) again |="
    ),
    "GEMM_NO_ROW_MASK": Mutant("gemm_sm80_f16.cu", *NO_ROW_MASK),
    # What every launch did once: a limit of its own, which a smaller launch lowers under a larger one.
    "SHARED_OF_ITS_OWN": Mutant(
        "launch_runtime.cpp",
        "launch.cuh",
        "const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));",
        "const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),\n"
        "                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);",
    ),
    # Outer factors of another 256 weights; bits of another run of 16 columns; offsets that are lost.
    "PLANES_OUTER_TOO_LATE": Mutant(*DECODE, "next_step % kStepsOfOuter == 0", "next_step % kStepsOfOuter == 1"),
    "PLANES_WRONG_RUN": Mutant(
        "decode_f16.cu", "multiply_planes.cuh", "q.high[tile][run / 2]", "q.high[tile][run % 2]"
    ),
    "PLANES_LOST_REST": Mutant(
        "decode_f16.cu", "multiply_planes.cuh", "if (kRestsLater && !symmetric) {", "if (kRestsLater && symmetric) {"
    ),
    # Of stacked experts: another expert's strips; a block that goes on behind its expert's last row; an expert without rows that
    # has no slot, so that those behind it share one; sums that are not yet there.
    "EXPERTS_WRONG_STRIPS": Mutant(*GEMM, "first_strip = rows.expert * p.weight.strips;", "first_strip = rows.expert;"),
    "EXPERTS_PAST_THE_END": Mutant(*EXPERTS, "left < t.size ? left : t.size", "t.size"),
    "EXPERTS_WITHOUT_A_SLOT": Mutant(
        *EXPERTS, "const int base = first / t.size + expert;", "const int base = first / t.size;"
    ),
    "EXPERTS_NO_BARRIER": Mutant(*EXPERTS, "thread - step))) : 0;\n    __syncthreads();\n", "thread - step))) : 0;\n"),
    "WGMMA_EXPERTS_WRONG_STRIPS": Mutant(*WGMMA, "return expert * w.strips;", "return expert + 0 * w.strips;"),
    "WGMMA_EXPERTS_WRONG_ROWS": Mutant(*WGMMA, "dense ? 0 : here.end,", "dense ? 0 : here.end - 1,"),
    "WGMMA_EXPERTS_READ_ON": Mutant(
        *WGMMA,
        "dense ? here.row : kTokens - (here.end - here.row),\n                  dense ? 0 : here.end,",
        "dense ? here.row : 0, dense ? 0 : here.row + kTokens,",
    ),
    "WGMMA_EXPERTS_PAST_THE_END": Mutant(
        *WGMMA, "if (m < mine.end && n < p.out.N_pad) {", "if (m < mine.row + kTokens && n < p.out.N_pad) {"
    ),
    "WGMMA_GATE_BESIDE_GATE": Mutant(*WGMMA, "here.strip + s * p.apart, begin", "here.strip + s, begin"),
    "WGMMA_GATE_UP_NO_BARRIER": Mutant(*WGMMA, "named_barrier_sync(1, kConsumers);  // gate's", "// "),
    "A8_NO_BARRIER": Mutant(*A8, "__syncthreads();  // everybody's copies of this slot", "// "),
    "A8_NO_BARRIER_BEFORE_EXCHANGE": Mutant(*A8, "__syncthreads();  // the exchange lies over stages", "// "),
    "A8_SHORT_WAIT": Mutant(*A8, "cp_async_wait<kStagesA8 - 2>();", "cp_async_wait<kStagesA8 - 1>();"),
    "A8_NO_ROW_MASK": Mutant("gemm_a8.cu", *NO_ROW_MASK),
    "A8_LOST_GROUP": Mutant(*A8, "if (used.left == 1 || step + 1 == end)", "if (step + 1 == end)"),
    "A8_NO_BARRIER_FOR_THE_MAXIMUM": Mutant(*QUANTIZE, "  __syncthreads();\n#pragma", "#pragma"),
    # Before this barrier alone there is a range of the row.
    "APART_NO_BARRIER_FOR_THE_RANGE": Mutant(*QUANTIZE, "  __syncthreads();  // all warps' ranges", "  // "),
    "APART_NO_BARRIER_FOR_WEIGHTS": Mutant(*APART, "    __syncthreads();  // weights and x are there\n", ""),
    "APART_LOST_MARK": Mutant(*APART, "i < blocks; ++i) marked |=", "i < 1; ++i) marked |="),
    "APART_LOST_ROUND": Mutant(*APART, "first < count; first += kFinishColumns", "first < 1; first += kFinishColumns"),
    "APART_MARKED_TWICE": Mutant(*QUANTIZE, " && (marks >> i & 1) == 0;", ";"),
    "APART_ENTRIES_IN_THE_MAXIMUM": Mutant(*QUANTIZE, "value = value < kOutlier ? value : 0.0f;", ""),
    "APART_WRONG_SIGN": Mutant(
        *APART, "low[i] = fmaf(-zero, low_ones, low[i])", "low[i] = fmaf(zero, low_ones, low[i])"
    ),
    "APART_LOST_PART": Mutant(*APART, "for (int s = 0; s < p.splits; ++s)", "for (int s = 0; s < 1; ++s)"),
    # A padded column of the weight has a code of 0, which means something. (Codes past K in every row would cancel.)
    "APART_ONES_PAST_K": Mutant(*QUANTIZE, "k + i < p.x.K &&", "(ones || k + i < p.x.K) &&"),
    "A8_WRONG_ORDER": Mutant(*QUANTIZE, "const int j = i / 8 + i % 2 * 2;", "const int j = i / 8 * 2 + i % 2;"),
    "WGMMA_NO_WAIT": Mutant(*WGMMA, "      wgmma_wait<0>();\n      wgmma_results(sums)", "      wgmma_results(sums)"),
    "WGMMA_SCALED_NO_WAIT": Mutant(*WGMMA, "wgmma_wait<0>();\n    wgmma_results(totals)", "wgmma_results(totals)"),
    "WGMMA_SHORT_WAIT": Mutant(*WGMMA, "wgmma_wait<2>();  // the one before", "wgmma_wait<3>();  // "),
    # Right, and slow: the tensor cores are empty whenever a fragment is ready.
    "WGMMA_SERIAL": Mutant(*WGMMA, "wgmma_wait<2>();  // the one before", "wgmma_wait<0>();  // "),
    "WGMMA_NO_FENCE": Mutant(*WGMMA, "wgmma_fence();\n      wgmma", "\n      wgmma"),
    "WGMMA_WRONG_PHASE": Mutant(
        *WGMMA, "mbarrier_wait(ring.full(), ring.parity);", "mbarrier_wait(ring.full(), ring.parity ^ 1);"
    ),
    "WGMMA_PRODUCER_DOES_NOT_WAIT": Mutant(
        *WGMMA, "mbarrier_wait(ring.empty(), ring.parity ^ 1);  // its codes", "// "
    ),
    "WGMMA_WRONG_SWIZZLE": Mutant(
        "gemm_sm90.cu", "ptx_sm90.cuh", "uint64_t{128 / kRowBytes} << 62", "uint64_t{2} << 62"
    ),
    # Scales are read from a stage that has brought none, but in the first step of their group.
    "WGMMA_STALE_SCALES": Mutant(*WGMMA, "if (fresh_in == 0) {", "{"),
    "WGMMA_NO_PROXY_FENCE": Mutant(*WGMMA, "    fence_async_proxy();\n", ""),
    "WGMMA_EARLY_RELEASE": Mutant(
        *WGMMA,
        "__syncwarp();  // all lanes have read the stage\n    if (lane == 0 && before",
        "if (lane == 0 && before",
    ),
    "WGMMA_NO_BARRIER_BEFORE_EXCHANGE": Mutant(*WGMMA, "named_barrier_sync(1, kConsumers);  // the warpgroups", "// "),
    "WGMMA_NO_ROW_MASK": Mutant(*WGMMA, "if (m < mine.end && n < p.out.N_pad) {", "if (n < p.out.N_pad) {"),
    "WGMMA_NO_CLUSTER_BARRIER": Mutant(*WGMMA, "cluster_barrier();  // all blocks' totals", "// "),
    "WGMMA_NO_LAST_CLUSTER_BARRIER": Mutant(*WGMMA, "cluster_barrier_relaxed();  // nobody", "// "),
    "WGMMA_CLUSTER_NO_ROW_MASK": Mutant(*WGMMA, "if (m >= p.out.M || n >= used) continue", "if (n >= used) continue"),
    "WGMMA_NOT_AGAIN": Mutant(*WGMMA, "    if (!all_finite(low, high)) {\n", "    if (false) {\n"),
    # Of fragments that are scaled: factors of another 256 weights, another run's bits, minima and factors of rows that are lost.
    "WGMMA_OUTER_TOO_LATE": Mutant(*WGMMA, "+ step / kStepsOfOuter;", "+ (step - begin) / (kStepsOfOuter + 1);"),
    "WGMMA_WRONG_RUN": Mutant("gemm_sm90.cu", "scaled_fragments.cuh", "q.above[run / 2]", "q.above[run % 2]"),
    "WGMMA_LOST_MINIMA": Mutant(
        "gemm_sm90.cu", "scaled_fragments.cuh", "    if (f.zero_type != Type::kNone) {", "    if (false) {"
    ),
    "WGMMA_LOST_ROW_FACTORS": Mutant(*WGMMA, "p.weight.outer != nullptr && p.weight.outers == 0;", "false;"),
    "IGMMA_NO_WAIT": Mutant(*IGMMA, "    wgmma_wait<0>();\n    wgmma_results(sums);\n    release", "    release"),
    "IGMMA_SHORT_WAIT": Mutant(*IGMMA, "wgmma_wait<1>();  // the first fragment", "wgmma_wait<2>();  // "),
    "IGMMA_NO_FENCE": Mutant(*IGMMA, "    wgmma_fence();\n", ""),
    "IGMMA_WRONG_PHASE": Mutant(
        *IGMMA, "mbarrier_wait(ring.full(), ring.parity);", "mbarrier_wait(ring.full(), ring.parity ^ 1);"
    ),
    "IGMMA_WRONG_SWIZZLE": Mutant(
        "gemm_a8_sm90.cu", "ptx_sm90.cuh", "uint64_t{128 / kRowBytes} << 62", "uint64_t{1} << 62"
    ),
    # One step after its group has ended, the slot holds what another group or nobody wrote.
    "IGMMA_SCALES_TOO_LATE": Mutant(
        "gemm_a8_sm90.cu", "gemm_sm90.cuh", "walk.left == 1 || step + 1 == end :", "step + 1 == end :"
    ),
    "IGMMA_EARLY_RELEASE": Mutant(*IGMMA, "__syncwarp();  // all lanes have read the stage\n", "\n"),
    # Right as long as a group of 32 columns ends with its step; but the compiler and a reader see a loop whose second round
    # writes a fragment that is being read.
    "IGMMA_GROUPS_GO_ROUND": Mutant(*IGMMA, "        ++step;\n        break;\n", ""),
    "IGMMA_NO_BARRIER_BEFORE_EXCHANGE": Mutant(*IGMMA, "named_barrier_sync(1, kConsumersA8);", ""),
    "IGMMA_NO_ROW_MASK": Mutant(*IGMMA, "m < p.out.M && n < p.out.N_pad) {", "n < p.out.N_pad) {"),
}


def write_mutant(healthy: Path, mutant: Mutant, folder: Path) -> None:
    """A copy of csrc/cuda with one change. Files that are right already keep their time, so that little is compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in healthy.iterdir():
        if path.suffix not in (".h", ".cuh", ".cu"):
            continue
        text = path.read_text()
        if path.name == mutant.header:
            count = text.count(mutant.healthy)
            assert count == 1, f"{path.name} has {mutant.healthy!r} {count} times, so the planted bug is stale"
            text = text.replace(mutant.healthy, mutant.broken)
        copy = folder / path.name
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
