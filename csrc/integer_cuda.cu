// Real quantization on CUDA: to int8, uint8, int16 or uint16, to two 4-bit values a byte, and back.
#include "cuda_launch.h"

namespace qzoo {
namespace {

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

Tensor quantize_cuda(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const Launch on(input);
  const Tensor x = densified(input);
  const View view(x);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  const ToInteger f{bounds.low, bounds.high};
  const ScalarType dtype = storage_type(num_bits, is_unsigned);
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
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, true);
  const FromInteger f{bounds.low, bounds.high};
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

// ---- two 4-bit values in a byte, the first one low: one thread a byte ----

template <typename T, typename W>
__global__ void quantize_pairs(const T* x, uint8_t* y, int64_t n, const float* amax, RangeIndex index, ToInteger f) {
  QZOO_EACH(i, (n + 1) / 2) {
    const int64_t k = 2 * i;
    const int low = f(static_cast<W>(x[k]), amax, index(k));
    const int high = k + 1 < n ? f(static_cast<W>(x[k + 1]), amax, index(k + 1)) : 0;
    y[i] = static_cast<uint8_t>((low & 0x0F) | ((high & 0x0F) << 4));
  }
}

__device__ __forceinline__ int half_byte(uint8_t pair, int high, bool is_unsigned) {
  const int v = high ? pair >> 4 : pair & 0x0F;
  return is_unsigned ? v : (v ^ 8) - 8;  // extends the sign
}

template <typename T, typename W>
__global__ void dequantize_pairs(
    const uint8_t* x, T* y, int64_t n, const float* amax, RangeIndex index, FromInteger f, bool is_unsigned) {
  QZOO_EACH(i, n) {
    const int q = half_byte(x[i >> 1], static_cast<int>(i & 1), is_unsigned);
    y[i] = static_cast<T>(f(static_cast<W>(q), amax, index(i)));
  }
}

__global__ void pack_pairs(const uint8_t* q, uint8_t* packed, int64_t n) {
  QZOO_EACH(i, (n + 1) / 2) {
    const int high = 2 * i + 1 < n ? q[2 * i + 1] : 0;
    packed[i] = static_cast<uint8_t>((q[2 * i] & 0x0F) | ((high & 0x0F) << 4));
  }
}

__global__ void unpack_pairs(const uint8_t* packed, uint8_t* q, int64_t n, bool is_unsigned) {
  QZOO_EACH(i, n) q[i] = static_cast<uint8_t>(half_byte(packed[i >> 1], static_cast<int>(i & 1), is_unsigned));
}

Tensor pack_int4_cuda(Tensor q) {
  check_one_byte(q);
  const Launch on(q);
  const Tensor held = torch::stable::contiguous(q);
  const int64_t n = held.numel();
  Tensor out = new_tensor(on, {(n + 1) / 2}, ScalarType::Byte);
  if (n == 0) return out;
  pack_pairs<<<blocks((n + 1) / 2), kThreads, 0, on.stream>>>(
      static_cast<const uint8_t*>(held.const_data_ptr()), static_cast<uint8_t*>(out.mutable_data_ptr()), n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor unpack_int4_cuda(Tensor packed, bool is_unsigned) {
  const int64_t n = 2 * packed.numel();
  check_packed(packed, {n});
  const Launch on(packed);
  const Tensor held = torch::stable::contiguous(packed);
  Tensor out = new_tensor(on, {n}, is_unsigned ? ScalarType::Byte : ScalarType::Char);
  if (n == 0) return out;
  unpack_pairs<<<blocks(n), kThreads, 0, on.stream>>>(
      static_cast<const uint8_t*>(held.const_data_ptr()), static_cast<uint8_t*>(out.mutable_data_ptr()), n,
      is_unsigned);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor quantize_int4_cuda(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  check_int4(num_bits);
  const Launch on(input);
  const Tensor x = torch::stable::contiguous(input);
  const View view(x);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  const ToInteger f{bounds.low, bounds.high};
  const int64_t n = x.numel();
  Tensor y = new_tensor(on, {(n + 1) / 2}, ScalarType::Byte);
  if (n == 0) return y;
#define QZOO_CASE(T, W)                                                                                  \
  quantize_pairs<T, W><<<blocks((n + 1) / 2), kThreads, 0, on.stream>>>(                                 \
      static_cast<const T*>(x.const_data_ptr()), static_cast<uint8_t*>(y.mutable_data_ptr()), n,         \
      floats(ranges), index, f)
  QZOO_SWITCH(x.scalar_type(), QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor dequantize_int4_cuda(
    Tensor input, Tensor amax, std::vector<int64_t> shape, int64_t num_bits, bool is_unsigned, ScalarType dtype) {
  check_int4(num_bits);
  const int64_t n = check_packed(input, shape);
  const Launch on(input);
  const Tensor packed = torch::stable::contiguous(input);
  Tensor y = new_tensor(on, shape, dtype);
  const View view(y);
  const Tensor ranges = ranges_of(on, amax);
  const RangeIndex index = index_of(view, kept_strides(view, ranges).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, true);
  const FromInteger f{bounds.low, bounds.high};
  if (n == 0) return y;
#define QZOO_CASE(T, W)                                                                                  \
  dequantize_pairs<T, W><<<blocks(n), kThreads, 0, on.stream>>>(                                         \
      static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), n,    \
      floats(ranges), index, f, is_unsigned)
  QZOO_SWITCH(dtype, QZOO_CASE)
#undef QZOO_CASE
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&qzoo::quantize_cuda));
  m.impl("dequantize", TORCH_BOX(&qzoo::dequantize_cuda));
  m.impl("pack_int4", TORCH_BOX(&qzoo::pack_int4_cuda));
  m.impl("unpack_int4", TORCH_BOX(&qzoo::unpack_int4_cuda));
  m.impl("quantize_int4", TORCH_BOX(&qzoo::quantize_int4_cuda));
  m.impl("dequantize_int4", TORCH_BOX(&qzoo::dequantize_int4_cuda));
}
