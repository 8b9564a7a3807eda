// CUDA kernels: the same arithmetic (quant.h) with one thread an element, in memory order.
//
// Where a kernel is missing here (the range searches) the reference implementation runs, on the GPU.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "quant.h"
#include "tensor.h"

namespace qzoo {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 4096;
constexpr int kMaxOuter = 6;
constexpr int kSharedBins = 8192;  // 32 KiB of 32-bit counts

// Which range an element uses. Small enough to travel as a kernel argument.
struct RangeIndex {
  int64_t length;  // elements that lie together and step through the ranges by `step`
  int64_t step;
  int outer;
  int64_t outer_size[kMaxOuter];
  int64_t outer_step[kMaxOuter];

  __device__ __forceinline__ int64_t operator()(int64_t element) const {
    int64_t run = element / length;
    int64_t range = (element - run * length) * step;
    for (int d = outer - 1; d >= 0; --d) {
      const int64_t next = run / outer_size[d];
      range += (run - next * outer_size[d]) * outer_step[d];
      run = next;
    }
    return range;
  }
};

// Counts in strides of the tensor of ranges itself, so that the kernels read it in place.
RangeIndex make_index(const View& x, const int64_t* kept) {
  int64_t size[kMaxDims], step[kMaxDims];
  int n = 0;
  for (int k = 0; k < x.count; ++k) {
    const int d = x.order[k];
    const int64_t s = x.sizes[d];
    const int64_t stride = kept[d] < 0 ? 0 : kept[d];
    if (n > 0 && step[n - 1] == stride * s) {
      size[n - 1] *= s;
      step[n - 1] = stride;
    } else {
      size[n] = s;
      step[n++] = stride;
    }
  }
  RangeIndex index{1, 0, 0, {}, {}};
  if (n == 0) return index;
  STD_TORCH_CHECK(n - 1 <= kMaxOuter, "the ranges alternate over too many axes for the CUDA kernels");
  index.length = size[n - 1];
  index.step = step[n - 1];
  index.outer = n - 1;
  for (int k = 0; k < n - 1; ++k) {
    index.outer_size[k] = size[k];
    index.outer_step[k] = step[k];
  }
  return index;
}

#define QZOO_EACH(I, N)                                                                    \
  for (int64_t I = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride_ = int64_t(gridDim.x) * blockDim.x; \
       I < (N); I += stride_)

// ---- kernels ----

struct FakeInteger {
  float low, high;
  template <typename W>
  __device__ __forceinline__ W operator()(W v, const float* amax, int64_t k) const {
    const Level level = make_level(amax[k], low, high);
    return fake_quantize(v, level.scale, level.low, level.high);
  }
};

struct ToInteger {
  float low, high;
  template <typename W>
  __device__ __forceinline__ int operator()(W v, const float* amax, int64_t k) const {
    const Level level = make_level(amax[k], low, high);
    const W q = quantize(v, level.scale, level.low, level.high);
    return static_cast<int>(q == q ? q : W(0));
  }
};

struct FromInteger {
  float low, high;
  template <typename W>
  __device__ __forceinline__ W operator()(W v, const float* amax, int64_t k) const {
    const Level level = make_level(amax[k], low, high);
    return level.high != 0.0f ? v / static_cast<W>(level.scale) : W(0);
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

template <typename From, typename To, typename W, typename F>
__global__ void elementwise(const From* x, To* y, int64_t n, const float* amax, RangeIndex index, F f) {
  QZOO_EACH(i, n) y[i] = static_cast<To>(f(static_cast<W>(x[i]), amax, index(i)));
}

template <typename T, typename W>
__global__ void gradient(const T* g, const T* x, T* y, int64_t n, const float* amax, RangeIndex index) {
  QZOO_EACH(i, n) y[i] = static_cast<T>(pass_gradient(static_cast<W>(g[i]), static_cast<W>(x[i]), amax[index(i)]));
}

__device__ __forceinline__ float magnitude(double v) { return std::fabs(static_cast<float>(v)); }

// The bit patterns of magnitudes order as integers, NaN on top; a thread writes only when its range changes.
template <typename T>
__global__ void amax_kernel(const T* x, int64_t n, unsigned* largest, RangeIndex index) {
  int64_t range = -1;
  unsigned m = 0;
  QZOO_EACH(i, n) {
    const int64_t k = index(i);
    if (k != range) {
      if (range >= 0 && m) atomicMax(largest + range, m);
      range = k;
      m = 0;
    }
    const unsigned u = float_bits(magnitude(static_cast<double>(x[i])));
    m = u > m ? u : m;
  }
  if (range >= 0 && m) atomicMax(largest + range, m);
}

struct Binning {
  float width, limit, above;
  int bins;
  bool skip_zeros;
};

// Counts nothing when the maximum, found before, is not finite.
template <bool kShared>
__global__ void histogram_kernel(
    const float* x, int64_t n, Binning b, const unsigned* largest, unsigned long long* counts, double* stats) {
  extern __shared__ unsigned table[];
  const bool finite = *largest < 0x7f800000u;
  if (kShared) {
    for (int k = threadIdx.x; k < b.bins; k += blockDim.x) table[k] = 0;
    __syncthreads();
  }
  unsigned long long overflow = 0;
  QZOO_EACH(i, n) {
    const float a = std::fabs(x[i]);
    overflow += a > b.limit;
    if (!finite || !(a <= b.limit) || !(a > b.above) || (b.skip_zeros && a == 0.0f)) continue;
    const float q = a / b.width;
    const int bin = q < static_cast<float>(b.bins - 1) ? static_cast<int>(q) : b.bins - 1;
    if (kShared) {
      atomicAdd(table + bin, 1u);
    } else {
      atomicAdd(counts + bin, 1ull);
    }
  }
  if (overflow) atomicAdd(stats + 1, static_cast<double>(overflow));
  if (blockIdx.x == 0 && threadIdx.x == 0) stats[0] = bits_float(*largest);
  if (kShared) {
    __syncthreads();
    for (int k = threadIdx.x; k < b.bins; k += blockDim.x)
      if (table[k]) atomicAdd(counts + k, static_cast<unsigned long long>(table[k]));
  }
}

// ---- launching ----

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

int blocks(int64_t n) { return static_cast<int>(std::min<int64_t>((n + kThreads - 1) / kThreads, kMaxBlocks)); }

Tensor new_tensor(const Launch& on, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d)
    strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), code, aoti_torch_device_type_cuda(), on.device, &handle));
  return Tensor(handle);
}

