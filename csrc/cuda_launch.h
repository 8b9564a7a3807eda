// What the CUDA kernels share: how a kernel is started, and the frame of the element-wise ones.
//
// One thread an element, in memory order, with the arithmetic of quant.h. Element numbers are 64-bit; a grid is at
// most kMaxBlocks wide and its threads stride over what is left.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quant.h"
#include "tensor.h"

namespace qzoo {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;

inline RangeIndex index_of(const View& x, const int64_t* kept) {
  RangeIndex index;
  STD_TORCH_CHECK(
      make_index(x.sizes, x.order, x.count, kept, &index),
      "the ranges alternate over too many axes for the CUDA kernels: input of shape ", shape_text(x.dim, x.sizes));
  return index;
}

#define QZOO_EACH(I, N)                                                                    \
  for (int64_t I = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride_ = int64_t(gridDim.x) * blockDim.x; \
       I < (N); I += stride_)

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int32_t device;

  explicit Launch(const Tensor& x) : guard(checked(x)), device(x.get_device_index()) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  static int32_t checked(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "the input is not on a GPU but another argument is: move both to one device");
    return x.get_device_index();
  }
  Tensor empty(const View& view, ScalarType dtype) const {
    return empty_as(view, dtype, aoti_torch_device_type_cuda(), device);
  }
};

inline int blocks(int64_t n) { return static_cast<int>(std::min<int64_t>((n + kThreads - 1) / kThreads, kMaxBlocks)); }

inline Tensor new_tensor(const Launch& on, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d)
    strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), code, aoti_torch_device_type_cuda(), on.device, &handle));
  return Tensor(handle);
}

inline bool is_on(const Launch& on, const Tensor& t) { return t.is_cuda() && t.get_device_index() == on.device; }

// The values as contiguous float32 on the device of x.
inline Tensor floats_on(const Launch& on, const Tensor& t) {
  if (is_on(on, t) && t.scalar_type() == ScalarType::Float) return torch::stable::contiguous(t);
  const std::vector<int64_t> sizes(t.sizes().data(), t.sizes().data() + t.dim());
  Tensor copy = new_tensor(on, sizes, ScalarType::Float);
  torch::stable::copy_(copy, t);
  return copy;
}

// A single range may come from the CPU.
inline Tensor ranges_of(const Launch& on, const Tensor& amax) {
  STD_TORCH_CHECK(
      is_on(on, amax) || amax.numel() == 1, "amax is on another device than the input: move both to one");
  return floats_on(on, amax);
}

#define QZOO_SWITCH(DTYPE, CASE)                                                                      \
  switch (DTYPE) {                                                                                    \
    case ScalarType::Float: CASE(float, float); break;                                                \
    case ScalarType::Double: CASE(double, double); break;                                             \
    case ScalarType::Half: CASE(Half, float); break;                                                  \
    case ScalarType::BFloat16: CASE(BFloat16, float); break;                                          \
    default: STD_TORCH_CHECK(false, "unsupported type ", torch::headeronly::toString(DTYPE));         \
  }

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// y[i] = f(x[i], ranges, number of the range) for functors with the arithmetic.
template <typename From, typename To, typename W, typename F>
__global__ void elementwise(const From* x, To* y, int64_t n, const float* amax, RangeIndex index, F f) {
  QZOO_EACH(i, n) y[i] = static_cast<To>(f(static_cast<W>(x[i]), amax, index(i)));
}

template <typename From, typename To, typename W, typename F>
inline void launch(const Launch& on, const Tensor& x, const Tensor& y, const float* amax, RangeIndex index, F f) {
  const int64_t n = x.numel();
  if (n == 0) return;
  elementwise<From, To, W, F><<<blocks(n), kThreads, 0, on.stream>>>(
      static_cast<const From*>(x.const_data_ptr()), static_cast<To*>(y.mutable_data_ptr()), n, amax, index, f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// y[i] = f(gradient[i], x[i], number of the range): the gradient of y to x, in the type and layout of x.
template <typename T, typename W, typename F>
__global__ void gradient(const T* g, const T* x, T* y, int64_t n, RangeIndex index, F f) {
  QZOO_EACH(i, n) y[i] = static_cast<T>(f(static_cast<W>(g[i]), static_cast<W>(x[i]), index(i)));
}

template <typename F>
inline Tensor launch_gradient(
    const Launch& on, const Tensor& grad, const Tensor& x, const View& view, RangeIndex index, F f) {
  Tensor g = grad;
  if (g.scalar_type() != x.scalar_type() || !same_layout(View(g), view)) {
    g = on.empty(view, x.scalar_type());
    torch::stable::copy_(g, grad);
  }
  Tensor y = on.empty(view, x.scalar_type());
  const int64_t n = x.numel();
  if (n == 0) return y;
#define QZOO_CASE(T, W)                                                                      \
  gradient<T, W, F><<<blocks(n), kThreads, 0, on.stream>>>(                                  \
      static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),  \
      static_cast<T*>(y.mutable_data_ptr()), n, index, f)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace qzoo
