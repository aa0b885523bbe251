// Hopper's asynchronous instructions (sm_90a): mbarrier, the copies of TMA, wgmma. As ptx.cuh: one wrapper per
// instruction, with host twins in tests/cuda/host/async_host.h that follow the PTX manual, sections "mbarrier",
// "cp.async.bulk" and "Asynchronous warpgroup-level matrix instructions".
#pragma once
#include "ptx.cuh"

#ifdef QKERNELS_HOST
#include "async_host.h"
#else
#include <cuda.h>

namespace qkernels::cuda {

// Where a matrix in global memory is, and how a tile of it lies in shared memory; a kernel's __grid_constant__.
using TensorMap = CUtensorMap;

// ---- mbarrier: a phase ends when `count` arrivals have been made and all announced bytes are there ----

QK_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After initialisation: the copies go through another proxy, which must see the barriers.
QK_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
QK_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes that copies will bring in this phase.
QK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; the first has parity 0, and the one before it (1) counts as ended.
QK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}

// ---- copies by TMA, global to shared memory ----

// `bytes` in a row, a multiple of 16 like both addresses.
QK_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// The tile at (column, row) of one of several matrices; zeros, for which nothing is read, where it reaches over that
// matrix, and the whole tile counts in bytes.
QK_DEVICE void copy_tile(uint32_t to, const TensorMap* map, int column, int row, int matrix, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

// ---- wgmma: d = a b + d (or a b), a of 64 x 16 (8 bit: 64 x 32) in registers, b in shared memory, by four warps ----
// Warp i of the four holds rows 16 i ... 16 i + 15 of a and d, as mma.m16n8k16 (8 bit: m16n8k32) does. From the
// instruction until a wgmma_wait that covers its group, d must not be touched and a not be written.

// Orders writes of registers before what follows; before the first wgmma of a group.
QK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
QK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading d before the wait that stands above.
template <int kCount>
QK_DEVICE void wgmma_results(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
QK_DEVICE void wgmma_results(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// The instruction's text names every register, and C++ has no loop over operands: these are the names of d, of a, of b
// and of what p is set from, for 8, 16, 32, 64 and 128 registers of d.
#define QK_D_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QK_A_8 "{%8,%9,%10,%11}, %12"
#define QK_P_8 "%13"
#define QK_D_16 QK_D_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QK_A_16 "{%16,%17,%18,%19}, %20"
#define QK_P_16 "%21"
#define QK_D_32                                            \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QK_A_32 "{%32,%33,%34,%35}, %36"
#define QK_P_32 "%37"
#define QK_D_64                                                      \
  QK_D_32                                                            \
  ","                                                                \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QK_A_64 "{%64,%65,%66,%67}, %68"
#define QK_P_64 "%69"
#define QK_D_128                                                                 \
  QK_D_64                                                                        \
  ","                                                                            \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QK_A_128 "{%128,%129,%130,%131}, %132"
#define QK_P_128 "%133"
#define QK_OPERANDS_8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define QK_OPERANDS_16(c, i) QK_OPERANDS_8(c, i), QK_OPERANDS_8(c, i + 8)
#define QK_OPERANDS_32(c, i) \
  QK_OPERANDS_8(c, i), QK_OPERANDS_8(c, i + 8), QK_OPERANDS_8(c, i + 16), QK_OPERANDS_8(c, i + 24)
#define QK_OPERANDS_64(c, i) QK_OPERANDS_32(c, i), QK_OPERANDS_32(c, i + 32)
#define QK_OPERANDS_128(c, i) QK_OPERANDS_64(c, i), QK_OPERANDS_64(c, i + 64)

// `shape`: with the types of d, a and b; `signs`: the operands after p.
#define QK_WGMMA(name, Sum, c, count, shape, signs)                                                                    \
  QK_DEVICE void name(Sum(&d)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                           \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " QK_P_##count ", 0; wgmma.mma_async.sync.aligned." shape             \
                                                                " {" QK_D_##count "}, " QK_A_##count ", p" signs "; }" \
                 : QK_OPERANDS_##count(c, 0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))               \
                 : "memory");                                                                                          \
  }
QK_WGMMA(wgmma_f16, float, "+f", 8, "m64n16k16.f32.f16.f16", ", 1, 1, 0")
QK_WGMMA(wgmma_f16, float, "+f", 16, "m64n32k16.f32.f16.f16", ", 1, 1, 0")
QK_WGMMA(wgmma_f16, float, "+f", 32, "m64n64k16.f32.f16.f16", ", 1, 1, 0")
QK_WGMMA(wgmma_f16, float, "+f", 64, "m64n128k16.f32.f16.f16", ", 1, 1, 0")
QK_WGMMA(wgmma_f16, float, "+f", 128, "m64n256k16.f32.f16.f16", ", 1, 1, 0")
QK_WGMMA(wgmma_bf16, float, "+f", 8, "m64n16k16.f32.bf16.bf16", ", 1, 1, 0")
QK_WGMMA(wgmma_bf16, float, "+f", 16, "m64n32k16.f32.bf16.bf16", ", 1, 1, 0")
QK_WGMMA(wgmma_bf16, float, "+f", 32, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0")
QK_WGMMA(wgmma_bf16, float, "+f", 64, "m64n128k16.f32.bf16.bf16", ", 1, 1, 0")
QK_WGMMA(wgmma_bf16, float, "+f", 128, "m64n256k16.f32.bf16.bf16", ", 1, 1, 0")
QK_WGMMA(wgmma_s8, int32_t, "+r", 32, "m64n64k32.s32.s8.s8", "")
QK_WGMMA(wgmma_s8, int32_t, "+r", 64, "m64n128k32.s32.s8.s8", "")
QK_WGMMA(wgmma_s8, int32_t, "+r", 128, "m64n256k32.s32.s8.s8", "")
#undef QK_WGMMA

// ---- clusters ----

// Waits for all threads of the cluster that have not exited, and orders their memory.
QK_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same without an order for memory: for who only waits until all have got here.
QK_DEVICE void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
// From the shared memory of the cluster's block `rank`, at the address that it has there.
QK_DEVICE Words2 load_cluster8(uint32_t address, int rank) {
  Words2 v;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %2, %3; ld.shared::cluster.v2.u32 {%0,%1}, [there]; }"
      : "=r"(v.word[0]), "=r"(v.word[1])
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// One lane of a warp, always the same. The compiler knows that it is alone: the operands of copies then need no loop
// over lanes that might differ.
QK_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

// Registers of a thread, for all four warps; multiples of 8.
template <int kRegisters>
QK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
QK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace qkernels::cuda
#endif  // QKERNELS_HOST

namespace qkernels::cuda {

// b for wgmma: rows (of n) of 128 or 64 bytes of k, eight of them in a row, aligned to the period of their swizzle
// (1024 or 512 bytes), chunks of 16 bytes swizzled as TMA writes them: XOR of the chunk with bits 7 ... 9 (64 bytes: 7,
// 8) of its address. Bits: 0 address / 16, 16 leading offset (unused here), 32 bytes from eight rows to the next / 16,
// 62 the mode, 1 for 128 bytes and 2 for 64.
template <int kRowBytes>
QK_DEVICE uint64_t wgmma_descriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{8 * kRowBytes >> 4} << 32 |
         uint64_t{128 / kRowBytes} << 62;
}

}  // namespace qkernels::cuda
