// The arithmetic and the walk over tensors, without torch: run under the address and undefined-behaviour sanitizers.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "layout.h"
#include "quant.h"

#define CHECK(CONDITION)                                                     \
  do {                                                                       \
    if (!(CONDITION)) {                                                      \
      std::fprintf(stderr, "line %d: %s is false\n", __LINE__, #CONDITION);  \
      std::exit(1);                                                          \
    }                                                                        \
  } while (0)

using namespace qzoo;

float fake(float x, float amax, float low, float high) {
  const Level level = make_level(amax, low, high);
  return fake_quantize(x, level.scale, level.low, level.high);
}

void test_integer() {
  const float nan = std::nanf(""), infinity = INFINITY;
  CHECK(fake(1.0f, 1.0f, -127, 127) == 1.0f);
  CHECK(fake(-9.0f, 1.0f, -127, 127) == -1.0f);
  CHECK(fake(-9.0f, 127.0f, -128, 127) == -9.0f);
  CHECK(fake(-200.0f, 127.0f, -128, 127) == -128.0f);
  CHECK(fake(0.5f, 127.0f, -127, 127) == 0.0f);  // ties to even
  CHECK(fake(1.5f, 127.0f, -127, 127) == 2.0f);
  CHECK(fake(-1.0f, 255.0f, 0, 255) == 0.0f);
  for (float amax : {0.0f, kTiny, 1e-41f}) {
    for (float x : {0.0f, 1.0f, -infinity, infinity}) CHECK(fake(x, amax, -127, 127) == 0.0f);
    CHECK(std::isnan(fake(nan, amax, -127, 127)));
  }
  CHECK(std::isnan(fake(1.0f, nan, -127, 127)));
  CHECK(fake(1.0f, 1.0f, 0, 0) == 0.0f);
  CHECK(pass_gradient(3.0f, -1.0f, 1.0f) == 3.0f);
  CHECK(pass_gradient(3.0f, std::nextafter(1.0f, 2.0f), 1.0f) == 0.0f);
  CHECK(pass_gradient(nan, 2.0f, 1.0f) == 0.0f);
  CHECK(pass_gradient(3.0f, nan, 1.0f) == 0.0f);
}

// All finite values of a format in the order of their codes.
std::vector<float> values(int exponent_bits, int mantissa_bits, float limit) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  std::vector<float> v;
  for (int code = 0; code < 1 << (exponent_bits + mantissa_bits); ++code) {
    const int exponent = code >> mantissa_bits;
    const float fraction = std::ldexp(static_cast<float>(code & ((1 << mantissa_bits) - 1)), -mantissa_bits);
    const float x =
        exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
    if (x <= limit) v.push_back(x);
  }
  return v;
}

template <bool kIsE5M2>
void test_fp8() {
  const float limit = kIsE5M2 ? kE5M2.limit : kE4M3.limit;
  const std::vector<float> v = values(kIsE5M2 ? 5 : 4, kIsE5M2 ? 2 : 3, limit);
  for (size_t code = 0; code < v.size(); ++code) {
    CHECK(round_fp8<kIsE5M2>(v[code], limit) == v[code]);
    CHECK(round_fp8<kIsE5M2>(-v[code], limit) == -v[code]);
    if (code + 1 == v.size()) break;
    const float middle = (v[code] + v[code + 1]) / 2;
    CHECK(round_fp8<kIsE5M2>(middle, limit) == v[code + code % 2]);
    CHECK(round_fp8<kIsE5M2>(std::nextafter(middle, 0.0f), limit) == v[code]);
    CHECK(round_fp8<kIsE5M2>(std::nextafter(middle, 1e9f), limit) == v[code + 1]);
  }
  CHECK(round_fp8<kIsE5M2>(INFINITY, limit) == limit);
  CHECK(round_fp8<kIsE5M2>(-1e30f, limit) == -limit);
  CHECK(std::isnan(round_fp8<kIsE5M2>(std::nanf(""), limit)));
  CHECK(round_fp8<kIsE5M2>(5.0f, 0.0f) == 0.0f);
}

