// Chunks of sixteen blocks: read, searched, and written as the bytes of their type (qkernels/formats/gguf/basic.py and
// kquants.py say what lies where).
#pragma once
#include "gguf_best.h"

namespace qkernels::cpu {
namespace {

inline void first_of(std::atomic<int64_t>& least, int64_t row) {
  int64_t seen = least.load(std::memory_order_relaxed);
  while (row < seen && !least.compare_exchange_weak(seen, row, std::memory_order_relaxed)) {
  }
}

template <class Convert, class From>
inline void widen(const From* from, int64_t n, float* to, Convert convert) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
}
inline void widen(const GgufCall& call, int64_t at, int64_t n, float* to) {
  const auto* halves = static_cast<const uint16_t*>(call.weight);
  if (call.weight_type == Type::kBFloat16) {
    widen(halves + at, n, to, [](uint16_t v) { return from_bf16(v); });
  } else if (call.weight_type == Type::kHalf) {
    widen(halves + at, n, to, [](uint16_t v) { return from_half(v); });
  } else {
    std::memcpy(to, static_cast<const float*>(call.weight) + at, n * sizeof(float));
  }
}

// Blocks begin ... begin + count - 1 of the weight.
inline void read_chunk(const GgufCall& call, int64_t begin, int count, Chunk& c) {
  const int elements = c.shape.elements;
  const int64_t per_row = call.columns / elements;
  widen(call, begin * elements, int64_t{count} * elements, c.x);
  for (int i = count * elements; i < kBlocks * elements; ++i) c.x[i] = 0.0f;
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t block = begin + (b < count ? b : 0);
    if (c.weighted) {
      std::memcpy(c.importance + b * elements, call.importance + block % per_row * elements, elements * sizeof(float));
    }
    c.variance[b] = call.row_variance != nullptr ? call.row_variance[block / per_row] : 0.0f;
  }
  uint32_t largest = 0;
  for (int i = 0; i < count * elements; ++i) largest = std::max(largest, as_bits(c.x[i]) & 0x7fffffff);
  if (largest < 0x7f800000) return;
  for (int b = 0; b < count; ++b) {
    for (int i = b * elements; i < (b + 1) * elements; ++i) {
      if ((as_bits(c.x[i]) & 0x7fffffff) >= 0x7f800000) first_of(*call.not_finite, (begin + b) / per_row);
    }
  }
}

// --- bytes ---

inline void put_half(uint8_t* to, uint16_t half) { to[0] = static_cast<uint8_t>(half), to[1] = half >> 8; }

