// Fake quantization on CUDA: integers forward and backward, and the fp8 round trip.
#include "cuda_launch.h"

namespace qzoo {
namespace {

struct FakeInteger {
  float low, high;
  template <typename W>
  __device__ __forceinline__ W operator()(W v, const float* amax, int64_t k) const {
    const Level level = make_level(amax[k], low, high);
    return fake_quantize(v, level.scale, level.low, level.high);
  }
};

template <bool kIsE5M2>
struct FakeFloat8 {
  float limit;
  __device__ __forceinline__ float operator()(float v, const float* amax, int64_t k) const {
    const Level level = amax ? make_level(amax[k], 0.0f, limit) : Level{1.0f, 0.0f, limit};
    return fake_quantize_fp8<kIsE5M2>(v, level.scale, level.high);
  }
};

struct Gradient {
  const float* amax;
  template <typename W>
  __device__ __forceinline__ W operator()(W grad, W v, int64_t k) const {
    return pass_gradient(grad, v, amax[k]);
  }
};

FakeInteger integer_format(int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  return {bounds.low, bounds.high};
}

void fake_into(
    const Launch& on, const Tensor& x, const View& view, const Tensor& amax, FakeInteger f, const Tensor& y) {
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
#define QZOO_CASE(T, W) launch<T, T, W>(on, x, y, floats(ranges), index, f)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
}

Tensor fake_quantize_cuda(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = on.empty(view, x.scalar_type());
  fake_into(on, x, view, amax, integer_format(num_bits, is_unsigned, narrow_range), y);
  return y;
}

void fake_quantize_out_cuda(
    Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range, Tensor out) {
  const Launch on(input);
  const View given(input), target(out);
  STD_TORCH_CHECK(out.scalar_type() == input.scalar_type(), "out must have the type of the input");
  if (given.dense && same_layout(given, target)) {
    fake_into(on, input, given, amax, integer_format(num_bits, is_unsigned, narrow_range), out);
    return;
  }
  Tensor y = fake_quantize_cuda(input, amax, num_bits, is_unsigned, narrow_range);
  torch::stable::copy_(out, y);
}

Tensor fake_quantize_backward_cuda(Tensor grad, Tensor input, Tensor amax) {
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
  return launch_gradient(on, grad, x, view, index, Gradient{floats(ranges)});
}

Tensor fake_quantize_fp8_cuda(Tensor input, std::optional<Tensor> amax, bool e5m2) {
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = on.empty(view, x.scalar_type());
  std::optional<Tensor> ranges;
  std::array<int64_t, kMaxDims> kept;
  kept.fill(-1);
  if (amax) {
    ranges = ranges_of(on, *amax);
    kept = kept_strides(view, *ranges);
  }
  const float* data = ranges ? floats(*ranges) : nullptr;
  const RangeIndex index = index_of(view, kept.data());
#define QZOO_CASE(T, W)                                                                \
  if (e5m2) {                                                                          \
    launch<T, T, float>(on, x, y, data, index, FakeFloat8<true>{kE5M2.limit});         \
  } else {                                                                             \
    launch<T, T, float>(on, x, y, data, index, FakeFloat8<false>{kE4M3.limit});        \
  }
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  return y;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&qzoo::fake_quantize_cuda));
  m.impl("fake_quantize_forward", TORCH_BOX(&qzoo::fake_quantize_cuda));
  m.impl("fake_quantize_out", TORCH_BOX(&qzoo::fake_quantize_out_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&qzoo::fake_quantize_backward_cuda));
  m.impl("fake_quantize_fp8", TORCH_BOX(&qzoo::fake_quantize_fp8_cuda));
  m.impl("fake_quantize_fp8_forward", TORCH_BOX(&qzoo::fake_quantize_fp8_cuda));
}
