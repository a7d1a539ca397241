// Solves one problem on a team of blocks. The plan is P_ij = a_i phi_i K_ij psi_j b_j: a kernel K = exp((f0_i + g0_j -
// cost_ij) / eps), and scalings phi and psi of its potentials f0 and g0, which absorb the scalings where these get large
// (Schmitzer, 2019). The first f0 and g0 are zero for small costs, else hard c-transforms, min_j cost_ij and
// min_i (cost_ij - f0_i): K is then at most 1, and 1 somewhere in each row and column, whatever eps is.
//
// K stays where its threads are. An iteration reads it once: the sum of a row gives its phi, and with that its part of the
// column sums. Those of the blocks meet on their boards, and every block updates all columns. Where shared memory is too
// small for a problem, but not by more than registers hold, threads keep the first rows in these while they iterate, and one
// block has all of a multiprocessor. What float32 scalings can't represent is iterated in the log domain
// (sinkhorn_logs.cuh). No atomics: the same input gives the same bits.
#pragma once

#include "../sinkhorn_looks.h"
#include "sinkhorn_block.cuh"
#include "sinkhorn_side.cuh"

namespace dpdiff {

template <class Team, int kLanes, int kQuads, int kHeld>
class Sinkhorn : SinkhornBlock<Team, kLanes, kQuads, kHeld> {
  typedef SinkhornBlock<Team, kLanes, kQuads, kHeld> Block;
  typedef SinkhornSide Side;
  typedef SinkhornExtents Extents;
  typedef SinkhornStats Stats;
  typedef typename Block::Turns Turns;
  using Block::column_, Block::kAcross, Block::kColumns, Block::kGroup, Block::kRows, Block::lane_, Block::leads_;
  using Block::first_row, Block::fold, Block::folded, Block::folded_stats, Block::for_halves, Block::for_points;
  using Block::for_quads, Block::for_rows, Block::inside, Block::kHalf, Block::of_row, Block::reduce_row, Block::row_;
  using Block::shape_, Block::step, Block::sum_all, Block::team_, Block::turns_, Block::warp_, Block::width;

 public:
  DPDIFF_DEVICE Sinkhorn(const Team& team, const SinkhornTask& task, const SinkhornShape& shape, int64_t problem,
                         float* shared, float* room, float* held)
      : Block(team, shape, shared + shape.side_of_columns()),
        task_(task),
        problem_(problem),
        first_(min_of(int64_t(team.rank()) * divide(task.n, shape.size), task.n)),
        // only balanced sides have rows that are held: powers take registers
        rows_(room, min_of(divide(task.n, shape.size), task.n - first_), shape.padded, kHeld == 0 && shape.relaxed_a,
              task.tau_a, task.eps),
        columns_(shared, task.m, width(), kHeld == 0 && shape.relaxed_b, task.tau_b, task.eps),
        kernel_(room + shape.side_of_rows() - shape.of_held()),
        held_(held),
        cost_(task.cost + (problem * task.n + first_) * task.m),
        scale_(float(1.4426950408889634 / task.eps)),
        scale_rest_(float(1.4426950408889634 / task.eps - scale_)) {}

  // Solves the problem that make() is of. Each phase is compiled apart, on an object of its own, so that it has the registers
  // to itself; start and iterate_logs, which need most, on one in memory.
  template <class Make>
  static DPDIFF_DEVICE void solve(const Make& make) {
    Progress progress;
    if (prepare(make, progress)) {
      Outcome outcome;
      do {
        Sinkhorn solver = make();
        solver.enter(progress);
        outcome = solver.iterate();
        solver.leave_iterations(progress);
      } while (outcome == kLarge && run<&Sinkhorn::absorb>(make, progress));
      if (outcome == kBad || !run<&Sinkhorn::zeros_fit>(make, progress)) run<&Sinkhorn::iterate_logs>(make, progress);
      run<&Sinkhorn::finish>(make, progress);
    } else {
      run<&Sinkhorn::fail>(make, progress);
    }
    make().team_.sync_all();  // no block ends while others send to its board or read it
  }

 private:
  // What is known of the problem so far, the same in all threads of all blocks.
  struct State {
    double mass_a = 0, mass_b = 0;
    float least_row_sum = 0;
    float stranded = 0;  // weight of balanced sides that nothing reaches
    bool zero_rows = false, zeros = false;
    int64_t used = 0;
  };

  // What goes from one phase to the next.
  struct Progress {
    State state;
    Turns turns;
    int now = 0;
  };
  DPDIFF_DEVICE void enter(const Progress& progress) {
    state_ = progress.state, turns_ = progress.turns, rows_.now = progress.now;
  }
  DPDIFF_DEVICE void leave(Progress& progress) const {
    progress.state = state_, progress.turns = turns_, progress.now = rows_.now;
  }

