// Real quantization: to int8, uint8, int16 or uint16, to two 4-bit values a byte, and back.
#include "cpu_loops.h"

namespace qzoo {
namespace {

// NaN has no integer: it becomes 0, by a comparison, before the conversion
template <typename W>
QZOO_FN int32_t to_integer(W q) {
  return static_cast<int32_t>(q == q ? q : W(0));
}

QZOO_TO_INTEGER(int8_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(uint8_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(int16_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(uint16_t, (to_integer(quantize(v, scale, low, high))))
QZOO_FROM_INTEGER(int8_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(uint8_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(int16_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(uint16_t, (high != 0.0f ? v / scale : 0))

Tensor quantize_cpu(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const Tensor x = densified(input);
  const View view(x);
  const ScalarType dtype = storage_type(num_bits, is_unsigned);
  Tensor y = empty_as(view, dtype);
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  const Levels levels(walk, amax, bounds.low, bounds.high);
#define QZOO_INTEGER(TO) QZOO_RUN(quantize, QZOO_T, TO)
#define QZOO_CASE(T)                                          \
  {                                                           \
    using QZOO_T = T;                                         \
    QZOO_SWITCH_INTEGER(dtype, "quantize", QZOO_INTEGER)      \
  }
  QZOO_SWITCH_FLOATING(x.scalar_type(), "quantize", QZOO_CASE)
#undef QZOO_CASE
#undef QZOO_INTEGER
  return y;
}

Tensor dequantize_cpu(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, ScalarType dtype) {
  const Tensor x = densified(input);
  const View view(x);
  Tensor y = empty_as(view, dtype);
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, true);
  const Levels levels(walk, amax, bounds.low, bounds.high);
#define QZOO_INTEGER(FROM) QZOO_RUN(dequantize, FROM, QZOO_T)
#define QZOO_CASE(T)                                                     \
  {                                                                      \
    using QZOO_T = T;                                                    \
    QZOO_SWITCH_INTEGER(x.scalar_type(), "dequantize", QZOO_INTEGER)     \
  }
  QZOO_SWITCH_FLOATING(dtype, "dequantize to", QZOO_CASE)
#undef QZOO_CASE
#undef QZOO_INTEGER
  return y;
}

// ---- two 4-bit values in a byte, the first one low ----
//
// Through a buffer that stays in the first-level cache: whatever the runs of the ranges, a byte is written once.

constexpr int64_t kPairs = 1024;

QZOO_CLONES void pack_pairs(const uint8_t* q, uint8_t* packed, int64_t bytes) {
  QZOO_VECTORIZE
  for (int64_t i = 0; i < bytes; ++i)
    packed[i] = static_cast<uint8_t>((q[2 * i] & 0x0F) | (q[2 * i + 1] << 4));
}

QZOO_CLONES void unpack_pairs(const uint8_t* packed, uint8_t* q, int64_t bytes) {
  QZOO_VECTORIZE
  for (int64_t i = 0; i < bytes; ++i) {
    q[2 * i] = packed[i] & 0x0F;
    q[2 * i + 1] = packed[i] >> 4;
  }
}

QZOO_CLONES void unpack_pairs(const uint8_t* packed, int8_t* q, int64_t bytes) {
  QZOO_VECTORIZE
  for (int64_t i = 0; i < bytes; ++i) {  // up and down again, which extends the sign
    q[2 * i] = static_cast<int8_t>(static_cast<int8_t>(static_cast<uint8_t>(packed[i] << 4)) >> 4);
    q[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(packed[i]) >> 4);
  }
}

// f(first byte, bytes, first value, values) for pieces of `n` values that end between bytes.
template <typename F>
void each_pair_block(int64_t n, const F& f) {
  in_parallel((n + 1) / 2, kGrain / 2, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kPairs) {
      const int64_t bytes = std::min(kPairs, end - at);
      f(at, bytes, 2 * at, std::min(2 * bytes, n - 2 * at));
    }
  });
}

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  prefer_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

Tensor pack_int4_cpu(Tensor q) {
  check_one_byte(q);
  const Tensor held = torch::stable::contiguous(q);
  const int64_t n = held.numel();
  Tensor out = new_tensor({(n + 1) / 2}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(held.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  in_parallel(n / 2, kGrain, [&](int64_t begin, int64_t end) { pack_pairs(from + 2 * begin, to + begin, end - begin); });
  if (n % 2) to[n / 2] = from[n - 1] & 0x0F;
  return out;
}

Tensor unpack_int4_cpu(Tensor packed, bool is_unsigned) {
  const int64_t bytes = packed.numel();
  check_packed(packed, {2 * bytes});
  const Tensor held = torch::stable::contiguous(packed);
  Tensor out = new_tensor({2 * bytes}, is_unsigned ? ScalarType::Byte : ScalarType::Char);
  const auto* from = static_cast<const uint8_t*>(held.const_data_ptr());
  void* to = out.mutable_data_ptr();
  in_parallel(bytes, kGrain, [&](int64_t begin, int64_t end) {
    if (is_unsigned) {
      unpack_pairs(from + begin, static_cast<uint8_t*>(to) + 2 * begin, end - begin);
    } else {
      unpack_pairs(from + begin, static_cast<int8_t*>(to) + 2 * begin, end - begin);
    }
  });
  return out;
}

template <typename T, typename Q>
void quantize_pairs(const Walk& walk, const Levels& levels, const Tensor& x, const Tensor& y) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  each_pair_block(walk.numel, [&](int64_t byte, int64_t bytes, int64_t first, int64_t n) {
    Q values[2 * kPairs];
    values[2 * bytes - 1] = 0;  // the high half that an odd number of values leaves
    run_range<T, Q>(walk, levels, first, first + n, from + first, values, QZOO_LOOPS_OF(quantize, T, Q));
    pack_pairs(reinterpret_cast<const uint8_t*>(values), to + byte, bytes);
  });
}

Tensor quantize_int4_cpu(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  check_int4(num_bits);
  const Tensor x = torch::stable::contiguous(input);
  const View view(x);
  Tensor y = new_tensor({(x.numel() + 1) / 2}, ScalarType::Byte);
  if (x.numel() == 0) return y;
  Walk walk = make_walk(view.sizes, view.order, view.count, kept_strides(view, amax).data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, narrow_range);
  const Levels levels(walk, amax, bounds.low, bounds.high);
#define QZOO_CASE(T) \
  is_unsigned ? quantize_pairs<T, uint8_t>(walk, levels, x, y) : quantize_pairs<T, int8_t>(walk, levels, x, y)
  QZOO_SWITCH_FLOATING(x.scalar_type(), "quantize_int4", QZOO_CASE)
#undef QZOO_CASE
  return y;
}

template <typename T, typename Q>
void dequantize_pairs(const Walk& walk, const Levels& levels, const Tensor& packed, const Tensor& y) {
  const uint8_t* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  T* to = static_cast<T*>(y.mutable_data_ptr());
  each_pair_block(walk.numel, [&](int64_t byte, int64_t bytes, int64_t first, int64_t n) {
    Q values[2 * kPairs];
    unpack_pairs(from + byte, values, bytes);
    run_range<Q, T>(walk, levels, first, first + n, values, to + first, QZOO_LOOPS_OF(dequantize, Q, T));
  });
}

Tensor dequantize_int4_cpu(
    Tensor input, Tensor amax, std::vector<int64_t> shape, int64_t num_bits, bool is_unsigned, ScalarType dtype) {
  check_int4(num_bits);
  const int64_t n = check_packed(input, shape);
  const Tensor packed = torch::stable::contiguous(input);
  Tensor y = new_tensor(shape, dtype);
  const View view(y);
  const auto kept = kept_strides(view, amax);
  if (n == 0) return y;
  Walk walk = make_walk(view.sizes, view.order, view.count, kept.data());
  const Bounds bounds = integer_bounds(num_bits, is_unsigned, true);
  const Levels levels(walk, amax, bounds.low, bounds.high);
#define QZOO_CASE(T)                                                  \
  is_unsigned ? dequantize_pairs<T, uint8_t>(walk, levels, packed, y) \
              : dequantize_pairs<T, int8_t>(walk, levels, packed, y)
  QZOO_SWITCH_FLOATING(dtype, "dequantize_int4 to", QZOO_CASE)
#undef QZOO_CASE
  return y;
}

}  // namespace
}  // namespace qzoo

STABLE_TORCH_LIBRARY_IMPL(qzoo, CPU, m) {
  m.impl("quantize", TORCH_BOX(&qzoo::quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&qzoo::dequantize_cpu));
  m.impl("pack_int4", TORCH_BOX(&qzoo::pack_int4_cpu));
  m.impl("unpack_int4", TORCH_BOX(&qzoo::unpack_int4_cpu));
  m.impl("quantize_int4", TORCH_BOX(&qzoo::quantize_int4_cpu));
  m.impl("dequantize_int4", TORCH_BOX(&qzoo::dequantize_int4_cpu));
}
