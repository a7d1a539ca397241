// Solves small problems as many at a time as a vector has lanes, one in each: no sum crosses lanes, and while one row waits
// for its scaling others are under way. The iterations are those of Sinkhorn (sinkhorn_forward.h) on the kernel of zero
// potentials; a problem that needs more than that, for its costs, weights or scalings, is left to Sinkhorn.

constexpr int64_t kFirstCache = 40 * 1024;  // bytes of kernels, beside which there is room for vectors
constexpr int kLaneRows = kWidth / 2;        // rows at a time, of which two sets and more fit in registers

class LaneSinkhorn {
 public:
  static bool suits(int64_t n, int64_t m) { return round_up(n, kLaneRows) * m * kWidth * int64_t(sizeof(float)) <= kFirstCache; }

  // Of problems of one shape, at most kWidth.
  LaneSinkhorn(const float* cost, const SinkhornOptions& options, const SinkhornProblem* problems, int count, Arena& arena)
      : cost_(cost),
        options_(options),
        problems_(problems),
        count_(count),
        n_(problems->n),
        m_(problems->m),
        padded_(round_up(n_, kLaneRows)),
        rows_(padded_, arena),
        columns_(m_, arena) {
    kernel_ = arena.take<float>(padded_ * m_ * kWidth);
    staged_ = arena.take<float>(std::max(n_, m_) * kWidth);
    moved_ = arena.take<float>(m_ * kWidth);
    seen_ = arena.take<float>(m_ * kWidth);
    std::fill_n(seen_, m_ * kWidth, 1.0f);
    sums_ = arena.take<float>(m_ * kWidth);
  }

  // Returns the lanes whose problems are solved.
  vint solve() {
    vint good = build();
    good &= weigh(rows_, n_, &SinkhornProblem::a) & weigh(columns_, m_, &SinkhornProblem::b);
    good &= iterate();
    if (any(good)) finish(good);
    return good;
  }

 private:
  // [row or column][lane]
  struct Side {
    float *weight, *scaling, *kept;  // kept: the scalings that lanes ended with
    LaneSums mass;

    Side(int64_t count, Arena& arena) {
      for (float** part : {&weight, &scaling, &kept}) {
        *part = arena.take<float>(count * kWidth);
        std::fill_n(*part, count * kWidth, 0.0f);
      }
    }
  };

  // Lanes beyond the last problem repeat it.
  int problem(int lane) const { return std::min(lane, count_ - 1); }

  // The arrays from(problem) of `count` numbers, as [number][lane].
  template <class From>
  void to_lanes(const From& from, int64_t count, float* to) const {
    for (int64_t j = 0; j < count; j += kWidth) {
      vfloat square[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) square[lane] = load_first(from(problem(lane)) + j, count - j, 0.0f);
      transpose(square);
      for (int64_t k = 0; k < kWidth && j + k < count; ++k) store(to + (j + k) * kWidth, square[k]);
    }
  }

  // Returns the lanes whose weights on this side plain scalings suit.
  vint weigh(Side& side, int64_t count, const float* SinkhornProblem::*weights) const {
    to_lanes([&](int lane) { return problems_[lane].*weights; }, count, side.weight);
    vint good = ~vint{};
    vfloat mass{};
    for (int64_t i = 0; i < count; ++i) {
      const vfloat weight = load(side.weight + i * kWidth);
      good &= weight >= vfloat{};
      mass += weight;
      side.mass.add(weight);
    }
    return good & (mass > vfloat{}) & (mass <= broadcast(kMostMass));
  }

  // Groups of kLaneRows rows, in each [column][row][lane].
  static constexpr int64_t kStep = kLaneRows * kWidth;  // from one column to the next
  float* entry(int64_t i) const { return kernel_ + (i / kLaneRows * m_ * kLaneRows + i % kLaneRows) * kWidth; }

  // Returns the lanes whose kernel float32 holds.
  vint build() {
    const Unshifted unshifted(options_.eps);
    vint worst{};
    for (int64_t i = 0; i < n_; ++i) {
      to_lanes([&](int lane) { return cost_ + (lane * n_ + i) * m_; }, m_, staged_);
      float* row = entry(i);
      for (int64_t j = 0; j < m_; ++j) store(row + j * kStep, unshifted(load(staged_ + j * kWidth), worst));
    }
    for (int64_t i = n_; i < padded_; ++i) {  // repeats of the last row, of zero weight
      for (int64_t j = 0; j < m_; ++j) store(entry(i) + j * kStep, load(entry(n_ - 1) + j * kStep));
    }
    return ~(worst > unshifted.limit);
  }

