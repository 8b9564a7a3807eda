// Statistics for calibration: largest magnitudes, histograms, and the searches for the range that loses least.
#include <cmath>
#include <limits>

#include "quant.h"
#include "tensor.h"

namespace qzoo {
namespace {

// ---- largest magnitude ----
//
// Without its sign bit the pattern of a floating-point number orders as an integer, with infinity above all numbers
// and NaN above infinity. An integer maximum is therefore the maximum of |x| with NaN propagating.

#define QZOO_AMAX(T, U, MASK)                                                 \
  QZOO_CLONES U amax_one(const U* x, int64_t n, U largest) {                  \
    for (int64_t i = 0; i < n; ++i) {                                         \
      const U a = static_cast<U>(x[i] & static_cast<U>(MASK));                \
      largest = largest < a ? a : largest;                                    \
    }                                                                         \
    return largest;                                                           \
  }                                                                           \
  QZOO_CLONES void amax_each(const U* x, int64_t n, U* largest) {             \
    QZOO_VECTORIZE                                                            \
    for (int64_t i = 0; i < n; ++i) {                                         \
      const U a = static_cast<U>(x[i] & static_cast<U>(MASK));                \
      largest[i] = largest[i] < a ? a : largest[i];                           \
    }                                                                         \
  }

QZOO_AMAX(float, uint32_t, 0x7fffffffu)
QZOO_AMAX(double, uint64_t, 0x7fffffffffffffffull)
QZOO_AMAX(Half, uint16_t, 0x7fffu)

float as_float(uint32_t bits, ScalarType) { return bits_float(bits); }
float as_float(uint64_t bits, ScalarType) {
  double d;
  std::memcpy(&d, &bits, sizeof d);
  return static_cast<float>(d);
}
float as_float(uint16_t bits, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return bits_float(uint32_t(bits) << 16);
  return static_cast<float>(Half(bits, Half::from_bits()));
}

// Splits [0, n) into one part per thread and calls f(part, begin, end); returns the number of parts.
template <typename F>
void in_parts(int64_t n, int64_t parts, const F& f) {
  in_parallel(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) f(p, n / parts * p, p + 1 == parts ? n : n / parts * (p + 1));
  });
}

int64_t parts_for(int64_t n) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, n / kGrain));
}

template <typename U>
void amax_into(const Walk& walk, const U* x, ScalarType dtype, float* out) {
  const int64_t parts = parts_for(walk.numel);
  std::vector<U> largest(parts * walk.ranges, U(0));
  in_parts(walk.numel, parts, [&](int64_t part, int64_t begin, int64_t end) {
    U* own = largest.data() + part * walk.ranges;
    walk.each_piece(begin, end, [&](int64_t at, int64_t n, int64_t k) {
      if (walk.step) {
        amax_each(x + at, n, own + k);
      } else {
        own[k] = amax_one(x + at, n, own[k]);
      }
    });
  });
  int64_t k = 0;
  walk.each_range([&](int64_t at) {
    U m = 0;
    for (int64_t p = 0; p < parts; ++p) m = std::max(m, largest[p * walk.ranges + k]);
    out[at] = as_float(m, dtype);
    ++k;
  });
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
      dtype == ScalarType::BFloat16;
}

Tensor reduce_amax_cpu(Tensor input, std::vector<int64_t> keep_axes) {
  const Tensor floating = is_floating(input.scalar_type()) ? input : torch::stable::to(input, ScalarType::Float);
  const Tensor x = densified(floating);
  const View view(x);
  std::vector<int64_t> sizes(keep_axes.empty() ? 0 : view.dim, 1);
  for (int64_t axis : keep_axes) {
    STD_TORCH_CHECK(
        -view.dim <= axis && axis < view.dim, "axis ", axis, " does not exist in an input of shape ",
        shape_text(view.dim, view.sizes));
    axis += axis < 0 ? view.dim : 0;
    sizes[axis] = view.sizes[axis];
  }
  std::array<int64_t, kMaxDims> kept;
  kept.fill(-1);
  int64_t stride = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] != 1) kept[d] = stride;
    stride *= sizes[d];
  }
  Tensor out = torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), ScalarType::Float);
  const Walk walk = make_walk(view.sizes, view.order, view.count, kept.data());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  if (walk.numel == 0) {
    std::fill(to, to + stride, 0.0f);
    return out;
  }
  const void* from = x.const_data_ptr();
  const ScalarType dtype = x.scalar_type();
  switch (dtype) {
    case ScalarType::Float: amax_into(walk, static_cast<const uint32_t*>(from), dtype, to); break;
    case ScalarType::Double: amax_into(walk, static_cast<const uint64_t*>(from), dtype, to); break;
    default: amax_into(walk, static_cast<const uint16_t*>(from), dtype, to);
  }
  return out;
}

