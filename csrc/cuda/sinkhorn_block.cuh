// How the threads of a block share the rows and columns of a problem, and how they and the blocks of a team put together what
// each has found. No atomics: the order of sums is fixed.
#pragma once

#include <math.h>

#include "common.cuh"
#include "sinkhorn_shape.h"

namespace dpdiff {

struct Sum {
  DPDIFF_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Least {
  DPDIFF_DEVICE float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  DPDIFF_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What a pass finds out; summed over threads, warps and blocks.
struct SinkhornStats {
  float error = 0;  // |marginal - target|, before the update
  float moved = 0;  // weight * scaling
  float bad = 0;    // in how many threads float32 can't tell a sum or a scaling
  float large = 0;  // in how many a scaling has to be absorbed
};

template <class Team, int kLanes, int kQuads>
class SinkhornBlock {
 protected:
  static constexpr int kRows = 8 / kQuads, kColumns = 4 * kQuads;  // of a thread
  static constexpr bool kAcross = kLanes > 32;                     // a row takes all warps of the block
  static constexpr int kGroup = kAcross ? 32 : kLanes;             // lanes of a warp with the same rows
  static constexpr int kShare = kGroup / kRows;                    // that get the same row's sum
  static constexpr int kSpan = kRows * (32 / kGroup);              // rows that a warp, or the block, takes at once

  // partial: the columns' from each warp; scratch: 64 floats for stats, then 64 for reduce_row, which are sum_all's too
  DPDIFF_DEVICE SinkhornBlock(const Team& team, const SinkhornShape& shape, float* partial)
      : team_(team),
        shape_(shape),
        warp_(team.thread() / 32),
        lane_(team.thread() % 32),
        row_(lane_ % kGroup / kShare),
        column_(4 * (team.thread() % kLanes)),
        leads_(lane_ % kShare == 0 && (!kAcross || warp_ == 0)),
        partial_(partial),
        scratch_(partial_ + (kAcross ? 0 : shape.warps() * shape.width)) {}

  // work(the first of this thread's kRows rows), all threads alike
  template <class Work>
  DPDIFF_DEVICE void for_rows(const Work& work) const {
    const int step = kAcross ? kSpan : kSpan * shape_.warps();
#pragma unroll 1
    for (int i = kAcross ? 0 : warp_ * kSpan; i < shape_.rows; i += step) work(i + lane_ / kGroup * kRows);
  }
  // work(i), spread over the block's threads
  template <class Work>
  DPDIFF_DEVICE void for_points(int n, const Work& work) const {
#pragma unroll 1
    for (int i = team_.thread(); i < n; i += team_.threads()) work(i);
  }
  // work(the first column, where its number is in the thread's arrays) for each group of four of this thread
  template <class Work>
  DPDIFF_DEVICE void for_quads(const Work& work) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) work(column_ + q * 4 * kLanes, 4 * q);
  }

  // Reduces each of kCount numbers over kWidth lanes, of which kWidth / kCount neighbours get the same one.
  template <int kCount, int kWidth, class Op>
  DPDIFF_DEVICE float reduce_lanes(float (&x)[kCount], Op op) const {
    int mask = kWidth / 2;
#pragma unroll
    for (int n = kCount / 2; n > 0; n /= 2, mask /= 2) {
      const bool upper = lane_ & mask;
#pragma unroll
      for (int r = 0; r < kCount / 2; ++r) {
        if (r >= n) continue;
        const float kept = upper ? x[r + n] : x[r], given = upper ? x[r] : x[r + n];
        x[r] = op(kept, team_.swap_lanes(given, mask));
      }
    }
#pragma unroll
    for (; mask > 0; mask /= 2) x[0] = op(x[0], team_.swap_lanes(x[0], mask));
    return x[0];
  }
  // The same over all threads of a row: kCount is kRows, and each lane gets row_, or it is 1.
  template <int kCount, class Op>
  DPDIFF_DEVICE float reduce_row(float (&x)[kCount], Op op) {
    float result = reduce_lanes<kCount, kGroup>(x, op);
    if constexpr (kAcross) {
      turns_.row ^= 1;
      float* met = scratch_ + 64 + turns_.row * 32;
      constexpr int kSame = 32 / kCount;
      if (lane_ % kSame == 0) met[warp_ * kCount + lane_ / kSame] = result;
      team_.sync();
      result = met[lane_ / kSame];
      for (int w = 1; w < kLanes / 32; ++w) result = op(result, met[w * kCount + lane_ / kSame]);
    }
    return result;
  }
  DPDIFF_DEVICE float of_row(float x, int r) const { return team_.of_lane(x, lane_ / kGroup * kGroup + r * kShare); }

