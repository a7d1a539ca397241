// What the attention kernels are given: plain pointers and strides, so that the kernels, which are compiled once per
// instruction set, see no tensor.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace dpdiff {

// Rows of E neighbouring channels, one for each image b, head h and token or prototype n, with strides in bytes.
// b = 0: shared by the images.
struct Rows {
  void* data = nullptr;
  int64_t b = 0, h = 0, n = 0;

  void* at(int64_t image, int64_t head, int64_t row) const {
    return static_cast<char*>(data) + image * b + head * h + row * n;
  }
};

struct Bank {
  Rows key, value;
  int64_t count = 0;   // prototypes
  bool shared = true;  // by the images
};

// Of row (b, h, n), for each of the one or two softmaxes s, at [s][b][h][n]: the score that exponents were taken
// relative to (near the largest; unscaled, like all scores here), and the sum of exponentials.
struct SoftmaxSums {
  float *reference = nullptr, *total = nullptr;
};

struct AttentionProblem {
  DType dtype = DType::float32;
  int64_t batch = 0, heads = 0, tokens = 0, channels = 0;
  float scale = 1;  // not negative
  Rows query;
  Bank local, global;              // global.count is 0 where there is none
  const float* gate = nullptr;     // (B, H, N), or null: one softmax over both banks
  bool streamed = false;           // answers and queries' gradients pass by the caches, where they'd push out the rest
  const int64_t* active = nullptr;   // image b's local prototypes are active[offsets[b]] to active[offsets[b + 1] - 1];
  const int64_t* offsets = nullptr;  // null: all of them

  bool routed() const { return offsets != nullptr; }
  int64_t local_count(int64_t image) const { return routed() ? offsets[image + 1] - offsets[image] : local.count; }
  // All images of a head see the same prototypes: their tokens then are one long sequence.
  bool folded() const { return local.shared && global.shared && !routed(); }
  // The banks as the images see them, head by head, and the tokens of each.
  int64_t instances() const { return heads * (folded() ? 1 : batch); }
  int64_t sequence() const { return tokens * (folded() ? batch : 1); }
};

struct AttentionForward : AttentionProblem {
  Rows out;
  Rows difference;   // global minus local answer, which the gate's gradient needs; without data: not wanted
  SoftmaxSums sums;  // null: not wanted
};

// Gradients of one bank: written where each image has its own; where the images share it, summed up in parts, each by
// one thread, in rows [head][row][channel] that start at zero. The gradient of prototype prototypes[i] is the sum of rows
// places[first[i]] to places[first[i + 1] - 1].
struct BankGradient {
  Rows key, value;
  float *key_rows = nullptr, *value_rows = nullptr;
  int64_t rows = 0;  // of a head
  const int64_t *prototypes = nullptr, *first = nullptr, *places = nullptr;
  int64_t n_prototypes = 0;
};

struct AttentionBackward : AttentionProblem {
  Rows out, difference, grad_out;
  SoftmaxSums sums;
  Rows grad_query;
  float* grad_gate = nullptr;  // (B, H, N)
  BankGradient grad_local, grad_global;
  const int64_t* rows = nullptr;  // with routes: where the sums of each of `active` are
  int64_t parts = 1;  // that the tokens of a head are split into: never a matter of threads, so that results are not
};

constexpr int64_t kChunk = 192;  // tokens of one instance that a thread takes at a time

}  // namespace dpdiff
