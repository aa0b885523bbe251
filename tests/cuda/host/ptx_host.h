// The twins of csrc/cuda/ptx.cuh, in its order and with its names, and the words of CUDA that kernels use.
//
// Shared memory is addressed from 0 and every access is checked against its size and alignment. Global memory is the
// process's: ASan and TSan look at it, so every access is a plain load or store in the thread that made it. (GCC
// expands a 16-byte memcpy after the TSan pass, which would then miss it.)
#pragma once
#include <cmath>

#include "warp_host.h"
#include "words.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define QK_DEVICE inline
#define QK_SHARED(name) unsigned char* const name = ::qkernels::host::block->shared
#define threadIdx (::qkernels::host::thread->id)
#define blockIdx (::qkernels::host::block->id)
#define blockDim (::qkernels::host::block->size)
#define gridDim (::qkernels::host::block->grid)
#define __syncthreads() ::qkernels::host::block_sync()
#define __syncwarp() ::qkernels::host::warp_sync()

using dim3 = qkernels::host::Dim3;

namespace qkernels::host {

// ---- memory ----

inline unsigned char* shared_memory(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0) fail("misaligned shared access at " + std::to_string(address));
  if (size_t{address} + bytes > block->shared_bytes) {
    fail("shared access out of bounds: " + std::to_string(address) + " of " + std::to_string(block->shared_bytes));
  }
  return block->shared + address;
}

template <class T>
inline const T* global_memory(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("misaligned global access");
  return static_cast<const T*>(p);
}
template <class T>
inline T* global_memory(void* p) {
  return const_cast<T*>(global_memory<T>(const_cast<const void*>(p)));
}

// Words one by one, volatile so that they are neither merged nor dropped. `T` is Words4, Words2, uint32_t, ...
template <class T>
inline T load(const void* from) {
  if constexpr (sizeof(T) <= 4) {
    return *static_cast<const volatile T*>(from);
  } else {
    T v;
    for (size_t i = 0; i < sizeof(T) / 4; ++i) v.word[i] = static_cast<const volatile uint32_t*>(from)[i];
    return v;
  }
}
template <class T>
inline void store(void* to, const T& v) {
  if constexpr (sizeof(T) <= 4) {
    *static_cast<volatile T*>(to) = v;
  } else {
    for (size_t i = 0; i < sizeof(T) / 4; ++i) static_cast<volatile uint32_t*>(to)[i] = v.word[i];
  }
}

// ---- cp.async ----

constexpr uint32_t kPoisonWord = 0xcdcdcdcd;

// The destination is poison from now on, so that reading it too early, or requesting it while somebody still reads what
// was there, gives wrong numbers (and a race).
inline void request_copy(uint32_t to, const void* from, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(bytes) != 0) fail("misaligned source of cp.async");
  unsigned char* const destination = shared_memory(to, static_cast<uint32_t>(bytes));
  for (int i = 0; i < bytes; i += 4) store(destination + i, kPoisonWord);
  thread->copies.push_back({destination, from, bytes, valid});
}

inline void finish_copies(size_t pending) {
  Thread& t = *thread;
  if (t.groups.size() <= pending) return;
  const size_t done = t.groups.size() - pending;
  const size_t end = t.groups[done - 1];
  for (size_t c = 0; c < end; ++c) {
    const Copy& copy = t.copies[c];
    for (int i = 0; i < copy.bytes; i += 4) {
      store(copy.to + i, copy.valid ? load<uint32_t>(static_cast<const char*>(copy.from) + i) : 0u);
    }
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<ptrdiff_t>(end));
  t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<ptrdiff_t>(done));
  for (size_t& group : t.groups) group -= end;
}

// ---- warp instructions ----

template <unsigned kMatrices, bool kTransposed>
inline void load_matrix(const char* name, uint32_t (&d)[kMatrices], uint32_t address) {
  uint32_t row[4] = {};
  if (thread->index % kLanes < 8 * kMatrices) {  // the other lanes' addresses are ignored
    const auto v = load<cuda::Words4>(shared_memory(address, 16));
    for (int i = 0; i < 4; ++i) row[i] = v.word[i];
  }
  give(0, row);
  warp_instruction(name, &load_matrix_warp<kMatrices, kTransposed>);
  take(d);
}

