// Element-wise kernels: fake quantization forward and backward, quantize, dequantize, the fp8 round trip.
//
// One pass each, bound by memory. A loop is written once per combination of types as a function of its own, because
// run-time dispatch over instruction sets works on functions.
#include "quant.h"
#include "tensor.h"

namespace qzoo {
namespace {

constexpr int64_t kRun = 1024;  // runs shorter than this cost more to start than to do

void repeat(float* values, int64_t n, int64_t times) {
  for (int64_t t = 1; t < times; ++t) std::copy(values, values + n, values + t * n);
}

// Scale, lowest and highest level of every range, each an array in the order of the walk.
class Levels {
 public:
  Levels(Walk& walk, const Tensor& amax, float low, float high) {
    const int64_t ranges = walk.ranges, times = walk.widen(kRun);
    n_ = ranges * times;
    if (n_ > 1) heap_.resize(3 * n_);
    float* s = data();
    read_ranges(walk, amax, s);
    for (int64_t k = 0; k < ranges; ++k) {
      const Level level = make_level(s[k], low, high);
      s[k] = level.scale;
      s[n_ + k] = level.low;
      s[2 * n_ + k] = level.high;
      uniform_ = uniform_ && level.high == high;
    }
    for (int part = 0; part < 3; ++part) repeat(s + part * n_, ranges, times);
  }
  explicit Levels(float top) : n_(1), one_{1.0f, 0.0f, top} {}  // no range: scale 1

  bool uniform() const { return uniform_; }
  const float* scale(int64_t k) const { return data() + k; }
  const float* low(int64_t k) const { return data() + n_ + k; }
  const float* high(int64_t k) const { return data() + 2 * n_ + k; }

 private:
  float* data() { return n_ > 1 ? heap_.data() : one_; }
  const float* data() const { return n_ > 1 ? heap_.data() : one_; }
  int64_t n_ = 1;
  bool uniform_ = true;
  float one_[3];
  std::vector<float> heap_;
};

// ---- the loops: `one` has a range for all elements, `each` a range per element, `scales` a scale per element and
// common limits (no range among them is too small to use) ----

#define QZOO_LOOPS(NAME, FROM, TO, W, EXPRESSION)                                                          \
  QZOO_CLONES void NAME##_one(const FROM* x, TO* y, int64_t n, float scale, float low, float high) {       \
    (void)low;                                                                                             \
    (void)high;                                                                                            \
    QZOO_VECTORIZE                                                                                         \
    for (int64_t i = 0; i < n; ++i) {                                                                      \
      const W v = static_cast<W>(x[i]);                                                                    \
      y[i] = static_cast<TO>(EXPRESSION);                                                                  \
    }                                                                                                      \
  }                                                                                                        \
  QZOO_CLONES void NAME##_scales(                                                                          \
      const FROM* x, TO* y, int64_t n, const float* scales, float low, float high) {                       \
    (void)low;                                                                                             \
    (void)high;                                                                                            \
    QZOO_VECTORIZE                                                                                         \
    for (int64_t i = 0; i < n; ++i) {                                                                      \
      const W v = static_cast<W>(x[i]);                                                                    \
      const float scale = scales[i];                                                                       \
      y[i] = static_cast<TO>(EXPRESSION);                                                                  \
    }                                                                                                      \
  }                                                                                                        \
  QZOO_CLONES void NAME##_each(                                                                            \
      const FROM* x, TO* y, int64_t n, const float* scales, const float* lows, const float* highs) {       \
    QZOO_VECTORIZE                                                                                         \
    for (int64_t i = 0; i < n; ++i) {                                                                      \
      const W v = static_cast<W>(x[i]);                                                                    \
      const float scale = scales[i], low = lows[i], high = highs[i];                                       \
      (void)low;                                                                                           \
      (void)high;                                                                                          \
      y[i] = static_cast<TO>(EXPRESSION);                                                                  \
    }                                                                                                      \
  }

#define QZOO_FLOATING(NAME, EXPRESSION)                    \
  QZOO_LOOPS(NAME, float, float, float, EXPRESSION)        \
  QZOO_LOOPS(NAME, double, double, double, EXPRESSION)     \
  QZOO_LOOPS(NAME, Half, Half, float, EXPRESSION)          \
  QZOO_LOOPS(NAME, BFloat16, BFloat16, float, EXPRESSION)

#define QZOO_FLOAT_ONLY(NAME, EXPRESSION)                  \
  QZOO_LOOPS(NAME, float, float, float, EXPRESSION)        \
  QZOO_LOOPS(NAME, double, double, float, EXPRESSION)      \
  QZOO_LOOPS(NAME, Half, Half, float, EXPRESSION)          \
  QZOO_LOOPS(NAME, BFloat16, BFloat16, float, EXPRESSION)

#define QZOO_TO_INTEGER(TO, EXPRESSION)                    \
  QZOO_LOOPS(quantize, float, TO, float, EXPRESSION)       \
  QZOO_LOOPS(quantize, double, TO, double, EXPRESSION)     \
  QZOO_LOOPS(quantize, Half, TO, float, EXPRESSION)        \
  QZOO_LOOPS(quantize, BFloat16, TO, float, EXPRESSION)

#define QZOO_FROM_INTEGER(FROM, EXPRESSION)                \
  QZOO_LOOPS(dequantize, FROM, float, float, EXPRESSION)   \
  QZOO_LOOPS(dequantize, FROM, double, double, EXPRESSION) \
  QZOO_LOOPS(dequantize, FROM, Half, float, EXPRESSION)    \
  QZOO_LOOPS(dequantize, FROM, BFloat16, float, EXPRESSION)

