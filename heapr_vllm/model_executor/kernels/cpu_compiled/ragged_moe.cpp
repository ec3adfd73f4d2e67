// SPDX-License-Identifier: Apache-2.0
// heapr::cpu_ragged_moe: a mixture of experts whose experts have widths of their own, on a CPU.
//
// Weights are stored as panels of two times 16 columns, so that one micro-kernel serves both products (`pack` in
// kernel.py). P neighbours along K lie together: 2 in bfloat16, where one instruction multiplies pairs, else 1.
//   gate/up of an expert [width / 16][hidden / P][gate, up][16 neurons][P]
//   down of an expert    [hidden / 32][width / P][32 outputs][P]
// Quantized experts have panels of the same shape, P = 2 or 4; codes.h and integers.h say in which order bytes lie.
// Down may have codes of 8 bits where gate and up have codes of 4. Their scales:
//   gate/up of an expert [width / 16][groups][gate, up][16 neurons]
//   down of an expert    [groups][width], for hidden / groups outputs each; by channel [slots][hidden] instead
// Those of gate and up multiply sums over a group of the hidden size; those of down multiply silu(gate) * up before the
// outputs of a group are computed, or by channel the outputs. Where products are of integers and down has 8 bits, the
// room of its [groups][width] holds bfloat16 instead, by slabs of 128 neighbouring neurons, the last one cut short:
//   down of an expert    [hidden / 32][slabs][32 outputs]
// They multiply sums over a slab, so that one rounding of silu(gate) * up does for all outputs.
// Per chunk of tokens there are two parallel loops, and where activations are rounded once, a third in between, which
// does it. The first takes tasks (expert, rows, 16-neuron panels) and leaves silu(gate) * up; the last takes tasks of
// output columns, runs over all experts in slot order and sums in fp32. No sum crosses a task, so results do not depend
// on the number of threads nor on who takes which task.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "integers.h"

