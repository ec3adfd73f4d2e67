// SPDX-License-Identifier: Apache-2.0
// heapr::cpu_ragged_moe: a mixture of experts whose experts have widths of their own, on a CPU.
//
// Weights are stored as panels of two times 16 columns, so that one micro-kernel serves both products (`pack` in
// kernel.py). P neighbours along K lie together: 2 in bfloat16, where one instruction multiplies pairs, else 1.
//   gate/up of an expert [width / 16][hidden / P][gate, up][16 neurons][P]
//   down of an expert    [hidden / 32][width / P][32 outputs][P]
// Per chunk of tokens there are two parallel loops. The first takes tasks (expert, rows, 16-neuron panels) and leaves
// silu(gate) * up; the second takes tasks of output columns, runs over all experts in slot order and sums in fp32. No
// sum crosses a task, so results do not depend on the number of threads nor on who takes which task.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>
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
constexpr int64_t kRowBlock = 96;    // rows of a gate/up task: its activations stay in the L2 cache
constexpr int64_t kAmxRows = 32;     // rows of a product on AMX tiles, two by two of them
constexpr int64_t kAmxUnit = 16;     // rows of a tile; what is missing is computed and thrown away
constexpr int64_t kFewRows = 5;      // with fewer rows reading weights dominates; not timed on AMX
constexpr int64_t kChunk = 1024;     // tokens sorted and computed together; bounds the scratch
constexpr int64_t kPrefetch = 8192;  // bytes ahead in the stream of weights; 2048 and 32768 were slower

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