  // Boards alternate: what is read from one stays until the next but one is written.
  DPDIFF_DEVICE float* board(int rank) const {
    return reinterpret_cast<float*>(team_.board(rank)) + turns_.board * shape_.board();
  }
  // Puts each thread's parts of the columns and its stats together, within the block and then on its board.
  template <class Op>
  DPDIFF_DEVICE void fold(float (&x)[kColumns], Op op, const SinkhornStats& stats) {
    turns_.board ^= 1;
    float* mine = board(team_.rank());
    float* columns = kAcross ? mine + 16 : partial_ + warp_ * shape_.width;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
#pragma unroll
      for (int mask = kGroup; mask < 32; mask *= 2) x[e] = op(x[e], team_.swap_lanes(x[e], mask));
    }
    for_quads([&](int j, int at) {
      if (lane_ < kGroup && j < shape_.width) {
        *reinterpret_cast<Quad*>(columns + j) = {x[at], x[at + 1], x[at + 2], x[at + 3]};
      }
    });
    float found[4] = {stats.error, stats.moved, stats.bad, stats.large};
    const float whole = reduce_lanes<4, 32>(found, Sum());
    if (lane_ % 8 == 0) scratch_[warp_ * 4 + lane_ / 8] = whole;
    team_.sync();
    if constexpr (!kAcross) {
      for_points(shape_.width, [&](int j) {
        float met = partial_[j];
        for (int w = 1; w < shape_.warps(); ++w) met = op(met, partial_[w * shape_.width + j]);
        mine[16 + j] = met;
      });
    }
    for_points(4, [&](int k) {
      float met = 0;
      for (int w = 0; w < shape_.warps(); ++w) met += scratch_[w * 4 + k];
      mine[8 + k] = met;
    });
    team_.sync_all();
  }
  // What the blocks have put together.
  template <class Op>
  DPDIFF_DEVICE float folded(int j, Op op) const {
    float x = board(0)[16 + j];
    for (int rank = 1; rank < shape_.size; ++rank) x = op(x, board(rank)[16 + j]);
    return x;
  }
  DPDIFF_DEVICE SinkhornStats folded_stats() const {
    SinkhornStats sum;
    for (int rank = 0; rank < shape_.size; ++rank) {
      const Quad x = *reinterpret_cast<const Quad*>(board(rank) + 8);
      sum.error += x.x[0], sum.moved += x.x[1], sum.bad += x.x[2], sum.large += x.x[3];
    }
    return sum;
  }
  // Sums over all threads of all blocks.
  DPDIFF_DEVICE void sum_all(double (&x)[4]) {
    turns_.board ^= 1;
    double* met = reinterpret_cast<double*>(scratch_ + 64);
    team_.sync();
    for (int k = 0; k < 4; ++k) {
      for (int mask = 16; mask > 0; mask /= 2) x[k] += team_.swap_lanes(x[k], mask);
      if (lane_ == 0) met[warp_ * 4 + k] = x[k];
    }
    team_.sync();
    for_points(4, [&](int k) {
      double sum = 0;
#pragma unroll 1
      for (int w = 0; w < shape_.warps(); ++w) sum += met[w * 4 + k];
      reinterpret_cast<double*>(board(team_.rank()))[k] = sum;
    });
    team_.sync_all();
    for (int k = 0; k < 4; ++k) {
      x[k] = 0;
#pragma unroll 1
      for (int rank = 0; rank < shape_.size; ++rank) x[k] += reinterpret_cast<const double*>(board(rank))[k];
    }
  }

  const Team team_;
  const SinkhornShape& shape_;
  const int warp_, lane_;
  const int row_;     // of the thread's kRows, whose sum it gets
  const int column_;  // its first
  const bool leads_;  // among those that get the same row's sum
  float* const partial_;
  float* const scratch_;
  struct Turns {
    int row = 0, board = 0;
  } turns_;  // which of two places is used
};

}  // namespace dpdiff