namespace {

constexpr int64_t kChunk = 1024;     // tokens sorted and computed together; bounds the scratch
constexpr int64_t kDownPanels = 16;  // at most, of a task of outputs

constexpr std::array<float, kPanel> filled(float value) {
  std::array<float, kPanel> values{};
  for (float& each : values) each = value;
  return values;
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
  for (int64_t i = 0; i < kLanes; i += kWidth) store(vector_at(result + i), h + i);
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

// Routes of one expert: [begin, end) of the sorted list; `slot`, `row` and `width` say where its weights lie; `h` where
// the rows of its hidden activations start, and `stride` how far they are apart.
struct Expert {
  int64_t slot, row, width, begin, end, h, stride;

  template <typename Element>
  Element* hidden_row(Element* rows, int64_t route) const {
    return rows + h + (route - begin) * stride;
  }
};

// Factors of codes; `groups` of the hidden size have their own. By channel it is one group, and outputs have factors.
struct Scales {
  const float* w13 = nullptr;
  const float* w2 = nullptr;
  int64_t groups = 1;
  bool by_channel = false;
};

// What the caller adds up over calls: squares of hidden activations [slots][max_width], and routes [slots]; or nothing.
struct Traffic {
  double* activation_sq = nullptr;
  int64_t* tokens = nullptr;
  int64_t max_width = 0;
};

// A row of activations [depth] times factors, or without any as they are, as products with weights W take it.
template <typename W, typename T, typename Row>
void convert_row(const T* values, const float* factors, int64_t depth, int64_t group, Row* out) {
  if constexpr (kIntegers<W>)
    round_row(values, factors, depth, group, W::kBias, out);
  else
    for (int64_t i = 0; i < depth; i += kWidth)
      store(factors ? vector_at(values + i) * vector_at(factors + i) : vector_at(values + i), out + i);
}

// Elements of a row as products take it.
template <typename Row>
int64_t row_size(int64_t depth, int64_t group) {
  return std::is_same_v<Row, int8_t> ? rounded_size(depth, group) : depth;
}

// W: weights of gate and up; D: of down.
template <typename T, typename W, typename D>
struct Layer {
  static_assert(kIntegers<W> == kIntegers<D>);
  static constexpr bool kCodes = !std::is_same_v<T, W>;
  using Row = std::conditional_t<kIntegers<W>, int8_t, typename Step<T>::Row>;
  static constexpr bool kBrief = kIntegers<W> && std::is_same_v<T, at::BFloat16>;  // 8 bits follow; the range suffices
  using Exact = std::conditional_t<kBrief, T, float>;     // where factors are still to come
  using Hidden = std::conditional_t<kCodes, Exact, Row>;  // of silu(gate) * up
  static constexpr bool kRoundsOnce = std::is_same_v<D, Biased<int8_t>>;
  static constexpr bool kConverts = kCodes && !kRoundsOnce;  // hidden activations, for every product with its factors
  const Row* x;
  const W* w13;
  const D* w2;
  Scales scales;
  const float* weights;
  const int32_t* ids;
  const int32_t* slots;
  const int32_t* table;
  T* output;
  Traffic traffic;
  int64_t hidden, row_group, top_k, num_experts, num_slots;

  // Output rows of tokens [begin, end).
  void run(int64_t begin, int64_t end) const {
    static thread_local std::vector<int32_t> routes;
    static thread_local std::vector<Expert> experts;
    static thread_local std::vector<Hidden> h;  // kept from call to call, like the others
    h.resize(std::max<size_t>(h.size(), sort(begin, end, routes, experts)));
    gate_up(routes.data(), experts, h.data());
    if (traffic.activation_sq) add_traffic(experts, h.data());
    if constexpr (kRoundsOnce) {
      static thread_local std::vector<Row> rounded;
      rounded.resize(h.size());
      round_hidden(experts, h.data(), rounded.data());
      down(begin, end, routes.data(), experts, rounded.data());
    } else {
      down(begin, end, routes.data(), experts, h.data());
    }
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
      const int64_t stride = kRoundsOnce ? row_size<Row>(width, kHiddenGroup) : width;
      if (count && width) experts.push_back({slot, row, width, first, first + count, elements, stride});
      first += count;
      elements += count * stride;
      widest = std::max(widest, width);
    }
    routes.resize(first);
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      const int64_t slot = slot_of(route);
      if (slot < num_slots) routes[next[slot]++] = route;
    }
    return elements + kAmxUnit * widest;  // tiles read beyond the last row
  }

  void gate_up(const int32_t* routes, const std::vector<Expert>& experts, Hidden* h) const {
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
    const int64_t x_size = row_size<Row>(hidden, row_group);
    for_tasks(all.size(), [&] {
      return [&, gathered = int64_t{-1}](int64_t number) mutable {
        static thread_local std::vector<Row> block;
        const Task& task = all[number];
        const Expert& e = *task.expert;
        const int64_t count = task.end - task.begin;
        const Row* rows[kRowBlock];
        float out[kRowBlock * kPanel];
        for (int64_t i = 0; i < count; ++i) rows[i] = x + routes[task.begin + i] / top_k * x_size;
        const bool tiled = !kIntegers<W> && on_tiles<T>(count);
        if (tiled) {
          block.resize(kRowBlock * hidden);
          for (int64_t i = 0; i < count; ++i) {
            Row* row = block.data() + i * hidden;
            if (gathered != task.begin) std::copy_n(rows[i], hidden, row);
            rows[i] = row;
          }
          gathered = task.begin;
        }
        for (int64_t panel = task.first; panel < task.last; ++panel) {
          const int64_t row = 2 * (e.row + panel * kLanes);
          product<T>(Block<Row>{rows, count, hidden, tiled, row_group}, hidden, codes(w13, row * hidden),
                     w13_scales(row), out);
          for (int64_t r = 0; r < count; ++r)
            silu_and_mul(out + r * kPanel, e.hidden_row(h, task.begin + r) + panel * kLanes);
        }
      };
    });
  }

