// Fake quantization: integers forward and backward, and the fp8 round trip.
#include "cpu_loops.h"

namespace qzoo {
namespace {

QZOO_FLOATING(fake, (fake_quantize(v, scale, low, high)))
QZOO_FLOAT_ONLY(fake_e4m3, (fake_quantize_fp8<false>(v, scale, high)))
QZOO_FLOAT_ONLY(fake_e5m2, (fake_quantize_fp8<true>(v, scale, high)))

#define QZOO_BACKWARD(T, W)                                                                             \
  QZOO_CLONES void backward_one(const T* g, const T* x, T* y, int64_t n, float amax) {                  \
    QZOO_VECTORIZE                                                                                      \
    for (int64_t i = 0; i < n; ++i)                                                                     \
      y[i] = static_cast<T>(pass_gradient(static_cast<W>(g[i]), static_cast<W>(x[i]), amax));           \
  }                                                                                                     \
  QZOO_CLONES void backward_each(const T* g, const T* x, T* y, int64_t n, const float* amax) {          \
    QZOO_VECTORIZE                                                                                      \
    for (int64_t i = 0; i < n; ++i)                                                                     \
      y[i] = static_cast<T>(pass_gradient(static_cast<W>(g[i]), static_cast<W>(x[i]), amax[i]));        \
  }

QZOO_BACKWARD(float, float)
QZOO_BACKWARD(double, double)
QZOO_BACKWARD(Half, float)
QZOO_BACKWARD(BFloat16, float)

void fake_into(const Tensor& x, const View& view, const Tensor& amax, Bounds bounds, const Tensor& y) {
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  const Levels levels(walk, amax, bounds.low, bounds.high);
#define QZOO_CASE(T) QZOO_RUN(fake, T, T)
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize", QZOO_CASE)
#undef QZOO_CASE
}

Tensor fake_quantize_cpu(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = empty_as(view, x.scalar_type());
  fake_into(x, view, amax, integer_bounds(num_bits, is_unsigned, narrow_range), y);
  return y;
}

void fake_quantize_out_cpu(
    Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range, Tensor out) {
  const View target(out);
  STD_TORCH_CHECK(
      out.scalar_type() == input.scalar_type(), "out is ", torch::headeronly::toString(out.scalar_type()),
      " but the input is ", torch::headeronly::toString(input.scalar_type()));
  const View given(input);
  if (given.dense && same_layout(given, target)) {
    fake_into(input, given, amax, integer_bounds(num_bits, is_unsigned, narrow_range), out);
    return;
  }
  Tensor y = fake_quantize_cpu(input, amax, num_bits, is_unsigned, narrow_range);
  torch::stable::copy_(out, y);
}

Tensor fake_quantize_backward_cpu(Tensor grad, Tensor input, Tensor amax) {
  const Tensor x = densified(input);
  const View view(x);
  const Tensor g = arranged_as(grad, view, x.scalar_type());
  Tensor y = empty_as(view, x.scalar_type());
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  const int64_t times = walk.widen(kRun);
  std::vector<float> ranges(walk.ranges * times);
  read_ranges(walk, amax, ranges.data());
  repeat(ranges.data(), walk.ranges, times);
#define QZOO_CASE(T)                                                             \
  {                                                                              \
    const T* gp = static_cast<const T*>(g.const_data_ptr());                     \
    const T* xp = static_cast<const T*>(x.const_data_ptr());                     \
    T* yp = static_cast<T*>(y.mutable_data_ptr());                               \
    in_parallel(walk.numel, kGrain, [&](int64_t begin, int64_t end) {            \
      walk.each_piece(begin, end, [&](int64_t at, int64_t n, int64_t k) {        \
        if (walk.step) {                                                         \
          backward_each(gp + at, xp + at, yp + at, n, ranges.data() + k);        \
        } else {                                                                 \
          backward_one(gp + at, xp + at, yp + at, n, ranges[k]);                 \
        }                                                                        \
      });                                                                        \
    });                                                                          \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_backward", QZOO_CASE)
#undef QZOO_CASE
  return y;
}

Tensor fake_quantize_fp8_cpu(Tensor input, std::optional<Tensor> amax, bool e5m2) {
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = empty_as(view, x.scalar_type());
  const float limit = e5m2 ? kE5M2.limit : kE4M3.limit;
  std::array<int64_t, kMaxDims> kept;
  kept.fill(-1);
  if (amax) kept = kept_strides(view, *amax);
  Walk walk = make_walk(view.sizes, view.order, view.count, kept.data());
  const Levels levels = amax ? Levels(walk, *amax, 0.0f, limit) : Levels(limit);
  if (e5m2) {
#define QZOO_CASE(T) QZOO_RUN(fake_e5m2, T, T)
    QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_fp8", QZOO_CASE)
#undef QZOO_CASE
  } else {
#define QZOO_CASE(T) QZOO_RUN(fake_e4m3, T, T)
    QZOO_SWITCH_FLOATING(x.scalar_type(), "fake_quantize_fp8", QZOO_CASE)
#undef QZOO_CASE
  }
  return y;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&qzoo::fake_quantize_cpu));
  m.impl("fake_quantize_forward", TORCH_BOX(&qzoo::fake_quantize_cpu));
  m.impl("fake_quantize_out", TORCH_BOX(&qzoo::fake_quantize_out_cpu));
  m.impl("fake_quantize_backward", TORCH_BOX(&qzoo::fake_quantize_backward_cpu));
  m.impl("fake_quantize_fp8", TORCH_BOX(&qzoo::fake_quantize_fp8_cpu));
  m.impl("fake_quantize_fp8_forward", TORCH_BOX(&qzoo::fake_quantize_fp8_cpu));
}
