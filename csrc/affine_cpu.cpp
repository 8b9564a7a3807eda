// Affine fake quantization, with a zero point: forward, backward, and the gradients to the two ends of a learned range.
#include <tuple>

#include "cpu_loops.h"

namespace qzoo {
namespace {

struct Limits {
  float low, high;
};

#define QZOO_AFFINE(T, W)                                                                                    \
  QZOO_CLONES void affine(const T* x, T* y, int64_t n, float scale, float low, float high) {                 \
    QZOO_VECTORIZE                                                                                           \
    for (int64_t i = 0; i < n; ++i)                                                                          \
      y[i] = static_cast<T>(fake_quantize_affine(static_cast<W>(x[i]), scale, low, high));                   \
  }                                                                                                          \
  QZOO_CLONES void affine_backward(const T* g, const T* x, T* y, int64_t n, float low, float high) {         \
    QZOO_VECTORIZE                                                                                           \
    for (int64_t i = 0; i < n; ++i)                                                                          \
      y[i] = static_cast<T>(pass_gradient(static_cast<W>(g[i]), static_cast<W>(x[i]), low, high));           \
  }                                                                                                          \
  /* sums[0]: what lies below passes to the low end; sums[1]: above, to the high end; sums[2]: the rounding */ \
  QZOO_CLONES void affine_learned(                                                                           \
      const T* g, const T* x, T* out, int64_t n, Level level, Limits at, double* sums) {                     \
    const float scale = level.scale, low = level.low, high = level.high, first = at.low, last = at.high;     \
    W below[kLanes] = {}, above[kLanes] = {}, inside[kLanes] = {};                                           \
    const int64_t whole = n - n % kLanes;                                                                    \
    for (int64_t i = 0; i < n; i += kLanes) {                                                                \
      const int count = i < whole ? kLanes : static_cast<int>(n - i);                                        \
      QZOO_VECTORIZE                                                                                         \
      for (int l = 0; l < count; ++l) {                                                                      \
        const W grad = static_cast<W>(g[i + l]), v = static_cast<W>(x[i + l]);                               \
        const W y = fake_quantize_affine(v, scale, low, high), passed = pass_gradient(grad, v, first, last); \
        out[i + l] = static_cast<T>(passed);                                                                 \
        below[l] += v < static_cast<W>(first) ? grad : W(0);                                                 \
        above[l] += v > static_cast<W>(last) ? grad : W(0);                                                  \
        inside[l] += passed * (y - v);                                                                       \
      }                                                                                                      \
    }                                                                                                        \
    for (int l = 0; l < kLanes; ++l) {                                                                       \
      sums[0] += static_cast<double>(below[l]);                                                              \
      sums[1] += static_cast<double>(above[l]);                                                              \
      sums[2] += static_cast<double>(inside[l]);                                                             \
    }                                                                                                        \
  }

QZOO_AFFINE(float, float)
QZOO_AFFINE(double, double)
QZOO_AFFINE(Half, float)
QZOO_AFFINE(BFloat16, float)

// The two ends with zero between them.
Limits limits_of(const Tensor& limits) {
  STD_TORCH_CHECK(
      limits.dim() == 1 && limits.numel() == 2, "the limits must be [low, high], not a tensor of shape ",
      shape_text(limits.dim(), limits.sizes().data()));
  const View view(limits);
  float ends[2];
  read_ranges(make_walk(view.sizes, view.order, view.count, kept_strides(view, limits).data()), limits, ends);
  return {0.0f < ends[0] ? 0.0f : ends[0], ends[1] < 0.0f ? 0.0f : ends[1]};
}

float top_of(int64_t num_bits) {
  STD_TORCH_CHECK(1 <= num_bits && num_bits <= 16, "num_bits=", num_bits, " is none of 1 to 16");
  return static_cast<float>((int64_t(1) << num_bits) - 1);
}

Tensor fake_quantize_affine_cpu(Tensor input, Tensor limits, int64_t num_bits) {
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = empty_as(view, x.scalar_type());
  const Limits at = limits_of(limits);
  const Level level = make_affine_level(at.low, at.high, top_of(num_bits));
#define QZOO_CASE(T)                                                                               \
  {                                                                                                \
    const T* xp = static_cast<const T*>(x.const_data_ptr());                                       \
    T* yp = static_cast<T*>(y.mutable_data_ptr());                                                 \
    in_parallel(view.numel(), kGrain, [&](int64_t begin, int64_t end) {                            \
      affine(xp + begin, yp + begin, end - begin, level.scale, level.low, level.high);             \
    });                                                                                            \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_affine", QZOO_CASE)
#undef QZOO_CASE
  return y;
}

Tensor fake_quantize_affine_backward_cpu(Tensor grad, Tensor input, Tensor limits) {
  const Tensor x = densified(input);
  const View view(x);
  const Tensor g = arranged_as(grad, view, x.scalar_type());
  Tensor y = empty_as(view, x.scalar_type());
  const Limits at = limits_of(limits);
#define QZOO_CASE(T)                                                                               \
  {                                                                                                \
    const T* gp = static_cast<const T*>(g.const_data_ptr());                                       \
    const T* xp = static_cast<const T*>(x.const_data_ptr());                                       \
    T* yp = static_cast<T*>(y.mutable_data_ptr());                                                 \
    in_parallel(view.numel(), kGrain, [&](int64_t begin, int64_t end) {                            \
      affine_backward(gp + begin, xp + begin, yp + begin, end - begin, at.low, at.high);           \
    });                                                                                            \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_affine_backward", QZOO_CASE)
#undef QZOO_CASE
  return y;
}

std::tuple<Tensor, Tensor> affine_learned_backward_cpu(
    Tensor grad, Tensor input, Tensor limits, int64_t num_bits, bool rounding) {
  const Tensor x = densified(input);
  const View view(x), ends(limits);
  const Tensor g = arranged_as(grad, view, x.scalar_type());
  Tensor y = empty_as(view, x.scalar_type());
  Tensor moved = empty_as(ends, ScalarType::Float);
  const Limits at = limits_of(limits);
  const Level level = make_affine_level(at.low, at.high, top_of(num_bits));
  std::array<double, 3> total;
#define QZOO_CASE(T)                                                                                      \
  {                                                                                                       \
    const T* gp = static_cast<const T*>(g.const_data_ptr());                                              \
    const T* xp = static_cast<const T*>(x.const_data_ptr());                                              \
    T* yp = static_cast<T*>(y.mutable_data_ptr());                                                        \
    total = sum_blocks<3>(view.numel(), [&](int64_t begin, int64_t n, double* sums) {                     \
      affine_learned(gp + begin, xp + begin, yp + begin, n, level, at, sums);                             \
    });                                                                                                   \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_affine_learned_backward", QZOO_CASE)
#undef QZOO_CASE
  const float span = at.high - at.low;
  const double error = rounding ? total[2] / static_cast<double>(span < kTiny ? kTiny : span) : 0.0;
  float* out = static_cast<float*>(moved.mutable_data_ptr());
  out[0] = static_cast<float>(total[0] - error);
  out[1] = static_cast<float>(total[1] + error);
  return {y, moved};
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("fake_quantize_affine", TORCH_BOX(&qzoo::fake_quantize_affine_cpu));
  m.impl("fake_quantize_affine_forward", TORCH_BOX(&qzoo::fake_quantize_affine_cpu));
  m.impl("fake_quantize_affine_backward", TORCH_BOX(&qzoo::fake_quantize_affine_backward_cpu));
  m.impl("fake_quantize_affine_learned_backward", TORCH_BOX(&qzoo::affine_learned_backward_cpu));
}
