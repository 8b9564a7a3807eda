// Statistics for calibration, each in one pass: largest magnitudes and histograms.
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

Tensor reduce_amax_cpu(Tensor input, std::vector<int64_t> keep_axes) {
  const Tensor floating = is_floating(input.scalar_type()) ? input : torch::stable::to(input, ScalarType::Float);
  const Tensor x = densified(floating);
  const View view(x);
  const std::vector<int64_t> sizes = kept_shape(view, keep_axes);
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

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("reduce_amax", TORCH_BOX(&qzoo::reduce_amax_cpu));
  m.impl("histogram_", TORCH_BOX(&qzoo::histogram_cpu));
}
