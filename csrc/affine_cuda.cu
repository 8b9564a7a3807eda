// Affine fake quantization on CUDA, with a zero point: forward and backward.
#include "cuda_launch.h"

namespace qzoo {
namespace {

template <typename T, typename W>
__global__ void affine(const T* x, T* y, int64_t n, const float* limits, float top) {
  const Level level = make_affine_level(limits[0], limits[1], top);
  QZOO_EACH(i, n)
    y[i] = static_cast<T>(fake_quantize_affine(static_cast<W>(x[i]), level.scale, level.low, level.high));
}

struct AffineGradient {
  const float* limits;
  template <typename W>
  __device__ __forceinline__ W operator()(W grad, W v, int64_t) const {
    const float low = 0.0f < limits[0] ? 0.0f : limits[0], high = limits[1] < 0.0f ? 0.0f : limits[1];
    return pass_gradient(grad, v, low, high);
  }
};

// The two ends as contiguous float32 on the device of x; they may come from the CPU.
Tensor limits_of(const Launch& on, const Tensor& limits) {
  STD_TORCH_CHECK(limits.dim() == 1 && limits.numel() == 2, "the limits must be [low, high]");
  return floats_on(on, limits);
}

Tensor fake_quantize_affine_cuda(Tensor input, Tensor limits, int64_t num_bits) {
  STD_TORCH_CHECK(1 <= num_bits && num_bits <= 16, "num_bits=", num_bits, " is none of 1 to 16");
  const float top = static_cast<float>((int64_t(1) << num_bits) - 1);
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = on.empty(view, x.scalar_type());
  const Tensor ends = limits_of(on, limits);
  const int64_t n = x.numel();
  if (n == 0) return y;
#define QZOO_CASE(T, W)                                                                                 \
  affine<T, W><<<blocks(n), kThreads, 0, on.stream>>>(                                                  \
      static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), n, floats(ends), top)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor fake_quantize_affine_backward_cuda(Tensor grad, Tensor input, Tensor limits) {
  const Launch on(input);
  const Tensor x = densified(input);
  const Tensor ends = limits_of(on, limits);
  return launch_gradient(on, grad, x, View(x), RangeIndex(), AffineGradient{floats(ends)});
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CUDA, m) {
  m.impl("fake_quantize_affine", TORCH_BOX(&qzoo::fake_quantize_affine_cuda));
  m.impl("fake_quantize_affine_forward", TORCH_BOX(&qzoo::fake_quantize_affine_cuda));
  m.impl("fake_quantize_affine_backward", TORCH_BOX(&qzoo::fake_quantize_affine_backward_cuda));
}