// ---- histogram ----
//
// A block of values at a time: first, with vector instructions, the bin of every value; then the counting, which
// cannot be vectorized. Several tables take turns, because counting twice in a row into one bin (a ReLU's zeros)
// has to wait for the first to reach memory. Values that are not to be counted go to one bin beyond the last.

constexpr int64_t kBlock = 1024;
constexpr int64_t kTables = 8;

struct Binning {
  float width, limit, above;
  uint32_t last;     // index of the last bin; last + 1 takes what is not counted
  uint32_t exclude;  // bit pattern of |x| that is left out: 0, or one that never occurs
};

struct Seen {
  uint32_t largest = 0;  // bit pattern
  int64_t overflow = 0;
};

QZOO_CLONES void bins_of(const float* x, uint32_t* bins, int64_t n, Binning b, Seen* seen) {
  uint32_t largest = seen->largest;
  uint32_t overflow = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_bits(x[i]) & 0x7fffffffu;
    const float a = bits_float(u);
    largest = largest < u ? u : largest;
    const bool fits = a <= b.limit;
    overflow += a > b.limit;
    // 2^31 bins are more than memory holds; the comparison keeps the conversion defined for larger quotients and NaN
    const float q = a / b.width;
    const int32_t whole = static_cast<int32_t>(q < 2147483520.0f ? q : 2147483520.0f);
    const uint32_t bin = static_cast<uint32_t>(whole) < b.last ? static_cast<uint32_t>(whole) : b.last;
    const bool counted = fits & (a > b.above) & (u != b.exclude);
    bins[i] = counted ? bin : b.last + 1;
  }
  seen->largest = largest;
  seen->overflow += overflow;
}

void count(const uint32_t* bins, int64_t n, uint32_t* tables, int64_t stride) {
  int64_t i = 0;
  for (; i + kTables <= n; i += kTables) {
    for (int64_t t = 0; t < kTables; ++t) ++tables[t * stride + bins[i + t]];
  }
  for (; i < n; ++i) ++tables[bins[i]];
}

// Adds what lies in [x, x + n) to `sums` [last + 2].
Seen histogram_part(const float* x, int64_t n, Binning b, int64_t* sums) {
  Seen seen;
  const int64_t stride = int64_t(b.last) + 2;
  std::vector<uint32_t> tables(kTables * stride, 0);
  uint32_t bins[kBlock];
  int64_t since = 0;
  const auto flush = [&] {
    for (int64_t t = 0; t < kTables; ++t)
      for (int64_t k = 0; k < stride; ++k) sums[k] += tables[t * stride + k];
    since = 0;
  };
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = std::min(kBlock, n - at);
    bins_of(x + at, bins, m, b, &seen);
    count(bins, m, tables.data(), stride);
    since += m;
    if (since > (int64_t(1) << 31)) {  // before a 32-bit count can run over
      flush();
      std::fill(tables.begin(), tables.end(), 0);
    }
  }
  flush();
  return seen;
}

