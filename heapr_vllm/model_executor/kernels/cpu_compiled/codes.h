// SPDX-License-Identifier: Apache-2.0
// Products with panels of codes, which are decoded on the way.
//
// Codes are of 8 bits: E4M3, or integers as a sign and seven bits, with -0 for -128. 64 bytes hold two neighbours along
// K of all columns, [4][2 halves of the panel][4 columns][2], so that interleaving two registers, of low and of high
// bytes of bfloat16, leaves the order of a bfloat16 panel. Or they are of 4 bits, integers with 8 added: 64 bytes hold
// four neighbours along K, [16 columns][2] elements of 16 bits, whose nibbles are those of [2 pairs][2 halves], lowest
// first, so that every nibble of all elements makes a register of a bfloat16 panel. Every code is a bfloat16 number
// exactly.

#pragma once

#include <array>

#include "panels.h"

namespace {

// Two codes of 4 bits.
struct Nibbles {
  uint8_t byte;
};

template <typename W>
constexpr int64_t kCodesPerByte = 1;
template <>
constexpr int64_t kCodesPerByte<Nibbles> = 2;

// Two neighbours along K, of all columns of a panel, in bfloat16.
struct Pairs {
  Bits columns[kVectors];
};

// Decodes 64 bytes: neighbours along K in pairs.
template <typename Code>
struct Decoder;
template <typename Code>
using Decoded = std::array<Pairs, kCodesPerByte<Code>>;

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

