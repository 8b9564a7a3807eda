// The searches over a histogram for the range that loses least.
#include <cmath>
#include <limits>

#include "quant.h"
#include "tensor.h"

namespace qzoo {
namespace {

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

#define QZOO_ERROR_FP8(NAME, IS_E5M2)                                                      \
  QZOO_CLONES double NAME(const float* x, const double* weight, int64_t n, Level level) {  \
    double sum = 0.0;                                                                      \
    for (int64_t i = 0; i < n; ++i) {                                                      \
      const double e = fake_quantize_fp8<IS_E5M2>(x[i], level.scale, level.high) - x[i];   \
      sum += e * e * weight[i];                                                            \
    }                                                                                      \
    return sum;                                                                            \
  }

QZOO_ERROR_FP8(error_e4m3, false)
QZOO_ERROR_FP8(error_e5m2, true)

using Error = double (*)(const float*, const double*, int64_t, Level);

struct MseInput {
  std::vector<float> center;
  std::vector<double> weight;
};

// The best candidate of one histogram. Bins are visited from the largest value down, where clipping costs most, and a
// candidate is dropped as soon as it costs more than the best one so far: sums only grow.
int64_t search_row(
    const int64_t* counts, const float* centers, int64_t bins, float low, float high, Error error, int64_t first,
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
      cost += error(&held.center[at], &held.weight[at], m, level);
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
          start >= 0 && stride > 0,
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
  Bounds bounds{0.0f, 0.0f};
  Error error = error_integer;
  if (num_bits >= 0) {
    bounds = integer_bounds(num_bits, is_unsigned, true);
  } else {
    STD_TORCH_CHECK(num_bits >= -2, "num_bits is an integer's, or -1 for E4M3, -2 for E5M2");
    bounds.high = num_bits == -1 ? kE4M3.limit : kE5M2.limit;
    error = num_bits == -1 ? error_e4m3 : error_e5m2;
  }
  const int64_t first = std::min(start, bins - 1);
  in_parallel(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      best[r] = search_row(counts + r * bins, values + r * bins, bins, bounds.low, bounds.high, error, first, stride);
  });
  return out;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("entropy_costs", TORCH_BOX(&qzoo::entropy_costs_cpu));
  m.impl("mse_search", TORCH_BOX(&qzoo::mse_search_cpu));
}
