// SPDX-License-Identifier: Apache-2.0
// Products of activations in 8 bits with panels of codes, summed as 32-bit integers.
//
// One instruction multiplies four unsigned bytes by four signed ones, so codes have a bias added, 128 in 8 bits and 8
// in 4, and activations keep their sign. A row's sum over a group of K then is too large by the bias times the sum of
// its activations there, which is known before, and from whose negative the sum starts. Of a panel, 128 bytes hold four
// neighbours along K of all columns, [2 halves of the panel][16 columns][4]; in 4 bits 64 bytes do, with the first half
// in the lower nibbles. No sum overflows: a group is at most 128 deep.

#pragma once

#include "codes.h"

namespace {

constexpr int64_t kInputGroup = 128;   // inputs of gate and up, at most, that share a scale
constexpr int64_t kHiddenGroup = 128;  // hidden activations that do; SLAB of a8_kernel.py

// Codes of weights with a bias, as the product with activations in 8 bits reads them.
template <typename Code>
struct Biased {
  static constexpr int32_t kBias = kCodesPerByte<Code> == 1 ? 128 : 8;
  uint8_t byte;
};
template <typename Code>
constexpr int64_t kCodesPerByte<Biased<Code>> = kCodesPerByte<Code>;

template <typename W>
constexpr bool kIntegers = false;
template <typename Code>
constexpr bool kIntegers<Biased<Code>> = true;

// Of a group of a rounded row: what its integers are multiplied by, and what sums of products start from. Those of all
// groups lie behind the integers.
struct RowGroup {
  float scale;
  int32_t start;
};

// Bytes of a rounded row.
inline int64_t rounded_size(int64_t depth, int64_t group) {
  return depth + at::divup(depth, group) * static_cast<int64_t>(sizeof(RowGroup));
}

#ifdef __AVX512VNNI__
inline __m512 load_lanes(const float* values, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, values); }
inline __m512 load_lanes(const at::Half* values, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, values));
}
inline __m512 load_lanes(const at::BFloat16* values, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Rounds a group of at most 64 * kBlocks activations, times factors unless they are null, to integers of at most 127.
// Where a value is not finite, the scale is no number.
template <int kBlocks, bool kFull, typename T>
RowGroup round_group(const T* values, const float* factors, int64_t count, int32_t bias, int8_t* out) {
  const auto lanes = [&](int64_t k) -> __mmask16 { return kFull || k < count ? 0xffff : 0; };
  __m512 products[kBlocks * 4];
  __m512i largest_bits = _mm512_setzero_si512();  // as integers, so that not-a-number is the largest
#pragma GCC unroll 8
  for (int v = 0; v < kBlocks * 4; ++v) {
    const int64_t k = v * kWidth;
    products[v] = load_lanes(values + k, lanes(k));
    if (factors) products[v] *= load_lanes(factors + k, lanes(k));
    largest_bits = _mm512_max_epu32(largest_bits, _mm512_castps_si512(_mm512_abs_ps(products[v])));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(largest_bits);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const __m512 factor = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // of narrowed lanes
  __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int block = 0; block < kBlocks; ++block) {
    const auto integers = [&](int v) { return _mm512_cvtps_epi32(products[4 * block + v] * factor); };
    const __m512i low = _mm512_packs_epi32(integers(0), integers(1));
    const __m512i high = _mm512_packs_epi32(integers(2), integers(3));
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), bytes);
    const int64_t rest = std::min<int64_t>(count - 64 * block, 64);
    if (kFull || rest == 64)
      _mm512_storeu_si512(out + 64 * block, bytes);
    else if (rest > 0)
      _mm512_mask_storeu_epi8(out + 64 * block, (uint64_t{1} << rest) - 1, bytes);
  }
  return {largest / 127, -bias * _mm512_reduce_add_epi32(sums)};
}

// Rounds a row, whose last group may be cut short.
template <typename T>
void round_row(const T* values, const float* factors, int64_t depth, int64_t group, int32_t bias, int8_t* out) {
  auto* groups = reinterpret_cast<RowGroup*>(out + depth);
  for (int64_t begin = 0; begin < depth; begin += group, ++groups) {
    const int64_t count = std::min(group, depth - begin);
    const auto round = count == 128  ? round_group<2, true, T>
                       : count == 64 ? round_group<1, true, T>
                                     : round_group<2, false, T>;
    *groups = round(values + begin, factors ? factors + begin : nullptr, count, bias, out + begin);
  }
}

typedef int32_t Sums __attribute__((vector_size(64)));

// Four neighbours along K of a panel's halves.
struct Fours {
  __m512i halves[2];
};

inline Fours load_fours(const Biased<int8_t>* codes) {
  return {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64)};
}

inline Fours load_fours(const Biased<Nibbles>* codes) {
  const __m512i both = _mm512_loadu_si512(codes), mask = _mm512_set1_epi8(0x0f);
  return {both & mask, _mm512_srli_epi16(both, 4) & mask};
}