  // Adds to `traffic` the routes of every expert and the squares of its hidden activations, in fp32 over a chunk.
  void add_traffic(const std::vector<Expert>& experts, const Hidden* h) const {
    for_tasks(experts.size(), [&] {
      return [&](int64_t number) {
        const Expert& e = experts[number];
        double* total = traffic.activation_sq + e.slot * traffic.max_width;
        for (int64_t column = 0; column < e.width; column += kLanes) {
          float sums[kLanes] = {};
          for (int64_t route = e.begin; route < e.end; ++route)
            for (int64_t i = 0; i < kLanes; ++i) {
              const float value = e.hidden_row(h, route)[column + i];
              sums[i] += value * value;
            }
          for (int64_t i = 0; i < kLanes; ++i) total[column + i] += sums[i];
        }
        traffic.tokens[e.slot] += e.end - e.begin;
      };
    });
  }

  // Where a weight lies, the first one of a panel.
  template <typename Code>
  static const Code* codes(const Code* weights, int64_t index) {
    return weights + index / kCodesPerByte<Code>;
  }

  // Of the panel of gate and up that starts at this row of w13.
  PanelScales w13_scales(int64_t row) const {
    if constexpr (!kCodes) return {};
    return {scales.w13 + row * scales.groups, hidden / scales.groups};
  }

  // Of a panel of down: by channel, by slab, or none.
  PanelScales w2_scales(const Expert& e, int64_t panel) const {
    static constexpr std::array<float, kPanel> ones = filled(1.f);
    if (scales.by_channel) return {scales.w2 + e.slot * hidden + panel * kPanel, e.width};
    if constexpr (!kRoundsOnce) return {ones.data(), e.width};
    static thread_local std::vector<float> values;
    const int64_t count = at::divup(e.width, kHiddenGroup) * kPanel;
    const auto* stored = reinterpret_cast<const at::BFloat16*>(scales.w2 + e.row * scales.groups) + panel * count;
    values.resize(std::max<size_t>(values.size(), count));
    at::vec::convert(stored, values.data(), count);
    for (int64_t i = 0; i < count; i += kPanel) __builtin_prefetch(stored + count + i);  // of the next panel
    return {values.data(), kHiddenGroup};
  }

  // Rounds the hidden activations of every expert, a block of all routes at a time.
  void round_hidden(const std::vector<Expert>& experts, const Hidden* h, Row* rounded) const {
    const int64_t routes = experts.empty() ? 0 : experts.back().end;
    const auto work = [&](int64_t block) {
      const int64_t begin = block * kRowBlock, end = std::min(begin + kRowBlock, routes);
      for (const Expert& e : experts)
        for (int64_t route = std::max(begin, e.begin); route < std::min(end, e.end); ++route)
          convert_row<D>(e.hidden_row(h, route), nullptr, e.width, kHiddenGroup, e.hidden_row(rounded, route));
    };
    for_tasks(at::divup(routes, kRowBlock), [&] { return work; });
  }

