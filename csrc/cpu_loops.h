// The frame of the element-wise CPU kernels: ranges ready to use, and loops over runs of elements.
//
// One pass each, bound by memory. A loop is written once per combination of types as a function of its own, because
// run-time dispatch over instruction sets works on functions.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "quant.h"
#include "tensor.h"

namespace qzoo {
namespace {  // every source file has loops of its own

constexpr int64_t kRun = 1024;  // runs shorter than this cost more to start than to do

inline void repeat(float* values, int64_t n, int64_t times) {
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

// ---- from walks to loops ----

// Runs the loop that fits over the elements [begin, end); `from` and `to` point at element `begin`.
template <typename From, typename To, typename One, typename Scales, typename Each>
void run_range(
    const Walk& walk, const Levels& levels, int64_t begin, int64_t end, const From* from, To* to, One one,
    Scales scales, Each each) {
  walk.each_piece(begin, end, [&](int64_t at, int64_t n, int64_t k) {
    const From* a = from + (at - begin);
    To* b = to + (at - begin);
    if (walk.step && levels.uniform()) {
      scales(a, b, n, levels.scale(k), *levels.low(k), *levels.high(k));
    } else if (walk.step) {
      each(a, b, n, levels.scale(k), levels.low(k), levels.high(k));
    } else {
      one(a, b, n, *levels.scale(k), *levels.low(k), *levels.high(k));
    }
  });
}

// The same over two tensors of one layout.
template <typename From, typename To, typename One, typename Scales, typename Each>
void run(
    const Walk& walk, const Levels& levels, const Tensor& x, const Tensor& y, One one, Scales scales, Each each) {
  const From* from = static_cast<const From*>(x.const_data_ptr());
  To* to = static_cast<To*>(y.mutable_data_ptr());
  in_parallel(walk.numel, kGrain, [&](int64_t begin, int64_t end) {
    run_range<From, To>(walk, levels, begin, end, from + begin, to + begin, one, scales, each);
  });
}

// The three loops of a kernel, as arguments of `run` and `run_range`.
#define QZOO_LOOPS_OF(NAME, FROM, TO)                                                                      \
  [](const FROM* a, TO* b, int64_t n, float s, float l, float h) { NAME##_one(a, b, n, s, l, h); },        \
  [](const FROM* a, TO* b, int64_t n, const float* s, float l, float h) {                                  \
    NAME##_scales(a, b, n, s, l, h);                                                                       \
  },                                                                                                       \
  [](const FROM* a, TO* b, int64_t n, const float* s, const float* l, const float* h) {                    \
    NAME##_each(a, b, n, s, l, h);                                                                         \
  }

#define QZOO_RUN(NAME, FROM, TO) run<FROM, TO>(walk, levels, x, y, QZOO_LOOPS_OF(NAME, FROM, TO))

// ---- sums ----

constexpr int64_t kSumBlock = 1 << 12;  // elements whose contributions are added in the type of the arithmetic
constexpr int kLanes = 16;              // sums side by side, so that the loop has no order to keep

// Totals of what f(begin, count, sums) adds for each block of n elements. The blocks are the same for any number of
// threads, and are added in order: so is the result.
template <int kSums, typename F>
std::array<double, kSums> sum_blocks(int64_t n, const F& f) {
  const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
  std::vector<std::array<double, kSums>> sums(blocks);
  in_parallel(blocks, kGrain / kSumBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      f(b * kSumBlock, std::min(kSumBlock, n - b * kSumBlock), sums[b].data());
  });
  std::array<double, kSums> total{};
  for (const auto& block : sums)
    for (int k = 0; k < kSums; ++k) total[k] += block[k];
  return total;
}

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

}  // namespace
}  // namespace qzoo