  // All that they change: registers are for what threads hold.
  DPDIFF_DEVICE void leave_iterations(Progress& progress) const {
    progress.state.used = state_.used, progress.turns = turns_, progress.now = rows_.now;
  }

  template <bool (Sinkhorn::*kPhase)(), class Make>
  static DPDIFF_APART bool run(const Make& make, Progress& progress) {
    Sinkhorn solver = make();
    solver.enter(progress);
    const bool result = (solver.*kPhase)();
    solver.leave(progress);
    return result;
  }

  DPDIFF_DEVICE bool read_weights();
  DPDIFF_DEVICE bool build_unshifted();
  DPDIFF_APART bool start();
  DPDIFF_DEVICE void lower_zero_rows();
  template <class Make>
  static DPDIFF_DEVICE bool prepare(const Make& make, Progress& progress) {
    if (!run<&Sinkhorn::read_weights>(make, progress)) return false;
    if (!run<&Sinkhorn::build_unshifted>(make, progress)) {
      if (!run<&Sinkhorn::start>(make, progress)) return false;
      run<&Sinkhorn::build_started>(make, progress);
    }
    return run<&Sinkhorn::undo>(make, progress);
  }

  static DPDIFF_DEVICE int min_of(int64_t a, int64_t b) { return int(a < b ? a : b); }
  static DPDIFF_DEVICE int divide(int a, int b) { return (a + b - 1) / b; }

  // --------------------------------------------------------------------------------------- costs and the kernel

  // Row i of the costs, this thread's columns.
  DPDIFF_DEVICE void load_costs(int i, float (&c)[kColumns], float beyond = INFINITY) const {
    const float* row = cost_ + int64_t(i) * task_.m;
    const bool whole = task_.m % 4 == 0;  // then rows begin at multiples of 16 bytes: the launch has seen to the first
    for_quads([&](int j, int at) {
      if (whole) {
        Quad x{beyond, beyond, beyond, beyond};
        if (i < rows_.n && j < task_.m) x = *reinterpret_cast<const Quad*>(row + j);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[at + e] = x.x[e];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[at + e] = i < rows_.n && j + e < task_.m ? row[j + e] : beyond;
      }
    });
  }
  // Whether the kernel has rows from `first` on.
  DPDIFF_DEVICE bool within(int first) const { return kHeld > 0 || first < shape_.rows; }
  // From where the kernel's rows are counted, for those from `first` on: in shared memory, held ones would come before.
  DPDIFF_DEVICE float* place(int first) const { return kHeld > 0 && first < shape_.held ? held_ : kernel_; }
  // Where four numbers of the kernel are, of row `first` + r: what is beyond the edges reads others' and never writes. The
  // thread's first column is added first: its other places then are constants away.
  DPDIFF_DEVICE Quad* quad(float* kernel, int first, int r, int j) const {
    float* const from = kernel + (int64_t(within(first) ? first : 0) * width() + column_) + r * width();
    return reinterpret_cast<Quad*>(from + (inside(j) ? j - column_ : -column_));
  }
  DPDIFF_DEVICE void load_kernel(float* kernel, int first, int r, float (&k)[kColumns]) const {
    for_quads([&](int j, int at) {
      const Quad x = *quad(kernel, first, r, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) k[at + e] = x.x[e];
    });
  }
  DPDIFF_DEVICE void store_kernel(int first, int r, const float (&k)[kColumns]) const {
    for_quads([&](int j, int at) {
      if (within(first) && inside(j)) *quad(place(first), first, r, j) = {k[at], k[at + 1], k[at + 2], k[at + 3]};
    });
  }
  // Of an array with a number for each column; 0 beyond the edge.
  DPDIFF_DEVICE void load_columns(const float* from, float (&x)[kColumns]) const {
    for_quads([&](int j, int at) {
      const Quad four = four_columns(from, j);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[at + e] = inside(j) ? four.x[e] : 0.0f;
    });
  }
  DPDIFF_DEVICE Quad four_columns(const float* from, int j) const {
    return *reinterpret_cast<const Quad*>(from + (inside(j) ? j : 0));
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
    const float p = exp_2(fminf(y, 126.0f));
    return y > -150.0f ? fmaf(p, lost * kLn2, p) : 0.0f;  // else infinite minus infinite
  }
  // exp(x / eps), where that is far from what float32 doesn't hold
  DPDIFF_DEVICE float moderate_power(float x) const {
    const float y = x * scale_, p = exp_2(y);
    return fmaf(p, fmaf(x, scale_rest_, fmaf(x, scale_, -y)) * kLn2, p);
  }

