// How the threads of a block share the rows and columns of a problem, and how they and the blocks of a team put together what
// each has found. No atomics: the order of sums is fixed.
#pragma once

#include <math.h>
#include <string.h>

#include "common.cuh"
#include "sinkhorn_shape.h"

namespace dpdiff {

struct Sum {
  static constexpr float kNothing = 0;
  DPDIFF_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Least {
  static constexpr float kNothing = INFINITY;
  DPDIFF_DEVICE float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  static constexpr float kNothing = -INFINITY;
  DPDIFF_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What a pass finds out; summed over threads, warps and blocks.
struct SinkhornStats {
  float error = 0;  // |marginal - target|, before the update
  float moved = 0;  // weight * scaling
  float bad = 0;    // in how many threads float32 can't tell a sum or a scaling
  float large = 0;  // in how many a scaling has to be absorbed
};

// kHeld: how often the threads of a block, which is alone then, hold rows of two rounds (see SinkhornShape::held).
template <class Team, int kLanes, int kQuads, int kHeld>
class SinkhornBlock {
 protected:
  static constexpr int kRows = sinkhorn_rows(kQuads), kColumns = 4 * kQuads;  // of a thread
  static constexpr bool kAcross = kLanes > 32;          // a row takes all warps of the block
  static constexpr bool kWhole = kLanes < 32;           // rows are padded to what their lanes take
  static constexpr int kGroup = kAcross ? 32 : kLanes;  // lanes of a warp with the same rows
  static constexpr int kShare = kGroup / kRows;         // that get the same row's sum
  static constexpr int kSpan = kRows * (32 / kGroup);   // rows that a warp, or the block, takes at once

  // partial: what each warp tells the block; scratch: 64 floats for reduce_row across warps
  DPDIFF_DEVICE SinkhornBlock(const Team& team, const SinkhornShape& shape, float* partial)
      : team_(team),
        shape_(shape),
        warp_(unsigned(team.thread()) / 32),
        lane_(unsigned(team.thread()) % 32),
        row_(lane_ % kGroup / kShare),
        column_(4 * (unsigned(team.thread()) % kLanes)),
        leads_(lane_ % kShare == 0 && (!kAcross || warp_ == 0)),
        partial_(partial),
        scratch_(partial + shape.parts()) {}

  // In a round, each warp takes kSpan rows, and each thread kRows, from first_row on; the next round is a step further.
  DPDIFF_DEVICE int step() const { return kAcross ? kSpan : kSpan * warps(); }
  DPDIFF_DEVICE int first_row(int round) const {
    return (kAcross ? 0 : warp_ * kSpan) + lane_ / kGroup * kRows + round * step();
  }
  // work(first_row) of each round from the given on, all threads of a warp alike
  template <class Work>
  DPDIFF_DEVICE void for_rows(const Work& work, int round = 0) const {
#pragma unroll 1
    for (int i = first_row(round); i < shape_.padded; i += step()) work(i);
  }
  // work(the same, where to go on) for each half of these rows, since registers that blocks share don't hold costs of all
  static constexpr int kHalf = kHeld > 0 ? kRows : kRows / 2;
  template <class Work>
  DPDIFF_DEVICE void for_halves(const Work& work) const {
    for_rows([&](int first) {
#pragma unroll 1
      for (int r = 0; r < kRows; r += kHalf) work(first, r);
    });
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
  // work(i, true) for each i < n, some at once, so that their loads overlap: where there aren't as many, work(n - 1, false).
  template <class Work>
  DPDIFF_DEVICE static void for_some(int n, const Work& work) {
    constexpr int kSome = kHeld > 0 ? kMostWarps : 4;
#pragma unroll 1
    for (int first = 0; first < n; first += kSome) {
#pragma unroll
      for (int i = first; i < first + kSome; ++i) work(i < n ? i : n - 1, i < n);
    }
  }
  // The shape's, of which the compiler knows more here.
  DPDIFF_DEVICE int width() const { return kWhole ? kLanes * kColumns : shape_.width; }
  DPDIFF_DEVICE int warps() const { return kHeld > 0 ? kMostWarps : shape_.warps(); }
  DPDIFF_DEVICE bool alone() const { return kHeld > 0 || (!kAcross && shape_.size == 1); }
  DPDIFF_DEVICE int length() const { return 4 + width(); }  // of a message
  DPDIFF_DEVICE int part() const { return kAcross ? 8 : length(); }
  DPDIFF_DEVICE bool inside(int column) const { return kWhole || column < shape_.width; }

  // Reduces each of kCount numbers over lanes that differ in the bits from kTop down to kLeast. Each bit halves what a lane
  // has, as long as that is more than one: lanes with it get the upper half.
  template <int kTop, int kLeast, int kCount, class Op>
  DPDIFF_DEVICE void reduce_lanes(float (&x)[kCount], Op op) const {
    int n = kCount;
#pragma unroll
    for (int mask = kTop; mask >= kLeast; mask /= 2) {
      const bool upper = lane_ & mask, alone = n == 1;
      n = alone ? 1 : n / 2;
#pragma unroll
      for (int r = 0; r < (kCount + 1) / 2; ++r) {
        if (r >= n) continue;
        const float kept = !alone && upper ? x[r + n] : x[r], given = alone || upper ? x[r] : x[r + n];
        x[r] = op(kept, team_.swap_lanes(given, mask));
      }
    }
  }
  // The same over all threads of a row. Each lane gets the one of the kCount numbers that its place among these threads
  // falls on (row_, where they are kRows), or the only one.
  template <int kCount, class Op>
  DPDIFF_DEVICE float reduce_row(float (&x)[kCount], Op op) {
    reduce_lanes<kGroup / 2, 1>(x, op);
    float result = x[0];
    if constexpr (kAcross) {
      turns_.row ^= 1;
      float* met = scratch_ + turns_.row * 32;
      constexpr int kSame = 32 / kCount;
      if (lane_ % kSame == 0) met[warp_ * kCount + lane_ / kSame] = result;
      team_.sync();
      result = met[lane_ / kSame];
      for (int w = 1; w < kLanes / 32; ++w) result = op(result, met[w * kCount + lane_ / kSame]);
    }
    return result;
  }
  DPDIFF_DEVICE float of_row(float x, int r) const { return team_.template of_lane<kGroup>(x, r * kShare); }

  // Boards alternate: what is on one stays until all have what is on the next. A block sends its message to all boards;
  // long ones stay on its own, where the others read them. Where it is alone, its warps' parts are the messages.
  DPDIFF_DEVICE int messages() const { return alone() ? warps() : shape_.size; }
  DPDIFF_DEVICE int board() const { return turns_.board % 2 * (kAcross ? 1 : messages()) * length(); }
  DPDIFF_DEVICE const float* message(int i) const {
    if constexpr (kAcross) return team_.board_of(i) + board();
    return team_.board() + board() + i * length();
  }
  DPDIFF_DEVICE float* part_of_warp() const {
    return alone() ? team_.board() + board() + warp_ * length() : partial_ + warp_ * part();
  }
  // Tells all blocks quad(0), quad(1), ... of this one, and waits for theirs.
  template <class Tell>
  DPDIFF_DEVICE void tell(int quads, const Tell& quad) {
    if (!kAcross && team_.thread() == 0) team_.expect(turns_.board, 16 * quads * shape_.size);
    for_points(quads, [&](int q) {
      const Quad x = quad(q);
      if constexpr (kAcross) {
        reinterpret_cast<Quad*>(team_.board() + board())[q] = x;
      } else {
#pragma unroll 1
        for (int rank = 0; rank < shape_.size; ++rank) {
          team_.send(rank, turns_.board, board() + team_.rank() * length() + 4 * q, x);
        }
      }
    });
    kAcross ? team_.sync_all() : team_.receive(turns_.board);
  }
  // Puts each thread's parts of the columns and its stats together, over the block, and then tells all blocks.
  template <class Op>
  DPDIFF_DEVICE void fold(float (&x)[kColumns], Op op, const SinkhornStats& stats) {
    ++turns_.board;
    float* mine = part_of_warp();
    float found[4] = {stats.error, stats.moved, stats.bad, stats.large};
    reduce_lanes<16, 1>(found, Sum());
    if (lane_ % 8 == 0) mine[lane_ / 8] = found[0];
    float* columns = (kAcross ? team_.board() + board() : mine) + 4;
    constexpr int kLeft = kColumns * kGroup / 32;
    reduce_lanes<16, kGroup>(x, op);
    const int from = lane_ / kGroup * kLeft;
    const auto place = [&](int e) { return column_ + e / 4 * (4 * kLanes) + e % 4; };
    if constexpr (kLeft < 4) {
#pragma unroll
      for (int e = 0; e < kLeft; ++e) columns[place(from + e)] = x[e];
    } else {
#pragma unroll
      for (int e = 0; e < kLeft; e += 4) {
        const int j = place(from + e);
        if (inside(j)) *reinterpret_cast<Quad*>(columns + j) = {x[e], x[e + 1], x[e + 2], x[e + 3]};
      }
    }
    team_.sync();
    if (alone()) return;
    tell(1 + (kAcross ? 0 : width() / 4), [&](int q) {
      const float nothing = q > 0 ? Op::kNothing : 0.0f;
      Quad met{nothing, nothing, nothing, nothing};
      for_some(warps(), [&](int w, bool is) {
        const Quad of_warp = reinterpret_cast<const Quad*>(partial_ + w * part())[q];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float both = q > 0 ? op(met.x[e], of_warp.x[e]) : met.x[e] + of_warp.x[e];
          met.x[e] = is ? both : met.x[e];
        }
      });
      return met;
    });
  }
  // What the blocks have put together.
  template <class Op>
  DPDIFF_DEVICE float folded(int j, Op op) const {
    float x = Op::kNothing;
    for_some(messages(), [&](int i, bool is) {
      const float both = op(x, message(i)[4 + j]);
      x = is ? both : x;
    });
    return x;
  }
  DPDIFF_DEVICE SinkhornStats folded_stats() const {
    SinkhornStats sum;
    for_some(messages(), [&](int i, bool is) {
      const Quad x = *reinterpret_cast<const Quad*>(message(i));
      if (!is) return;
      sum.error += x.x[0], sum.moved += x.x[1], sum.bad += x.x[2], sum.large += x.x[3];
    });
    return sum;
  }
  // Sums over all threads of all blocks.
  DPDIFF_DEVICE void sum_all(double (&x)[4]) {
    ++turns_.board;
    for (int k = 0; k < 4; ++k) {
      for (int mask = 16; mask > 0; mask /= 2) x[k] += team_.swap_lanes(x[k], mask);
      if (lane_ == 0) reinterpret_cast<double*>(part_of_warp())[k] = x[k];
    }
    team_.sync();
    if (!alone()) {
      tell(2, [&](int q) {
        double sums[2] = {};
#pragma unroll 1
        for (int w = 0; w < warps(); ++w) {
          for (int k = 0; k < 2; ++k) sums[k] += reinterpret_cast<const double*>(partial_ + w * part())[2 * q + k];
        }
        Quad both;
        memcpy(&both, sums, sizeof both);
        return both;
      });
    }
    for (int k = 0; k < 4; ++k) {
      x[k] = 0;
#pragma unroll 1
      for (int i = 0; i < messages(); ++i) x[k] += reinterpret_cast<const double*>(message(i))[k];
    }
  }

  struct Turns {
    int row = 0;
    unsigned board = ~0u;
  };

  const Team team_;
  const SinkhornShape& shape_;
  const int warp_, lane_;
  const int row_;     // of the thread's kRows, whose sum it gets
  const int column_;  // its first
  const bool leads_;  // among those that get the same row's sum
  float* const partial_;
  float* const scratch_;
  Turns turns_;  // what is used alternates
};

}  // namespace dpdiff