Tensor histogram_cpu(
    Tensor counts, Tensor input, double width, double limit, double above, bool skip_zeros) {
  const int64_t bins = counts.numel();
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.dim() == 1 && bins > 0 && bins < (int64_t(1) << 31) - 2,
      "counts must be int64 of shape [bins]");
  const Binning b{
      static_cast<float>(width), static_cast<float>(limit), static_cast<float>(above),
      static_cast<uint32_t>(bins - 1), skip_zeros ? 0u : 0xffffffffu};
  STD_TORCH_CHECK(
      b.width >= std::numeric_limits<float>::min() && std::isfinite(b.width), "width must be positive");
  const Tensor dense = densified(input);
  const Tensor x =
      dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
  const int64_t n = x.numel();
  const float* data = static_cast<const float*>(x.const_data_ptr());
  const int64_t parts = parts_for(n);
  std::vector<int64_t> sums(parts * (bins + 1), 0);
  std::vector<Seen> seen(parts);
  in_parts(n, parts, [&](int64_t part, int64_t begin, int64_t end) {
    seen[part] = histogram_part(data + begin, end - begin, b, sums.data() + part * (bins + 1));
  });
  uint32_t largest = 0;
  int64_t overflow = 0;
  for (const Seen& s : seen) {
    largest = std::max(largest, s.largest);
    overflow += s.overflow;
  }
  if (largest < 0x7f800000u) {  // all finite: otherwise the caller refuses the tensor and nothing is counted
    const int64_t stride = counts.stride(0);
    int64_t* to = static_cast<int64_t*>(counts.mutable_data_ptr());
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t k = 0; k < bins; ++k) to[k * stride] += sums[part * (bins + 1) + k];
  }
  const int64_t two = 2;
  Tensor stats = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&two, 1), ScalarType::Double);
  double* s = static_cast<double*>(stats.mutable_data_ptr());
  s[0] = bits_float(largest);
  s[1] = static_cast<double>(overflow);
  return stats;
}

// ---- search by relative entropy ----

double xlogx(double x) { return x > 0 ? x * std::log(x) : 0.0; }

// KL(P || Q) for every candidate edge; the derivation is in qzoo/quant/ops/search.py.
Tensor entropy_costs_cpu(Tensor input, int64_t groups, int64_t start, int64_t stride) {
  STD_TORCH_CHECK(
      input.scalar_type() == ScalarType::Long && input.dim() == 1 && groups > 0 && start > 0 && stride > 0,
      "entropy_costs takes int64 [bins] and positive numbers");
  const Tensor held = torch::stable::contiguous(input);
  const int64_t bins = held.numel();
  const int64_t* counts = static_cast<const int64_t*>(held.const_data_ptr());
  std::vector<int64_t> mass(bins + 1, 0), filled(bins + 1, 0);
  std::vector<double> plogp(bins + 1, 0.0);
  for (int64_t j = 0; j < bins; ++j) {
    mass[j + 1] = mass[j] + counts[j];
    filled[j + 1] = filled[j] + (counts[j] > 0);
    plogp[j + 1] = plogp[j] + xlogx(static_cast<double>(counts[j]));
  }
  const int64_t first = std::min(start, bins);
  const int64_t candidates = (bins - first) / stride + 1;
  Tensor out =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(&candidates, 1), ScalarType::Double);
  double* costs = static_cast<double*>(out.mutable_data_ptr());
  const double total = static_cast<double>(mass[bins]);
  in_parallel(candidates, std::max<int64_t>(1, kGrain / (groups * 16)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = first + c * stride;
      const int64_t inside = mass[i], beyond = mass[bins] - inside, last = counts[i - 1];
      if (inside == 0 || (last == 0 && beyond > 0)) {  // P has mass where Q has none
        costs[c] = std::numeric_limits<double>::infinity();
        continue;
      }
      double q = 0.0, level = 0.0;
      int64_t from = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t to = ((g + 1) * i + groups - 1) / groups;
        const double group = static_cast<double>(mass[to] - mass[from]);
        if (group > 0) {
          level = std::log(group / static_cast<double>(filled[to] - filled[from]));
          q += group * level;
        }
        if (to > from) from = to;
      }
      // the last bin lies in the last group that holds anything, unless it is empty, and then nothing is beyond it
      const double p = plogp[i] - xlogx(static_cast<double>(last)) + xlogx(static_cast<double>(last + beyond));
      q += static_cast<double>(beyond) * level;
      costs[c] = (p - q) / total - std::log(total) + std::log(static_cast<double>(inside));
    }
  });
  return out;
}

// ---- search by mean squared error ----

constexpr int64_t kSlice = 128;

QZOO_CLONES double error_integer(const float* x, const double* weight, int64_t n, Level level) {
  double sum = 0.0;
  float error[kSlice];
  QZOO_VECTORIZE
  for (int64_t i = 0; i < n; ++i) error[i] = fake_quantize(x[i], level.scale, level.low, level.high) - x[i];
  double lane[8] = {};  // eight sums side by side: a fixed order that vector instructions can follow
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double e = error[i + k];
      lane[k] += e * e * weight[i + k];
    }
  for (; i < n; ++i) {
    const double e = error[i];
    sum += e * e * weight[i];
  }
  for (int k = 0; k < 8; ++k) sum += lane[k];
  return sum;
}