  // The kernel of f0 and g0, from the costs, or from their copies in its place.
  DPDIFF_DEVICE bool build(bool again) {
    const auto set_pulls = [&](const Side& side) {
      if (!side.relaxed) return;
      for_points(side.n, [&](int i) { side.pull()[i] = float(exp(-side.base(i).wide() / (side.tau + task_.eps))); });
    };
    set_pulls(rows_);
    set_pulls(columns_);
    for_halves([&](int first, int from) {
      float c[kHalf][kColumns];
#pragma unroll
      for (int r = 0; r < kHalf; ++r) {
        again ? load_costs(first + from + r, c[r]) : load_kernel(place(first), first, from + r, c[r]);
      }
#pragma unroll
      for (int r = 0; r < kHalf; ++r) {
        const Pair f = rows_.base(first + from + r);
        for_quads([&](int j, int at) {
          const Quad high = four_columns(columns_.high(), j), low = four_columns(columns_.low(), j);
#pragma unroll
          for (int e = 0; e < 4; ++e) c[r][at + e] = kernel_of(f, {high.x[e], low.x[e]}, c[r][at + e]);
        });
        store_kernel(first, from + r, c[r]);
      }
    });
    team_.sync();
    return true;
  }
  DPDIFF_DEVICE bool build_started() { return build(false); }

  // --------------------------------------------------------------------------------------- iterations

  DPDIFF_DEVICE float scaling_of(const Side& side, int i, float sum) const {
    return side.relaxed ? powf(fmaxf(sum, kTiny), -side.damp) * side.pull()[i] : reciprocal(sum);
  }

  typedef float Rows[kRows][kColumns];
  typedef Rows Held[kHeld > 0 ? kHeld : 1][2];
  DPDIFF_DEVICE void load_rows(float* kernel, int first, Rows& k) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) load_kernel(kernel, first, r, k[r]);
  }

  // The rows' next scalings, and the column sums that these give.
  DPDIFF_DEVICE void update_rows(Held& held) {
    // The shared rows need the registers of the last round that is held, which comes back while others are at work.
    if constexpr (kHeld > 0) load_rows(held_, first_row(2 * kHeld - 1), held[kHeld - 1][1]);
    float v[kColumns], sums[kColumns] = {};
    load_columns(columns_.moved(), v);
    Stats stats;
    Extents extents;
    // `k`: of one round, or of two at once, so that fewer lanes have the same row's sum
    const auto update = [&](int first, const auto& k) {
      constexpr int kCount = kRows * int(sizeof k / sizeof k[0]);
      float dot[kCount];
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        dot[r] = 0;
#pragma unroll
        for (int e = 0; e < kColumns; ++e) dot[r] = fmaf(k[r / kRows][r % kRows][e], v[e], dot[r]);
      }
      const int mine = lane_ % kGroup / (kGroup / kCount), i = first + mine / kRows * step() + mine % kRows;
      const float weight = rows_.weight()[i], before = rows_.scaling()[i], aim = rows_.aim(i);
      const float sum = reduce_row(dot, Sum());
      const float next = scaling_of(rows_, i, sum), u = weight > 0 ? weight * next : 0.0f;
      extents.include(weight > 0, sum, next, rows_.relaxed);
      stats.error += weight > 0 ? fabsf(weight * before * sum - aim) : 0.0f;
      stats.moved += u;
      rows_.next_scaling()[i] = next;  // all threads with the sum alike, rather than some, which takes branches
      if (rows_.relaxed) rows_.next_target()[i] = u * sum;
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const float of_this = team_.template of_lane<kGroup>(u, r * (kGroup / kCount));
#pragma unroll
        for (int e = 0; e < kColumns; ++e) sums[e] = fmaf(of_this, k[r / kRows][r % kRows][e], sums[e]);
      }
    };
