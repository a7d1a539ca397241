// What comes before the iterations: weights, first potentials and kernel.
#pragma once

#include "sinkhorn.cuh"

namespace dpdiff {

// False where a weight has no meaning.
template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE bool Sinkhorn<Team, kLanes, kQuads, kHeld>::read_weights() {
  const float* a = task_.a + problem_ * task_.n + first_;
  const float* b = task_.b + problem_ * task_.m;
  double sums[4] = {};  // masses and numbers of zeros
  const auto read = [&](const Side& side, const float* given, double& mass, double& zeros) {
    for_points(side.padded, [&](int i) {
      const float w = i < side.n ? given[i] : 0.0f;
      if (i < side.n) {
        mass += w >= 0 && w < INFINITY ? w : NAN;
        zeros += w == 0;
      }
      side.weight()[i] = w;
      side.set_base(i, {0.0f, 0.0f});
      side.scaling()[i] = side.next_scaling()[i] = 0.0f;
      if (side.relaxed) side.target()[i] = side.next_target()[i] = w, side.pull()[i] = 1.0f;
    });
  };
  read(rows_, a, sums[0], sums[1]);
  read(columns_, b, sums[2], sums[3]);
  for_points(columns_.n, [&](int j) { columns_.seen()[j] = 0.0f; });
  if (team_.rank() > 0) sums[2] = sums[3] = 0;
  sum_all(sums);
  state_.mass_a = sums[0], state_.mass_b = sums[2];
  state_.least_row_sum = float(kLeastRowSum * state_.mass_b);
  state_.zero_rows = sums[1] > 0, state_.zeros = sums[1] + sums[3] > 0;
  return state_.mass_a + state_.mass_b < INFINITY;
}

// The kernel of zero potentials, in one pass, where float32 holds it: small finite costs. Otherwise false.
template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE bool Sinkhorn<Team, kLanes, kQuads, kHeld>::build_unshifted() {
  if (!(state_.mass_a > 0 && state_.mass_b > 0)) return false;
  const float limit = fminf(float(kMostExponent * task_.eps), 0x1p126f);
  float unused[kColumns] = {};
  bool all = true;
  for_halves([&](int first, int from) {
    float c[kHalf][kColumns];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) load_costs(first + from + r, c[r], 0.0f);  // no weight is beyond: any number does
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        all = all && fabsf(c[r][e]) <= limit;
        c[r][e] = moderate_power(-c[r][e]);
      }
      store_kernel(first, from + r, c[r]);
    }
  });
  Stats stats;
  stats.bad = !all;
  fold(unused, Sum(), stats);
  return folded_stats().bad == 0;
}

// The first potentials; the kernel's place gets the costs. False where a cost has no meaning.
template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_APART bool Sinkhorn<Team, kLanes, kQuads, kHeld>::start() {
  float nearest[kColumns];
#pragma unroll
  for (float& x : nearest) x = INFINITY;
  Stats stats;  // error: the weight of balanced rows that nothing reaches
  for_rows([&](int first) {
    float c[kRows][kColumns], least[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_costs(first + r, c[r]);
    const int i = first + row_;
    const float weight = rows_.weight()[i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      least[r] = INFINITY;
      for_quads([&](int j, int at) {
        const Quad w = four_columns(columns_.weight(), j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          stats.bad += !(c[r][at + e] > -INFINITY);
          least[r] = w.x[e] > 0 ? fminf(least[r], c[r][at + e]) : least[r];
        }
      });
      store_kernel(first, r, c[r]);
    }
    const float base = reduce_row(least, Least());
    if (leads_ && i < rows_.n) {
      rows_.set_base(i, {base, 0.0f});
      if (!(base < INFINITY)) {
        if (weight > 0 && !rows_.relaxed) stats.error += weight;
        rows_.leave_out(i);
      }
    }
    const float reaching = weight > 0 && base < INFINITY ? base : -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float subtract = of_row(reaching, r);
#pragma unroll
      for (int e = 0; e < kColumns; ++e) nearest[e] = fminf(nearest[e], c[r][e] - subtract);
    }
  });
  fold(nearest, Least(), stats);
  stats = folded_stats();
  if (stats.bad > 0) return false;
  double sums[4] = {};
  for_points(columns_.n, [&](int j) {
    const float base = folded(j, Least());
    columns_.set_base(j, {base, 0.0f});
    if (base < INFINITY) return;
    if (columns_.weight()[j] > 0 && !columns_.relaxed && team_.rank() == 0) sums[0] += columns_.weight()[j];
    columns_.leave_out(j);
  });
  sum_all(sums);
  state_.stranded = stats.error + float(sums[0]);
  if (state_.zero_rows) lower_zero_rows();
  return true;
}

// f0 of rows without weight, which g0 doesn't look at: min_j (cost_ij - g0_j), so that their K is at most 1 too.
template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_DEVICE void Sinkhorn<Team, kLanes, kQuads, kHeld>::lower_zero_rows() {
  for_rows([&](int first) {
    float least[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      least[r] = INFINITY;
      for_quads([&](int j, int) {
        const Quad c = *quad(place(first), first, r, j);
        const Quad g = four_columns(columns_.high(), j), w = four_columns(columns_.weight(), j);
#pragma unroll
        for (int e = 0; e < 4; ++e) least[r] = w.x[e] > 0 ? fminf(least[r], c.x[e] - g.x[e]) : least[r];
      });
    }
    const float base = reduce_row(least, Least());
    const int i = first + row_;
    if (leads_ && i < rows_.n && rows_.weight()[i] == 0 && base < INFINITY) rows_.set_base(i, {base, 0.0f});
  });
  team_.sync();
}

}  // namespace dpdiff
