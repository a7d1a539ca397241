// Solves small problems whose kernel and its transpose both stay in the first cache. A half-step is then the product of one
// of the two and the other side's scaled weights, without sums across lanes. A few problems are under way at a time: while
// one's sums wait for each other and for their scalings, another's don't. The iterations are those of LaneSinkhorn
// (sinkhorn_lanes.h), and what it leaves to Sinkhorn this does too.

class TransposedSinkhorn {
 public:
  // How many problems the first cache holds.
  static int64_t together(int64_t n, int64_t m) {
    return std::min(kFirstCache / (Matrix::size(n, m) + Matrix::size(m, n)), kMostTogether);
  }

  // Of problems of one shape, at most together(n, m).
  TransposedSinkhorn(const float* cost, const SinkhornOptions& options, const SinkhornProblem* problems, int count, Arena& arena)
      : cost_(cost), options_(options), problems_(problems), count_(count), arena_(arena) {}

  // Returns the lanes whose numbers are those of solved problems.
  vint solve() {
    Work works[kMostTogether];  // here: what stores of numbers can't change
    const SinkhornLooks looks(options_.n_iters, 24);
    vint good{};
    int left = 0;
    for (int p = 0; p < count_; ++p) {
      if (start(p, works[left])) ++left;
    }
    int64_t look = looks.every();
    for (int64_t k = 1; left > 0; ++k) {
      for (int i = 0; i < left; ++i) update(works[i], works[i].transposed, works[i].columns, works[i].rows);
      for (int i = 0; i < left;) {
        Work& work = works[i];
        update(work, work.kernel, work.rows, work.columns);
        if (k < options_.n_iters && !(k == look && at_rest(work, looks, k))) {
          ++i;
          continue;
        }
        if (calm(work)) {
          finish(work);
          good[work.problem] = -1;
        }
        std::swap(work, works[--left]);
      }
      if (k == look) look += looks.every();
    }
    return good;
  }

 private:
  static constexpr int64_t kMostTogether = std::min(kWidth, 4);
  static constexpr int kChains = 4;  // of dependent sums, for each vector of them

  // A number for each of `rows` and `columns`, these in pairs of vectors (and the one left over), in each [row][vector]. To a
  // multiple of four rows.
  struct Matrix {
    int64_t depth, tiles;
    float* data;

    static int64_t size(int64_t rows, int64_t columns) {
      return round_up(rows, kGroup) * round_up(columns, kWidth) * int64_t(sizeof(float));
    }
    void take(int64_t rows, int64_t columns, Arena& arena) {
      depth = round_up(rows, kGroup), tiles = tiles_of(columns);
      data = arena.take<float>(depth * tiles * kWidth);
    }
    // Of the first row; the next one's is a step further.
    float* tile(int64_t t) const { return data + (t % 2 == 0 ? t * depth : (t - 1) * depth + 1) * kWidth; }
    int64_t step(int64_t t) const { return t % 2 == 0 && t + 1 == tiles ? kWidth : 2 * kWidth; }
  };

  struct Side {
    int64_t n, padded;
    float *weight, *scaling, *moved;  // moved: weight * scaling; beyond n, all of no weight
    double mass;

    void take(int64_t count, Arena& arena) {
      n = count, padded = round_up(count, kWidth);
      for (float** part : {&weight, &scaling, &moved}) *part = arena.take<float>(padded);
    }

    // Whether plain scalings suit these weights.
    bool weigh(const float* weights) {
      LaneSums sums;
      vint good = ~vint{};
      for (int64_t i = 0; i < padded; i += kWidth) {
        const vfloat some = load_first(weights + i, n - i, 0.0f);
        good &= some >= vfloat{};
        sums.add(some);
        store(weight + i, some);
        store(moved + i, some);
      }
      mass = sums.total();
      return !any(~good) && mass > 0 && mass <= kMostMass;
    }

    // Writes the potentials and returns their part of the dual objective.
    double dual(double eps, float* potentials) const {
      LaneSums sums;
      for (int64_t i = 0; i < padded; i += kWidth) {
        const Potentials of(load(scaling + i), kLn2 * eps);
        const vfloat some = load(weight + i);
        sums.low += widen_low(some) * of.low;
        sums.high += widen_high(some) * of.high;
        store_first(potentials + i, narrow(of.low, of.high), n - i);
      }
      return sums.total();
    }
  };

