// SPDX-License-Identifier: Apache-2.0
// Products of rows of activations with a panel of 32 columns of weights, which ragged_moe.cpp describes.
//
// Weights are of the activations' type, or codes of 8 bits: E4M3, or integers as a sign and seven bits, with -0 for
// -128. 64 bytes hold two neighbours along K of all columns, [4][2 halves of the panel][4 columns][2], so that
// interleaving two registers, of low and of high bytes of bfloat16, leaves the order of a bfloat16 panel. Every code is
// a bfloat16 number exactly.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;  // neurons of a panel
constexpr int64_t kPanel = 2 * kLanes;
#ifdef __AVX512F__
constexpr int64_t kWidth = 16;         // columns of one vector register
constexpr int64_t kAccumulators = 24;  // of the 32 registers
constexpr int64_t kRows = 12;          // rows of the micro-kernel: 12 x 2 accumulators
constexpr int64_t kHeld = 2;           // vectors of weights in registers at a time
#else
constexpr int64_t kWidth = 8;
constexpr int64_t kAccumulators = 12;  // of the 16 registers
constexpr int64_t kRows = 6;           // 6 x 2 accumulators and two passes over a panel, or 3 x 4 and one
constexpr int64_t kHeld = 1;
#endif
constexpr int64_t kRowBlock = 96;         // rows of a product: their activations stay in the L2 cache
constexpr int64_t kAmxRows = 32;          // rows of a product on AMX tiles, two by two of them
constexpr int64_t kAmxUnit = 16;          // rows of a tile; what is missing is computed and thrown away
constexpr int64_t kFewRows = 5;           // with fewer rows reading weights dominates; not timed on AMX
constexpr int64_t kPrefetch = 8192;       // bytes ahead in the stream of weights; 2048 and 32768 were slower
constexpr int64_t kDecodedBytes = 16384;  // of weights that are decoded at a time: they stay in the L1 cache
constexpr int64_t kVectors = kPanel / kWidth;

typedef float Vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

// One step along K: P values of a row times P values of each of kWidth columns, which `load` reads. `Row` is the type
// that activations have here: float where they would be converted at every use.
template <typename T>
struct Step;

template <>
struct Step<float> {
  using Row = float;
  using Columns = Vec;
  static constexpr int64_t kPairs = 1;
  static Columns load(const float* b) { return *reinterpret_cast<const Vec*>(b); }
  static void fma(Vec& acc, const Row* a, Columns b) { acc += *a * b; }
};

template <>
struct Step<at::Half> {
  using Row = float;
  using Columns = Vec;
  static constexpr int64_t kPairs = 1;
  static Columns load(const at::Half* b) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
#else
    Vec wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = static_cast<float>(b[i]);
    return wide;
#endif
  }
  static void fma(Vec& acc, const Row* a, Columns b) { acc += *a * b; }
};

template <>
struct Step<at::BFloat16> {
  static constexpr int64_t kPairs = 2;
#ifdef __AVX512BF16__
  using Row = at::BFloat16;
  using Columns = __m512bh;
  static Columns load(const at::BFloat16* b) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)); }
  static void fma(Vec& acc, const Row* a, Columns b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    acc = _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), b);
  }
#else
  using Row = float;
  struct Columns {
    Vec even, odd;
  };
  static Columns load(const at::BFloat16* b) {
    const Bits bits = *reinterpret_cast<const Bits*>(b);
    return {reinterpret_cast<Vec>(bits << 16), reinterpret_cast<Vec>(bits & 0xffff0000u)};
  }
  static void fma(Vec& acc, const Row* a, Columns b) {
    acc += a[0] * b.even;
    acc += a[1] * b.odd;
  }
#endif
};

inline Vec& vector_at(float* values) { return *reinterpret_cast<Vec*>(values); }
inline const Vec& vector_at(const float* values) { return *reinterpret_cast<const Vec*>(values); }

// Sums of codes are multiplied with their columns' scales and added to `out`; others, without scales, replace it.
inline void finish(const Vec& sum, const float* scale, float* out) {
  if (scale)
    vector_at(out) += sum * vector_at(scale);
  else
    vector_at(out) = sum;
}

