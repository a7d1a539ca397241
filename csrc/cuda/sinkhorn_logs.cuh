// The iterations in the log domain: slower, for what leaves the range of scalings. Each exponent is relative to the
// greatest of its row or column, so that no sum is lost. Potentials are in float64, as the sum of two float32.
#pragma once

#include "sinkhorn.cuh"

namespace dpdiff {

template <class Team, int kLanes, int kQuads, int kHeld>
DPDIFF_APART bool Sinkhorn<Team, kLanes, kQuads, kHeld>::iterate_logs() {
  const double eps = task_.eps;
  // h = g + eps log b, and f before it is taken, are kept where the scalings were
  const auto set_h = [&](int j, double g) {
    const Pair h = Pair::of(carried(columns_, j, g));
    columns_.scaling()[j] = h.high, columns_.moved()[j] = h.low;
  };
  const auto next_f = [&](int i) { return double(rows_.scaling()[i]) + rows_.next_scaling()[i]; };
  // log sum exp((from - c) / eps), from the greatest of from - c
  const auto term = [&](double from, double greatest, float c) {
    return c < INFINITY && from > -INFINITY ? exp2f(float((from - c - greatest) * 1.4426950408889634 / eps)) : 0.0f;
  };
  const auto log_sum = [&](double greatest, double sum) { return sum > 0 ? greatest + eps * log(sum) : -INFINITY; };

  for_points(rows_.padded, [&](int i) { rows_.set_base(i, {0.0f, 0.0f}); });
  for_points(columns_.padded, [&](int j) { set_h(j, 0.0); });
  team_.sync();
  for (state_.used = 0; state_.used < task_.n_iters; ++state_.used) {
    float x[kColumns];
#pragma unroll
    for (float& most : x) most = -INFINITY;
    Stats stats;
    for_rows([&](int first) {
#pragma unroll 1
      for (int i = first; i < first + kRows; ++i) {
        float c[kColumns], top[1] = {-INFINITY}, total[1] = {0.0f};
        load_costs(i, c);
        for_quads([&](int j, int at) {
          const Quad h = four_columns(columns_.scaling(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) top[0] = fmaxf(top[0], h.x[e] - c[at + e]);
        });
        const double greatest = reduce_row(top, Most());
        for_quads([&](int j, int at) {
          const Quad high = four_columns(columns_.scaling(), j), low = four_columns(columns_.moved(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) total[0] += term(double(high.x[e]) + low.x[e], greatest, c[at + e]);
        });
        const double softmin = -log_sum(greatest, reduce_row(total, Sum())), f = rows_.damp * softmin;
        const float weight = rows_.weight()[i];
        if (first_of_row()) {
          if (weight > 0) {
            stats.error += fabsf(float(weight * exp((rows_.base(i).wide() - softmin) / eps)) - rows_.aim(i));
          }
          const Pair next = Pair::of(f);
          rows_.scaling()[i] = next.high, rows_.next_scaling()[i] = next.low;
        }
        const float k = float(carried(rows_, i, f));
#pragma unroll
        for (int e = 0; e < kColumns; ++e) x[e] = fmaxf(x[e], k - c[e]);
      }
    });
    fold(x, Most(), stats);
    if (state_.used > 0 && folded_stats().error + state_.stranded < task_.tol) break;

    for_points(columns_.padded, [&](int j) { columns_.pull()[j] = folded(j, Most()); });
    for_points(rows_.padded, [&](int i) {
      const double f = next_f(i);
      rows_.set_base(i, Pair::of(f));
      if (rows_.relaxed) rows_.target()[i] = rows_.weight()[i] > 0 ? float(rows_.weight()[i] * exp(-f / rows_.tau)) : 0.0f;
    });
    team_.sync();
#pragma unroll
    for (float& sum : x) sum = 0.0f;
    for_rows([&](int first) {
#pragma unroll 1
      for (int i = first; i < first + kRows; ++i) {
        float c[kColumns];
        load_costs(i, c);
        const double k = carried(rows_, i, rows_.base(i).wide());
        for_quads([&](int j, int at) {
          const Quad greatest = four_columns(columns_.pull(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[at + e] += term(k, greatest.x[e], c[at + e]);
        });
      }
    });
    fold(x, Sum(), Stats());
    for_points(columns_.n, [&](int j) {
      const double g = -columns_.damp * log_sum(columns_.pull()[j], folded(j, Sum()));
      columns_.set_base(j, Pair::of(g));
      set_h(j, g);
      if (columns_.relaxed) columns_.target()[j] = columns_.weight()[j] > 0 ? float(columns_.weight()[j] * exp(-g / columns_.tau)) : 0.0f;
    });
    team_.sync();
  }
  const auto leave = [&](const Side& side) {
    for_points(side.n, [&](int i) {
      if (!(side.base(i).wide() < INFINITY)) side.leave_out(i);
      side.scaling()[i] = 1.0f;
    });
  };
  leave(rows_);
  leave(columns_);
  for_points(columns_.n, [&](int j) { columns_.moved()[j] = fmaxf(columns_.weight()[j], 0.0f); });
  team_.sync();
  return build(true);
}

}  // namespace dpdiff
