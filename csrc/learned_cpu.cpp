// Gradients of fake quantization with a learned range: to the input and to the range, in one pass.
#include <tuple>

#include "cpu_loops.h"

namespace qzoo {
namespace {

#define QZOO_LEARNED(T, W, NAME, TERM)                                                                       \
  QZOO_CLONES double NAME(                                                                                   \
      const T* g, const T* x, T* out, int64_t n, float scale, float low, float high, float amax) {           \
    W sums[kLanes] = {};                                                                                     \
    const int64_t whole = n - n % kLanes;                                                                    \
    for (int64_t i = 0; i < whole; i += kLanes) {                                                            \
      QZOO_VECTORIZE                                                                                         \
      for (int l = 0; l < kLanes; ++l) {                                                                     \
        const W grad = static_cast<W>(g[i + l]), v = static_cast<W>(x[i + l]);                               \
        const W y = fake_quantize(v, scale, low, high), passed = pass_gradient(grad, v, amax);               \
        out[i + l] = static_cast<T>(passed);                                                                 \
        sums[l] += TERM;                                                                                     \
      }                                                                                                      \
    }                                                                                                        \
    double total = 0.0;                                                                                      \
    for (int l = 0; l < kLanes; ++l) total += static_cast<double>(sums[l]);                                  \
    for (int64_t i = whole; i < n; ++i) {                                                                    \
      const W grad = static_cast<W>(g[i]), v = static_cast<W>(x[i]);                                         \
      const W y = fake_quantize(v, scale, low, high), passed = pass_gradient(grad, v, amax);                 \
      out[i] = static_cast<T>(passed);                                                                       \
      total += static_cast<double>(TERM);                                                                    \
    }                                                                                                        \
    return total;                                                                                            \
  }

// LSQ moves the range by the rounding error inside, and by the highest level outside; PACT by the latter alone.
#define QZOO_LEARNED_RULES(T, W)                                          \
  QZOO_LEARNED(T, W, lsq_gradient, passed * (y - v) + (grad - passed) * y) \
  QZOO_LEARNED(T, W, pact_gradient, (grad - passed) * y)

QZOO_LEARNED_RULES(float, float)
QZOO_LEARNED_RULES(double, double)
QZOO_LEARNED_RULES(Half, float)
QZOO_LEARNED_RULES(BFloat16, float)

std::tuple<Tensor, Tensor> learned_backward_cpu(
    Tensor grad, Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range, bool rounding) {
  STD_TORCH_CHECK(amax.numel() == 1, "a gradient to the range needs one range, not ", amax.numel());
  const Tensor x = densified(input);
  const View view(x), one(amax);
  const Tensor g = arranged_as(grad, view, x.scalar_type());
  Tensor y = empty_as(view, x.scalar_type());
  Tensor moved = empty_as(one, ScalarType::Float);
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  float range = 0.0f;
  read_ranges(walk, amax, &range);
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  const Level level = make_level(range, bounds.low, bounds.high);
  double total = 0.0;
#define QZOO_CASE(T)                                                                                      \
  {                                                                                                       \
    const T* gp = static_cast<const T*>(g.const_data_ptr());                                              \
    const T* xp = static_cast<const T*>(x.const_data_ptr());                                              \
    T* yp = static_cast<T*>(y.mutable_data_ptr());                                                        \
    total = sum_blocks<1>(view.numel(), [&](int64_t at, int64_t n, double* sum) {                         \
      *sum = rounding                                                                                     \
          ? lsq_gradient(gp + at, xp + at, yp + at, n, level.scale, level.low, level.high, range)         \
          : pact_gradient(gp + at, xp + at, yp + at, n, level.scale, level.low, level.high, range);       \
    })[0];                                                                                                \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_learned_backward", QZOO_CASE)
#undef QZOO_CASE
  *static_cast<float*>(moved.mutable_data_ptr()) = static_cast<float>(total / static_cast<double>(range));
  return {y, moved};
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&qzoo::learned_backward_cpu));
}
