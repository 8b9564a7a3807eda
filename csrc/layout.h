// How a tensor with ranges attached to it is walked in memory order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quant.h"

namespace qzoo {

constexpr int kMaxDims = 64;

// The elements of a dense tensor in the order they lie in memory, as `rows` runs of `length`. Every run uses either
// one range (`step` 0) or a range of its own per element (`step` 1). Ranges are numbered in the same order, whatever
// the memory format, so that runs are as long as they can be.
struct Walk {
  int64_t numel = 0;
  int64_t length = 1;  // elements in a run
  int64_t step = 0;    // 0: one range for the run, 1: one per element
  int64_t ranges = 1;  // how many ranges there are
  int outer = 0;       // outer dimensions that number the runs, slowest first
  int64_t outer_size[kMaxDims];
  int64_t outer_step[kMaxDims];  // what one step along the dimension adds to the number of the range
  // where range k lies in the tensor of ranges: kept dimensions in memory order of x, slowest first
  int kept = 0;
  int64_t kept_size[kMaxDims];
  int64_t kept_stride[kMaxDims];  // in elements of the tensor of ranges

  // Number of the first range of a run.
  int64_t range_of(int64_t run) const {
    int64_t range = 0;
    for (int d = outer - 1; d >= 0; --d) {
      range += (run % outer_size[d]) * outer_step[d];
      run /= outer_size[d];
    }
    return range;
  }

  // Short runs that all use the same ranges become one longer run; returns how many. The ranges then have to be there
  // that many times over.
  int64_t widen(int64_t target) {
    if (step == 0 || outer > 0 || length == 0 || length >= target) return 1;
    const int64_t times = std::max<int64_t>(1, std::min(target, numel) / length);
    length *= times;
    return times;
  }

  // Calls f(position in the tensor of ranges) for range 0, 1, 2, ...
  template <typename F>
  void each_range(F f) const {
    int64_t index[kMaxDims] = {};
    int64_t at = 0;
    for (int64_t k = 0; k < ranges; ++k) {
      f(at);
      for (int d = kept - 1; d >= 0; --d) {
        at += kept_stride[d];
        if (++index[d] < kept_size[d]) break;
        at -= kept_size[d] * kept_stride[d];
        index[d] = 0;
      }
    }
  }

  // Calls f(first element, count, first range) for the pieces of [begin, end).
  template <typename F>
  void each_piece(int64_t begin, int64_t end, F f) const {
    int64_t run = begin / length;
    int64_t inside = begin - run * length;
    while (begin < end) {
      const int64_t count = std::min(length - inside, end - begin);
      f(begin, count, range_of(run) + (step ? inside : 0));
      begin += count;
      inside = 0;
      ++run;
    }
  }
};

// Sorts the dimensions longer than 1 by stride, slowest first. False when the tensor is not dense.
inline bool memory_order(int64_t dim, const int64_t* sizes, const int64_t* strides, int* order, int* count) {
  int n = 0;
  for (int d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    int at = n++;
    for (; at > 0 && strides[order[at - 1]] < strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  *count = n;
  int64_t expected = 1;
  for (int k = n - 1; k >= 0; --k) {
    if (strides[order[k]] != expected) return false;
    expected *= sizes[order[k]];
  }
  return true;
}

// kept_strides[d]: stride of the tensor of ranges along dimension d of x, or -1 where the dimension shares one range.
inline Walk make_walk(const int64_t* sizes, const int* order, int count, const int64_t* kept_strides) {
  Walk w;
  w.numel = 1;
  int64_t steps[kMaxDims];
  for (int k = count - 1; k >= 0; --k) {
    const int d = order[k];
    w.numel *= sizes[d];
    const bool kept = kept_strides[d] >= 0;
    steps[k] = kept ? w.ranges : 0;
    if (kept) w.ranges *= sizes[d];
  }
  for (int k = 0; k < count; ++k) {
    const int d = order[k];
    if (kept_strides[d] < 0) continue;
    w.kept_size[w.kept] = sizes[d];
    w.kept_stride[w.kept++] = kept_strides[d];
  }
  // merge neighbours that count through the ranges in one stride
  int64_t size[kMaxDims], step[kMaxDims];
  int n = 0;
  for (int k = 0; k < count; ++k) {
    const int64_t s = sizes[order[k]];
    if (n > 0 && step[n - 1] == steps[k] * s) {
      size[n - 1] *= s;
      step[n - 1] = steps[k];
    } else {
      size[n] = s;
      step[n++] = steps[k];
    }
  }
  if (n > 0) {
    w.length = size[n - 1];
    w.step = step[n - 1];
    int k = 0;
    while (k < n - 1 && step[k] == 0) ++k;  // the slowest dimensions repeat what the others do
    for (; k < n - 1; ++k) {
      w.outer_size[w.outer] = size[k];
      w.outer_step[w.outer++] = step[k];
    }
  }
  return w;
}

// Which range one element uses, for kernels that give an element a thread. Small enough to travel as an argument.
constexpr int kMaxOuter = 6;

struct RangeIndex {
  int64_t length = 1;  // elements that lie together and step through the ranges by `step`
  int64_t step = 0;
  int outer = 0;
  int64_t outer_size[kMaxOuter] = {};
  int64_t outer_step[kMaxOuter] = {};

  // Position in the tensor of ranges for an element, numbered as it lies in memory.
  QZOO_FN int64_t operator()(int64_t element) const {
    if (step == 0 && outer == 0) return 0;  // one range: no division
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

// Counts in strides of the tensor of ranges itself, so that it can be read in place; arguments as for make_walk.
// False where the ranges alternate over more dimensions than fit.
inline bool make_index(
    const int64_t* sizes, const int* order, int count, const int64_t* kept_strides, RangeIndex* index) {
  int64_t size[kMaxDims], step[kMaxDims];
  int n = 0;
  for (int k = 0; k < count; ++k) {
    const int d = order[k];
    const int64_t stride = kept_strides[d] < 0 ? 0 : kept_strides[d];
    if (n > 0 && step[n - 1] == stride * sizes[d]) {
      size[n - 1] *= sizes[d];
      step[n - 1] = stride;
    } else {
      size[n] = sizes[d];
      step[n++] = stride;
    }
  }
  *index = RangeIndex();
  if (n == 0) return true;
  if (n - 1 > kMaxOuter) return false;
  index->length = size[n - 1];
  index->step = step[n - 1];
  index->outer = n - 1;
  for (int k = 0; k < n - 1; ++k) {
    index->outer_size[k] = size[k];
    index->outer_step[k] = step[k];
  }
  return true;
}

}  // namespace qzoo
