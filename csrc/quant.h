// The arithmetic of qzoo, once: the CPU and the CUDA kernels both compile this file.
// It is the twin of the reference implementations in qzoo/quant/ops; tests compare the two bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QZOO_FN __host__ __device__ __forceinline__
#else
#define QZOO_FN inline __attribute__((always_inline))
#endif

namespace qzoo {

constexpr float kTiny = 1.0f / (1 << 24);  // ranges at or below this quantize everything to zero

// One range, ready to use.
struct Level {
  float scale;  // bound / amax
  float low;    // lowest and highest level, in units of the integer format
  float high;
};

// low and high belong to the integer format. A range too small to divide by keeps only the level 0; NaN stays NaN.
QZOO_FN Level make_level(float amax, float low, float high) {
  if (amax <= kTiny || high <= 0.0f) return {1.0f, 0.0f, 0.0f};
  return {high / amax, low, high};
}

// The comparisons are written so that NaN comes through.
template <typename W>
QZOO_FN W quantize(W x, float scale, float low, float high) {
  W q = std::rint(x * static_cast<W>(scale));
  q = static_cast<W>(high) < q ? static_cast<W>(high) : q;
  return static_cast<W>(low) > q ? static_cast<W>(low) : q;
}

template <typename W>
QZOO_FN W fake_quantize(W x, float scale, float low, float high) {
  return quantize(x, scale, low, high) / static_cast<W>(scale);
}

// Straight-through gradient: equality counts as inside, NaN as outside.
template <typename W>
QZOO_FN W pass_gradient(W grad, W x, float amax) {
  return std::fabs(x) <= static_cast<W>(amax) ? grad : W(0);
}

// A range of two ends, ready to use: zero is always a code. `low` and `high` count codes from it, `top` is the highest.
QZOO_FN Level make_affine_level(float low, float high, float top) {
  low = 0.0f < low ? 0.0f : low;
  high = high < 0.0f ? 0.0f : high;
  float span = high - low;
  span = span < kTiny ? kTiny : span;
  const float scale = span / top;
  float zero = std::rint(-low / scale);
  zero = zero < 0.0f ? 0.0f : zero;
  zero = top < zero ? top : zero;
  return {scale, -zero, top - zero};
}

// As ONNX has it: divide by the scale, multiply by it again. The comparisons are written so that NaN comes through.
template <typename W>
QZOO_FN W fake_quantize_affine(W x, float scale, float low, float high) {
  W q = std::rint(x / static_cast<W>(scale));
  q = static_cast<W>(high) < q ? static_cast<W>(high) : q;
  q = static_cast<W>(low) > q ? static_cast<W>(low) : q;
  return q * static_cast<W>(scale);
}

// Straight-through gradient between two ends, one at least of which is zero or beyond.
template <typename W>
QZOO_FN W pass_gradient(W grad, W x, float low, float high) {
  const bool inside = x >= static_cast<W>(low) && x <= static_cast<W>(high);
  return inside ? grad : W(0);
}

QZOO_FN uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

QZOO_FN float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// An 8-bit floating-point format.
struct Float8 {
  int dropped;           // mantissa bits of a float32 that the format does not have
  float smallest_normal;
  float subnormal_magic;  // 1.5 * 2^23 * (the subnormal step): adding it rounds to a multiple of that step
  float limit;
};
constexpr Float8 kE4M3{20, 1.0f / (1 << 6), 1.5f * (1 << 14), 448.0f};
constexpr Float8 kE5M2{21, 1.0f / (1 << 14), 1.5f * (1 << 7), 57344.0f};

// Nearest value of the format, ties to even, saturating; NaN stays NaN.
template <bool kIsE5M2>
QZOO_FN float round_fp8(float x, float top) {
  constexpr Float8 f = kIsE5M2 ? kE5M2 : kE4M3;
  float a = std::fabs(x);
  a = top < a ? top : a;
  const uint32_t u = float_bits(a);
  const uint32_t half = (1u << (f.dropped - 1)) - 1 + ((u >> f.dropped) & 1u);
  const float normal = bits_float((u + half) & ~((1u << f.dropped) - 1u));
  const float subnormal = (a + f.subnormal_magic) - f.subnormal_magic;
  const float r = a < f.smallest_normal ? subnormal : normal;
  return a != a ? x : std::copysign(r, x);
}

// Level.high is the saturation limit (0 for a range that is too small), low is unused.
template <bool kIsE5M2>
QZOO_FN float fake_quantize_fp8(float x, float scale, float top) {
  const float y = round_fp8<kIsE5M2>(x * scale, top) / scale;
  return std::fabs(x) < kTiny ? 0.0f : y;
}

}  // namespace qzoo