inline void nibbles_of_32(const uint8_t* codes, uint8_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = (codes[i] & 15) | (codes[i + 16] << 4);
}
inline void fifths_of_32(const uint8_t* codes, uint8_t* to) {
  for (int i = 0; i < 4; ++i) {
    to[i] = 0;
    for (int bit = 0; bit < 8; ++bit) to[i] |= (codes[8 * i + bit] >> 4) << bit;
  }
}
inline void two_bits(const uint8_t* codes, uint8_t* to) {  // [64]
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 32; ++i) {
      const uint8_t* c = codes + 128 * h + i;
      to[32 * h + i] = (c[0] & 3) | ((c[32] & 3) << 2) | ((c[64] & 3) << 4) | ((c[96] & 3) << 6);
    }
  }
}
inline void nibbles_by_64(const uint8_t* codes, uint8_t* to) {  // [128]
  for (int h = 0; h < 4; ++h) {
    for (int i = 0; i < 32; ++i) to[32 * h + i] = (codes[64 * h + i] & 15) | ((codes[64 * h + 32 + i] & 15) << 4);
  }
}
// Bit e / 32 of byte e % 32 is bit `bit` of code e.
inline void bits_by_32(const uint8_t* codes, int bit, uint8_t* to) {
  for (int i = 0; i < 32; ++i) {
    to[i] = 0;
    for (int j = 0; j < 8; ++j) to[i] |= ((codes[32 * j + i] >> bit) & 1) << j;
  }
}
inline void six_bits(const float* small, const float* minima, uint8_t* to) {
  uint8_t s[8], m[8];
  for (int i = 0; i < 8; ++i) s[i] = static_cast<uint8_t>(small[i]), m[i] = static_cast<uint8_t>(minima[i]);
  for (int i = 0; i < 4; ++i) {
    to[i] = s[i] | ((s[i + 4] >> 4) << 6);
    to[i + 4] = m[i] | ((m[i + 4] >> 4) << 6);
    to[i + 8] = (s[i + 4] & 15) | ((m[i + 4] & 15) << 4);
  }
}
inline void bytes_q6_k(const uint8_t* codes, const float* small, uint16_t d, uint8_t* to) {
  for (int h = 0; h < 2; ++h) {
    const uint8_t* c = codes + 128 * h;
    for (int i = 0; i < 64; ++i) to[64 * h + i] = (c[i] & 15) | ((c[i + 64] & 15) << 4);
    for (int i = 0; i < 32; ++i) {
      to[128 + 32 * h + i] = (c[i] >> 4) | ((c[i + 32] >> 4) << 2) | ((c[i + 64] >> 4) << 4) | ((c[i + 96] >> 4) << 6);
    }
  }
  for (int i = 0; i < 16; ++i) to[192 + i] = static_cast<uint8_t>(static_cast<int8_t>(small[i]));
  put_half(to + 208, d);
}
inline void bytes_q3_k(const uint8_t* codes, const float* small, uint16_t d, uint8_t* to) {
  bits_by_32(codes, 2, to);
  two_bits(codes, to + 32);
  uint8_t s[16];
  for (int i = 0; i < 16; ++i) s[i] = static_cast<uint8_t>(static_cast<int>(small[i]) + 32);
  for (int i = 0; i < 8; ++i) to[96 + i] = (s[i] & 15) | ((s[i + 8] & 15) << 4);
  for (int i = 0; i < 4; ++i) {
    to[104 + i] = (s[i] >> 4) | ((s[i + 4] >> 4) << 2) | ((s[i + 8] >> 4) << 4) | ((s[i + 12] >> 4) << 6);
  }
  put_half(to + 108, d);
}
inline void bytes_iq4_xs(const uint8_t* codes, const float* small, uint16_t d, uint8_t* to) {
  put_half(to, d);
  uint16_t high = 0;
  for (int i = 0; i < 4; ++i) to[4 + i] = 0;
  for (int i = 0; i < 8; ++i) {
    const int s = static_cast<int>(small[i]) + 32;
    to[4 + i / 2] |= (s & 15) << (4 * (i % 2));
    high |= static_cast<uint16_t>((s >> 4) << (2 * i));
    nibbles_of_32(codes + 32 * i, to + 8 + 16 * i);
  }
  put_half(to + 2, high);
}

// Block b of what was found.
inline void write_block(GgufType type, const Found& found, int b, const GgufShape& shape, uint8_t* to) {
  const int per = shape.elements / shape.group;
  const uint8_t* codes = found.codes + b * shape.elements;
  const float *small = found.small + b * per, *minima = found.minima + b * per;
  const uint16_t d = to_half(found.d[b]), dmin = to_half(found.dmin[b]);
  switch (type) {
    case GgufType::kQ4_0:
    case GgufType::kIq4Nl:
      put_half(to, d), nibbles_of_32(codes, to + 2);
      break;
    case GgufType::kQ4_1:
      put_half(to, d), put_half(to + 2, dmin), nibbles_of_32(codes, to + 4);
      break;
    case GgufType::kQ5_0:
      put_half(to, d), fifths_of_32(codes, to + 2), nibbles_of_32(codes, to + 6);
      break;
    case GgufType::kQ5_1:
      put_half(to, d), put_half(to + 2, dmin), fifths_of_32(codes, to + 4), nibbles_of_32(codes, to + 8);
      break;
    case GgufType::kQ8_0:
      put_half(to, d);
      for (int i = 0; i < 32; ++i) to[2 + i] = codes[i] ^ 128;
      break;
    case GgufType::kQ2K:
      for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(small[i]) | (static_cast<uint8_t>(minima[i]) << 4);
      two_bits(codes, to + 16), put_half(to + 80, d), put_half(to + 82, dmin);
      break;
    case GgufType::kQ3K:
      bytes_q3_k(codes, small, d, to);
      break;
    case GgufType::kQ4K:
      put_half(to, d), put_half(to + 2, dmin), six_bits(small, minima, to + 4), nibbles_by_64(codes, to + 16);
      break;
    case GgufType::kQ5K:
      put_half(to, d), put_half(to + 2, dmin), six_bits(small, minima, to + 4);
      bits_by_32(codes, 4, to + 16), nibbles_by_64(codes, to + 48);
      break;
    case GgufType::kQ6K:
      bytes_q6_k(codes, small, d, to);
      break;
    case GgufType::kIq4Xs:
      bytes_iq4_xs(codes, small, d, to);
      break;
    case GgufType::kMxfp4:
      to[0] = static_cast<uint8_t>(small[0]), nibbles_of_32(codes, to + 1);
      break;
  }
}