  struct Work {
    Matrix kernel, transposed;
    Side rows, columns;
    int problem;
    float* seen;              // the columns' scalings at the last look
    bool tame;                // its scalings needn't be watched
    vfloat least, greatest;  // else, of its scalings

    void take(int64_t n, int64_t m, Arena& arena) {
      kernel.take(n, m, arena);
      transposed.take(m, n, arena);
      rows.take(n, arena);
      columns.take(m, arena);
      seen = arena.take<float>(columns.padded);
      std::fill_n(seen, columns.padded, 1.0f);
    }
  };

  // Prepares a problem; false where plain scalings don't suit it.
  bool start(int p, Work& work) {
    const SinkhornProblem& problem = problems_[p];
    work.take(problem.n, problem.m, arena_);
    work.problem = p;
    work.least = broadcast(INFINITY), work.greatest = vfloat{};
    const bool good = build(work) & work.rows.weigh(problem.a) & work.columns.weigh(problem.b);
    work.tame &= work.columns.mass >= 1 / kMostMass;
    return good;
  }

  // Whether float32 holds the kernel. Sets `tame`, to whether no cost is negative.
  //
  // Costs from 0 to R times eps are tame: no scaling overflows on the way. An iteration takes g, as a vector, no farther
  // from where it ends (Franklin and Lorenz, 1989), which is at numbers that differ by R eps at most, and so may be chosen
  // within R / 2 eps of zero, where g begins. Then |g| <= R eps always, and f is from -R to 2 R eps, less eps log(sum of b).
  bool build(Work& work) {
    const Matrix kernel = work.kernel, transposed = work.transposed;
    const int64_t n = problems_->n, m = problems_->m;
    const float* costs = cost_ + work.problem * n * m;
    const Unshifted unshifted(options_.eps);
    vint worst{}, signs{};
    // Beyond the edges the last row and column again: no sum is then zero, whose scaling would be infinite.
    for (int64_t t = 0; t < kernel.tiles; ++t) {
      float* to = kernel.tile(t);
      for (int64_t i = 0; i < kernel.depth; ++i, to += kernel.step(t)) {
        const float* row = costs + std::min(i, n - 1) * m;
        const vfloat some = load_first(row + t * kWidth, m - t * kWidth, row[m - 1]);
        signs |= (vint)some;
        store(to, unshifted(some, worst));
      }
    }
    for (int64_t t = 0; t < transposed.tiles; ++t) {
      for (int64_t s = 0; s < kernel.tiles; ++s) {
        const float* from = kernel.tile(s);
        vfloat square[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) square[r] = load(from + std::min(t * kWidth + r, n - 1) * kernel.step(s));
        transpose(square);
        float* to = transposed.tile(t) + s * kWidth * transposed.step(t);
        for (int64_t k = 0; k < kWidth && s * kWidth + k < transposed.depth; ++k) store(to + k * transposed.step(t), square[k]);
      }
    }
    work.tame = !any(signs < 0);
    return !any(worst > unshifted.limit);
  }