// NaN has no integer: it becomes 0, by a comparison, before the conversion
template <typename W>
QZOO_FN int32_t to_integer(W q) {
  return static_cast<int32_t>(q == q ? q : W(0));
}

QZOO_FLOATING(fake, (fake_quantize(v, scale, low, high)))
QZOO_FLOAT_ONLY(fake_e4m3, (fake_quantize_fp8<false>(v, scale, high)))
QZOO_FLOAT_ONLY(fake_e5m2, (fake_quantize_fp8<true>(v, scale, high)))
QZOO_TO_INTEGER(int8_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(uint8_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(int16_t, (to_integer(quantize(v, scale, low, high))))
QZOO_TO_INTEGER(uint16_t, (to_integer(quantize(v, scale, low, high))))
QZOO_FROM_INTEGER(int8_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(uint8_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(int16_t, (high != 0.0f ? v / scale : 0))
QZOO_FROM_INTEGER(uint16_t, (high != 0.0f ? v / scale : 0))

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

// ---- from tensors to loops ----

struct Bounds {
  float low, high;
};

Bounds integer_bounds(int64_t num_bits, bool is_unsigned, bool narrow_range) {
  const int64_t width = num_bits - 1 + is_unsigned;
  STD_TORCH_CHECK(width < 31, "num_bits=", num_bits, " is more than the kernels handle");
  const float high = width > 0 ? static_cast<float>((int64_t(1) << width) - 1) : 0.0f;
  if (is_unsigned || high == 0.0f) return {0.0f, high};
  return {narrow_range ? -high : -high - 1.0f, high};
}

// Runs the loop that fits over two tensors of one layout.
template <typename From, typename To, typename One, typename Scales, typename Each>
void run(
    const Walk& walk, const Levels& levels, const Tensor& x, const Tensor& y, One one, Scales scales, Each each) {
  const From* from = static_cast<const From*>(x.const_data_ptr());
  To* to = static_cast<To*>(y.mutable_data_ptr());
  in_parallel(walk.numel, kGrain, [&](int64_t begin, int64_t end) {
    walk.each_piece(begin, end, [&](int64_t at, int64_t n, int64_t k) {
      if (walk.step && levels.uniform()) {
        scales(from + at, to + at, n, levels.scale(k), *levels.low(k), *levels.high(k));
      } else if (walk.step) {
        each(from + at, to + at, n, levels.scale(k), levels.low(k), levels.high(k));
      } else {
        one(from + at, to + at, n, *levels.scale(k), *levels.low(k), *levels.high(k));
      }
    });
  });
}

#define QZOO_RUN(NAME, FROM, TO)                                                                             \
  run<FROM, TO>(                                                                                             \
      walk, levels, x, y,                                                                                    \
      [](const FROM* a, TO* b, int64_t n, float s, float l, float h) { NAME##_one(a, b, n, s, l, h); },      \
      [](const FROM* a, TO* b, int64_t n, const float* s, float l, float h) {                                \
        NAME##_scales(a, b, n, s, l, h);                                                                     \
      },                                                                                                     \
      [](const FROM* a, TO* b, int64_t n, const float* s, const float* l, const float* h) {                  \
        NAME##_each(a, b, n, s, l, h);                                                                       \
      })

#define QZOO_SWITCH_FLOATING(DTYPE, WHAT, CASE)                                                      \
  switch (DTYPE) {                                                                                   \
    case ScalarType::Float: CASE(float); break;                                                      \
    case ScalarType::Double: CASE(double); break;                                                    \
    case ScalarType::Half: CASE(Half); break;                                                        \
    case ScalarType::BFloat16: CASE(BFloat16); break;                                                \
    default:                                                                                         \
      STD_TORCH_CHECK(                                                                               \
          false, WHAT " takes float32, float64, float16 or bfloat16, not ", torch::headeronly::toString(DTYPE)); \
  }

#define QZOO_SWITCH_INTEGER(DTYPE, WHAT, CASE)                                                       \
  switch (DTYPE) {                                                                                   \
    case ScalarType::Char: CASE(int8_t); break;                                                      \
    case ScalarType::Byte: CASE(uint8_t); break;                                                     \
    case ScalarType::Short: CASE(int16_t); break;                                                    \
    case ScalarType::UInt16: CASE(uint16_t); break;                                                  \
    default:                                                                                         \
      STD_TORCH_CHECK(                                                                               \
          false, WHAT " takes int8, uint8, int16 or uint16, not ", torch::headeronly::toString(DTYPE)); \
  }

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

Tensor quantize_cpu(Tensor input, Tensor amax, int64_t num_bits, bool is_unsigned, bool narrow_range) {
  STD_TORCH_CHECK(
      1 <= num_bits && num_bits <= 16, "num_bits=", num_bits, " cannot be stored: use 1 to 16 bits");
  const Tensor x = densified(input);
  const View view(x);
  const ScalarType dtype = num_bits <= 8 ? (is_unsigned ? ScalarType::Byte : ScalarType::Char)
                                         : (is_unsigned ? ScalarType::UInt16 : ScalarType::Short);
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
  m.impl("quantize", TORCH_BOX(&qzoo::quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&qzoo::dequantize_cpu));
  m.impl("fake_quantize_fp8", TORCH_BOX(&qzoo::fake_quantize_fp8_cpu));
  m.impl("fake_quantize_fp8_forward", TORCH_BOX(&qzoo::fake_quantize_fp8_cpu));
}