  void down(int64_t begin, int64_t end, const int32_t* routes, const std::vector<Expert>& experts,
            const std::conditional_t<kConverts, Hidden, Row>* h) const {
    const int64_t panels = hidden / kPanel;
    const int64_t same = kConverts && !scales.by_channel ? panels / scales.groups : panels;  // with the same factors
    const int64_t group = std::clamp<int64_t>(panels / (4 * at::get_num_threads()), 1, kDownPanels);
    const auto work = [&](int64_t task) {
      static thread_local std::vector<float> sums;
      const int64_t first_panel = task * group, last_panel = std::min(first_panel + group, panels);
      const int64_t columns = (last_panel - first_panel) * kPanel;
      sums.assign((end - begin) * columns, 0.f);
      float out[kRowBlock * kPanel];
      for (const Expert& e : experts)
        for (int64_t first = e.begin; first < e.end; first += kRowBlock) {
          const int64_t count = std::min(kRowBlock, e.end - first);
          const Row* rows[kRowBlock];
          Block<Row> block{rows, count, e.width, !kIntegers<W> && on_tiles<T>(e.end - e.begin), kHiddenGroup};
          for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            if (panel == first_panel || panel % same == 0) {
              if constexpr (kConverts)
                rows[0] = converted(e.hidden_row(h, first), count, e, panel / same);
              else
                rows[0] = e.hidden_row(h, first);
              for (int64_t r = 1; r < count; ++r) rows[r] = rows[r - 1] + row_size<Row>(e.width, kHiddenGroup);
            }
            product<T>(block, e.width, codes(w2, e.row * hidden + panel * kPanel * e.width), w2_scales(e, panel), out);
            for (int64_t r = 0; r < count; ++r) {
              const int64_t route = routes[first + r];
              float* sum = sums.data() + (route / top_k - begin) * columns + (panel - first_panel) * kPanel;
              for (int64_t i = 0; i < kPanel; ++i) sum[i] += weights[route] * out[r * kPanel + i];
            }
          }
        }
      for (int64_t token = begin; token < end; ++token)
        for (int64_t i = 0; i < columns; ++i)
          output[token * hidden + first_panel * kPanel + i] = static_cast<T>(sums[(token - begin) * columns + i]);
    };
    for_tasks(at::divup(panels, group), [&] { return work; });
  }

  // Rows of hidden activations of an expert, times its factors for a group of outputs, as this thread keeps them until
  // the next call. Tiles may read beyond them.
  const Row* converted(const Hidden* h, int64_t count, const Expert& e, int64_t group) const {
    static thread_local std::vector<Row> result;
    const int64_t size = row_size<Row>(e.width, kHiddenGroup);
    result.resize(std::max<size_t>(result.size(), kRowBlock * size));
    const float* scale = scales.by_channel ? nullptr : scales.w2 + e.row * scales.groups + group * e.width;
    for (int64_t r = 0; r < count; ++r)
      convert_row<D>(h + r * e.stride, scale, e.width, kHiddenGroup, result.data() + r * size);
    return result.data();
  }
};

struct Arguments {
  at::Tensor& output;
  const at::Tensor &x, &w13, &w2, &weights, &ids, &slots, &table;
  Scales scales;
  Traffic traffic;
};

// Rows [tokens, hidden] as products with weights W take them.
template <typename T, typename W, typename Row>
at::Tensor converted(const at::Tensor& x, int64_t group) {
  if constexpr (!kIntegers<W>) {
    return x.contiguous().to(c10::CppTypeToScalarType<Row>::value);
  } else {
    const int64_t hidden = x.size(1), size = row_size<Row>(hidden, group);
    const at::Tensor values = x.contiguous(), rows = at::empty({x.size(0), size}, x.options().dtype(at::kChar));
    at::parallel_for(0, x.size(0), 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        convert_row<W>(values.const_data_ptr<T>() + r * hidden, nullptr, hidden, group,
                       rows.mutable_data_ptr<int8_t>() + r * size);
    });
    return rows;
  }
}

// Checks that scales of down by slab have room in place of those in groups.
void check_slabs(const Arguments& a) {
  if (a.scales.by_channel) return;
  const int32_t* table = a.table.const_data_ptr<int32_t>();
  for (int64_t slot = 0; slot < a.table.size(0); ++slot) {
    const int64_t width = table[2 * slot + 1], halves = 2 * width * a.scales.groups;
    TORCH_CHECK(at::divup(width, kHiddenGroup) * a.x.size(1) <= halves,
                "cpu_ragged_moe: width ", width, " leaves no room for scales by slab; CompiledA8Kernel pads it");
  }
}