// out[r][32] = rows[r][0 : depth] times a panel, for `Rows` rows; in two passes if there are accumulators for half of it.
template <typename T, int Rows>
void multiply(const typename Step<T>::Row* const* rows, int64_t depth, const T* panel, float* out) {
  constexpr int64_t pairs = Step<T>::kPairs;
  constexpr int64_t vectors = kPanel / kWidth * Rows <= kAccumulators ? kPanel / kWidth : kLanes / kWidth;
  for (int64_t column = 0; column < kPanel; column += vectors * kWidth) {
    Vec acc[Rows][vectors] = {};
    const T* b = panel + column * pairs;
    for (int64_t k = 0; k < depth; k += pairs, b += kPanel * pairs) {
#pragma GCC unroll 4
      for (int first = 0; first < vectors; first += kHeld) {
        const T* part = b + first * kWidth * pairs;
        typename Step<T>::Columns columns[kHeld];
#pragma GCC unroll 2
        for (int v = 0; v < kHeld; ++v) {
          if ((first + v) * kWidth % kLanes == 0)
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
      for (int v = 0; v < vectors; ++v)
        *reinterpret_cast<Vec*>(out + r * kPanel + column + v * kWidth) = acc[r][v];
  }
}

template <typename T, int Rows = kRows>
void multiply(int64_t count, const typename Step<T>::Row* const* rows, int64_t depth, const T* panel, float* out) {
  if constexpr (Rows > 0) {
    if (count == Rows) return multiply<T, Rows>(rows, depth, panel, out);
    multiply<T, Rows - 1>(count, rows, depth, panel, out);
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

// out[r][32] = rows[r][0 : depth] times a panel. With `tiled` the rows lie one after the other, and so many more can be
// read that kAmxUnit divides their number: brgemm compiles a kernel per shape and thread, so two per depth.
template <typename T>
void multiply(int64_t count, const typename Step<T>::Row* const* rows, int64_t depth, bool tiled, const T* panel,
              float* out) {
  if constexpr (std::is_same_v<typename Step<T>::Row, at::BFloat16>)
    if (tiled)
      return at::native::cpublas::brgemm(at::divup(count, kAmxUnit) * kAmxUnit, kPanel, depth, depth, kPanel, kPanel,
                                         false, rows[0], panel, out);
  multiply<T>(count, rows, depth, panel, out);
}

// Calls f(first, count) for runs of rows that cover [begin, end): whole tiles, or at most kRows, even to one row.
template <typename F>
void for_runs(int64_t begin, int64_t end, bool tiled, const F& f) {
  for (int64_t runs = at::divup(end - begin, tiled ? kAmxRows : kRows); runs > 0; --runs) {
    const int64_t count = tiled ? std::min(kAmxRows, end - begin) : at::divup(end - begin, runs);
    f(begin, count);
    begin += count;
  }
}

// h[i] = silu(gate[i]) * up[i] for 16 neurons.
template <typename Row>
void silu_and_mul(const float* gate_up, Row* h) {
  using V = at::vec::Vectorized<float>;
  float result[kLanes];
  for (int64_t i = 0; i < kLanes; i += V::size()) {
    const V gate = V::loadu(gate_up + i);
    (gate * V::loadu(gate_up + kLanes + i) / (V(1.f) + gate.neg().exp())).store(result + i);
  }
  for (int64_t i = 0; i < kLanes; ++i) h[i] = static_cast<Row>(result[i]);
}

// Every thread makes a worker and calls it with one task after another; they take the next one as they get free.
template <typename F>
void for_tasks(int64_t tasks, const F& make_worker) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) worker(task);
#ifdef HEAPR_AMX
    at::native::cpublas::brgemm_release();
#endif
  });
}

// Routes of one expert: [begin, end) of the sorted list; `row` and `width` say where its weights lie; `h` where the
// rows of its hidden activations start.
struct Expert {
  int64_t row, width, begin, end, h;
};

template <typename T>
struct Layer {
  using Row = typename Step<T>::Row;
  const Row* x;
  const T* w13;
  const T* w2;
  const float* weights;
  const int32_t* ids;
  const int32_t* slots;
  const int32_t* table;
  T* output;
  int64_t hidden, top_k, num_experts, num_slots;

  // Output rows of tokens [begin, end).
  void run(int64_t begin, int64_t end) const {
    static thread_local std::vector<int32_t> routes;
    static thread_local std::vector<Expert> experts;
    static thread_local std::vector<Row> h;  // kept from call to call, like the others
    h.resize(std::max<size_t>(h.size(), sort(begin, end, routes, experts)));
    gate_up(routes.data(), experts, h.data());
    down(begin, end, routes.data(), experts, h.data());
  }

  // Sorts the routes of these tokens by slot, then by token; returns the elements of h. Routes of experts that are not
  // stored here, and ids out of range, are dropped.
  int64_t sort(int64_t begin, int64_t end, std::vector<int32_t>& routes, std::vector<Expert>& experts) const {
    const auto slot_of = [&](int64_t route) {
      const int32_t id = ids[route];
      return id < 0 || id >= num_experts ? num_slots : static_cast<int64_t>(slots[id]);
    };
    static thread_local std::vector<int64_t> next;  // by slot: first the number of routes, then the next one's place
    next.assign(num_slots + 1, 0);
    for (int64_t route = begin * top_k; route < end * top_k; ++route) ++next[slot_of(route)];
    experts.clear();
    int64_t first = 0, elements = 0, widest = 0;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const int64_t count = next[slot], row = table[2 * slot], width = table[2 * slot + 1];
      next[slot] = first;
      if (count && width) experts.push_back({row, width, first, first + count, elements});
      first += count;
      elements += count * width;
      widest = std::max(widest, width);
    }
    routes.resize(first);
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      const int64_t slot = slot_of(route);
      if (slot < num_slots) routes[next[slot]++] = route;
    }
    return elements + kAmxUnit * widest;  // tiles read beyond the last row
  }

  void gate_up(const int32_t* routes, const std::vector<Expert>& experts, Row* h) const {
    struct Task {
      const Expert* expert;
      int64_t begin, end, first, last;  // routes, panels
    };
    static thread_local std::vector<Task> tasks;
    tasks.clear();
    int64_t panels = 0;
    for (const Expert& e : experts) panels += e.width / kLanes * at::divup(e.end - e.begin, kRowBlock);
    const int64_t group = std::clamp<int64_t>(panels / (8 * at::get_num_threads()), 1, 8);
    for (const Expert& e : experts)
      for (int64_t begin = e.begin; begin < e.end; begin += kRowBlock)
        for (int64_t first = 0; first < e.width / kLanes; first += group)
          tasks.push_back({&e, begin, std::min(begin + kRowBlock, e.end), first,
                           std::min(first + group, e.width / kLanes)});
    const std::vector<Task>& all = tasks;
    for_tasks(all.size(), [&] {
      return [&, gathered = int64_t{-1}](int64_t number) mutable {
        static thread_local std::vector<Row> block;
        const Task& task = all[number];
        const Expert& e = *task.expert;
        const Row* rows[kRowBlock];
        float out[kAmxRows * kPanel];
        for (int64_t i = task.begin; i < task.end; ++i) rows[i - task.begin] = x + routes[i] / top_k * hidden;
        const bool tiled = on_tiles<T>(task.end - task.begin);
        if (tiled) {
          block.resize(kRowBlock * hidden);
          for (int64_t i = 0; i < task.end - task.begin; ++i) {
            Row* row = block.data() + i * hidden;
            if (gathered != task.begin) std::copy_n(rows[i], hidden, row);
            rows[i] = row;
          }
          gathered = task.begin;
        }
        for (int64_t panel = task.first; panel < task.last; ++panel) {
          const T* weight = w13 + 2 * (e.row + panel * kLanes) * hidden;
          for_runs(task.begin, task.end, tiled, [&](int64_t first, int64_t count) {
            multiply<T>(count, rows + first - task.begin, hidden, tiled, weight, out);
            for (int64_t r = 0; r < count; ++r)
              silu_and_mul(out + r * kPanel, h + e.h + (first - e.begin + r) * e.width + panel * kLanes);
          });
        }
      };
    });
  }

  void down(int64_t begin, int64_t end, const int32_t* routes, const std::vector<Expert>& experts,
            const Row* h) const {
    const int64_t panels = hidden / kPanel;
    const int64_t group = std::clamp<int64_t>(panels / (8 * at::get_num_threads()), 1, 2);
    const auto work = [&](int64_t task) {
      static thread_local std::vector<float> sums;
      const int64_t first_panel = task * group, last_panel = std::min(first_panel + group, panels);
      const int64_t columns = (last_panel - first_panel) * kPanel;
      sums.assign((end - begin) * columns, 0.f);
      const Row* rows[kAmxRows];
      float out[kAmxRows * kPanel];
      for (const Expert& e : experts) {
        const bool tiled = on_tiles<T>(e.end - e.begin);
        for_runs(e.begin, e.end, tiled, [&](int64_t first, int64_t count) {
          for (int64_t r = 0; r < count; ++r) rows[r] = h + e.h + (first - e.begin + r) * e.width;
          for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            multiply<T>(count, rows, e.width, tiled, w2 + e.row * hidden + panel * kPanel * e.width, out);
            for (int64_t r = 0; r < count; ++r) {
              const int64_t route = routes[first + r];
              float* sum = sums.data() + (route / top_k - begin) * columns + (panel - first_panel) * kPanel;
              for (int64_t i = 0; i < kPanel; ++i) sum[i] += weights[route] * out[r * kPanel + i];
            }
          }
        });
      }
      for (int64_t token = begin; token < end; ++token)
        for (int64_t i = 0; i < columns; ++i)
          output[token * hidden + first_panel * kPanel + i] = static_cast<T>(sums[(token - begin) * columns + i]);
    };
    for_tasks(at::divup(panels, group), [&] { return work; });
  }
};

