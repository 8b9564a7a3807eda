// What the kernels of both devices share: tensors through the LibTorch stable ABI, in the order their elements lie
// in memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "layout.h"

// Three builds of every hot loop, chosen once at load time by what the processor can do.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(QZOO_NO_CLONES)
#define QZOO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define QZOO_CLONES
#endif

#if defined(__clang__)
#define QZOO_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define QZOO_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace qzoo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements that are worth another thread

// The strides are what the shim reports: borrowed, valid as long as the tensor.
struct View {
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  int order[kMaxDims];  // dimensions longer than 1, slowest first
  int count;
  bool dense;

  explicit View(const Tensor& t) : dim(t.dim()), sizes(t.sizes().data()), strides(t.strides().data()) {
    STD_TORCH_CHECK(dim <= kMaxDims, "qzoo kernels take at most ", kMaxDims, " dimensions, not ", dim);
    dense = memory_order(dim, sizes, strides, order, &count);
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
    return n;
  }
};

inline std::string shape_text(int64_t dim, const int64_t* sizes) {
  std::string s = "[";
  for (int64_t d = 0; d < dim; ++d) s += (d ? ", " : "") + std::to_string(sizes[d]);
  return s + "]";
}

// New memory is faulted in page by page, and for a large tensor that takes several times as long as computing it.
// Huge pages make it 512 times fewer faults. Only a hint: where the system does not do it nothing changes.
constexpr int64_t kWorthHugePages = 8 << 20;

inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kWorthHugePages) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

inline Tensor empty_as(const View& like, ScalarType dtype, int32_t device, int32_t index) {
  AtenTensorHandle handle = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(like.dim, like.sizes, like.strides, code, device, index, &handle));
  return Tensor(handle);
}

// A CPU tensor of the shape and strides of `like`, which must be dense.
inline Tensor empty_as(const View& like, ScalarType dtype) {
  Tensor t = empty_as(like, dtype, aoti_torch_device_type_cpu(), -1);
  if (like.numel() * 8 >= kWorthHugePages) {
    int64_t bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    prefer_huge_pages(t.mutable_data_ptr(), bytes);
  }
  return t;
}

// The same values without gaps or overlap, in the memory order that torch's preserve_format gives.
inline Tensor densified(const Tensor& t) { return View(t).dense ? t : torch::stable::clone(t); }

inline bool same_layout(const View& a, const View& b) {
  if (a.dim != b.dim) return false;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// `t` in the type and the memory layout of `like`; copies only where it has to.
inline Tensor arranged_as(const Tensor& t, const View& like, ScalarType dtype) {
  if (t.scalar_type() == dtype && same_layout(View(t), like)) return t;
  Tensor copy = empty_as(like, dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// Strides of the ranges along each dimension of x, -1 where they are shared. Raises where they do not broadcast.
inline std::array<int64_t, kMaxDims> kept_strides(const View& x, const Tensor& amax) {
  const int64_t dim = amax.dim();
  const int64_t* sizes = amax.sizes().data();
  const int64_t* strides = amax.strides().data();
  std::array<int64_t, kMaxDims> kept;
  bool fits = true;
  for (int64_t a = 0; a < dim - x.dim; ++a) fits = fits && sizes[a] == 1;
  for (int64_t d = 0; d < x.dim; ++d) {
    const int64_t a = d - (x.dim - dim);
    const bool shared = a < 0 || sizes[a] == 1;
    fits = fits && (shared || sizes[a] == x.sizes[d]);
    kept[d] = shared ? -1 : strides[a];
  }
  STD_TORCH_CHECK(
      fits, "amax of shape ", shape_text(dim, sizes), " does not broadcast to the input of shape ",
      shape_text(x.dim, x.sizes));
  return kept;
}

template <typename T>
void read_ranges(const Walk& walk, const T* amax, float* out) {
  walk.each_range([&](int64_t at) { *out++ = static_cast<float>(amax[at]); });
}

// The ranges as float32, in the order of the walk.
inline void read_ranges(const Walk& walk, const Tensor& amax, float* out) {
  const void* data = amax.const_data_ptr();
  switch (amax.scalar_type()) {
    case ScalarType::Float: return read_ranges(walk, static_cast<const float*>(data), out);
    case ScalarType::Double: return read_ranges(walk, static_cast<const double*>(data), out);
    case ScalarType::Half: return read_ranges(walk, static_cast<const Half*>(data), out);
    case ScalarType::BFloat16: return read_ranges(walk, static_cast<const BFloat16*>(data), out);
    default: STD_TORCH_CHECK(false, "amax must be floating point");
  }
}

// f(begin, end) over [0, n), on the calling thread when n is small.
template <typename F>
void in_parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) {
    if (n > 0) f(int64_t(0), n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// ---- formats ----

struct Bounds {
  float low, high;
};

// Lowest and highest level of an integer format; without a positive level only 0 is left.
inline Bounds integer_bounds(int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const int64_t width = num_bits - 1 + is_unsigned;
  STD_TORCH_CHECK(width < 31, "num_bits=", num_bits, " is more than the kernels handle");
  const float high = width > 0 ? static_cast<float>((int64_t(1) << width) - 1) : 0.0f;
  if (is_unsigned || high == 0.0f) return {0.0f, high};
  return {narrow_range ? -high : -high - 1.0f, high};
}

inline ScalarType storage_type(int64_t num_bits, bool is_unsigned) {
  STD_TORCH_CHECK(
      1 <= num_bits && num_bits <= 16, "num_bits=", num_bits, " cannot be stored: use 1 to 16 bits");
  if (num_bits <= 8) return is_unsigned ? ScalarType::Byte : ScalarType::Char;
  return is_unsigned ? ScalarType::UInt16 : ScalarType::Short;
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
      dtype == ScalarType::BFloat16;
}

// ---- two 4-bit values in a byte ----

inline void check_int4(int64_t num_bits) {
  STD_TORCH_CHECK(1 <= num_bits && num_bits <= 4, "num_bits=", num_bits, " does not fit into 4 bits: use 1 to 4");
}

// How many values `packed` must hold for `shape`; raises where it does not.
inline int64_t check_packed(const Tensor& packed, const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "shape has a negative length: ", shape_text(shape.size(), shape.data()));
    n *= size;
  }
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.numel() == (n + 1) / 2,
      "4-bit values of shape ", shape_text(shape.size(), shape.data()), " need uint8 [", (n + 1) / 2, "], not ",
      torch::headeronly::toString(packed.scalar_type()), " ", shape_text(packed.dim(), packed.sizes().data()));
  return n;
}

inline void check_one_byte(const Tensor& q) {
  STD_TORCH_CHECK(
      q.scalar_type() == ScalarType::Char || q.scalar_type() == ScalarType::Byte,
      "pack_int4 takes int8 or uint8, not ", torch::headeronly::toString(q.scalar_type()));
}

// ---- reductions ----

// Shape of the ranges of a reduction: length 1 where an axis is reduced, no dimensions where all are.
inline std::vector<int64_t> kept_shape(const View& x, const std::vector<int64_t>& keep_axes) {
  std::vector<int64_t> sizes(keep_axes.empty() ? 0 : x.dim, 1);
  for (int64_t axis : keep_axes) {
    STD_TORCH_CHECK(
        -x.dim <= axis && axis < x.dim, "axis ", axis, " does not exist in an input of shape ",
        shape_text(x.dim, x.sizes));
    axis += axis < 0 ? x.dim : 0;
    sizes[axis] = x.sizes[axis];
  }
  return sizes;
}

}  // namespace qzoo
