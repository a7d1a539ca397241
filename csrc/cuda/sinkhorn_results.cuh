// What comes after the iterations: the plan and what is told of it.
#pragma once

#include "sinkhorn.cuh"

namespace dpdiff {

template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE bool Sinkhorn<Team, kLanes, kQuads, kHeld>::finish() {
  float sums[kColumns] = {};
  const float unit = float(task_.eps) * kLn2;
  float* plan = task_.plan == nullptr ? nullptr : task_.plan + (problem_ * task_.n + first_) * task_.m;
  double results[4] = {};  // error, mass, cost, dual objective
  for_halves([&](int first, int from) {
    float k[kHalf][kColumns];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) load_kernel(place(first), first, from + r, k[r]);
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      const int i = first + from + r;
      const Pair f = rows_.base(i);
      const float weight = rows_.weight()[i], u = weight > 0 ? weight * rows_.scaling()[i] : 0.0f;
      float mass[1] = {}, total = 0;
      for_quads([&](int j, int at) {
        if (!inside(j)) return;
        Quad p;
        const Quad v = four_columns(columns_.moved(), j);
        const Quad high = four_columns(columns_.high(), j), low = four_columns(columns_.low(), j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Pair sum = Pair::sum(f.high, high.x[e]);
          const float c = (sum.high - unit * log_2(k[r][at + e])) + (sum.low + (f.low + low.x[e]));
          p.x[e] = u * k[r][at + e] * v.x[e];
          mass[0] += p.x[e];
          sums[at + e] += p.x[e];
          total += p.x[e] > 0 ? p.x[e] * c : 0.0f;
        }
        store_plan(plan, i, j, p);
      });
      results[2] += total;
      const float sum = reduce_row(mass, Sum());
      if (first_of_row()) {
        results[0] += fabsf(sum - rows_.aim(i));
        results[1] += sum;
      }
    }
  });
  fold(sums, Sum(), Stats());
  settle();
  dual(rows_, task_.a + problem_ * task_.n + first_, task_.f + problem_ * task_.n + first_, results[3]);
  if (team_.rank() == 0) {
    for_points(columns_.n, [&](int j) { results[0] += fabsf(folded(j, Sum()) - columns_.aim(j)); });
    dual(columns_, task_.b + problem_ * task_.m, task_.g + problem_ * task_.m, results[3]);
  }
  sum_all(results);
  if (team_.rank() > 0 || team_.thread() > 0) return true;
  task_.error[problem_] = float(results[0] + state_.stranded);
  task_.total[problem_] = float(results[2]);
  task_.value[problem_] = float(results[3] - task_.eps * (results[1] - state_.mass_a * state_.mass_b));
  task_.used[problem_] = state_.used;
  return true;
}

template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE void Sinkhorn<Team, kLanes, kQuads, kHeld>::store_plan(float* plan, int i, int j, const Quad& p) const {
  if (plan == nullptr || i >= rows_.n) return;
  float* to = plan + int64_t(i) * task_.m + j;
  if (task_.m % 4 == 0) {
    if (j < task_.m) *reinterpret_cast<Quad*>(to) = p;
  } else {
    for (int e = 0; e < 4; ++e) {
      if (j + e < task_.m) to[e] = p.x[e];
    }
  }
}

// Writes a side's potentials and adds their part of the dual objective.
template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE void Sinkhorn<Team, kLanes, kQuads, kHeld>::dual(const Side& side, const float* given, float* to,
                                                               double& sum) const {
  for_points(side.n, [&](int i) {
    const double potential = side.potential(i);
    to[i] = float(potential);
    if (given[i] > 0) sum += given[i] * (side.relaxed ? -side.tau * expm1(-potential / side.tau) : potential);
  });
}

template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE bool Sinkhorn<Team, kLanes, kQuads, kHeld>::fail() {
  if (task_.plan != nullptr) {
    float* plan = task_.plan + (problem_ * task_.n + first_) * task_.m;
    for (int64_t i = team_.thread(); i < int64_t(rows_.n) * task_.m; i += team_.threads()) plan[i] = NAN;
  }
  for_points(rows_.n, [&](int i) { task_.f[problem_ * task_.n + first_ + i] = NAN; });
  for_points(columns_.n, [&](int j) { task_.g[problem_ * task_.m + j] = NAN; });
  if (team_.rank() > 0 || team_.thread() > 0) return true;
  task_.error[problem_] = task_.total[problem_] = task_.value[problem_] = NAN;
  task_.used[problem_] = task_.n_iters;
  return true;
}

}  // namespace dpdiff