template <class D, int kSize>
inline void mma(const char* name, void (*work)(Warp&), D (&d)[kSize], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t c[kSize];
  for (int i = 0; i < kSize; ++i) c[i] = std::bit_cast<uint32_t>(d[i]);
  give(kOperandA, a);
  give(kOperandB, b);
  give(kOperandC, c);
  warp_instruction(name, work);
  take(c);
  for (int i = 0; i < kSize; ++i) d[i] = std::bit_cast<D>(c[i]);
}

inline uint32_t exchange(const char* name, uint32_t v, unsigned source) {
  const uint32_t operands[2] = {v, source};
  give(0, operands);
  warp_instruction(name, &shuffle_warp);
  uint32_t result[1];
  take(result);
  return result[0];
}

}  // namespace qkernels::host

namespace qkernels::cuda {

// ---- shared memory ----
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - host::block->shared);
}
inline Words4 load_shared16(uint32_t address) { return host::load<Words4>(host::shared_memory(address, 16)); }
inline Words2 load_shared8(uint32_t address) { return host::load<Words2>(host::shared_memory(address, 8)); }
inline uint32_t load_shared4(uint32_t address) { return host::load<uint32_t>(host::shared_memory(address, 4)); }
inline uint16_t load_shared2(uint32_t address) { return host::load<uint16_t>(host::shared_memory(address, 2)); }
inline void store_shared16(uint32_t address, Words4 v) { host::store(host::shared_memory(address, 16), v); }
inline void store_shared8(uint32_t address, Words2 v) { host::store(host::shared_memory(address, 8), v); }
inline void store_shared4(uint32_t address, uint32_t v) { host::store(host::shared_memory(address, 4), v); }
inline void store_shared2(uint32_t address, uint16_t v) { host::store(host::shared_memory(address, 2), v); }

// ---- asynchronous copies ----
inline void cp_async16(uint32_t to, const void* from) { host::request_copy(to, from, 16, true); }
inline void cp_async16_or_zero(uint32_t to, const void* from, bool valid) { host::request_copy(to, from, 16, valid); }
inline void cp_async8_or_zero(uint32_t to, const void* from, bool valid) { host::request_copy(to, from, 8, valid); }
inline void cp_async4_or_zero(uint32_t to, const void* from, bool valid) { host::request_copy(to, from, 4, valid); }
inline uint64_t evict_first_policy() { return 0; }
inline void cp_async16_hint(uint32_t to, const void* from, uint64_t) { host::request_copy(to, from, 16, true); }
inline void cp_async_commit() { host::thread->groups.push_back(host::thread->copies.size()); }
template <int kPending>
inline void cp_async_wait() {
  host::finish_copies(kPending);
}

// ---- global memory ----
inline Words4 load_global16(const void* p) { return host::load<Words4>(host::global_memory<Words4>(p)); }
inline Words4 load_global16_stream(const void* p) { return load_global16(p); }
inline Words2 load_global8(const void* p) { return host::load<Words2>(host::global_memory<Words2>(p)); }
inline uint32_t load_global4(const void* p) { return host::load<uint32_t>(host::global_memory<uint32_t>(p)); }
inline uint16_t load_global2(const void* p) { return host::load<uint16_t>(host::global_memory<uint16_t>(p)); }
inline uint32_t load_global1(const void* p) { return host::load<uint8_t>(p); }
inline void store_global16(void* p, Words4 v) { host::store(host::global_memory<Words4>(p), v); }
inline void store_global8(void* p, Words2 v) { host::store(host::global_memory<Words2>(p), v); }
inline void store_global4(void* p, uint32_t v) { host::store(host::global_memory<uint32_t>(p), v); }
inline void store_global2(void* p, uint16_t v) { host::store(host::global_memory<uint16_t>(p), v); }