#pragma unroll
    for (int pair = 0; pair < kHeld; ++pair) update(first_row(2 * pair), held[pair]);
    stats.error *= 2, stats.moved *= 2;  // half as many threads have added the same
    const auto load_and_update = [&](int first) {
      Rows k[1];
      load_rows(kernel_, first, k[0]);
      update(first, k);
    };
    for_rows(load_and_update, 2 * kHeld);
    constexpr float kOnce = float(kRows) / kLanes;  // all threads of a row have added the same
    stats.error *= kOnce, stats.moved *= kOnce;
    extents.finish(rows_.relaxed);
    stats.bad = extents.bad(state_.least_row_sum), stats.large = extents.large();
    fold(sums, Sum(), stats);
  }

  DPDIFF_DEVICE Extents update_columns() {
    Extents extents;
    for_points(columns_.n, [&](int j) {
      const float sum = folded(j, Sum()), weight = columns_.weight()[j];
      const float next = scaling_of(columns_, j, sum);
      extents.include(weight > 0, sum, next, columns_.relaxed);
      columns_.scaling()[j] = next;
      columns_.moved()[j] = weight > 0 ? weight * next : 0.0f;
      if (columns_.relaxed) columns_.target()[j] = columns_.moved()[j] * sum;
    });
    extents.finish(columns_.relaxed);
    return extents;
  }

  // Before the first iteration g = 0: the scalings undo g0, infinite ones too where there is no weight.
  DPDIFF_DEVICE bool undo() {
    for_points(columns_.n, [&](int j) {
      const float weight = columns_.weight()[j];
      columns_.moved()[j] = weight > 0 ? weight * exp2f(-columns_.high()[j] * scale_) : 0.0f;
    });
    team_.sync();
    return true;
  }

  // kBad: a sum or a scaling leaves what float32 can tell; kLarge: scalings have to be absorbed before the next iteration.
  enum Outcome { kDone, kLarge, kBad };

  DPDIFF_DEVICE Outcome iterate() {
    Held held;
#pragma unroll
    for (int round = 0; round < 2 * kHeld - 1; ++round) load_rows(held_, first_row(round), held[round / 2][round % 2]);
    const SinkhornLooks looks(task_.n_iters, 16);
    int64_t look = task_.tol > 0 ? 0 : looks.after(state_.used);  // a tolerance ends the iterations, which the results tell of
    while (state_.used < task_.n_iters) {
      update_rows(held);
      const Stats rows = folded_stats();
      if (task_.tol > 0 && state_.used > 0 && rows.error + state_.stranded < task_.tol) break;
      if (!(rows.bad == 0 && rows.moved < INFINITY)) return kBad;  // extents pass over a NaN
      rows_.now ^= 1;
      const Extents columns = update_columns();
      const bool bad = columns.bad(kLeastColumnSum * rows.moved);
      const bool any = team_.sync_or(bad || rows.large > 0 || columns.large());
      if (any && team_.sync_or(bad)) return kBad;
      ++state_.used;
      if (state_.used == look) {
        look += looks.every();
        if (at_rest(looks)) state_.used = task_.n_iters;
      }
      if (state_.used < task_.n_iters && any) return kLarge;
    }
    return kDone;
  }

  // Whether the iterations left may be spared, by what the columns' scalings have changed since the last look. Each warp looks
  // at all of them, the same numbers in all blocks.
  DPDIFF_DEVICE bool at_rest(const SinkhornLooks& looks) {
    float least[1] = {INFINITY}, greatest[1] = {0.0f};
#pragma unroll 1
    for (int j = lane_; j < columns_.n; j += 32) {
      const float change = columns_.scaling()[j] * reciprocal(columns_.seen()[j]);
      if (!(columns_.weight()[j] > 0)) continue;
      least[0] = fminf(least[0], change), greatest[0] = fmaxf(greatest[0], change);
    }
    this->template reduce_lanes<16, 1>(least, Least());
    this->template reduce_lanes<16, 1>(greatest, Most());
    team_.sync();
    for_points(columns_.n, [&](int j) { columns_.seen()[j] = columns_.scaling()[j]; });
    return looks.at_rest(least[0] - 1.0, greatest[0] - 1.0, rows_.relaxed || columns_.relaxed, state_.used);
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

  // Moves the scalings into f0 and g0, so that the next look has none to compare with. Those that float32 can't hold stay: they
  // are of zero weights.
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
    for_points(columns_.n, [&](int j) {
      columns_.moved()[j] = fmaxf(columns_.weight()[j], 0.0f);
      columns_.seen()[j] = 0.0f;
    });
    team_.sync();
  }
  DPDIFF_DEVICE bool absorb() {
    settle();
    return build(true);
  }

  DPDIFF_APART bool iterate_logs();
  DPDIFF_DEVICE double carried(const Side& side, int i, double potential) const {
    const float w = side.weight()[i];
    return w > 0 && potential < INFINITY ? potential + task_.eps * log(double(w)) : -INFINITY;
  }

  // --------------------------------------------------------------------------------------- results

  DPDIFF_DEVICE bool first_of_row() const { return lane_ % kGroup == 0 && (!kAcross || warp_ == 0); }

  DPDIFF_DEVICE bool finish();
  DPDIFF_DEVICE void store_plan(float* plan, int i, int j, const Quad& p) const;
  DPDIFF_DEVICE void dual(const Side& side, const float* given, float* to, double& sum) const;
  DPDIFF_DEVICE bool fail();

  const SinkhornTask& task_;
  const int64_t problem_;
  const int first_;  // of the block's rows
  Side rows_, columns_;
  float* const kernel_;
  float* const held_;  // in global memory: the rows that threads hold while they iterate, then and otherwise
  const float* const cost_;
  const float scale_, scale_rest_;  // log2(e) / eps
  State state_;
};

}  // namespace dpdiff

#include "sinkhorn_logs.cuh"
#include "sinkhorn_results.cuh"
#include "sinkhorn_start.cuh"