// A part of a panel along K, whole groups of it, times several runs of rows.
template <typename Code>
struct Part {
  int64_t depth, group, begin, end;  // of rows
  int64_t number;                    // of the first group
  const Biased<Code>* codes;
  const float* scale;
  int64_t scale_step;  // from a group to the next; 0 within one scale group of the panel
  int64_t ahead;       // bytes from weights to what is prefetched beside them
};

constexpr int64_t kIntegerRows = 8;  // 12 need more registers for their addresses than there are
constexpr int64_t kPart = kPartBytes / kPanel;  // of K; in 4 bits it takes half the bytes
template <typename Code>
constexpr int64_t kFourBytes = 4 * kPanel / kCodesPerByte<Code>;  // of four neighbours along K
template <typename Code>
constexpr int kLines<Biased<Code>> = kUnrolled * kFourBytes<Code> / 64;

// out[r][32] += rows[r] times a part of a panel, for `Rows` rounded rows; prefetches as `multiply` does.
template <typename Code, int Lines, int Rows>
void multiply_part(const int8_t* const* rows, const Part<Code>& part, float* out) {
  const auto* codes = part.codes;
  const float* scale = part.scale;
  const int8_t* row[Rows];  // a copy, which stores to `out` cannot change, for all that the compiler knows
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) row[r] = rows[r];
  int64_t offset = part.depth + part.number * static_cast<int64_t>(sizeof(RowGroup));  // of the group, from a row
  const auto group_of = [&](int r) { return *reinterpret_cast<const RowGroup*>(row[r] + offset); };
  for (int64_t begin = part.begin, end; begin < part.end; begin = end) {
    end = std::min(begin + part.group, part.end);
    const uint8_t* next = &codes->byte + part.ahead;
    Sums acc[Rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = reinterpret_cast<Sums>(_mm512_set1_epi32(group_of(r).start));
    for (int64_t k = begin; k < end; k += 4 * kUnrolled) {  // few times, so that the loop's end is foreseen
#pragma GCC unroll 4
      for (int i = 0; i < kUnrolled; ++i, codes += kFourBytes<Code>) {
#pragma GCC unroll 2
        for (int line = i * Lines / kUnrolled; line < (i + 1) * Lines / kUnrolled; ++line, next += 64)
          __builtin_prefetch(next);
        const Fours fours = load_fours(codes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
          int32_t four;
          std::memcpy(&four, row[r] + k + 4 * i, sizeof(four));
          const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v)
            acc[r][v] = reinterpret_cast<Sums>(
                _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc[r][v]), fours.halves[v], activations));
        }
      }
    }
    const Vec scales[2] = {vector_at(scale), vector_at(scale + kWidth)};
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float row_scale = group_of(r).scale;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        vector_at(out + r * kPanel + v * kWidth) += __builtin_convertvector(acc[r][v], Vec) * scales[v] * row_scale;
    }
    asm volatile("" ::: "memory");  // or the compiler holds `out` in the registers that sums need
    offset += sizeof(RowGroup);
    scale += part.scale_step;
  }
}

// out[r][32] = rounded rows[r] times a panel.
template <typename T, typename Code>
void product(const Block<int8_t>& block, int64_t depth, const Biased<Code>* panel, PanelScales scales, float* out) {
  const bool same_groups = block.group == scales.group;
  const auto bytes_of = [](int64_t k) { return k / 4 * kFourBytes<Code>; };
  std::fill_n(out, block.count * kPanel, 0.f);
  for (int64_t begin = 0, end; begin < depth; begin = end) {
    const int64_t number = begin / scales.group;
    end = std::min({begin + kPart, depth, same_groups ? depth : (number + 1) * scales.group});
    const Biased<Code>* codes = panel + begin * kPanel / kCodesPerByte<Code>;
    Part<Code> part{depth, block.group, begin, end, begin / block.group, codes, scales.values + number * kPanel,
                    same_groups ? kPanel : 0, 0};
    const int64_t runs = at::divup(block.count, kIntegerRows);
    int64_t run = 0;
    with_lines<kLines<Biased<Code>>>(runs, [&](auto lines) {
      for_runs(block.count, kIntegerRows, [&](int64_t first, int64_t count) {
        part.ahead = bytes_ahead(bytes_of(kPart), bytes_of(block.group), runs, run++);
        constexpr int64_t least = decltype(lines)::value < kLines<Biased<Code>> ? kIntegerRows / 2 : 1;
        with_constant<least, kIntegerRows>(count, [&](auto rows) {
          constexpr auto multiply_rows = multiply_part<Code, decltype(lines)::value, decltype(rows)::value>;
          multiply_rows(block.rows + first, part, out + first * kPanel);
        });
      });
    });
  }
}
#endif

}  // namespace
