// Solves one problem on a team of blocks. The plan is P_ij = a_i phi_i K_ij psi_j b_j: a kernel K = exp((f0_i + g0_j -
// cost_ij) / eps), and scalings phi and psi of its potentials f0 and g0, which absorb the scalings where these get large
// (Schmitzer, 2019). The first f0 and g0 are zero for small costs, else hard c-transforms, min_j cost_ij and
// min_i (cost_ij - f0_i): K is then at most 1, and 1 somewhere in each row and column, whatever eps is.
//
// K stays where its threads are. An iteration reads it once: the sum of a row gives its phi, and with that its part of the
// column sums. Those of the blocks meet on their boards, and every block updates all columns. What float32 scalings can't
// represent is iterated in the log domain (sinkhorn_logs.cuh). No atomics: the same input gives the same bits.
#pragma once

#include <math.h>

#include "common.cuh"
#include "sinkhorn_shape.h"

namespace dpdiff {

constexpr float kTiny = 0x1p-126f, kLn2 = 0.69314718056f;
// K is without what is below 2^-126; columns' scalings are at most kMostScaling, so that row sums from kLeastRowSum of
// b's mass are right to float32, and columns' from kLeastColumnSum of the sum of a phi.
constexpr float kMostScaling = 0x1p30f, kLeastScaling = 0x1p-60f;
constexpr float kLeastRowSum = 0x1p-72f, kLeastColumnSum = 0x1p-96f;
constexpr double kMostExponent = 30;  // of the kernel of zero potentials

struct Sum {
  DPDIFF_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Least {
  DPDIFF_DEVICE float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  DPDIFF_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A number as what float32 holds of it, and the rest.
struct Pair {
  float high, low;

  static DPDIFF_DEVICE Pair of(double x) {
    const float high = float(x);
    return {high, fabsf(high) < INFINITY ? float(x - high) : 0.0f};
  }
  static DPDIFF_DEVICE Pair sum(float a, float b) {  // Knuth's
    const float s = a + b, t = s - a;
    return {s, (a - (s - t)) + (b - t)};
  }
  DPDIFF_DEVICE double wide() const { return double(high) + low; }
};

template <class Team, int kLanes, int kQuads>
class Sinkhorn {
  static constexpr int kRows = 8 / kQuads, kColumns = 4 * kQuads;  // of a thread
  static constexpr bool kAcross = kLanes > 32;                     // a row takes all warps of the block
  static constexpr int kGroup = kAcross ? 32 : kLanes;             // lanes of a warp with the same rows
  static constexpr int kShare = kGroup / kRows;                    // that get the same row's sum
  static constexpr int kSpan = kRows * (32 / kGroup);              // rows that a warp, or the block, takes at once

  // The block's rows, or all columns: arrays of a number each, one after the other.
  struct Side {
    float* at;
    int n, padded;
    double tau;
    float damp;
    bool relaxed;
    int now = 0;  // rows' scalings and targets change places with the next ones

    DPDIFF_DEVICE Side(float* at, int n, int padded, bool relaxed, double tau, double eps)
        : at(at), n(n), padded(padded), tau(tau), damp(relaxed ? tau / (tau + eps) : 1.0), relaxed(relaxed) {}

    DPDIFF_DEVICE float* array(int k) const { return at + int64_t(k) * padded; }
    DPDIFF_DEVICE float* high() const { return array(0); }  // of f0, g0
    DPDIFF_DEVICE float* low() const { return array(1); }
    DPDIFF_DEVICE float* weight() const { return array(2); }         // as given; -1 where nothing reaches
    DPDIFF_DEVICE float* scaling() const { return array(3 + now); }  // phi, psi
    DPDIFF_DEVICE float* next_scaling() const { return array(4 - now); }
    DPDIFF_DEVICE float* moved() const { return array(4); }  // of columns: weight * scaling
    DPDIFF_DEVICE float* pull() const { return array(5); }   // relaxed: exp(-base / (tau + eps))
    DPDIFF_DEVICE float* target() const { return array(6 + now); }  // relaxed: weight exp(-potential / tau)
    DPDIFF_DEVICE float* next_target() const { return array(7 - now); }

    DPDIFF_DEVICE Pair base(int i) const { return {high()[i], low()[i]}; }
    DPDIFF_DEVICE void set_base(int i, Pair x) const { high()[i] = x.high, low()[i] = x.low; }
    DPDIFF_DEVICE float aim(int i) const { return relaxed ? target()[i] : fmaxf(weight()[i], 0.0f); }
    DPDIFF_DEVICE void leave_out(int i) const {
      set_base(i, {0.0f, 0.0f});
      weight()[i] = -1.0f;
      if (relaxed) target()[i] = 0.0f;
    }
    DPDIFF_DEVICE double potential(int i) const { return weight()[i] < 0 ? INFINITY : base(i).wide(); }
  };

  // What a pass finds out; summed over threads, warps and blocks.
  struct Stats {
    float error = 0;  // |marginal - target|, before the update
    float moved = 0;  // weight * scaling
    float bad = 0;    // in how many threads float32 can't tell a sum or a scaling
    float large = 0;  // in how many a scaling has to be absorbed
  };

  // The least and the greatest of the sums and of the scalings of a thread's points.
  struct Extents {
    float least_sum = INFINITY, most_sum = 0, least = INFINITY, most = 0;

    DPDIFF_DEVICE void include(float sum, float scaling) {
      least_sum = fminf(least_sum, sum), most_sum = fmaxf(most_sum, sum);
      least = fminf(least, scaling), most = fmaxf(most, scaling);
    }
    // Sums are right from `right` on.
    DPDIFF_DEVICE bool bad(float right) const {
      return !(least_sum >= fmaxf(right, kTiny) && most_sum < 0x1p120f && least >= 0x1p-100f && most < 0x1p100f);
    }
    DPDIFF_DEVICE bool large() const { return !(least >= kLeastScaling && most <= kMostScaling); }
  };

 public:
  DPDIFF_DEVICE Sinkhorn(const Team& team, const SinkhornTask& task, const SinkhornShape& shape, int64_t problem,
                         float* shared, float* room)
      : team_(team),
        task_(task),
        shape_(shape),
        problem_(problem),
        first_(min_of(int64_t(team.rank()) * divide(task.n, shape.size), task.n)),
        warp_(team.thread() / 32),
        lane_(team.thread() % 32),
        row_(lane_ % kGroup / kShare),
        column_(4 * (team.thread() % kLanes)),
        leads_(lane_ % kShare == 0 && (!kAcross || warp_ == 0)),
        rows_(room, min_of(divide(task.n, shape.size), task.n - first_), shape.rows, shape.relaxed_a, task.tau_a,
              task.eps),
        columns_(shared, task.m, shape.width, shape.relaxed_b, task.tau_b, task.eps),
        kernel_(room + shape.side_of_rows()),
        partial_(shared + shape.side_of_columns()),
        scratch_(partial_ + (kAcross ? 0 : shape.warps() * shape.width)),
        cost_(task.cost + (problem * task.n + first_) * task.m),
        scale_(float(1.4426950408889634 / task.eps)),
        scale_rest_(float(1.4426950408889634 / task.eps - scale_)) {}

  // Solves the problem that both are of. What is not iterated is compiled on its own, on an object in memory, so that the
  // iterations have the registers to themselves.
  static DPDIFF_DEVICE void solve(Sinkhorn& slow, Sinkhorn fast) {
    if (run<&Sinkhorn::prepare>(slow)) {
      fast.state_ = slow.state_;
      if (!fast.iterate(slow)) run<&Sinkhorn::iterate_logs>(slow);
      run<&Sinkhorn::finish>(slow);
    } else {
      run<&Sinkhorn::fail>(slow);
    }
    slow.team_.sync_all();  // no block ends before the others have read its board
  }

 private:
  // What is known of the problem so far, the same in all threads of all blocks.
  struct State {
    double mass_a = 0, mass_b = 0;
    float least_row_sum = 0;
    float stranded = 0;  // weight of balanced sides that nothing reaches
    bool zero_rows = false, zeros = false;
    int turn = 0, turn_of_board = 0;
    int64_t used = 0;
  };

  template <bool (Sinkhorn::*kPhase)()>
  static DPDIFF_APART bool run(Sinkhorn& slow) {
    return (slow.*kPhase)();
  }

  DPDIFF_DEVICE bool prepare() { return read_weights() && (build_unshifted() || (start() && build(false))); }

  static DPDIFF_DEVICE int min_of(int64_t a, int64_t b) { return int(a < b ? a : b); }
  static DPDIFF_DEVICE int divide(int a, int b) { return (a + b - 1) / b; }

  // --------------------------------------------------------------------------------------- threads, warps and blocks

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
      state_.turn ^= 1;
      float* met = scratch_ + 64 + state_.turn * 32;
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
    return reinterpret_cast<float*>(team_.board(rank)) + state_.turn_of_board * shape_.board();
  }
  // Puts each thread's parts of the columns and its stats together, within the block and then on its board.
  template <class Op>
  DPDIFF_DEVICE void fold(float (&x)[kColumns], Op op, const Stats& stats) {
    state_.turn_of_board ^= 1;
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
  DPDIFF_DEVICE Stats folded_stats() const {
    Stats sum;
    for (int rank = 0; rank < shape_.size; ++rank) {
      const Quad x = *reinterpret_cast<const Quad*>(board(rank) + 8);
      sum.error += x.x[0], sum.moved += x.x[1], sum.bad += x.x[2], sum.large += x.x[3];
    }
    return sum;
  }
  // Sums over all threads of all blocks.
  DPDIFF_DEVICE void sum_all(double (&x)[4]) {
    state_.turn_of_board ^= 1;
    double* met = reinterpret_cast<double*>(scratch_ + 64);
    team_.sync();
    for (int k = 0; k < 4; ++k) {
      for (int mask = 16; mask > 0; mask /= 2) x[k] += team_.swap_lanes(x[k], mask);
      if (lane_ == 0) met[warp_ * 4 + k] = x[k];
    }
    team_.sync();
    for_points(4, [&](int k) {
      double sum = 0;
      for (int w = 0; w < shape_.warps(); ++w) sum += met[w * 4 + k];
      reinterpret_cast<double*>(board(team_.rank()))[k] = sum;
    });
    team_.sync_all();
    for (int k = 0; k < 4; ++k) {
      x[k] = 0;
      for (int rank = 0; rank < shape_.size; ++rank) x[k] += reinterpret_cast<const double*>(board(rank))[k];
    }
  }

  // --------------------------------------------------------------------------------------- costs and the kernel

  // Row i of the costs, this thread's columns; infinity beyond the edges.
  DPDIFF_DEVICE void load_costs(int i, float (&c)[kColumns]) const {
    const float* row = cost_ + int64_t(i) * task_.m;
    const bool whole = task_.m % 4 == 0;  // then rows begin at multiples of 16 bytes: the launch has seen to the first
    for_quads([&](int j, int at) {
      if (whole) {
        Quad x{INFINITY, INFINITY, INFINITY, INFINITY};
        if (i < rows_.n && j < task_.m) x = *reinterpret_cast<const Quad*>(row + j);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[at + e] = x.x[e];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[at + e] = i < rows_.n && j + e < task_.m ? row[j + e] : INFINITY;
      }
    });
  }
  // Where four numbers of the kernel are: columns beyond the edge read the row's first, and never write.
  DPDIFF_DEVICE Quad* quad(int i, int j) const {
    return reinterpret_cast<Quad*>(kernel_ + int64_t(i) * shape_.width + (j < shape_.width ? j : 0));
  }
  DPDIFF_DEVICE void load_kernel(int i, float (&k)[kColumns]) const {
    for_quads([&](int j, int at) {
      const Quad x = *quad(i, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) k[at + e] = x.x[e];
    });
  }
  DPDIFF_DEVICE void store_kernel(int i, const float (&k)[kColumns]) const {
    for_quads([&](int j, int at) {
      if (j < shape_.width) *quad(i, j) = {k[at], k[at + 1], k[at + 2], k[at + 3]};
    });
  }
  // Of an array with a number for each column; 0 beyond the edge.
  DPDIFF_DEVICE void load_columns(const float* from, float (&x)[kColumns]) const {
    for_quads([&](int j, int at) {
      const Quad four = *reinterpret_cast<const Quad*>(from + (j < shape_.width ? j : 0));
#pragma unroll
      for (int e = 0; e < 4; ++e) x[at + e] = j < shape_.width ? four.x[e] : 0.0f;
    });
  }
  DPDIFF_DEVICE Quad four_columns(const float* from, int j) const {
    return *reinterpret_cast<const Quad*>(from + (j < shape_.width ? j : 0));
  }

  // exp((f + g - c) / eps), at most 2^126
  DPDIFF_DEVICE float kernel_of(Pair f, Pair g, float c) const {
    const Pair s = Pair::sum(f.high, g.high), x = Pair::sum(s.high, -c);
    return power(x.high, (s.low + x.low) + (f.low + g.low));
  }
  // exp((x + rest) / eps)
  DPDIFF_DEVICE float power(float x, float rest) const {
    const float y = x * scale_;
    const float lost = fmaf(x, scale_, -y) + (x * scale_rest_ + rest * scale_);
    const float p = exp2f(fminf(y, 126.0f));
    return y > -150.0f ? fmaf(p, lost * kLn2, p) : 0.0f;  // else infinite minus infinite
  }

  // False where a weight has no meaning.
  DPDIFF_DEVICE bool read_weights() {
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
    if (team_.rank() > 0) sums[2] = sums[3] = 0;
    sum_all(sums);
    state_.mass_a = sums[0], state_.mass_b = sums[2];
    state_.least_row_sum = float(kLeastRowSum * state_.mass_b);
    state_.zero_rows = sums[1] > 0, state_.zeros = sums[1] + sums[3] > 0;
    return state_.mass_a + state_.mass_b < INFINITY;
  }

  // The kernel of zero potentials, in one pass, where float32 holds it: small finite costs. Otherwise false.
  DPDIFF_DEVICE bool build_unshifted() {
    if (!(state_.mass_a > 0 && state_.mass_b > 0)) return false;
    const float limit = fminf(float(kMostExponent * task_.eps), 0x1p126f);
    float unused[kColumns] = {};
    Stats stats;
    for_rows([&](int first) {
      float c[kRows][kColumns];
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_costs(first + r, c[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool inside = first + r < rows_.n;
        for_quads([&](int j, int at) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = c[r][at + e];
            stats.bad += inside && j + e < columns_.n && !(fabsf(x) <= limit);
            x = power(-x, 0.0f);
          }
        });
        store_kernel(first + r, c[r]);
      }
    });
    fold(unused, Sum(), stats);
    return folded_stats().bad == 0;
  }

  // The first potentials; the kernel's place gets the costs. False where a cost has no meaning.
  DPDIFF_DEVICE bool start() {
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
        store_kernel(first + r, c[r]);
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
  DPDIFF_DEVICE void lower_zero_rows() {
    for_rows([&](int first) {
      float least[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        least[r] = INFINITY;
        for_quads([&](int j, int) {
          const Quad c = *quad(first + r, j), g = four_columns(columns_.high(), j), w = four_columns(columns_.weight(), j);
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

  // The kernel of f0 and g0, from the costs, or from their copies in its place.
  DPDIFF_DEVICE bool build(bool again) {
    const auto set_pulls = [&](const Side& side) {
      if (!side.relaxed) return;
      for_points(side.n, [&](int i) { side.pull()[i] = float(exp(-side.base(i).wide() / (side.tau + task_.eps))); });
    };
    set_pulls(rows_);
    set_pulls(columns_);
    for_rows([&](int first) {
      float c[kRows][kColumns];
#pragma unroll
      for (int r = 0; r < kRows; ++r) again ? load_costs(first + r, c[r]) : load_kernel(first + r, c[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Pair f = rows_.base(first + r);
        for_quads([&](int j, int at) {
          const Quad high = four_columns(columns_.high(), j), low = four_columns(columns_.low(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) c[r][at + e] = kernel_of(f, {high.x[e], low.x[e]}, c[r][at + e]);
        });
        store_kernel(first + r, c[r]);
      }
    });
    team_.sync();
    return true;
  }

  // --------------------------------------------------------------------------------------- iterations

  DPDIFF_DEVICE float scaling_of(const Side& side, int i, float sum) const {
    return side.relaxed ? powf(fmaxf(sum, kTiny), -side.damp) * side.pull()[i] : 1.0f / sum;
  }

  // The rows' next scalings, and the column sums that these give.
  DPDIFF_DEVICE void update_rows() {
    float v[kColumns], sums[kColumns] = {};
    load_columns(columns_.moved(), v);
    Stats stats;
    Extents extents;
    for_rows([&](int first) {
      float k[kRows][kColumns], dot[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_kernel(first + r, k[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        dot[r] = 0;
#pragma unroll
        for (int e = 0; e < kColumns; ++e) dot[r] = fmaf(k[r][e], v[e], dot[r]);
      }
      const int i = first + row_;
      const float weight = rows_.weight()[i], before = rows_.scaling()[i], aim = rows_.aim(i);
      const float sum = reduce_row(dot, Sum());
      const float next = scaling_of(rows_, i, sum), u = weight > 0 ? weight * next : 0.0f;
      if (weight > 0) extents.include(sum, next);
      if (leads_) {
        stats.error += weight > 0 ? fabsf(weight * before * sum - aim) : 0.0f;
        stats.moved += u;
        rows_.next_scaling()[i] = next;
        if (rows_.relaxed) rows_.next_target()[i] = u * sum;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float of_this = of_row(u, r);
#pragma unroll
        for (int e = 0; e < kColumns; ++e) sums[e] = fmaf(of_this, k[r][e], sums[e]);
      }
    });
    stats.bad = extents.bad(state_.least_row_sum), stats.large = extents.large();
    fold(sums, Sum(), stats);
  }

  DPDIFF_DEVICE Extents update_columns() {
    Extents extents;
    for_points(columns_.n, [&](int j) {
      const float sum = folded(j, Sum()), weight = columns_.weight()[j];
      const float next = scaling_of(columns_, j, sum);
      if (weight > 0) extents.include(sum, next);
      columns_.scaling()[j] = next;
      columns_.moved()[j] = weight > 0 ? weight * next : 0.0f;
      if (columns_.relaxed) columns_.target()[j] = columns_.moved()[j] * sum;
    });
    return extents;
  }

  // False where a sum or a scaling leaves what float32 can tell.
  DPDIFF_DEVICE bool iterate(Sinkhorn& slow) {
    for_points(columns_.n, [&](int j) {  // g = 0: the scalings undo g0
      columns_.moved()[j] = fmaxf(columns_.weight()[j], 0.0f) * exp2f(-columns_.high()[j] * scale_);
    });
    team_.sync();
    bool good = true;
    for (state_.used = 0; state_.used < task_.n_iters; ++state_.used) {
      update_rows();
      const Stats rows = folded_stats();
      if (state_.used > 0 && rows.error + state_.stranded < task_.tol) break;
      good = rows.bad == 0;
      if (!good) break;
      rows_.now ^= 1;
      const Extents columns = update_columns();
      const bool bad = columns.bad(kLeastColumnSum * rows.moved);
      if (team_.sync_or(bad || rows.large > 0 || columns.large())) {
        good = !team_.sync_or(bad);
        if (!good) break;
        if (state_.used + 1 < task_.n_iters) {
          hand_over(slow);
          run<&Sinkhorn::absorb>(slow);
        }
      }
    }
    hand_over(slow);
    return good && run<&Sinkhorn::zeros_fit>(slow);
  }
  DPDIFF_DEVICE void hand_over(Sinkhorn& slow) const {
    slow.rows_.now = rows_.now;
    slow.state_.used = state_.used, slow.state_.turn_of_board = state_.turn_of_board, slow.state_.turn = state_.turn;
  }

  // Whether zero weights have scalings from which a potential can be told.
  DPDIFF_DEVICE bool zeros_fit() {
    if (!state_.zeros) return true;
    double sums[4] = {};
    const auto count = [&](const Side& side) {
      for_points(side.n, [&](int i) {
        const float s = side.scaling()[i];
        sums[0] += side.weight()[i] == 0 && !(s > 0x1p-60f && s < 0x1p60f);
      });
    };
    count(rows_);
    count(columns_);
    sum_all(sums);
    return sums[0] == 0;
  }

  // Moves the scalings into f0 and g0. Those that float32 can't hold stay: they are of zero weights.
  DPDIFF_DEVICE void settle() const {
    const auto move = [&](const Side& side) {
      for_points(side.n, [&](int i) {
        const float s = side.scaling()[i];
        if (!(s >= kTiny && s < INFINITY)) return;
        side.set_base(i, Pair::of(side.base(i).wide() + task_.eps * log(double(s))));
        side.scaling()[i] = 1.0f;
      });
    };
    move(rows_);
    move(columns_);
    for_points(columns_.n, [&](int j) { columns_.moved()[j] = fmaxf(columns_.weight()[j], 0.0f); });
    team_.sync();
  }
  DPDIFF_DEVICE bool absorb() {
    settle();
    return build(true);
  }

  DPDIFF_DEVICE bool iterate_logs();
  DPDIFF_DEVICE double carried(const Side& side, int i, double potential) const {
    const float w = side.weight()[i];
    return w > 0 && potential < INFINITY ? potential + task_.eps * log(double(w)) : -INFINITY;
  }

  // --------------------------------------------------------------------------------------- results

  // The plan and what is told of it.
  DPDIFF_DEVICE bool finish() {
    float v[kColumns], sums[kColumns] = {};
    load_columns(columns_.moved(), v);
    const float unit = float(task_.eps) * kLn2;
    float* plan = task_.plan == nullptr ? nullptr : task_.plan + (problem_ * task_.n + first_) * task_.m;
    double results[4] = {};  // error, mass, cost, dual objective
    for_rows([&](int first) {
      float rows[kRows];
      const int i = first + row_;
      const float weight = fmaxf(rows_.weight()[i], 0.0f), u = weight > 0 ? weight * rows_.scaling()[i] : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Pair f = rows_.base(first + r);
        const float of_this = of_row(u, r);
        float total = 0;
        rows[r] = 0;
        for_quads([&](int j, int at) {
          Quad p = *quad(first + r, j);
          const Quad high = four_columns(columns_.high(), j), low = four_columns(columns_.low(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float k = p.x[e];
            const Pair sum = Pair::sum(f.high, high.x[e]);
            const float c = (sum.high - unit * log2f(k)) + (sum.low + (f.low + low.x[e]));
            p.x[e] = of_this * k * v[at + e];
            rows[r] += p.x[e];
            sums[at + e] += p.x[e];
            total += p.x[e] > 0 ? p.x[e] * c : 0.0f;
          }
          store_plan(plan, first + r, j, p);
        });
        results[2] += total;
      }
      const float sum = reduce_row(rows, Sum());
      if (leads_) {
        results[0] += fabsf(sum - rows_.aim(i));
        results[1] += sum;
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

  DPDIFF_DEVICE void store_plan(float* plan, int i, int j, const Quad& p) const {
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
  DPDIFF_DEVICE void dual(const Side& side, const float* given, float* to, double& sum) const {
    for_points(side.n, [&](int i) {
      const double potential = side.potential(i);
      to[i] = float(potential);
      if (given[i] > 0) sum += given[i] * (side.relaxed ? -side.tau * expm1(-potential / side.tau) : potential);
    });
  }

  DPDIFF_DEVICE bool fail() {
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

  const Team team_;
  const SinkhornTask& task_;
  const SinkhornShape& shape_;
  const int64_t problem_;
  const int first_;  // of the block's rows
  const int warp_, lane_;
  const int row_;     // of the thread's kRows, whose sum it gets
  const int column_;  // its first
  const bool leads_;  // among those that get the same row's sum
  Side rows_, columns_;
  float* const kernel_;
  float* const partial_;  // of the columns, from each warp
  float* const scratch_;  // 64 floats for stats, then 64 for reduce_row, which are sum_all's 32 numbers too
  const float* const cost_;
  const float scale_, scale_rest_;  // log2(e) / eps
  State state_;
};

}  // namespace dpdiff

#include "sinkhorn_logs.cuh"