QZOO_CLONES double error_e4m3(const float* x, const double* weight, int64_t n, Level level) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double e = fake_quantize_fp8<false>(x[i], level.scale, level.high) - x[i];
    sum += e * e * weight[i];
  }
  return sum;
}

struct MseInput {
  std::vector<float> center;
  std::vector<double> weight;
};

// The best candidate of one histogram. Bins are visited from the largest value down, where clipping costs most, and a
// candidate is dropped as soon as it costs more than the best one so far: sums only grow.
int64_t search_row(
    const int64_t* counts, const float* centers, int64_t bins, float low, float high, bool e4m3, int64_t first,
    int64_t stride) {
  MseInput held;  // only the bins that hold anything
  held.center.reserve(bins);
  held.weight.reserve(bins);
  for (int64_t j = bins - 1; j >= 0; --j) {
    if (counts[j] <= 0) continue;
    held.center.push_back(centers[j]);
    held.weight.push_back(static_cast<double>(counts[j]));
  }
  const int64_t n = static_cast<int64_t>(held.center.size());
  const int64_t candidates = (bins - 1 - first) / stride + 1;
  int64_t best = first;
  double least = std::numeric_limits<double>::infinity();
  // from the widest range down: the best one is rarely far below it, and an early good one drops most of the others
  for (int64_t c = candidates - 1; c >= 0; --c) {
    const int64_t index = first + c * stride;
    const Level level = make_level(centers[index], low, high);
    double cost = 0.0;
    for (int64_t at = 0; at < n && cost <= least; at += kSlice) {
      const int64_t m = std::min(kSlice, n - at);
      cost += e4m3 ? error_e4m3(&held.center[at], &held.weight[at], m, level)
                   : error_integer(&held.center[at], &held.weight[at], m, level);
    }
    if (cost <= least) {  // going down, so that the first of several equal candidates stays
      least = cost;
      best = index;
    }
  }
  return best;
}

Tensor mse_search_cpu(
    Tensor input, Tensor middle, int64_t num_bits, bool is_unsigned, int64_t start, int64_t stride) {
  STD_TORCH_CHECK(
      input.scalar_type() == ScalarType::Long && middle.scalar_type() == ScalarType::Float && input.dim() > 0 &&
          start >= 0 && stride > 0 && num_bits < 31,
      "mse_search takes int64 counts and float32 centers [..., bins]");
  const Tensor held = torch::stable::contiguous(input);
  const Tensor centers = torch::stable::contiguous(middle);
  STD_TORCH_CHECK(centers.numel() == held.numel(), "mse_search needs a center for every count");
  const int64_t bins = held.size(held.dim() - 1);
  STD_TORCH_CHECK(bins > 0, "mse_search needs at least one bin");
  const int64_t rows = held.numel() / bins;
  Tensor out = torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(held.sizes().data(), held.dim() - 1), ScalarType::Long);
  const int64_t* counts = static_cast<const int64_t*>(held.const_data_ptr());
  const float* values = static_cast<const float*>(centers.const_data_ptr());
  int64_t* best = static_cast<int64_t*>(out.mutable_data_ptr());
  const bool e4m3 = num_bits == 0;
  const int64_t width = num_bits - 1 + is_unsigned;
  const float high =
      e4m3 ? kE4M3.limit : (width > 0 ? static_cast<float>((int64_t(1) << width) - 1) : 0.0f);
  const float low = is_unsigned ? 0.0f : -high;
  const int64_t first = std::min(start, bins - 1);
  in_parallel(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      best[r] = search_row(counts + r * bins, values + r * bins, bins, low, high, e4m3, first, stride);
  });
  return out;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("reduce_amax", TORCH_BOX(&qzoo::reduce_amax_cpu));
  m.impl("histogram_", TORCH_BOX(&qzoo::histogram_cpu));
  m.impl("entropy_costs", TORCH_BOX(&qzoo::entropy_costs_cpu));
  m.impl("mse_search", TORCH_BOX(&qzoo::mse_search_cpu));
}