  // kTiles vectors of sums, of a matrix's rows times `factors`.
  template <int kTiles>
  static DPDIFF_INLINE void sum(const float* row, const float* factors, int64_t depth, vfloat (&sums)[kTiles]) {
    vfloat chains[kTiles][kChains] = {};
    for (int64_t k = 0; k < depth; k += kGroup, row += kGroup * kTiles * kWidth) {
      vfloat factor[kGroup];
      spread(load_quad(factors + k), factor);
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) chains[t][r % kChains] += load(row + (r * kTiles + t) * kWidth) * factor[r];
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) sums[t] = (chains[t][0] + chains[t][1]) + (chains[t][2] + chains[t][3]);
  }

  // Calls work(i, sums) for the vectors of sums of a matrix's rows times `factors`, from column i on.
  template <class Each>
  static DPDIFF_INLINE void for_sums(const Matrix& matrix, const float* factors, const Each& each) {
    int64_t t = 0;
    for (; t + 2 <= matrix.tiles; t += 2) {
      vfloat sums[2];
      sum<2>(matrix.tile(t), factors, matrix.depth, sums);
      each(t * kWidth, sums[0]);
      each((t + 1) * kWidth, sums[1]);
    }
    if (t < matrix.tiles) {
      vfloat sums[1];
      sum<1>(matrix.tile(t), factors, matrix.depth, sums);
      each(t * kWidth, sums[0]);
    }
  }

  // A half-step: scalings `to` one side.
  static DPDIFF_INLINE void update(Work& work, const Matrix matrix, const Side from, const Side to) {
    const bool watched = !work.tame;
    vfloat least = work.least, greatest = work.greatest;
    for_sums(matrix, from.moved, [&](int64_t i, vfloat sums) __attribute__((always_inline)) {
      const vfloat scaling = 1.0f / sums;
      if (watched) {
        least = minimum(least, scaling);
        greatest = maximum(greatest, scaling);
      }
      store(to.scaling + i, scaling);
      store(to.moved + i, load(to.weight + i) * scaling);
    });
    if (watched) work.least = least, work.greatest = greatest;
  }

  // Whether the iterations left may be spared, by what the columns' scalings have changed since the last look.
  static bool at_rest(const Work& work, const SinkhornLooks& looks, int64_t used) {
    Extent change;
    for (int64_t i = 0; i < work.columns.padded; i += kWidth) {
      const vfloat scaling = load(work.columns.scaling + i);
      change.include(scaling / load(work.seen + i), ~vint{});
      store(work.seen + i, scaling);
    }
    return looks.at_rest(change.least() - 1.0, change.greatest() - 1.0, false, used);
  }

  // Whether the scalings, of zero weights too, end calm and, unless the problem is tame, were so all the time.
  static bool calm(const Work& work) {
    vint all = ~vint{};
    if (!work.tame) all = (work.least >= broadcast(kTimid)) & (work.greatest <= broadcast(kBold));
    for (const Side& side : {work.rows, work.columns}) {
      for (int64_t i = 0; i < side.padded; i += kWidth) {
        const vfloat scaling = load(side.scaling + i);
        all &= (scaling >= broadcast(kTimid)) & (scaling <= broadcast(kBold));
      }
    }
    return !any(~all);
  }

  void finish(const Work& work) {
    const SinkhornProblem& problem = problems_[work.problem];
    const int64_t n = problem.n, m = problem.m;
    LaneSums mass, cost, error;
    for_sums(work.transposed, work.columns.moved, [&](int64_t i, vfloat sums) __attribute__((always_inline)) {
      const vfloat marginal = load(work.rows.moved + i) * sums;
      mass.add(marginal);
      error.add(absolute(marginal - load(work.rows.weight + i)));
    });
    const bool streamed = problem.streams && m % kWidth == 0 && uintptr_t(problem.plan) % sizeof(vfloat) == 0;
    for (int64_t t = 0; t < work.kernel.tiles; ++t) {
      const int64_t j = t * kWidth;
      const float *kernel = work.kernel.tile(t), *costs = cost_ + work.problem * n * m + j;
      float* plan = problem.plan == nullptr ? nullptr : problem.plan + j;
      const vfloat v = load(work.columns.moved + j);
      vfloat marginal{}, of_costs{};
      for (int64_t i = 0; i < n; ++i, kernel += work.kernel.step(t), costs += m) {
        const vfloat part = work.rows.moved[i] * load(kernel) * v;
        marginal += part;
        of_costs += part * load_first(costs, m - j, 0.0f);
        if (plan == nullptr) continue;
        if (streamed) {
          stream(plan, part);
        } else {
          store_first(plan, part, m - j);
        }
        plan += m;
      }
      cost.add(of_costs);
      error.add(absolute(marginal - load(work.columns.weight + j)));
    }
    if (streamed) stream_end();
    const double spare = mass.total() - work.rows.mass * work.columns.mass, eps = options_.eps;
    *problem.cost = float(cost.total());
    *problem.value = float(work.rows.dual(eps, problem.f) + work.columns.dual(eps, problem.g) - eps * spare);
    *problem.error = float(error.total());
    *problem.n_iters = options_.n_iters;
  }

  const float* cost_;
  const SinkhornOptions& options_;
  const SinkhornProblem* problems_;
  const int count_;
  Arena& arena_;
};
