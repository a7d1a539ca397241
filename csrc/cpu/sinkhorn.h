// What sinkhorn.cpp and the kernels of each instruction set agree on.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../sinkhorn_looks.h"
#include "memory.h"

namespace dpdiff {

constexpr int64_t kWorthThread = int64_t(1) << 14;    // pairs
constexpr int64_t kLeastStreamed = int64_t(1) << 21;  // pairs: too many to be found in a cache later
constexpr int64_t kMostReread = int64_t(1) << 23;     // pairs: a cost of fewer may still be found in one

struct SinkhornOptions {
  double eps;
  int64_t n_iters;
  double tol;           // 0: none
  double tau_a, tau_b;  // infinity: balanced
};

// One problem: weights (n,) and (m,), and where its results go. Its cost is the kernels' other argument.
struct SinkhornProblem {
  int64_t n, m;
  const float *a, *b;
  float* plan;              // (n, m), or null
  bool streams;             // the plan passes by the caches
  float *f, *g;             // (n,), (m,), or null
  double *f_wide, *g_wide;  // the same in float64, or null
  float *cost, *value, *error;
  int64_t* n_iters;
  double* history;  // f and g after each iteration, each padded to whole vectors; or null
};

// One problem and its results: plan and cost (n, m), a and f (n,), b and g (m,).
struct SinkhornSolved {
  int64_t n, m;
  double eps;
  const float *plan, *a, *b, *f, *g;
  const float* cost;  // null: better not read again
};

// Gradients of the results, null where there is none; and of the weights, where these go.
struct SinkhornGradients {
  const float *of_plan, *of_f, *of_g;
  float of_total;
  float *a, *b;
};

// Points x (n, dim) and y (m, dim), whose cost is the squared distance, or 1 - x y for the cosine.
struct SinkhornPoints {
  const float *x, *y;
  int64_t dim;
  bool cosine;
};

// The plan exp((h_x_i + h_y_j - cost_ij) / eps), and v (m, depth) that it is applied to.
struct SinkhornApplied {
  int64_t n, m, depth;
  const double *h_x, *h_y;
  const float* v;
  double eps;
};

// While it lives, this thread's results below 2^-126 are zeros: most of a kernel's are where eps is small, and Intel's
// processors would take a hundred cycles and more for each vector with one.
class FlushTiny {
 public:
  FlushTiny(const FlushTiny&) = delete;
#if defined(__x86_64__)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  FlushTiny() {}
#endif
};

// Calls work(first, last) on ranges of [0, n), in parallel where asked for.
template <class Work>
void for_ranges(bool parallel, int64_t n, const Work& work) {
  if (parallel && n > 1) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      const FlushTiny flush;
      work(first, last);
    });
  } else {
    work(int64_t(0), n);
  }
}

// Calls solve(problem, arena, parallel) for each problem. Many problems: a thread each, in each call of a size the same ones,
// which its caches may still hold; who is done goes on with others', since problems stop at iterations of their own. Few large
// ones: one after the other, all threads on each.
template <class Solve>
void for_problems(int64_t n_problems, int64_t pairs, const Solve& solve) {
  const FlushTiny flush;
  const int64_t threads = torch::stable::get_num_threads();
  if (pairs >= int64_t(1) << 18 && n_problems < 4 * threads) {
    Arena arena;
    for (int64_t i = 0; i < n_problems; ++i) solve(i, arena, true);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t n_parts = std::min({threads, n_problems, n_problems * pairs / kWorthThread + 1});
  std::vector<Part> parts(n_parts);
  for (int64_t part = 0; part < n_parts; ++part) {
    parts[part].next = part * n_problems / n_parts;
    parts[part].end = (part + 1) * n_problems / n_parts;
  }
  for_ranges(true, n_parts, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      Arena arena;
      for (int64_t k = 0; k < n_parts; ++k) {
        Part& part = parts[(first + k) % n_parts];
        for (int64_t i = part.next++; i < part.end; i = part.next++) solve(i, arena, false);
      }
    }
  });
}

}  // namespace dpdiff