// out[r][32] = rows[r][begin : end] times a panel, for `Rows` rows, finished with the columns' scales; in two passes if
// there are accumulators for half of it. Weights that come from memory are prefetched.
template <typename T, bool kFromMemory, int Rows>
void multiply(const typename Step<T>::Row* const* rows, int64_t begin, int64_t end, const T* panel, const float* scale,
              float* out) {
  constexpr int64_t pairs = Step<T>::kPairs;
  constexpr int64_t vectors = kVectors * Rows <= kAccumulators ? kVectors : kLanes / kWidth;
  for (int64_t column = 0; column < kPanel; column += vectors * kWidth) {
    Vec acc[Rows][vectors] = {};
    const T* b = panel + column * pairs;
    for (int64_t k = begin; k < end; k += pairs, b += kPanel * pairs) {
#pragma GCC unroll 4
      for (int first = 0; first < vectors; first += kHeld) {
        const T* part = b + first * kWidth * pairs;
        typename Step<T>::Columns columns[kHeld];
#pragma GCC unroll 2
        for (int v = 0; v < kHeld; ++v) {
          if (kFromMemory && (first + v) * kWidth % kLanes == 0)
            __builtin_prefetch(reinterpret_cast<const char*>(part + v * kWidth * pairs) + kPrefetch);
          columns[v] = Step<T>::load(part + v * kWidth * pairs);
        }
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kHeld; ++v) Step<T>::fma(acc[r][first + v], rows[r] + k, columns[v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = column + v * kWidth;
        finish(acc[r][v], scale ? scale + first : nullptr, out + r * kPanel + first);
      }
  }
}

template <typename T, bool kFromMemory, int Rows = kRows>
void multiply(int64_t count, const typename Step<T>::Row* const* rows, int64_t begin, int64_t end, const T* panel,
              const float* scale, float* out) {
  if constexpr (Rows > 0) {
    if (count == Rows) return multiply<T, kFromMemory, Rows>(rows, begin, end, panel, scale, out);
    multiply<T, kFromMemory, Rows - 1>(count, rows, begin, end, panel, scale, out);
  }
}

// Whether `count` rows go to AMX tiles, through PyTorch's brgemm, which reads the same panels. HEAPR_AMX is defined
// where the CPU has them; elsewhere brgemm gives the same bits as `multiply`, for tests.
template <typename T>
bool on_tiles(int64_t count) {
#ifdef HEAPR_AMX
  return std::is_same_v<T, at::BFloat16> && count >= kFewRows;
#else
  return false;
#endif
}

// Up to kRowBlock rows of activations. With `tiled` they lie one after the other, `stride` elements each, and so many
// more can be read that kAmxUnit divides their number.
template <typename Row>
struct Block {
  const Row* const* rows;
  int64_t count, stride;
  bool tiled;
};

// As `multiply` on tiles. brgemm compiles a kernel per shape and thread, so two per depth.
template <typename Row>
void multiply_tiles(int64_t count, const Row* rows, int64_t stride, int64_t depth, const Row* panel,
                    const float* scale, float* out) {
  float sums[kAmxRows * kPanel];
  at::native::cpublas::brgemm(at::divup(count, kAmxUnit) * kAmxUnit, kPanel, depth, stride, kPanel, kPanel, false,
                              rows, panel, sums);
  for (int64_t i = 0; i < count * kPanel; i += kWidth)
    finish(vector_at(sums + i), scale ? scale + i % kPanel : nullptr, out + i);
}

// Calls f(first, count) for runs of rows that cover [0, end): whole tiles, or at most kRows, even to one row.
template <typename F>
void for_runs(int64_t end, bool tiled, const F& f) {
  int64_t begin = 0;
  for (int64_t runs = at::divup(end, tiled ? kAmxRows : kRows); runs > 0; --runs) {
    const int64_t count = tiled ? std::min(kAmxRows, end - begin) : at::divup(end - begin, runs);
    f(begin, count);
    begin += count;
  }
}

// out[r][32] = block.rows[r][begin : end] times a panel, in runs.
template <typename T, bool kFromMemory>
void multiply(const Block<typename Step<T>::Row>& block, int64_t begin, int64_t end, const T* panel,
              const float* scale, float* out) {
  for_runs(block.count, block.tiled, [&](int64_t first, int64_t count) {
    if constexpr (std::is_same_v<typename Step<T>::Row, at::BFloat16>)
      if (block.tiled)
        return multiply_tiles(count, block.rows[first] + begin, block.stride, end - begin, panel, scale,
                              out + first * kPanel);
    multiply<T, kFromMemory>(count, block.rows + first, begin, end, panel, scale, out + first * kPanel);
  });
}

// Two neighbours along K, of all columns of a panel, in bfloat16.
struct Pairs {
  Bits columns[kVectors];
};

#ifdef __AVX512VBMI__
// Bits in bfloat16 of `number` * 2^exponent, of at most 7 bits.
constexpr uint32_t bfloat16_bits(uint32_t number, int exponent) {
  if (number == 0) return 0;
  const int highest = 31 - __builtin_clz(number);
  return ((127 + exponent + highest) << 7) + ((number << (7 - highest)) & 0x7f);
}

// The number, in bfloat16, of a code without its sign; 0x7f is none in E4M3.
template <typename Code>
constexpr uint32_t magnitude(uint32_t code) {
  if constexpr (std::is_same_v<Code, int8_t>) return bfloat16_bits(code, 0);
  if (code == 0x7f) return 0x7fff;
  return code < 8 ? bfloat16_bits(code, -9) : (code << 4) + (120 << 7);
}

// Byte `shift` / 8 of every magnitude.
template <typename Code>
constexpr std::array<uint8_t, 128> byte_table(int shift) {
  std::array<uint8_t, 128> table{};
  for (uint32_t code = 0; code < 128; ++code) table[code] = magnitude<Code>(code) >> shift & 0xff;
  return table;
}

template <typename Code>
struct Decoder {
  alignas(64) static constexpr std::array<uint8_t, 128> kLow = byte_table<Code>(0), kHigh = byte_table<Code>(8);
  const __m512i low[2] = {_mm512_load_si512(kLow.data()), _mm512_load_si512(kLow.data() + 64)};
  const __m512i high[2] = {_mm512_load_si512(kHigh.data()), _mm512_load_si512(kHigh.data() + 64)};

  Pairs operator()(const uint8_t* codes) const {
    const __m512i code = _mm512_loadu_si512(codes), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low_byte = _mm512_permutex2var_epi8(low[0], code, low[1]);
    __m512i high_byte = _mm512_permutex2var_epi8(high[0], code, high[1]);
    high_byte = _mm512_ternarylogic_epi32(high_byte, code, sign, 0xf8);  // high_byte | (code & sign)
    if constexpr (std::is_same_v<Code, int8_t>) {
      const __m512i minus_128 = _mm512_set1_epi8(static_cast<char>(0xc3));  // and low byte 0
      high_byte = _mm512_mask_mov_epi8(high_byte, _mm512_cmpeq_epi8_mask(code, sign), minus_128);
    }
    return {reinterpret_cast<Bits>(_mm512_unpacklo_epi8(low_byte, high_byte)),
            reinterpret_cast<Bits>(_mm512_unpackhi_epi8(low_byte, high_byte))};
  }
};
#else
template <typename Code>
struct Decoder {
  Pairs operator()(const uint8_t* codes) const {
    Pairs pairs;
    for (int64_t v = 0; v < kVectors; ++v) {
      const Bits code = two_codes(codes, v * kWidth);
      pairs.columns[v] = (value(code & 0xff) >> 16) | value(code >> 8);
    }
    return pairs;
  }

 private:
  // Both codes of kWidth columns from `column` on, in the lower half of an element each.
  static Bits two_codes(const uint8_t* codes, int64_t column) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
    uint64_t four_columns[kWidth / 4];
    for (int64_t i = 0; i < kWidth / 4; ++i)
      std::memcpy(four_columns + i, codes + (column % kLanes / 4 + i) * 16 + column / kLanes * 8, 8);
    Halves halves;
    std::memcpy(&halves, four_columns, sizeof(halves));
    return __builtin_convertvector(halves, Bits);
  }

  // Bits in float32, the lower half zero. No operand is denormal.
  static Bits value(Bits code) {
    typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
    const Bits sign = (code & 0x80) << 24, number = code & 0x7f;
    const auto bits_of = [](Bits integers, float factor) {
      return reinterpret_cast<Bits>(__builtin_convertvector(reinterpret_cast<Integers>(integers), Vec) * factor);
    };
    if constexpr (std::is_same_v<Code, int8_t>) return sign | bits_of(number + (code == 0x80 ? 128u : 0u), 1.f);
    const Bits finite = number < 8 ? bits_of(number, 0x1p-9f) : (number << 20) + (120u << 23);
    return sign | (number == 0x7f ? 0x7fff0000u : finite);
  }
};
#endif

// Writes two neighbours along K as `multiply` reads them, in bfloat16 or float32.
template <typename Row>
void store(const Pairs& pairs, Row* decoded) {
  for (int64_t v = 0; v < kVectors; ++v)
    if constexpr (std::is_same_v<Row, float>) {
      vector_at(decoded + v * kWidth) = reinterpret_cast<Vec>(pairs.columns[v] << 16);
      vector_at(decoded + kPanel + v * kWidth) = reinterpret_cast<Vec>(pairs.columns[v] & 0xffff0000u);
    } else {
      std::memcpy(decoded + 2 * v * kWidth, &pairs.columns[v], sizeof(Bits));
    }
}

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
// As `multiply`, with codes that are decoded in registers, and for others' use kept in `decoded` unless it is null.
template <typename Code, int Rows>
void multiply_codes(const at::BFloat16* const* rows, int64_t begin, int64_t end, const uint8_t* codes,
                    const float* scale, at::BFloat16* decoded, float* out) {
  const Decoder<Code> decoder;
  Vec acc[Rows][kVectors] = {};
  for (int64_t k = begin; k < end; k += 2, codes += 2 * kPanel) {
    __builtin_prefetch(codes + kPrefetch);
    const Pairs pairs = decoder(codes);
    if (decoded) store(pairs, decoded + (k - begin) * kPanel);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        Step<at::BFloat16>::fma(acc[r][v], rows[r] + k, reinterpret_cast<__m512bh>(pairs.columns[v]));
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) finish(acc[r][v], scale + v * kWidth, out + r * kPanel + v * kWidth);
}

template <typename Code, int Rows = kRows>
void multiply_codes(int64_t count, const at::BFloat16* const* rows, int64_t begin, int64_t end, const uint8_t* codes,
                    const float* scale, at::BFloat16* decoded, float* out) {
  if constexpr (Rows > 0) {
    if (count == Rows) return multiply_codes<Code, Rows>(rows, begin, end, codes, scale, decoded, out);
    multiply_codes<Code, Rows - 1>(count, rows, begin, end, codes, scale, decoded, out);
  }
}
#endif

// Decodes a panel along K. Returns of how many rows it has computed the product meanwhile: a first run if the CPU
// decodes in registers, which hides what decoding takes, otherwise none.
template <typename Code, typename Row>
int64_t decode(const Block<Row>& block, int64_t begin, int64_t end, const uint8_t* codes, const float* scale,
               Row* decoded, float* out) {
#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Row, at::BFloat16>)
    if (!block.tiled) {
      const int64_t count = at::divup(block.count, at::divup(block.count, kRows));
      multiply_codes<Code>(count, block.rows, begin, end, codes, scale, count < block.count ? decoded : nullptr, out);
      return count;
    }
#endif
  const Decoder<Code> decoder;
  for (int64_t k = begin; k < end; k += 2, codes += 2 * kPanel, decoded += 2 * kPanel) {
    __builtin_prefetch(codes + kPrefetch);
    store(decoder(codes), decoded);
  }
  return 0;
}

// Scales of a panel of codes: [depth / group][32].
struct PanelScales {
  const float* values;
  int64_t group;
};

// out[r][32] = block.rows[r][0 : depth] times a panel of codes. Sums are over as much of K as is decoded at a time or a
// scale group, also where codes are decoded in registers: a row's result does not depend on how many there are.
template <typename T, typename Code>
void multiply_decoded(const Block<typename Step<T>::Row>& block, int64_t depth, const Code* panel, PanelScales scales,
                      float* out) {
  using Row = typename Step<T>::Row;
  constexpr int64_t longest = kDecodedBytes / (kPanel * sizeof(Row));
  alignas(64) Row decoded[longest * kPanel];
  const auto* codes = reinterpret_cast<const uint8_t*>(panel);
  std::fill_n(out, block.count * kPanel, 0.f);
  for (int64_t begin = 0, end; begin < depth; begin = end) {
    const int64_t group = begin / scales.group;
    end = std::min({begin + longest, (group + 1) * scales.group, depth});
    const float* scale = scales.values + group * kPanel;
    const int64_t done = decode<Code>(block, begin, end, codes + begin * kPanel, scale, decoded, out);
    const Block<Row> rest{block.rows + done, block.count - done, block.stride, block.tiled};
    multiply<Row, false>(rest, begin, end, decoded, scale, out + done * kPanel);
  }
}

// out[r][32] = block.rows[r][0 : depth] times a panel; without scales if weights are of the activations' type.
template <typename T, typename W>
void product(const Block<typename Step<T>::Row>& block, int64_t depth, const W* panel, PanelScales scales,
             float* out) {
  if constexpr (std::is_same_v<T, W>)
    multiply<T, true>(block, 0, depth, panel, nullptr, out);
  else
    multiply_decoded<T>(block, depth, panel, scales, out);
}

// Rounds kWidth values to the type of activations.
inline void store(const Vec& values, float* out) { vector_at(out) = values; }
#ifdef __AVX512BF16__
inline void store(const Vec& values, at::BFloat16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}
#endif

}  // namespace