inline void search_plain(GgufType type, const Chunk& c, Found& found) {
  switch (type) {
    case GgufType::kQ4_0:
      return search_signed(c, 8, found);
    case GgufType::kQ4_1:
      return search_range(c, 15, found);
    case GgufType::kQ5_0:
      return search_signed(c, 16, found);
    case GgufType::kQ5_1:
      return search_range(c, 31, found);
    case GgufType::kQ8_0:
      return search_q8_0(c, found);
    case GgufType::kQ2K:
      return search_lines<16>(c, 3, 15, {-0.5f, 0.1f, 16}, true, found);
    case GgufType::kQ3K:
      return search_q3_k(c, found);
    case GgufType::kQ4K:
      return search_lines<32>(c, 15, 63, {-1.0f, 0.1f, 21}, false, found);
    case GgufType::kQ5K:
      return search_lines<32>(c, 31, 63, {-0.5f, 0.1f, 16}, false, found);
    case GgufType::kQ6K:
      return search_q6_k(c, found);
    case GgufType::kIq4Nl:
    case GgufType::kIq4Xs:
      return search_iq4(c, found);
    case GgufType::kMxfp4:
      return search_mxfp4(c, found);
  }
}

inline void search_blocks(const GgufCall& call, int64_t begin, int64_t end) {
  Chunk c;
  c.shape = shape_of(call.type), c.weighted = call.importance != nullptr;
  Found found;
  const int64_t per_row = call.columns / c.shape.elements;
  for (int64_t first = begin; first < end; first += kBlocks) {
    const int count = static_cast<int>(std::min<int64_t>(kBlocks, end - first));
    read_chunk(call, first, count, c);
    search_plain(call.type, c, found);
    if (call.best) search_best(call.type, c, found);
    for (int b = 0; b < count; ++b) {
      const auto infinite = [](float v) { return (to_half(v) & 0x7fff) >= 0x7c00; };
      if (infinite(found.d[b]) || (has_minima(call.type) && infinite(found.dmin[b]))) {
        first_of(*call.too_large, (first + b) / per_row);
      }
      write_block(call.type, found, b, c.shape, call.out + (first + b) * c.shape.bytes);
    }
  }
}

// Mean square of rows begin ... end - 1, each summed in order; eight at a time, since a sum waits for itself.
inline void row_variances(const GgufCall& call, int64_t begin, int64_t end) {
  constexpr int kRows = 8, kColumns = 256;
  float x[kRows][kColumns];
  for (int64_t first = begin; first < end; first += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - first));
    float sum[kRows] = {};
    for (int64_t k = 0; k < call.columns; k += kColumns) {
      const int64_t n = std::min<int64_t>(kColumns, call.columns - k);
      for (int r = 0; r < rows; ++r) widen(call, (first + r) * call.columns + k, n, x[r]);
      for (int64_t i = 0; i < n; ++i) {
        for (int r = 0; r < kRows; ++r) sum[r] += x[r][i] * x[r][i];
      }
    }
    for (int r = 0; r < rows; ++r) call.row_variance[first + r] = sum[r] / static_cast<float>(call.columns);
  }
}

}  // namespace
}  // namespace qkernels::cpu