template <typename T>
void run(at::Tensor& output, const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
         const at::Tensor& weights, const at::Tensor& ids, const at::Tensor& slots, const at::Tensor& table) {
  const int64_t tokens = x.size(0);
  const at::Tensor rows = x.contiguous().to(c10::CppTypeToScalarType<typename Step<T>::Row>::value);
  const Layer<T> layer{rows.const_data_ptr<typename Step<T>::Row>(), w13.const_data_ptr<T>(), w2.const_data_ptr<T>(),
                       weights.const_data_ptr<float>(), ids.const_data_ptr<int32_t>(),
                       slots.const_data_ptr<int32_t>(), table.const_data_ptr<int32_t>(),
                       output.mutable_data_ptr<T>(), x.size(1), ids.size(1), slots.size(0) - 1, table.size(0)};
  const int64_t chunks = at::divup(tokens, kChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    layer.run(tokens * chunk / chunks, tokens * (chunk + 1) / chunks);
}

// Writes the MoE output [T, H]. x [T, H]; w13 [2 * rows, H] and w2 [rows, H] packed as above; weights float32 and ids
// int32 [T, k]; slots int32 [num_experts + 1]; table int32 [num_slots, 2], first row and width, a multiple of 16.
void cpu_ragged_moe(at::Tensor& output, const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
                    const at::Tensor& weights, const at::Tensor& ids, const at::Tensor& slots,
                    const at::Tensor& table) {
  TORCH_CHECK(x.dim() == 2, "cpu_ragged_moe: activations [tokens, hidden size]");
  for (const at::Tensor* tensor : {static_cast<const at::Tensor*>(&output), &w13, &w2})
    TORCH_CHECK(tensor->is_contiguous() && tensor->dim() == 2 && tensor->size(1) == x.size(1) &&
                    tensor->scalar_type() == x.scalar_type(),
                "cpu_ragged_moe: output and weights are contiguous, of the activations' dtype and hidden size");
  TORCH_CHECK(x.size(1) % kPanel == 0 && w13.size(0) == 2 * w2.size(0) && output.sizes() == x.sizes(),
              "cpu_ragged_moe: hidden size is a multiple of ", kPanel, ", w13 has twice the rows of w2");
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && weights.sizes() == ids.sizes() &&
                  table.dim() == 2 && table.size(1) == 2 && table.is_contiguous() && slots.is_contiguous(),
              "cpu_ragged_moe: weights and ids [tokens, k], table [slots, 2], contiguous");
  const at::Tensor plain_weights = weights.to(at::kFloat).contiguous(), plain_ids = ids.to(at::kInt).contiguous();
  switch (x.scalar_type()) {
    case at::kFloat: return run<float>(output, x, w13, w2, plain_weights, plain_ids, slots, table);
    case at::kHalf: return run<at::Half>(output, x, w13, w2, plain_weights, plain_ids, slots, table);
    case at::kBFloat16: return run<at::BFloat16>(output, x, w13, w2, plain_weights, plain_ids, slots, table);
    default: TORCH_CHECK(false, "cpu_ragged_moe: no kernel for ", x.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(heapr, library) {
  library.def(
      "cpu_ragged_moe(Tensor(a!) output, Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, "
      "Tensor topk_ids, Tensor slots, Tensor table) -> ()");
}

TORCH_LIBRARY_IMPL(heapr, CPU, library) { library.impl("cpu_ragged_moe", &cpu_ragged_moe); }
