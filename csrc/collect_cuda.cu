// Statistics for calibration on CUDA, each in one pass: largest magnitudes and histograms. The searches over a
// histogram are made on the CPU: it is a few thousand numbers.
#include <cmath>
#include <limits>

#include "cuda_launch.h"

namespace qzoo {
namespace {

constexpr int kSharedBins = 8192;  // 32 KiB of 32-bit counts
constexpr int kTableBlocks = 512;  // few blocks, as each has a table of its own to add up
constexpr unsigned kInfinity = 0x7f800000u;
constexpr unsigned kAllLanes = 0xffffffffu;

// Bit patterns of magnitudes order as integers, NaN on top.
__device__ __forceinline__ unsigned magnitude(float v) { return float_bits(std::fabs(v)); }
__device__ __forceinline__ unsigned magnitude(double v) { return float_bits(std::fabs(static_cast<float>(v))); }

// All lanes of a warp call these; lane 0 writes.
__device__ __forceinline__ void warp_max(unsigned* to, unsigned v) {
  for (int d = 16; d > 0; d /= 2) {
    const unsigned other = __shfl_down_sync(kAllLanes, v, d);
    v = other > v ? other : v;
  }
  if (threadIdx.x % 32 == 0 && v) atomicMax(to, v);
}

__device__ __forceinline__ void warp_add(unsigned long long* to, unsigned long long v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(kAllLanes, v, d);
  if (threadIdx.x % 32 == 0 && v) atomicAdd(to, v);
}

// ---- largest magnitude ----

template <typename T, typename W>
__global__ void amax_one(const T* x, int64_t n, unsigned* largest) {
  unsigned m = 0;
  QZOO_EACH(i, n) {
    const unsigned u = magnitude(static_cast<W>(x[i]));
    m = u > m ? u : m;
  }
  warp_max(largest, m);
}

// A thread writes only when its range changes.
template <typename T, typename W>
__global__ void amax_each(const T* x, int64_t n, unsigned* largest, RangeIndex index) {
  int64_t range = -1;
  unsigned m = 0;
  QZOO_EACH(i, n) {
    const int64_t k = index(i);
    if (k != range) {
      if (range >= 0 && m) atomicMax(largest + range, m);
      range = k;
      m = 0;
    }
    const unsigned u = magnitude(static_cast<W>(x[i]));
    m = u > m ? u : m;
  }
  if (range >= 0 && m) atomicMax(largest + range, m);
}

Tensor reduce_amax_cuda(Tensor input, std::vector<int64_t> keep_axes) {
  const Launch on(input);
  const Tensor x =
      densified(is_floating(input.scalar_type()) ? input : torch::stable::to(input, ScalarType::Float));
  const View view(x);
  Tensor out = new_tensor(on, kept_shape(view, keep_axes), ScalarType::Float);
  const RangeIndex index = index_of(view, kept_strides(view, out).data());
  if (out.numel() == 0) return out;
  auto* largest = static_cast<unsigned*>(out.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(largest, 0, out.numel() * sizeof(float), on.stream));
  const int64_t n = x.numel();
  if (n == 0) return out;
#define QZOO_CASE(T, W)                                                             \
  {                                                                                 \
    const T* from = static_cast<const T*>(x.const_data_ptr());                      \
    if (out.numel() == 1) {                                                         \
      amax_one<T, W><<<blocks(n), kThreads, 0, on.stream>>>(from, n, largest);      \
    } else {                                                                        \
      amax_each<T, W><<<blocks(n), kThreads, 0, on.stream>>>(from, n, largest, index); \
    }                                                                               \
  }
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// ---- histogram ----
//
// One pass over the data counts into memory of its own and finds the maximum; a second kernel, over the bins, adds
// the counts when all values were finite. Otherwise the caller refuses the tensor and keeps what it has.

struct Binning {
  float width, limit, above;
  int bins;
  bool skip_zeros;
};

// `fresh` is [bins + 2]: counts, values beyond the limit, bit pattern of the largest magnitude.
template <bool kShared>
__global__ void histogram_kernel(const float* x, int64_t n, Binning b, unsigned long long* fresh) {
  extern __shared__ unsigned table[];
  if (kShared) {
    for (int k = threadIdx.x; k < b.bins; k += blockDim.x) table[k] = 0;
    __syncthreads();
  }
  unsigned largest = 0;
  unsigned long long overflow = 0, first = 0;  // a ReLU's zeros would all wait for one counter
  QZOO_EACH(i, n) {
    const float a = std::fabs(x[i]);
    const unsigned u = float_bits(a);
    largest = u > largest ? u : largest;
    overflow += a > b.limit;
    if (!(a <= b.limit) || !(a > b.above) || (b.skip_zeros && u == 0)) continue;
    const float q = a / b.width;
    const int bin = q < static_cast<float>(b.bins - 1) ? static_cast<int>(q) : b.bins - 1;
    if (bin == 0) {
      ++first;
    } else if (kShared) {
      atomicAdd(table + bin, 1u);
    } else {
      atomicAdd(fresh + bin, 1ull);
    }
  }
  warp_add(fresh, first);
  warp_add(fresh + b.bins, overflow);
  warp_max(reinterpret_cast<unsigned*>(fresh + b.bins + 1), largest);
  if (kShared) {
    __syncthreads();
    for (int k = threadIdx.x; k < b.bins; k += blockDim.x)
      if (table[k]) atomicAdd(fresh + k, static_cast<unsigned long long>(table[k]));
  }
}

__global__ void add_histogram(const unsigned long long* fresh, int64_t bins, unsigned long long* counts, double* stats) {
  const unsigned largest = *reinterpret_cast<const unsigned*>(fresh + bins + 1);
  if (largest < kInfinity) {
    QZOO_EACH(k, bins) counts[k] += fresh[k];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    stats[0] = bits_float(largest);
    stats[1] = static_cast<double>(fresh[bins]);
  }
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
  const Binning b{
      static_cast<float>(width), static_cast<float>(limit), static_cast<float>(above), static_cast<int>(bins),
      skip_zeros};
  STD_TORCH_CHECK(
      b.width >= std::numeric_limits<float>::min() && std::isfinite(b.width), "width must be positive");
  Tensor fresh = new_tensor(on, {bins + 2}, ScalarType::Long);
  Tensor stats = new_tensor(on, {2}, ScalarType::Double);
  auto* own = static_cast<unsigned long long*>(fresh.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(own, 0, (bins + 2) * sizeof(unsigned long long), on.stream));
  const int64_t n = x.numel();
  if (n > 0 && bins <= kSharedBins) {
    // 32-bit counts: a block sees fewer than 2^32 values of any tensor that fits a GPU
    const int grid = std::min(blocks(n), kTableBlocks);
    histogram_kernel<true><<<grid, kThreads, bins * sizeof(unsigned), on.stream>>>(floats(x), n, b, own);
  } else if (n > 0) {
    histogram_kernel<false><<<blocks(n), kThreads, 0, on.stream>>>(floats(x), n, b, own);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  add_histogram<<<blocks(bins), kThreads, 0, on.stream>>>(
      own, bins, static_cast<unsigned long long*>(counts.mutable_data_ptr()),
      static_cast<double*>(stats.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return stats;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CUDA, m) {
  m.impl("reduce_amax", TORCH_BOX(&qzoo::reduce_amax_cuda));
  m.impl("histogram_", TORCH_BOX(&qzoo::histogram_cuda));
}