// The ranges as contiguous float32 on the device of x; a single range may come from the CPU.
Tensor ranges_of(const Launch& on, const Tensor& amax) {
  const bool here = amax.is_cuda() && amax.get_device_index() == on.device;
  STD_TORCH_CHECK(here || amax.numel() == 1, "amax is on another device than the input: move both to one");
  if (here && amax.scalar_type() == ScalarType::Float) return torch::stable::contiguous(amax);
  const std::vector<int64_t> sizes(amax.sizes().data(), amax.sizes().data() + amax.dim());
  Tensor copy = new_tensor(on, sizes, ScalarType::Float);
  torch::stable::copy_(copy, amax);
  return copy;
}

#define QZOO_SWITCH(DTYPE, CASE)                                                                      \
  switch (DTYPE) {                                                                                    \
    case ScalarType::Float: CASE(float, float); break;                                                \
    case ScalarType::Double: CASE(double, double); break;                                             \
    case ScalarType::Half: CASE(Half, float); break;                                                  \
    case ScalarType::BFloat16: CASE(BFloat16, float); break;                                          \
    default: STD_TORCH_CHECK(false, "unsupported type ", torch::headeronly::toString(DTYPE));         \
  }

template <typename From, typename To, typename W, typename F>
void launch(const Launch& on, const Tensor& x, const Tensor& y, const float* amax, RangeIndex index, F f) {
  const int64_t n = x.numel();
  if (n == 0) return;
  elementwise<From, To, W, F><<<blocks(n), kThreads, 0, on.stream>>>(
      static_cast<const From*>(x.const_data_ptr()), static_cast<To*>(y.mutable_data_ptr()), n, amax, index, f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

FakeInteger integer_format(int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const int64_t width = num_bits - 1 + is_unsigned;
  STD_TORCH_CHECK(width < 31, "num_bits=", num_bits, " is more than the kernels handle");
  const float high = width > 0 ? static_cast<float>((int64_t(1) << width) - 1) : 0.0f;
  if (is_unsigned || high == 0.0f) return {0.0f, high};
  return {narrow_range ? -high : -high - 1.0f, high};
}

void fake_into(
    const Launch& on, const Tensor& x, const View& view, const Tensor& amax, FakeInteger f, const Tensor& y) {
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = make_index(view, kept_strides(view, ranges).data());
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
  Tensor g = grad;
  if (g.scalar_type() != x.scalar_type() || !same_layout(View(g), view)) {
    g = on.empty(view, x.scalar_type());
    torch::stable::copy_(g, grad);
  }
  Tensor y = on.empty(view, x.scalar_type());
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = make_index(view, kept_strides(view, ranges).data());
  const int64_t n = x.numel();
  if (n == 0) return y;
#define QZOO_CASE(T, W)                                                                      \
  gradient<T, W><<<blocks(n), kThreads, 0, on.stream>>>(                                     \
      static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),  \
      static_cast<T*>(y.mutable_data_ptr()), n, floats(ranges), index)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor quantize_cuda(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  STD_TORCH_CHECK(1 <= num_bits && num_bits <= 16, "num_bits=", num_bits, " cannot be stored: use 1 to 16 bits");
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = make_index(view, kept_strides(view, ranges).data());
  const FakeInteger format = integer_format(num_bits, is_unsigned, narrow_range);
  const ToInteger f{format.low, format.high};
  const ScalarType dtype = num_bits <= 8 ? (is_unsigned ? ScalarType::Byte : ScalarType::Char)
                                         : (is_unsigned ? ScalarType::UInt16 : ScalarType::Short);
  Tensor y = on.empty(view, dtype);
#define QZOO_CASE(T, W)                                                                             \
  switch (dtype) {                                                                                  \
    case ScalarType::Byte: launch<T, uint8_t, W>(on, x, y, floats(ranges), index, f); break;        \
    case ScalarType::Char: launch<T, int8_t, W>(on, x, y, floats(ranges), index, f); break;         \
    case ScalarType::UInt16: launch<T, uint16_t, W>(on, x, y, floats(ranges), index, f); break;     \
    default: launch<T, int16_t, W>(on, x, y, floats(ranges), index, f);                             \
  }
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  return y;
}

Tensor dequantize_cuda(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, ScalarType dtype) {
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = make_index(view, kept_strides(view, ranges).data());
  const FakeInteger format = integer_format(num_bits, is_unsigned, true);
  const FromInteger f{format.low, format.high};
  Tensor y = on.empty(view, dtype);
#define QZOO_CASE(T, W)                                                                                        \
  switch (x.scalar_type()) {                                                                                   \
    case ScalarType::Byte: launch<uint8_t, T, W>(on, x, y, floats(ranges), index, f); break;                   \
    case ScalarType::Char: launch<int8_t, T, W>(on, x, y, floats(ranges), index, f); break;                    \
    case ScalarType::UInt16: launch<uint16_t, T, W>(on, x, y, floats(ranges), index, f); break;                \
    case ScalarType::Short: launch<int16_t, T, W>(on, x, y, floats(ranges), index, f); break;                  \
    default: STD_TORCH_CHECK(false, "dequantize takes int8, uint8, int16 or uint16");                          \
  }
  QZOO_SWITCH(dtype, QZOO_CASE)
#undef QZOO_CASE
  return y;
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
  const RangeIndex index = make_index(view, kept.data());
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

void amax_into(const Launch& on, const Tensor& x, const Tensor& out, RangeIndex index) {
  const int64_t n = x.numel();
  STD_CUDA_CHECK(cudaMemsetAsync(out.mutable_data_ptr(), 0, out.numel() * sizeof(float), on.stream));
  if (n == 0) return;
#define QZOO_CASE(T, W)                                        \
  amax_kernel<T><<<blocks(n), kThreads, 0, on.stream>>>(       \
      static_cast<const T*>(x.const_data_ptr()), n, static_cast<unsigned*>(out.mutable_data_ptr()), index)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

Tensor reduce_amax_cuda(Tensor input, std::vector<int64_t> keep_axes) {
  const Launch on(input);
  const Tensor x =
      densified(is_floating(input.scalar_type()) ? input : torch::stable::to(input, ScalarType::Float));
  const View view(x);
  std::vector<int64_t> sizes(keep_axes.empty() ? 0 : view.dim, 1);
  for (int64_t axis : keep_axes) {
    STD_TORCH_CHECK(-view.dim <= axis && axis < view.dim, "axis ", axis, " does not exist");
    axis += axis < 0 ? view.dim : 0;
    sizes[axis] = view.sizes[axis];
  }
  Tensor out = new_tensor(on, sizes, ScalarType::Float);
  std::array<int64_t, kMaxDims> kept = kept_strides(view, out);
  amax_into(on, x, out, make_index(view, kept.data()));
  return out;
}

Tensor histogram_cuda(Tensor counts, Tensor input, double width, double limit, double above, bool skip_zeros) {
  const int64_t bins = counts.numel();
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.dim() == 1 && counts.is_contiguous() && bins > 0 &&
          bins < (int64_t(1) << 24) && counts.is_cuda() && counts.get_device_index() == input.get_device_index(),
      "counts must be contiguous int64 [bins] on the device of the input, with fewer than 2^24 bins");
  const Launch on(input);
  const Tensor dense = densified(input);
  const Tensor x = dense.scalar_type() == ScalarType::Float ? dense : torch::stable::to(dense, ScalarType::Float);
  Tensor largest = new_tensor(on, {}, ScalarType::Float);
  amax_into(on, x, largest, RangeIndex{std::max<int64_t>(x.numel(), 1), 0, 0, {}, {}});
  Tensor stats = new_tensor(on, {2}, ScalarType::Double);
  STD_CUDA_CHECK(cudaMemsetAsync(stats.mutable_data_ptr(), 0, 2 * sizeof(double), on.stream));
  const int64_t n = x.numel();
  if (n == 0) return stats;
  const Binning b{
      static_cast<float>(width), static_cast<float>(limit), static_cast<float>(above), static_cast<int>(bins),
      skip_zeros};
  const auto* top = static_cast<const unsigned*>(largest.const_data_ptr());
  auto* to = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  auto* s = static_cast<double*>(stats.mutable_data_ptr());
  if (bins <= kSharedBins) {
    // few blocks, each with a table of its own; a block counts fewer than 2^32 values for any tensor that fits a GPU
    const int grid = std::min(blocks(n), 512);
    histogram_kernel<true>
        <<<grid, kThreads, bins * sizeof(unsigned), on.stream>>>(floats(x), n, b, top, to, s);
  } else {
    histogram_kernel<false><<<blocks(n), kThreads, 0, on.stream>>>(floats(x), n, b, top, to, s);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return stats;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&qzoo::fake_quantize_cuda));
  m.impl("fake_quantize_forward", TORCH_BOX(&qzoo::fake_quantize_cuda));
  m.impl("fake_quantize_out", TORCH_BOX(&qzoo::fake_quantize_out_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&qzoo::fake_quantize_backward_cuda));
  m.impl("quantize", TORCH_BOX(&qzoo::quantize_cuda));
  m.impl("dequantize", TORCH_BOX(&qzoo::dequantize_cuda));
  m.impl("fake_quantize_fp8", TORCH_BOX(&qzoo::fake_quantize_fp8_cuda));
  m.impl("fake_quantize_fp8_forward", TORCH_BOX(&qzoo::fake_quantize_fp8_cuda));
  m.impl("reduce_amax", TORCH_BOX(&qzoo::reduce_amax_cuda));
  m.impl("histogram_", TORCH_BOX(&qzoo::histogram_cuda));
}
