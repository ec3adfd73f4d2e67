// SPDX-License-Identifier: Apache-2.0
// Products of rows of activations with a panel of 32 columns of weights, which ragged_moe.cpp describes.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
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
constexpr int64_t kPartBytes = 16384;     // of weights that several runs of rows take in turn: they stay in L1
constexpr int kUnrolled = 4;              // steps along K; depths are multiples of as many
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

// Calls f with a number, which is from `Least` to `Most`, as a constant.
template <int Least, int Most, typename F>
void with_constant(int64_t number, const F& f) {
  if constexpr (Least < Most)
    if (number < Most) return with_constant<Least, Most - 1>(number, f);
  f(std::integral_constant<int, Most>());
}

// Calls f with as many lines, as a constant, as each of `runs` runs of rows prefetches so that together they fetch at
// least `Most`; a power of two.
template <int Most, int Lines = Most, typename F>
void with_lines(int64_t runs, const F& f) {
  if constexpr (Lines > 1)
    if (Lines / 2 * runs >= Most) return with_lines<Most, Lines / 2>(runs, f);
  f(std::integral_constant<int, Lines>());
}

// How many bytes ahead of its weights a run of rows starts to prefetch. A single run stays a little ahead of itself. Of
// several, which take the same part of a panel in turn, each fetches its share of the next part, `stride` bytes further
// and `bytes` long, so that memory is read all the time and not during the first run only.
inline int64_t bytes_ahead(int64_t stride, int64_t bytes, int64_t runs, int64_t run) {
  return runs == 1 ? kPrefetch : stride + bytes / runs * run;
}

template <typename T>
constexpr int64_t kStepBytes = kPanel * Step<T>::kPairs * sizeof(T);  // of a panel
template <typename T>
constexpr int kLines = kUnrolled * kStepBytes<T> / 64;  // of 64 bytes, of kUnrolled steps

// out[r][32] = rows[r][begin : end] times a panel, for `Rows` rows, finished with the columns' scales, or without them
// added to the product with [0 : begin]; in two passes if there are accumulators for half of it. In kUnrolled steps it
// prefetches so many lines from `next` on, none where weights lie in the L1 cache: one now and one then, since a burst
// of them, or a loop whose end is guessed wrong, costs up to a fifth of the time (docs/measurements.md, 27 November).
template <typename T, int Lines, int Rows>
void multiply(const typename Step<T>::Row* const* rows, int64_t begin, int64_t end, const T* panel, const float* scale,
              const char* next, float* out) {
  constexpr int64_t pairs = Step<T>::kPairs;
  constexpr int64_t vectors = kVectors * Rows <= kAccumulators ? kVectors : kLanes / kWidth;
  const bool continues = !scale && begin > 0;
  for (int64_t column = 0; column < kPanel; column += vectors * kWidth) {
    Vec acc[Rows][vectors] = {};
    if (continues)
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) acc[r][v] = vector_at(out + r * kPanel + column + v * kWidth);
    const T* b = panel + column * pairs;
    for (int64_t k = begin; k < end; k += kUnrolled * pairs) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnrolled; ++i, b += kPanel * pairs) {
#pragma GCC unroll 2
        for (int line = i * Lines / kUnrolled; line < (i + 1) * Lines / kUnrolled; ++line, next += 64)
          if (column == 0) __builtin_prefetch(next);
#pragma GCC unroll 4
        for (int first = 0; first < vectors; first += kHeld) {
          const T* part = b + first * kWidth * pairs;
          typename Step<T>::Columns columns[kHeld];
#pragma GCC unroll 2
          for (int v = 0; v < kHeld; ++v) columns[v] = Step<T>::load(part + v * kWidth * pairs);
#pragma GCC unroll 12
          for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kHeld; ++v) Step<T>::fma(acc[r][first + v], rows[r] + k + i * pairs, columns[v]);
        }
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
// more can be read that kAmxUnit divides their number. Of integers, `group` neighbours share a scale.
template <typename Row>
struct Block {
  const Row* const* rows;
  int64_t count, stride;
  bool tiled;
  int64_t group = 1;
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

// Calls f(first, count) for runs of at most `longest` rows that cover [0, end), even to one row.
template <typename F>
void for_runs(int64_t end, int64_t longest, const F& f) {
  int64_t begin = 0;
  for (int64_t runs = at::divup(end, longest); runs > 0; --runs) {
    const int64_t count = at::divup(end - begin, runs);
    f(begin, count);
    begin += count;
  }
}

// out[r][32] = block.rows[r][begin : end] times a panel, in runs, as `multiply` of a run does.
template <typename T, int Lines>
void multiply(const Block<typename Step<T>::Row>& block, int64_t begin, int64_t end, const T* panel,
              const float* scale, float* out) {
  const int64_t runs = at::divup(block.count, kRows);
  int64_t run = 0;
  for_runs(block.count, kRows, [&](int64_t first, int64_t count) {
    const int64_t bytes = (end - begin) * kPanel * static_cast<int64_t>(sizeof(T));
    const char* next = reinterpret_cast<const char*>(panel) + bytes_ahead(kPartBytes, bytes, runs, run++);
    constexpr int64_t least = Lines > 0 && Lines < kLines<T> ? kRows / 2 : 1;  // of several runs, which are even
    with_constant<least, kRows>(count, [&](auto rows) {
      constexpr int number = decltype(rows)::value;
      multiply<T, Lines, number>(block.rows + first, begin, end, panel, scale, next, out + first * kPanel);
    });
  });
}

// out[r][32] = block.rows[r][0 : depth] times a panel that comes from memory; by parts along K if runs are several.
template <typename T>
void multiply(const Block<typename Step<T>::Row>& block, int64_t depth, const T* panel, float* out) {
  const int64_t runs = at::divup(block.count, kRows);
  const int64_t longest = runs == 1 ? depth : kPartBytes / (kPanel * sizeof(T));
  with_lines<kLines<T>>(runs, [&](auto lines) {
    for (int64_t begin = 0, end; begin < depth; begin = end) {
      end = std::min(begin + longest, depth);
      multiply<T, decltype(lines)::value>(block, begin, end, panel + begin * kPanel, nullptr, out);
    }
  });
}

// Does as `multiply` on AMX tiles and returns true if rows go there.
template <typename T>
bool multiply_if_tiled(const Block<typename Step<T>::Row>& block, int64_t begin, int64_t end, const T* panel,
                       const float* scale, float* out) {
  if constexpr (std::is_same_v<typename Step<T>::Row, at::BFloat16>)
    if (block.tiled) {
      for (int64_t first = 0; first < block.count; first += kAmxRows)
        multiply_tiles(std::min(kAmxRows, block.count - first), block.rows[first] + begin, block.stride, end - begin,
                       panel, scale, out + first * kPanel);
      return true;
    }
  return false;
}

// Scales of a panel of codes: [depth / group][32].
struct PanelScales {
  const float* values;
  int64_t group;
};

}  // namespace
