// The only door between the kernels and the hardware: one wrapper per PTX instruction.
//
// nvcc sees inline PTX; g++ with -DQKERNELS_HOST sees the twins of tests/cuda/host, which do what the PTX manual (ISA
// 8.x, chapter 9.7) says each instruction does. So a kernel that includes this file and nothing else of CUDA can be
// compiled for a GPU, and can be executed on a CPU under the sanitizers. What a kernel may use beside the wrappers:
// threadIdx, blockIdx, blockDim, gridDim, __syncthreads(), __syncwarp(), fmaf, and QK_SHARED for its dynamic shared
// memory; no static __shared__ arrays (the host build would share them between blocks).
//
// Everything needs sm_80. Half-precision values travel as they do in PTX: two in a uint32_t, the lower half first.
#pragma once
#include <cstdint>

#include "words.h"

#ifdef QKERNELS_HOST
#include "ptx_host.h"
#else

#define QK_DEVICE __device__ __forceinline__
// Dynamic shared memory of the kernel. 128 bytes: the row of a swizzled tile, and all 32 banks.
#define QK_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace qkernels::cuda {

// ---- shared memory. Addresses are 32 bit, as the instructions take them: half the registers of a pointer. ----

QK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

QK_DEVICE Words4 load_shared16(uint32_t address) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}
QK_DEVICE Words2 load_shared8(uint32_t address) {
  Words2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "r"(address) : "memory");
  return v;
}
QK_DEVICE uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
QK_DEVICE uint16_t load_shared2(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
QK_DEVICE void store_shared16(uint32_t address, Words4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
QK_DEVICE void store_shared8(uint32_t address, Words2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}
QK_DEVICE void store_shared4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
QK_DEVICE void store_shared2(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

// ---- asynchronous copies, global to shared. They pass L1 by (.cg) where 16 bytes move. ----
// Visible to the thread that copied after cp_async_wait, to others after a barrier that follows it.

QK_DEVICE void cp_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Writes zeros where `valid` is false; `from` must still be an address that may be formed, and is not read.
QK_DEVICE void cp_async16_or_zero(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
QK_DEVICE void cp_async8_or_zero(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
}
QK_DEVICE void cp_async4_or_zero(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// An L2 policy for bytes that are read once, such as weights in decode: they should not push out what is read again.
QK_DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
QK_DEVICE void cp_async16_hint(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}

QK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's youngest groups are still under way.
template <int kPending>
QK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- global memory ----
// load_*: data that no kernel writes while this one runs (.nc). stream: read once, so do not keep it in L1.
// volatile: without it nvcc 13 takes a load out of a loop and past the condition that guards it, as it did with the
// bias of gemm_a8: a null pointer was read (tests/cuda/test_guarded_loads.py).

QK_DEVICE Words4 load_global16(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
QK_DEVICE Words4 load_global16_stream(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
QK_DEVICE Words2 load_global8(const void* p) {
  Words2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
  return v;
}
QK_DEVICE uint32_t load_global4(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
QK_DEVICE uint16_t load_global2(const void* p) {
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
QK_DEVICE uint32_t load_global1(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
QK_DEVICE void store_global16(void* p, Words4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
QK_DEVICE void store_global8(void* p, Words2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}
QK_DEVICE void store_global4(void* p, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
QK_DEVICE void store_global2(void* p, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}

// ---- 8 x 8 matrices of 16-bit elements, from shared memory to fragments ----
// Lane 8 i + r gives the address of row r of matrix i; lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l /
// 4 of each (of column l / 4, transposed).

QK_DEVICE void load_matrix_x1(uint32_t (&d)[1], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(address) : "memory");
}
QK_DEVICE void load_matrix_x2(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}
QK_DEVICE void load_matrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}
QK_DEVICE void load_matrix_x4_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// ---- tensor cores: d += a b, a of 16 x 16 (8 bit: 16 x 32), b of 16 x 8 (32 x 8) ----

QK_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QK_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The accumulator is fp16: twice the rate on GeForce cards. d[0] holds row l / 4, d[1] row l / 4 + 8.
QK_DEVICE void mma_f16_accumulate_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
               : "+r"(d[0]), "+r"(d[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QK_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- bits ----

// Any function of three bits, at every bit: kTable is f(0xf0, 0xcc, 0xaa), e.g. 0xea for (a & b) | c.
template <int kTable>
QK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
// value >> kBits as the upper half of a product: on the pipe of multiplications, where shifts and lop3 share another
// one that takes two cycles a warp. The compiler does not make it a shift again.
template <int kBits>
QK_DEVICE uint32_t shift_right_by_multiplying(uint32_t value) {
  uint32_t d;
  asm("mul.hi.u32 %0, %1, %2;" : "=r"(d) : "r"(value), "n"(1u << (32 - kBits)));
  return d;
}
// The compiler takes `value` for unknown from here on: it keeps it in a register, where it would else compute it again
// from threadIdx and arguments in every round of a loop.
QK_DEVICE void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
// Byte i of the result is byte (selector nibble i) of the eight bytes {b, a}, a lowest.
QK_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// ---- pairs of fp16 and of bf16, rounded once ----

QK_DEVICE uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
QK_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
QK_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
QK_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// sm_80 knows no other arithmetic of bf16x2 than fma; add, sub and mul (sm_90) would run at the same rate.
QK_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- fp32, each operation rounded by itself: the compiler fuses a * b + c where it can, but not these ----

QK_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
QK_DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
QK_DEVICE float divide_rounded(float a, float b) { return __fdiv_rn(a, b); }

// ---- fp32, of transcendental functions: 2 units in the last place ----

QK_DEVICE float exp2_approximately(float v) {
  float d;
  asm("ex2.approx.f32 %0, %1;" : "=f"(d) : "f"(v));
  return d;
}
QK_DEVICE float erf_of(float v) { return erff(v); }

// ---- conversions, to nearest even ----

QK_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
QK_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
QK_DEVICE float f16_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
QK_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
QK_DEVICE uint32_t float_to_bits(float f) { return __float_as_uint(f); }

// ---- between the lanes of a warp, and between warps ----

QK_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
QK_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
QK_DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
QK_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
QK_DEVICE bool any_lane(bool v) { return __any_sync(0xffffffffu, v); }

// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads of the block, a multiple of 32.
QK_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
QK_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace qkernels::cuda
#endif  // QKERNELS_HOST

// ---- what follows from the wrappers ----
namespace qkernels::cuda {

// bf16 is the upper half of a float.
QK_DEVICE float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// a - b = b * (-1) + a and a * b = a * b + (-0): one rounding, as the instructions would have.
QK_DEVICE uint32_t sub_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(b, 0xbf80bf80u, a); }
QK_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }

}  // namespace qkernels::cuda