// Every element is visited once, with the range that broadcasting gives it.
void test_walk() {
  std::mt19937 random(0);
  for (int round = 0; round < 3000; ++round) {
    const int dim = random() % 6;
    int64_t sizes[kMaxDims], strides[kMaxDims], kept[kMaxDims];
    std::vector<int> permutation(dim);
    std::iota(permutation.begin(), permutation.end(), 0);
    std::shuffle(permutation.begin(), permutation.end(), random);
    int64_t stride = 1;
    for (int d : permutation) {
      sizes[d] = random() % 4 + (random() % 20 != 0);
      strides[d] = stride;
      stride *= std::max<int64_t>(sizes[d], 1);
    }
    int64_t numel = 1, ranges = 1;
    for (int d = dim - 1; d >= 0; --d) {
      numel *= sizes[d];
      const bool keep = random() % 2 && sizes[d] != 1;
      kept[d] = keep ? ranges : -1;
      if (keep) ranges *= sizes[d];
    }
    if (numel == 0) continue;  // strides of empty tensors do not matter
    int order[kMaxDims], count = 0;
    CHECK(memory_order(dim, sizes, strides, order, &count));
    Walk walk = make_walk(sizes, order, count, kept);
    CHECK(walk.numel == numel);
    CHECK(walk.ranges == ranges);
    std::vector<int64_t> place;  // of each range of the walk in the tensor of ranges
    walk.each_range([&](int64_t at) { place.push_back(at); });

    const int64_t times = random() % 2 ? walk.widen(1 + random() % 40) : 1;
    CHECK(walk.length <= std::max<int64_t>(walk.numel, 1));
    for (int64_t k = 0; k < (times - 1) * ranges; ++k) place.push_back(place[k]);

    std::vector<int64_t> seen(numel, -1);
    const int64_t cut = random() % (numel + 1);
    const auto piece = [&](int64_t at, int64_t n, int64_t k) {
      for (int64_t i = 0; i < n; ++i) {
        CHECK(seen[at + i] == -1);
        seen[at + i] = place.at(k + (walk.step ? i : 0));
      }
    };
    walk.each_piece(0, cut, piece);
    walk.each_piece(cut, numel, piece);

    RangeIndex one;
    CHECK(make_index(sizes, order, count, kept, &one));

    std::vector<int64_t> index(dim, 0);
    for (int64_t i = 0; i < numel; ++i) {
      int64_t at = 0, range = 0;
      for (int d = 0; d < dim; ++d) {
        at += index[d] * strides[d];
        range += kept[d] < 0 ? 0 : index[d] * kept[d];
      }
      CHECK(seen[at] == range);
      CHECK(one(at) == range);
      for (int d = dim - 1; d >= 0 && ++index[d] == sizes[d]; --d) index[d] = 0;
    }
  }
  const int64_t gap_sizes[] = {2, 3}, gap_strides[] = {4, 1}, spread_strides[] = {0, 1};
  int order[kMaxDims], count = 0;
  int64_t many[20], many_strides[20], alternating[20];
  for (int d = 19; d >= 0; --d) {
    many[d] = 2;
    many_strides[d] = d == 19 ? 1 : 2 * many_strides[d + 1];
    alternating[d] = d % 2 ? 1 << (19 - d) / 2 : -1;
  }
  RangeIndex one;
  CHECK(memory_order(20, many, many_strides, order, &count));
  CHECK(!make_index(many, order, count, alternating, &one));  // more turns than a thread can follow
  CHECK(!memory_order(2, gap_sizes, gap_strides, order, &count));
  CHECK(!memory_order(2, gap_sizes, spread_strides, order, &count));
}

void test_affine() {
  const float nan = std::nanf(""), infinity = INFINITY;
  const Level level = make_affine_level(-64.0f, 191.0f, 255.0f);
  CHECK(level.scale == 1.0f && level.low == -64.0f && level.high == 191.0f);
  const auto fake = [](float x, Level at) { return fake_quantize_affine(x, at.scale, at.low, at.high); };
  CHECK(fake(0.5f, level) == 0.0f && fake(1.5f, level) == 2.0f);  // ties to even
  CHECK(fake(-infinity, level) == -64.0f && fake(infinity, level) == 191.0f && std::isnan(fake(nan, level)));
  CHECK(fake(-9.0f, make_affine_level(0.5f, 2.0f, 255.0f)) == 0.0f);  // zero belongs to every range
  CHECK(fake(9.0f, make_affine_level(-2.0f, -1.0f, 255.0f)) == 0.0f);
  for (float x : {1.0f, -1.0f, infinity}) CHECK(std::fabs(fake(x, make_affine_level(0.0f, 0.0f, 255.0f))) <= kTiny);
  CHECK(std::isnan(fake(1.0f, make_affine_level(nan, 1.0f, 255.0f))));
  CHECK(std::isnan(fake(1.0f, make_affine_level(-1.0f, nan, 255.0f))));
  CHECK(pass_gradient(3.0f, -1.0f, -1.0f, 2.0f) == 3.0f && pass_gradient(3.0f, 2.0f, -1.0f, 2.0f) == 3.0f);
  CHECK(pass_gradient(3.0f, -1.01f, -1.0f, 2.0f) == 0.0f && pass_gradient(3.0f, nan, -1.0f, 2.0f) == 0.0f);
}

int main() {
  test_integer();
  test_affine();
  test_fp8<false>();
  test_fp8<true>();
  test_walk();
  std::puts("passed");
}
