// Sinkhorn for one instruction set; included once for each (foreach_isa.h).
#include "sinkhorn_tiles.h"
#include "sinkhorn_sides.h"
#include "sinkhorn_sweep.h"
#include "sinkhorn_points.h"
#include "sinkhorn_forward.h"
#include "sinkhorn_logs.h"
#include "sinkhorn_results.h"
#include "sinkhorn_lanes.h"
#include "sinkhorn_transposed.h"
#include "sinkhorn_backward.h"
#include "sinkhorn_adjoint.h"
#include "sinkhorn_envelope.h"

// Whether scalings of the kernel of zero potentials may do, for a given number of iterations.
inline bool plain(const SinkhornOptions& options, int64_t n, int64_t m) {
  return n * m > 0 && options.n_iters > 0 && options.tol == 0 && options.tau_a == INFINITY && options.tau_b == INFINITY;
}

// How many problems sinkhorn_dense should be given at a time.
int64_t sinkhorn_together(const SinkhornOptions& options, int64_t n, int64_t m) {
  if (!plain(options, n, m)) return 1;
  return LaneSinkhorn::suits(n, m) ? kWidth : std::max<int64_t>(TransposedSinkhorn::together(n, m), 1);
}

// Problems of one shape, whose costs follow each other.
void sinkhorn_dense(const float* cost, const SinkhornOptions& options, const SinkhornProblem* problems, int64_t count,
                    Arena& arena, bool parallel) {
  const int64_t n = problems->n, m = problems->m;
  vint solved{};
  arena.reset();
  if (plain(options, n, m)) {
    if (LaneSinkhorn::suits(n, m)) {
      solved = LaneSinkhorn(cost, options, problems, int(count), arena).solve();
    } else if (TransposedSinkhorn::together(n, m) > 0) {
      solved = TransposedSinkhorn(cost, options, problems, int(count), arena).solve();
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (solved[i]) continue;
    arena.reset();
    Sinkhorn<DenseCost>({cost + i * n * m, n, m}, options, problems[i], arena, parallel).solve();
  }
}

void sinkhorn_value_gradient(const SinkhornSolved& solved, float factor, bool streams, int64_t first, int64_t last, float* to,
                             Arena& arena) {
  arena.reset();
  ValueGradient(solved, factor, streams, arena).write(first, last, to);
}

void sinkhorn_points(const SinkhornPoints& points, const SinkhornOptions& options, const SinkhornProblem& problem, Arena& arena,
                     bool parallel) {
  arena.reset();
  const PointsCost source(points, problem.n, problem.m, arena);
  Sinkhorn<PointsCost>(source, options, problem, arena, parallel).solve();
}

// Runs the iterations again, as many as there were, for their potentials. False for a problem without a meaning.
template <class Source>
bool replay(const Source& source, SinkhornOptions options, SinkhornProblem problem, std::vector<double>& history, Arena& arena,
            bool parallel) {
  float value, error;
  int64_t used;
  options.n_iters = *problem.n_iters;
  options.tol = 0;
  history.resize(options.n_iters * (tiles_of(problem.n) + tiles_of(problem.m)) * kWidth);
  problem.history = history.data();
  problem.value = &value;
  problem.error = &error;
  problem.n_iters = &used;
  Sinkhorn<Source>(source, options, problem, arena, parallel).solve();
  return value == value;
}

void sinkhorn_dense_backward(const float* cost, const SinkhornOptions& options, const SinkhornProblem& problem,
                             const SinkhornGradients& gradients, float* of_cost, Arena& arena, bool parallel) {
  const int64_t n = problem.n, m = problem.m;
  const DenseCost source{cost, n, m};
  SinkhornOptions again = options;
  again.n_iters = *problem.n_iters;
  arena.reset();
  if (n * m > 0 && SinkhornAdjoint(source, again, problem, gradients, arena, parallel).run(of_cost)) return;
  arena.reset();
  std::vector<double> history;
  if (!replay(source, options, problem, history, arena, parallel)) {
    std::fill_n(of_cost, n * m, NAN);
    std::fill_n(gradients.a, n, NAN);
    std::fill_n(gradients.b, m, NAN);
    return;
  }
  std::fill_n(of_cost, n * m, 0.0f);
  const DenseSink sink{of_cost, n, m};
  SinkhornBackward<DenseCost, DenseSink>(source, sink, options, problem, gradients, chunks_of(n, m), parallel)
      .run(history.data(), *problem.n_iters);
}

void sinkhorn_points_backward(const SinkhornPoints& points, const SinkhornOptions& options, const SinkhornProblem& problem,
                              const SinkhornGradients& gradients, float* of_x, float* of_y, Arena& arena, bool parallel) {
  const int64_t n = problem.n, m = problem.m, dim = points.dim;
  arena.reset();
  const PointsCost source(points, n, m, arena);
  std::vector<double> history;
  if (!replay(source, options, problem, history, arena, parallel)) {
    std::fill_n(of_x, n * dim, NAN);
    std::fill_n(of_y, m * dim, NAN);
    std::fill_n(gradients.a, n, NAN);
    std::fill_n(gradients.b, m, NAN);
    return;
  }
  const int64_t chunks = std::min(chunks_of(n, m), PointsSink::most_chunks(m, dim));
  const PointsSink sink(source, points, of_x, of_y, chunks, arena);
  SinkhornBackward<PointsCost, PointsSink>(source, sink, options, problem, gradients, chunks, parallel)
      .run(history.data(), *problem.n_iters);
  sink.finish();
}

void sinkhorn_apply(const SinkhornPoints& points, const SinkhornApplied& applied, float* out, Arena& arena, bool parallel) {
  arena.reset();
  const PointsCost source(points, applied.n, applied.m, arena);
  apply_plan(source, applied, out, parallel);
}

void sinkhorn_apply_backward(const SinkhornPoints& points, const SinkhornApplied& applied, const float* of_out, float* of_x,
                             float* of_y, double* of_h_x, double* of_h_y, Arena& arena, bool parallel) {
  const int64_t n = applied.n, m = applied.m, depth = applied.depth;
  arena.reset();
  const PointsCost source(points, n, m, arena);
  const int64_t chunks = std::min(chunks_of(n, m), PointsSink::most_chunks(m, points.dim));
  const PointsSink sink(source, points, of_x, of_y, chunks, arena);
  std::vector<double> h_x(tiles_of(n) * kWidth, -INFINITY), h_y(tiles_of(m) * kWidth, -INFINITY);
  std::copy_n(applied.h_x, n, h_x.begin());
  std::copy_n(applied.h_y, m, h_y.begin());
  const float *outs = pack_points(of_out, n, depth, arena), *vs = pack_points(applied.v, m, depth, arena);
  PairsBackward<PointsCost, PointsSink> backward(source, sink, applied.eps, chunks, parallel);
  backward.of_plan(h_x.data(), h_y.data(), 0.0f,
                   [&](int64_t i, int64_t j, Tile& tile) { inner_products(outs + i * depth, vs + j * depth, depth, tile); });
  sink.finish();
  std::copy_n(backward.of_rows(), n, of_h_x);
  std::copy_n(backward.of_columns(), m, of_h_y);
}