  // The sums of a group of rows, and the part of the group before it, whose scaled weights `rows` holds until then, in the
  // column sums. Together, so that neither waits for the other's sums and divisions.
  template <bool kRows, bool kColumns>
  DPDIFF_INLINE void sweep(const float* ahead, const float* behind, vfloat (&rows)[kLaneRows]) {
    const float* moved = moved_;  // these three: what the stores below can't change
    float* column_sums = sums_;
    const int64_t end = m_ * kWidth;
    vfloat sums[kLaneRows] = {};
    for (int64_t j = 0; j < end; j += kWidth) {
      if constexpr (kRows) {
        const vfloat v = load(moved + j);
#pragma GCC unroll 8
        for (int r = 0; r < kLaneRows; ++r) sums[r] += load(ahead + j * kLaneRows + r * kWidth) * v;
      }
      if constexpr (kColumns) {
        vfloat even = load(column_sums + j), odd{};
#pragma GCC unroll 8
        for (int r = 0; r < kLaneRows; r += 2) {
          even += load(behind + j * kLaneRows + r * kWidth) * rows[r];
          odd += load(behind + j * kLaneRows + (r + 1) * kWidth) * rows[r + 1];
        }
        store(column_sums + j, even + odd);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; kRows && r < kLaneRows; ++r) rows[r] = sums[r];
  }

  // The lanes of which the iterations left may be spared, by what the columns' scalings have changed since the last look.
  vint at_rest(const SinkhornLooks& looks, int64_t used) const {
    vfloat least = broadcast(INFINITY), greatest{};
    for (int64_t j = 0; j < m_ * kWidth; j += kWidth) {
      const vfloat scaling = load(columns_.scaling + j), change = scaling / load(seen_ + j);
      least = minimum(least, change);
      greatest = maximum(greatest, change);
      store(seen_ + j, scaling);
    }
    vint lanes{};
    for (int i = 0; i < kWidth; ++i) lanes[i] = looks.at_rest(least[i] - 1.0, greatest[i] - 1.0, false, used) ? -1 : 0;
    return lanes;
  }

  // Some lanes' scalings, as they are now.
  void keep(const Side& side, int64_t count, vint lanes) const {
    for (int64_t i = 0; i < count * kWidth; i += kWidth) {
      store(side.kept + i, select(lanes, load(side.scaling + i), load(side.kept + i)));
    }
  }

  // Returns the lanes whose scalings, of zero weights too, stay calm.
  vint iterate() {
    vfloat least = broadcast(INFINITY), greatest{};
    const auto scale = [&](const Side& side, int64_t i, vfloat sum) __attribute__((always_inline)) {
      const vfloat scaling = 1.0f / sum, moved = load(side.weight + i * kWidth) * scaling;
      least = minimum(least, scaling);
      greatest = maximum(greatest, scaling);
      store(side.scaling + i * kWidth, scaling);
      return moved;
    };
    std::copy_n(columns_.weight, m_ * kWidth, moved_);
    const SinkhornLooks looks(options_.n_iters, 8);
    int64_t look = looks.every();
    vint left = ~vint{};  // the lanes that still count; others stay as they were, whatever their neighbours are
    for (int64_t k = 0; k < options_.n_iters && any(left); ++k) {
      std::fill_n(sums_, m_ * kWidth, 0.0f);
      // to and fro: what was read last is nearest
      const int64_t first = k % 2 == 0 ? 0 : padded_ - kLaneRows, step = k % 2 == 0 ? kLaneRows : -kLaneRows;
      vfloat rows[kLaneRows];
      sweep<true, false>(entry(first), nullptr, rows);
      for (int64_t i = first;; i += step) {
#pragma GCC unroll 8
        for (int r = 0; r < kLaneRows; ++r) rows[r] = scale(rows_, i + r, rows[r]);
        const int64_t next = i + step;
        if (next < 0 || next >= padded_) {
          sweep<false, true>(nullptr, entry(i), rows);
          break;
        }
        sweep<true, true>(entry(next), entry(i), rows);
      }
      for (int64_t j = 0; j < m_; ++j) store(moved_ + j * kWidth, scale(columns_, j, load(sums_ + j * kWidth)));
      const bool last = k + 1 == options_.n_iters;
      if (!last && k + 1 != look) continue;
      look += looks.every();
      const vint ends = last ? left : left & at_rest(looks, k + 1);
      keep(rows_, n_, ends);
      keep(columns_, m_, ends);
      left &= ~ends;
    }
    std::swap(rows_.scaling, rows_.kept);
    std::swap(columns_.scaling, columns_.kept);
    for (int64_t j = 0; j < m_ * kWidth; j += kWidth) store(moved_ + j, load(columns_.weight + j) * load(columns_.scaling + j));
    return (least >= broadcast(kTimid)) & (greatest <= broadcast(kBold));
  }

  // The plan of row i, scaled by u, and of `count` columns from j on; adds it to the sums.
  DPDIFF_INLINE void scale_columns(int64_t i, int64_t j, int64_t count, vfloat u, vfloat (&square)[kWidth], vfloat (&sums)[2]) {
    const float *row = entry(i) + j * kStep, *moved = moved_ + j * kWidth;
    float* column_sums = sums_ + j * kWidth;
#pragma GCC unroll 16
    for (int k = 0; k < kWidth; ++k) {
      square[k] = vfloat{};
      if (k >= count) continue;
      square[k] = u * load(row + k * kStep) * load(moved + k * kWidth);
      sums[k % 2] += square[k];
      store(column_sums + k * kWidth, load(column_sums + k * kWidth) + square[k]);
    }
  }

  // Results of the lanes that are good.
  void finish(vint good) {
    LaneSums mass, cost, error;
    const float* first = problems_->plan;
    const bool streamed = first != nullptr && problems_->streams && m_ % kWidth == 0 && uintptr_t(first) % sizeof(vfloat) == 0;
    const float* costs[kWidth];
    float* plans[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      costs[lane] = cost_ + problem(lane) * n_ * m_;
      float* plan = lane < count_ && good[lane] ? problems_[lane].plan : nullptr;
      plans[lane] = plan == nullptr ? staged_ : plan;
    }
    std::fill_n(sums_, m_ * kWidth, 0.0f);
    vfloat costs_of_rows[kWidth] = {};
    for (int64_t i = 0; i < n_; ++i) {
      const vfloat weight = load(rows_.weight + i * kWidth), u = weight * load(rows_.scaling + i * kWidth);
      vfloat sums[2] = {};
      for (int64_t j = 0; j < m_; j += kWidth) {
        vfloat square[kWidth];
        if (m_ - j >= kWidth) {
          scale_columns(i, j, kWidth, u, square, sums);
        } else {
          scale_columns(i, j, m_ - j, u, square, sums);
        }
        transpose(square);
#pragma GCC unroll 16
        for (int lane = 0; lane < kWidth; ++lane) {
          costs_of_rows[lane] += square[lane] * load_first(costs[lane] + j, m_ - j, 0.0f);
          if (streamed) {
            stream(plans[lane] + j, square[lane]);
          } else {
            store_first(plans[lane] + j, square[lane], m_ - j);
          }
        }
      }
      mass.add(sums[0] + sums[1]);
      error.add(absolute(sums[0] + sums[1] - weight));
      if (i % kLaneRows == kLaneRows - 1 || i == n_ - 1) {
        transpose(costs_of_rows);
        for (vfloat& part : costs_of_rows) cost.add(part), part = vfloat{};
      }
      for (int lane = 0; lane < kWidth; ++lane) {
        costs[lane] += m_;
        plans[lane] += plans[lane] == staged_ ? 0 : m_;
      }
    }
    for (int64_t j = 0; j < m_; ++j) error.add(absolute(load(sums_ + j * kWidth) - load(columns_.weight + j * kWidth)));
    const LaneSums of_rows = dual(rows_, n_, good, &SinkhornProblem::f), of_columns = dual(columns_, m_, good, &SinkhornProblem::g);
    for (int lane = 0; lane < count_; ++lane) {
      if (!good[lane]) continue;
      const SinkhornProblem& p = problems_[lane];
      const double spare = mass[lane] - rows_.mass[lane] * columns_.mass[lane];
      *p.cost = float(cost[lane]);
      *p.value = float(of_rows[lane] + of_columns[lane] - options_.eps * spare);
      *p.error = float(error[lane]);
      *p.n_iters = options_.n_iters;
    }
    stream_end();
  }

  // Writes a side's potentials and returns their part of the dual objectives.
  LaneSums dual(const Side& side, int64_t count, vint good, float* SinkhornProblem::*to) const {
    const double unit = kLn2 * options_.eps;
    LaneSums sums;
    for (int64_t i = 0; i < count; ++i) {
      const Potentials potentials(load(side.scaling + i * kWidth), unit);
      const vfloat weight = load(side.weight + i * kWidth);
      sums.low += widen_low(weight) * potentials.low;
      sums.high += widen_high(weight) * potentials.high;
      store(staged_ + i * kWidth, narrow(potentials.low, potentials.high));
    }
    for (int64_t i = 0; i < count; i += kWidth) {
      vfloat square[kWidth] = {};
      for (int64_t k = 0; k < kWidth && i + k < count; ++k) square[k] = load(staged_ + (i + k) * kWidth);
      transpose(square);
      for (int lane = 0; lane < count_; ++lane) {
        if (good[lane]) store_first(problems_[lane].*to + i, square[lane], count - i);
      }
    }
    return sums;
  }

  const float* cost_;
  const SinkhornOptions& options_;
  const SinkhornProblem* problems_;
  const int count_;
  const int64_t n_, m_, padded_;  // padded_: to whole groups of rows
  Side rows_, columns_;
  float *kernel_, *staged_;
  float* seen_;  // the columns' scalings at the last look
  float *moved_, *sums_;  // of columns: weight * scaling, and the sums of the kernel and the rows' scaled weights
};