template <typename T, typename W, typename D = W>
void run(const Arguments& a) {
  using Row = typename Layer<T, W, D>::Row;
  const int64_t tokens = a.x.size(0), row_group = std::gcd(kInputGroup, a.x.size(1) / a.scales.groups);
  if constexpr (std::is_same_v<D, Biased<int8_t>>) check_slabs(a);
  const at::Tensor rows = converted<T, W, Row>(a.x, row_group);
  const Layer<T, W, D> layer{rows.const_data_ptr<Row>(),
                          static_cast<const W*>(a.w13.const_data_ptr()),
                          static_cast<const D*>(a.w2.const_data_ptr()),
                          a.scales,
                          a.weights.const_data_ptr<float>(),
                          a.ids.const_data_ptr<int32_t>(),
                          a.slots.const_data_ptr<int32_t>(),
                          a.table.const_data_ptr<int32_t>(),
                          a.output.mutable_data_ptr<T>(),
                          a.traffic,
                          a.x.size(1),
                          row_group,
                          a.ids.size(1),
                          a.slots.size(0) - 1,
                          a.table.size(0)};
  const int64_t chunks = at::divup(tokens, kChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    layer.run(tokens * chunk / chunks, tokens * (chunk + 1) / chunks);
}

template <typename T>
void run(const Arguments& a, bool rounds_activations) {
  const bool two_widths = a.w13.scalar_type() == at::kByte && a.w2.scalar_type() == at::kChar;
  if (rounds_activations) {
#ifdef __AVX512VNNI__
    if (a.w13.scalar_type() == at::kChar) return run<T, Biased<int8_t>>(a);
    if (two_widths) return run<T, Biased<Nibbles>, Biased<int8_t>>(a);
    if (a.w13.scalar_type() == at::kByte) return run<T, Biased<Nibbles>>(a);
#endif
    TORCH_CHECK(false, "cpu_ragged_moe: activations in 8 bits need AVX-512 VNNI and weights of integers");
  }
  if (two_widths) return run<T, Nibbles, int8_t>(a);
  switch (a.w13.scalar_type()) {
    case at::kChar: return run<T, int8_t>(a);
    case at::kByte: return run<T, Nibbles>(a);
    case at::kFloat8_e4m3fn: return run<T, at::Float8_e4m3fn>(a);
    default: return run<T, T>(a);
  }
}

// Checks the scales of codes and says what they are.
Scales scales_of(int64_t hidden, const at::Tensor& w13, const at::Tensor& w2,
                 const std::optional<at::Tensor>& w13_scale, const std::optional<at::Tensor>& w2_scale,
                 int64_t num_slots) {
  TORCH_CHECK(w13_scale && w2_scale, "cpu_ragged_moe: codes need scales");
  for (const at::Tensor& scale : {*w13_scale, *w2_scale})
    TORCH_CHECK(scale.dim() == 2 && scale.is_contiguous() && scale.scalar_type() == at::kFloat,
                "cpu_ragged_moe: scales are matrices of float32, contiguous");
  const int64_t groups = w13_scale->size(1), rows = w2.size(0);
  const bool by_channel = w2_scale->size(1) == hidden;
  TORCH_CHECK(groups > 0 && hidden % (groups * kPanel) == 0 && w13_scale->size(0) == w13.size(0) &&
                  w2_scale->size(0) == (by_channel ? num_slots : rows) &&
                  (by_channel ? groups == 1 : w2_scale->size(1) == groups),
              "cpu_ragged_moe: scales [rows, groups] of multiples of ", kPanel,
              " along the hidden size, or by channel [rows, 1] for w13 and [slots, hidden size] for w2");
  return {w13_scale->const_data_ptr<float>(), w2_scale->const_data_ptr<float>(), groups, by_channel};
}

// Checks the sums of traffic and says where they lie.
Traffic traffic_of(const std::optional<at::Tensor>& activation_sq, const std::optional<at::Tensor>& tokens,
                   int64_t num_slots) {
  if (!activation_sq) return {};
  TORCH_CHECK(tokens && activation_sq->dim() == 2 && activation_sq->size(0) == num_slots &&
                  activation_sq->is_contiguous() && activation_sq->scalar_type() == at::kDouble &&
                  tokens->numel() == num_slots && tokens->is_contiguous() && tokens->scalar_type() == at::kLong,
              "cpu_ragged_moe: sums of traffic are float64 [slots, widest width] and int64 [slots], contiguous");
  return {activation_sq->mutable_data_ptr<double>(), tokens->mutable_data_ptr<int64_t>(), activation_sq->size(1)};
}

// Writes the MoE output [T, H]. x [T, H]; w13 [2 * rows, H] and w2 [rows, H] packed as above, of x's dtype, or int8 or
// float8_e4m3fn, or uint8 [rows, H / 2] with two codes in a byte, beside which w2 may be int8; codes with float32
// scales, for w13 [2 * rows, groups] and for w2 [rows, groups], in whose room those by slab may lie, or by channel [2 *
// rows, 1] and [num_slots, H]; weights float32 and ids int32 [T, k]; slots int32 [num_experts + 1]; table int32
// [num_slots, 2], first row and width, a multiple of 16. With rounds_activations products are of integers (integers.h),
// and panels in their order. Adds the call's tokens to activation_sq float64 [num_slots, widest width] and tokens int64
// [num_slots], if they are there.
void cpu_ragged_moe(at::Tensor& output, const at::Tensor& x, const at::Tensor& w13, const at::Tensor& w2,
                    const at::Tensor& weights, const at::Tensor& ids, const at::Tensor& slots, const at::Tensor& table,
                    const std::optional<at::Tensor>& w13_scale, const std::optional<at::Tensor>& w2_scale,
                    const std::optional<at::Tensor>& activation_sq, const std::optional<at::Tensor>& tokens,
                    bool rounds_activations) {
  TORCH_CHECK(x.dim() == 2, "cpu_ragged_moe: activations [tokens, hidden size]");
  const at::ScalarType stored = w13.scalar_type();
  const bool codes = stored == at::kChar || stored == at::kFloat8_e4m3fn || stored == at::kByte;
  for (const at::Tensor* tensor : {static_cast<const at::Tensor*>(&output), &w13, &w2}) {
    const bool is_codes = codes && tensor != &output, is_wider = stored == at::kByte && w2.scalar_type() == at::kChar;
    const at::ScalarType type = !is_codes ? x.scalar_type() : tensor == &w2 && is_wider ? at::kChar : stored;
    TORCH_CHECK(tensor->is_contiguous() && tensor->dim() == 2 && tensor->scalar_type() == type &&
                    tensor->size(1) * (type == at::kByte ? 2 : 1) == x.size(1),
                "cpu_ragged_moe: output and weights are contiguous, of the activations' dtype and hidden size; weights "
                "may be int8, float8_e4m3fn, or two codes in a byte of half that size");
  }
  TORCH_CHECK(x.size(1) % kPanel == 0 && w13.size(0) == 2 * w2.size(0) && output.sizes() == x.sizes(),
              "cpu_ragged_moe: hidden size is a multiple of ", kPanel, ", w13 has twice the rows of w2");
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == x.size(0) && weights.sizes() == ids.sizes() &&
                  table.dim() == 2 && table.size(1) == 2 && table.is_contiguous() && slots.is_contiguous(),
              "cpu_ragged_moe: weights and ids [tokens, k], table [slots, 2], contiguous");
  const at::Tensor plain_weights = weights.to(at::kFloat).contiguous(), plain_ids = ids.to(at::kInt).contiguous();
  const Scales scales = codes ? scales_of(x.size(1), w13, w2, w13_scale, w2_scale, table.size(0)) : Scales{};
  const Traffic traffic = traffic_of(activation_sq, tokens, table.size(0));
  const Arguments arguments{output, x, w13, w2, plain_weights, plain_ids, slots, table, scales, traffic};
  switch (x.scalar_type()) {
    case at::kFloat: return run<float>(arguments, rounds_activations);
    case at::kHalf: return run<at::Half>(arguments, rounds_activations);
    case at::kBFloat16: return run<at::BFloat16>(arguments, rounds_activations);
    default: TORCH_CHECK(false, "cpu_ragged_moe: no kernel for ", x.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(heapr, library) {
  library.def(
      "cpu_ragged_moe(Tensor(a!) output, Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, "
      "Tensor topk_ids, Tensor slots, Tensor table, Tensor? w13_scale=None, Tensor? w2_scale=None, "
      "Tensor(b!)? activation_sq=None, Tensor(c!)? tokens=None, "
      "bool rounds_activations=False) -> ()");
}

TORCH_LIBRARY_IMPL(heapr, CPU, library) { library.impl("cpu_ragged_moe", &cpu_ragged_moe); }
