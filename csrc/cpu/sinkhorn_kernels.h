// Sinkhorn for one instruction set; included once for each (foreach_isa.h).
#include "sinkhorn_tiles.h"
#include "sinkhorn_points.h"
#include "sinkhorn_forward.h"
#include "sinkhorn_logs.h"

void sinkhorn_dense(const float* cost, const SinkhornOptions& options, const SinkhornProblem& problem, Arena& arena,
                    bool parallel) {
  arena.reset();
  const DenseCost source{cost, problem.n, problem.m};
  Sinkhorn<DenseCost>(source, options, problem, arena, parallel).solve();
}

void sinkhorn_points(const float* x, const float* y, int64_t dim, SinkhornMetric metric, const SinkhornOptions& options,
                     const SinkhornProblem& problem, Arena& arena, bool parallel) {
  arena.reset();
  const PointsCost source(x, y, problem.n, problem.m, dim, metric, arena);
  Sinkhorn<PointsCost>(source, options, problem, arena, parallel).solve();
}