// ---- matrices ----
inline void load_matrix_x1(uint32_t (&d)[1], uint32_t address) {
  host::load_matrix<1, false>("ldmatrix.x1", d, address);
}
inline void load_matrix_x2(uint32_t (&d)[2], uint32_t address) {
  host::load_matrix<2, false>("ldmatrix.x2", d, address);
}
inline void load_matrix_x4(uint32_t (&d)[4], uint32_t address) {
  host::load_matrix<4, false>("ldmatrix.x4", d, address);
}
inline void load_matrix_x4_transposed(uint32_t (&d)[4], uint32_t address) {
  host::load_matrix<4, true>("ldmatrix.x4.trans", d, address);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma("mma.f16", &host::mma_warp<host::Fp16>, d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma("mma.bf16", &host::mma_warp<host::Bf16>, d, a, b);
}
inline void mma_f16_accumulate_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma("mma.f16.f16", &host::mma_warp_accumulate_f16, d, a, b);
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma("mma.s8", &host::mma_warp_s8, d, a, b);
}

// ---- bits ----
template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if ((kTable >> i & 1) != 0) d |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  }
  return d;
}
template <int kBits>
inline uint32_t shift_right_by_multiplying(uint32_t value) {
  return static_cast<uint32_t>(uint64_t{value} * (1u << (32 - kBits)) >> 32);
}
inline void keep(uint32_t&) {}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (nibble & 7)));
    const uint8_t result = (nibble & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xff : 0;  // bit 3: the sign, eight times
    d |= static_cast<uint32_t>(result) << (8 * i);
  }
  return d;
}

// ---- pairs ---- (24 bits of float hold twice the 11 of fp16 and two more, so add and mul may round to float first)
inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
  using host::Fp16, host::low, host::high;
  return host::pack<Fp16>(low<Fp16>(a) + low<Fp16>(b), high<Fp16>(a) + high<Fp16>(b));
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) { return add_f16x2(a, b ^ 0x80008000u); }
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  using host::Fp16, host::low, host::high;
  return host::pack<Fp16>(low<Fp16>(a) * low<Fp16>(b), high<Fp16>(a) * high<Fp16>(b));
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) { return host::fma2<host::Fp16>(a, b, c); }
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) { return host::fma2<host::Bf16>(a, b, c); }

// ---- conversions ----
inline float multiply_rounded(float a, float b) { return a * b; }
inline float add_rounded(float a, float b) { return a + b; }
inline float divide_rounded(float a, float b) { return a / b; }
inline float exp2_approximately(float v) { return std::exp2(v); }
inline float erf_of(float v) { return std::erf(v); }
inline uint32_t pack_f16x2(float low, float high) { return host::pack<host::Fp16>(low, high); }
inline uint32_t pack_bf16x2(float low, float high) { return host::pack<host::Bf16>(low, high); }
inline float f16_to_float(uint16_t h) { return host::Fp16::to_float(h); }
inline float bits_to_float(uint32_t bits) { return host::bits_float(bits); }
inline uint32_t float_to_bits(float f) { return host::float_bits(f); }

// ---- lanes and warps ----
inline uint32_t shuffle_xor(uint32_t v, int mask) {
  return host::exchange("shfl.bfly", v, host::thread->index % host::kLanes ^ static_cast<unsigned>(mask));
}
inline float shuffle_xor(float v, int mask) { return bits_to_float(shuffle_xor(float_to_bits(v), mask)); }
inline uint32_t shuffle(uint32_t v, int lane) { return host::exchange("shfl.idx", v, static_cast<unsigned>(lane)); }
inline float shuffle(float v, int lane) { return bits_to_float(shuffle(float_to_bits(v), lane)); }
inline bool any_lane(bool v) {
  const uint32_t operand[1] = {v};
  host::give(0, operand);
  host::warp_instruction("vote.any", &host::any_warp);
  uint32_t result[1];
  host::take(result);
  return result[0] != 0;
}
inline void named_barrier_sync(int id, int threads) { host::barrier_sync(id, static_cast<unsigned>(threads)); }
inline void named_barrier_arrive(int id, int threads) { host::arrive(id, static_cast<unsigned>(threads), false); }

}  // namespace qkernels::cuda