  Decoded<Code> operator()(const uint8_t* codes) const {
    const __m512i code = _mm512_loadu_si512(codes), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low_byte = _mm512_permutex2var_epi8(low[0], code, low[1]);
    __m512i high_byte = _mm512_permutex2var_epi8(high[0], code, high[1]);
    high_byte = _mm512_ternarylogic_epi32(high_byte, code, sign, 0xf8);  // high_byte | (code & sign)
    if constexpr (std::is_same_v<Code, int8_t>) {
      const __m512i minus_128 = _mm512_set1_epi8(static_cast<char>(0xc3));  // and low byte 0
      high_byte = _mm512_mask_mov_epi8(high_byte, _mm512_cmpeq_epi8_mask(code, sign), minus_128);
    }
    return {Pairs{reinterpret_cast<Bits>(_mm512_unpacklo_epi8(low_byte, high_byte)),
                  reinterpret_cast<Bits>(_mm512_unpackhi_epi8(low_byte, high_byte))}};
  }
};
#else
template <typename Code>
struct Decoder {
  Decoded<Code> operator()(const uint8_t* codes) const {
    Pairs pairs;
    for (int64_t v = 0; v < kVectors; ++v) {
      const Bits code = two_codes(codes, v * kWidth);
      pairs.columns[v] = (value(code & 0xff) >> 16) | value(code >> 8);
    }
    return {pairs};
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

#ifdef __AVX512BW__
template <>
struct Decoder<Nibbles> {
  // Bits in bfloat16 of -8 to 7, twice, since an index is of five bits.
  alignas(64) static constexpr std::array<uint16_t, 32> kTable = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
      0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i table = _mm512_load_si512(kTable.data());

  Decoded<Nibbles> operator()(const uint8_t* codes) const {
    const __m512i code = _mm512_loadu_si512(codes);
    const auto decoded = [&](__m512i index) {
      return reinterpret_cast<Bits>(_mm512_permutexvar_epi16(index, table));
    };
    return {Pairs{decoded(code), decoded(_mm512_srli_epi16(code, 4))},
            Pairs{decoded(_mm512_srli_epi16(code, 8)), decoded(_mm512_srli_epi16(code, 12))}};
  }
};
#else
template <>
struct Decoder<Nibbles> {
  Decoded<Nibbles> operator()(const uint8_t* codes) const {
    Decoded<Nibbles> decoded;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t column = v * kWidth;
      const Bits elements = *reinterpret_cast<const Bits*>(codes + column % kLanes * 4);
      for (int64_t pair = 0; pair < 2; ++pair) {
        const Bits nibbles = elements >> static_cast<uint32_t>(8 * pair + column / kLanes * 4);
        decoded[pair].columns[v] = (value(nibbles & 15) >> 16) | value(nibbles >> 16 & 15);
      }
    }
    return decoded;
  }

 private:
  // Bits in float32, the lower half zero.
  static Bits value(Bits nibble) {
    typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
    return reinterpret_cast<Bits>(__builtin_convertvector(reinterpret_cast<Integers>(nibble) - 8, Vec));
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
// As `multiply`, with codes that are decoded in registers, and for others' use kept in `decoded` unless it is null. A
// function of its own, since inlined it took a third longer with codes of 4 bits.
template <typename Code, int Rows>
[[gnu::noinline]] void multiply_codes(const at::BFloat16* const* rows, int64_t begin, int64_t end,
                                      const uint8_t* codes, const float* scale, at::BFloat16* decoded, float* out) {
  const Decoder<Code> decoder;
  Vec acc[Rows][kVectors] = {};
  for (int64_t k = begin; k < end; codes += 64) {
    __builtin_prefetch(codes + kPrefetch);
    for (const Pairs& pairs : decoder(codes)) {
      if (decoded) store(pairs, decoded + (k - begin) * kPanel);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          Step<at::BFloat16>::fma(acc[r][v], rows[r] + k, reinterpret_cast<__m512bh>(pairs.columns[v]));
      k += 2;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) finish(acc[r][v], scale + v * kWidth, out + r * kPanel + v * kWidth);
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
      Row* kept = count < block.count ? decoded : nullptr;
      with_constant<1, kRows>(count, [&](auto rows) {
        multiply_codes<Code, decltype(rows)::value>(block.rows, begin, end, codes, scale, kept, out);
      });
      return count;
    }
#endif
  const Decoder<Code> decoder;
  for (const Row* last = decoded + (end - begin) * kPanel; decoded < last; codes += 64) {
    __builtin_prefetch(codes + kPrefetch);
    for (const Pairs& pairs : decoder(codes)) {
      store(pairs, decoded);
      decoded += 2 * kPanel;
    }
  }
  return 0;
}

// out[r][32] = block.rows[r][0 : depth] times a panel of codes. Sums are over as much of K as is decoded at a time or a
// scale group, also where codes are decoded in registers: a row's result does not depend on how many there are.
template <typename T, typename Code>
void multiply_decoded(const Block<typename Step<T>::Row>& block, int64_t depth, const Code* panel, PanelScales scales,
                      float* out) {
  using Row = typename Step<T>::Row;
  constexpr int64_t longest = kPartBytes / (kPanel * sizeof(Row));
  alignas(64) Row decoded[longest * kPanel];
  const auto* codes = reinterpret_cast<const uint8_t*>(panel);
  std::fill_n(out, block.count * kPanel, 0.f);
  for (int64_t begin = 0, end; begin < depth; begin = end) {
    const int64_t group = begin / scales.group;
    end = std::min({begin + longest, (group + 1) * scales.group, depth});
    const float* scale = scales.values + group * kPanel;
    const uint8_t* first = codes + begin * kPanel / kCodesPerByte<Code>;
    const int64_t done = decode<Code>(block, begin, end, first, scale, decoded, out);
    const Block<Row> rest{block.rows + done, block.count - done, block.stride, block.tiled};
    if (!multiply_if_tiled(rest, begin, end, decoded, scale, out + done * kPanel))
      multiply<Row, 0>(rest, begin, end, decoded, scale, out + done * kPanel);
  }
}

// out[r][32] = block.rows[r][0 : depth] times a panel; without scales if weights are of the activations' type.
template <typename T, typename W>
void product(const Block<typename Step<T>::Row>& block, int64_t depth, const W* panel, PanelScales scales,
             float* out) {
  if constexpr (!std::is_same_v<T, W>)
    multiply_decoded<T>(block, depth, panel, scales, out);
  else if (!multiply_if_tiled(block, 0, depth, panel, nullptr, out))
    multiply(block, depth, panel, out);
}

// Rounds kWidth values to the type of activations.
template <typename T>
void store(const Vec& values, T* out) {
  for (int64_t i = 0; i < kWidth; ++i) out[i] = static_cast<T>(values[i]);
}
inline void store(const Vec& values, float* out) { vector_at(out) = values; }
#ifdef __AVX512BF16__
inline void store(const Vec& values, at::BFloat16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}
#endif

}  // namespace
