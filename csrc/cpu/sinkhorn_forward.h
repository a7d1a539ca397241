// Solves one problem. The plan is P_ij = a_i phi_i K_ij psi_j b_j: a kernel K = exp((f0_i + g0_j - cost_ij) / eps), and
// scalings phi and psi of its potentials f0 and g0, which absorb the scalings where these get large (Schmitzer, 2019). The
// first f0 and g0 are hard c-transforms, min_j cost_ij and min_i (cost_ij - f0_i): K is then at most 1, and 1 somewhere in
// each row and column, whatever eps is. An iteration reads K once: the row sums of a block give its phi, and with that its
// part of the column sums. What float32 scalings can't represent is iterated in the log domain (sinkhorn_logs.h).

// K is without what is below 2^-126: with phi psi <= 2^80 that is an error of 2^-46 relative to the sums.
constexpr float kMostProduct = 0x1p80f, kMostScaling = 0x1p60f, kLeastScaling = 0x1p-60f;
constexpr double kMostExponent = 30;  // of the kernel of zero potentials
constexpr float kLeastSum = 0x1p-96f;  // relative to the sum of the other side's scaled weights
// The rows are taken in up to this many chunks, each with column sums of its own, whether or not they run in parallel: the
// result doesn't depend on the number of threads.
constexpr int64_t kMostChunks = 32;

inline int64_t chunks_of(int64_t n, int64_t m) {
  return std::max<int64_t>(std::min({n * m >> 16, kMostChunks, tiles_of(n)}), 1);
}

// The least and the greatest of positive numbers.
struct Extent {
  vfloat low, high;

  Extent() : low(broadcast(INFINITY)), high{} {}  // spelled out: GCC compiles implicit ones for the wrong target
  DPDIFF_INLINE void include(vfloat x, vint where) {
    low = minimum(low, select(where, x, broadcast(INFINITY)));
    high = maximum(high, select(where, x, vfloat{}));
  }
  void include(const Extent& other) {
    low = minimum(low, other.low);
    high = maximum(high, other.high);
  }
  float least() const { return -reduce_max(-low); }
  float greatest() const { return reduce_max(high); }
};

// What a pass over rows or columns finds out. Of what carries weight only.
struct Totals {
  vfloat error;  // |marginal - target|, before the update
  vfloat moved;  // weight * scaling
  Extent sums, scalings;

  Totals() : error{}, moved{} {}
  void include(const Totals& other) {
    error += other.error;
    moved += other.moved;
    sums.include(other.sums);
    scalings.include(other.scalings);
  }
  // Whether the sums of `total` are right to float32.
  bool trusted(float total) const {
    const float low = sums.least();
    return low == INFINITY || (low >= kLeastSum * total && low >= kTiny && sums.greatest() < 0x1p120f &&
                               scalings.least() >= 0x1p-100f && scalings.greatest() < 0x1p100f);
  }
};

// The rows or the columns, padded to whole tiles with weights of zero.
struct Side {
  int64_t n, padded;
  double tau, damp;
  const float* given;   // weights
  float* weight;        // the same, but zero where nothing reaches
  uint8_t* unreached;
  double* base;         // f0, g0
  float* pull;          // relaxed: exp(-base / (tau + eps))
  float* scaling;       // phi, psi
  float* moved;         // weight * scaling
  float* target;        // of the marginal: the weight, or weight exp(-potential / tau)
  double mass = 0;      // sum of the given weights
  double stranded = 0;  // what of it nothing reaches; a relaxed marginal just leaves that
  bool has_zeros = false;

  Side(int64_t n, const float* weights, double tau, double eps, Arena& arena)
      : n(n), padded(tiles_of(n) * kWidth), tau(tau), damp(relaxed() ? tau / (tau + eps) : 1.0), given(weights) {
    weight = floats(arena);
    unreached = arena.take<uint8_t>(padded);
    base = arena.take<double>(padded);
    pull = floats(arena);
    scaling = floats(arena);
    moved = floats(arena);
    target = floats(arena);
    std::fill_n(unreached, padded, 0);
    std::fill_n(base, padded, 0.0);
    std::copy_n(weights, n, weight);
    std::copy_n(weights, n, target);
  }

  bool relaxed() const { return tau < INFINITY; }

  // False where a weight has no meaning.
  bool check() {
    for (int64_t i = 0; i < n; ++i) {
      if (!(given[i] >= 0 && given[i] < INFINITY)) return false;
      mass += given[i];
      has_zeros |= given[i] == 0;
    }
    return true;
  }

  void leave_out(int64_t i) {
    base[i] = 0;
    unreached[i] = 1;
    if (!relaxed()) stranded += weight[i];
    weight[i] = target[i] = 0;
  }

  // The scalings of kWidth points from their sums; returns weight * scaling.
  DPDIFF_INLINE vfloat scale(int64_t i, vfloat sums, float* scaling, Totals& totals) const {
    const vfloat w = load(weight + i);
    const vint present = w > vfloat{};
    const vfloat s = relaxed() ? inverse_power(maximum(sums, broadcast(kTiny)), float(damp)) * load(pull + i) : 1.0f / sums;
    const vfloat scaled = select(present, w * s, vfloat{});
    store(scaling + i, s);
    totals.sums.include(sums, present);
    totals.scalings.include(s, present);
    totals.moved += scaled;
    return scaled;
  }

  // base + eps log(scaling), +inf where nothing reaches
  void potentials(double eps, double* to) const {
    const double unit = kLn2 * eps;
    for (int64_t i = 0; i < padded; i += kWidth) {
      vfloat whole, part;
      split_log2(load(scaling + i), whole, part);
      store(to + i, load(base + i) + (widen_low(whole) + widen_low(part)) * unit);
      store(to + i + kWidth / 2, load(base + i + kWidth / 2) + (widen_high(whole) + widen_high(part)) * unit);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (unreached[i]) to[i] = INFINITY;
    }
  }

  // Moves the scalings into base. Those that float32 can't hold stay: they are of zero weights.
  void absorb(double eps) {
    const double unit = kLn2 * eps;
    for (int64_t i = 0; i < padded; i += kWidth) {
      const vfloat s = load(scaling + i);
      const vint fit = (s >= broadcast(kTiny)) & (s < broadcast(INFINITY));
      vfloat whole, part;
      split_log2(select(fit, s, broadcast(1.0f)), whole, part);
      double *low = base + i, *high = base + i + kWidth / 2;
      store(low, load(low) + (widen_low(whole) + widen_low(part)) * unit);
      store(high, load(high) + (widen_high(whole) + widen_high(part)) * unit);
      store(scaling + i, select(fit, broadcast(1.0f), s));
      store(moved + i, load(weight + i));
    }
  }

  // Whether zero weights have scalings from which a potential can be told.
  bool zeros_fit() const {
    for (int64_t i = 0; has_zeros && i < n; ++i) {
      if (given[i] == 0 && !unreached[i] && !(scaling[i] > kLeastScaling && scaling[i] < kMostScaling)) return false;
    }
    return true;
  }

  float* floats(Arena& arena) const {
    float* array = arena.take<float>(padded);
    std::fill_n(array, padded, 0.0f);
    return array;
  }
};

template <class Source>
class Sinkhorn {
 public:
  Sinkhorn(const Source& source, const SinkhornOptions& options, const SinkhornProblem& problem, Arena& arena, bool parallel)
      : source_(source),
        options_(options),
        problem_(problem),
        parallel_(parallel),
        scale_(kLog2e / options.eps),
        rows_(problem.n, problem.a, options.tau_a, options.eps, arena),
        columns_(problem.m, problem.b, options.tau_b, options.eps, arena),
        blocks_(rows_.padded / kWidth),
        width_(columns_.padded),
        chunks_(chunks_of(problem.n, problem.m)) {
    next_scaling_ = rows_.floats(arena);
    next_moved_ = rows_.floats(arena);
    next_target_ = rows_.floats(arena);
    std::copy_n(rows_.target, rows_.padded, next_target_);
    partial_ = arena.take<float>(chunks_ * width_);
    scratch_ = arena.take<float>(parallel ? 0 : width_ * kWidth);
    kernel_ = Source::kStored ? arena.take<float>(blocks_ * width_ * kWidth) : nullptr;
  }

  void solve() {
    if (!(rows_.check() & columns_.check())) return fail();
    bool built = false;
    if constexpr (Source::kStored) built = build_unshifted();
    if (!built) {
      if (!start()) return fail();
      build();
    }
    const bool scaled = iterate_scaled();
    if (!scaled) iterate_logs();
    finish(scaled);
  }

 private:

  // Calls work(chunk, first block, last block, scratch) for each chunk.
  template <class Work>
  void for_chunks(const Work& work) const {
    for_ranges(parallel_, chunks_, [&](int64_t first, int64_t last) {
      Arena local;
      float* scratch = parallel_ ? local.take<float>(width_ * kWidth) : scratch_;
      for (; first < last; ++first) work(first, first * blocks_ / chunks_, (first + 1) * blocks_ / chunks_, scratch);
    });
  }
  float* partial(int64_t chunk) const { return partial_ + chunk * width_; }
  typename Source::Block open(int64_t block) const { return source_.block(block * kWidth); }

  // The kernel of zero potentials, in one pass, where float32 holds it: small finite costs. Otherwise false.
  bool build_unshifted() {
    if (rows_.mass == 0 || columns_.mass == 0) return false;
    const vint limit = (vint)broadcast(float(std::min(kMostExponent / scale_, 1e38)));
    std::atomic<bool> good{true};
    for_chunks([&](int64_t, int64_t first, int64_t last, float*) {
      const float scale = float(scale_), rest = float(scale_ - scale);
      for (; first < last && good.load(std::memory_order_relaxed); ++first) {
        const auto costs = open(first);
        float* block = kernel_ + first * width_ * kWidth;
        vint worst{};
        for (int64_t j = 0; j < width_; j += kWidth) {
          Tile c;
          costs.tile(j, c, 0.0f);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            const vint size = (vint)c[r] & 0x7fffffff;  // ordered as integers are: finite numbers, infinity, NaN
            worst = size > worst ? size : worst;
            const vfloat x = c[r] * scale;
            const vfloat lost = rounding_of(c[r], broadcast(scale), x) + c[r] * rest, power = exp2(-x);
            store(block + (j + r) * kWidth, power - power * (lost * float(kLn2)));
          }
        }
        if (any(worst > limit)) good = false;
      }
    });
    if (good) set_pulls();
    return good;
  }

  // The first potentials. False where a cost has no meaning.
  bool start() {
    float* penalty = columns_.moved;  // a row isn't near to what has no weight
    for (int64_t j = 0; j < width_; ++j) penalty[j] = columns_.weight[j] > 0 ? 0.0f : INFINITY;
    std::atomic<bool> good{true};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      float* nearest = partial(chunk);
      std::fill_n(nearest, width_, INFINITY);
      vint bad{};
      for (; first < last; ++first) {
        const auto block = open(first);
        Tile c, least;
        for (vfloat& x : least) x = broadcast(INFINITY);
        for (int64_t j = 0; j < width_; j += kWidth) {
          block.tile(j, c);
          const vfloat extra = load(penalty + j);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            bad |= ~(c[r] > broadcast(-INFINITY));
            least[r] = minimum(least[r], c[r] + extra);
            store(scratch + (j + r) * kWidth, c[r]);
          }
        }
        const vfloat base = reduce_rows(least, Minimum());
        const vint present = (base < broadcast(INFINITY)) & (load(rows_.weight + first * kWidth) > vfloat{});
        const vfloat subtract = select(present, base, broadcast(-INFINITY));
        for (int64_t j = 0; j < width_; j += kWidth) {
          vfloat column = load(nearest + j);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) column = minimum(column, load(scratch + (j + r) * kWidth) - subtract[r]);
          store(nearest + j, column);
        }
        for (int r = 0; r < kWidth; ++r) rows_.base[first * kWidth + r] = base[r];
      }
      if (any(bad)) good = false;
    });
    if (!good) return false;
    for (int64_t j = 0; j < width_; ++j) {
      columns_.base[j] = INFINITY;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        columns_.base[j] = std::min<double>(columns_.base[j], partial(chunk)[j]);
      }
    }
    for (Side* side : {&rows_, &columns_}) {
      for (int64_t i = 0; i < side->padded; ++i) {
        if (side->base[i] == INFINITY) side->leave_out(i);
      }
    }
    if (rows_.has_zeros) lower_zero_rows();
    return true;
  }

  // f0 of rows without weight, which g0 doesn't look at: min_j (cost_ij - g0_j), so that their K is at most 1 too.
  void lower_zero_rows() {
    for_chunks([&](int64_t, int64_t first, int64_t last, float*) {
      for (; first < last; ++first) {
        const auto block = open(first);
        Tile c, least;
        for (vfloat& x : least) x = broadcast(INFINITY);
        for (int64_t j = 0; j < width_; j += kWidth) {
          block.tile(j, c);
          vfloat g = vfloat{};
          for (int lane = 0; lane < kWidth; ++lane) g[lane] = float(columns_.base[j + lane]);
          const vint present = load(columns_.weight + j) > vfloat{};
          for (int r = 0; r < kWidth; ++r) least[r] = minimum(least[r], select(present, c[r] - g, broadcast(INFINITY)));
        }
        const vfloat base = reduce_rows(least, Minimum());
        for (int r = 0; r < kWidth; ++r) {
          const int64_t i = first * kWidth + r;
          if (rows_.weight[i] == 0 && !rows_.unreached[i] && base[r] < INFINITY) rows_.base[i] = base[r];
        }
      }
    });
  }

  // A block of the kernel, from where it is stored, or made in scratch.
  const float* kernel(int64_t block, float* scratch, bool stored) const {
    if (stored) return kernel_ + block * width_ * kWidth;
    make_kernel(block, scratch);
    return scratch;
  }
  void make_kernel(int64_t block, float* kernel) const {
    const auto costs = open(block);
    const double* f = rows_.base + block * kWidth;
    for (int64_t j = 0; j < width_; j += kWidth) {
      Tile c;
      costs.tile(j, c);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        store(kernel + (j + r) * kWidth, bounded_exp2(exponent(f[r], columns_.base + j, c[r], scale_)));
      }
    }
  }

  void build() {
    if (Source::kStored) {
      for_chunks([&](int64_t, int64_t first, int64_t last, float*) {
        for (; first < last; ++first) make_kernel(first, kernel_ + first * width_ * kWidth);
      });
    }
    set_pulls();
  }
  void set_pulls() {
    for (Side* side : {&rows_, &columns_}) {
      if (!side->relaxed()) continue;
      for (int64_t i = 0; i < side->n; ++i) side->pull[i] = float(::exp(-side->base[i] / (side->tau + options_.eps)));
    }
  }

  // The rows' scalings, kept beside the old ones, and the column sums that these give, chunk by chunk. The row sums of the
  // next block are formed between those of this one and their use, which would otherwise wait for the last of them.
  Totals update_rows() {
    Totals totals[kMostChunks];
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      Totals found;
      Tile sums;
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      const float* block = first < last ? kernel(first, scratch, Source::kStored) : nullptr;
      if (first < last) row_sums(block, sums);
      for (; first < last; ++first) {
        scale_rows(first * kWidth, reduce_rows(sums, Sum()), found);
        const float* ahead = block;
        if (first + 1 < last) {
          if (!Source::kStored) add_rows(block, first * kWidth, column_sums);
          ahead = kernel(first + 1, scratch, Source::kStored);
          row_sums(ahead, sums);
        }
        if (Source::kStored || first + 1 == last) add_rows(block, first * kWidth, column_sums);
        block = ahead;
      }
      totals[chunk] = found;
    });
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) totals[0].include(totals[chunk]);
    return totals[0];
  }

  DPDIFF_INLINE void row_sums(const float* block, Tile& sums) const {
    Tile rows;
    for (vfloat& x : rows) x = vfloat{};
    for (int64_t j = 0; j < width_; j += kWidth) {
      const vfloat v = load(columns_.moved + j);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) rows[r] += load(block + (j + r) * kWidth) * v;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) sums[r] = rows[r];
  }

  DPDIFF_INLINE void scale_rows(int64_t i, vfloat sums, Totals& totals) const {
    const vfloat off = load(rows_.moved + i) * sums - load(rows_.target + i);
    totals.error += maximum(off, -off);
    const vfloat moved = rows_.scale(i, sums, next_scaling_, totals);
    store(next_moved_ + i, moved);
    if (rows_.relaxed()) store(next_target_ + i, moved * sums);
  }

  DPDIFF_INLINE void add_rows(const float* block, int64_t i, float* column_sums) const {
    Tile u;
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) u[r] = broadcast(next_moved_[i + r]);
    for (int64_t j = 0; j < width_; j += kWidth) {
      vfloat even = load(column_sums + j), odd{};
#pragma GCC unroll 8
      for (int r = 0; r < kWidth; r += 2) {
        even += u[r] * load(block + (j + r) * kWidth);
        odd += u[r + 1] * load(block + (j + r + 1) * kWidth);
      }
      store(column_sums + j, even + odd);
    }
  }

  Totals update_columns() {
    std::swap(rows_.scaling, next_scaling_);
    std::swap(rows_.moved, next_moved_);
    if (rows_.relaxed()) std::swap(rows_.target, next_target_);
    Totals totals;
    for (int64_t j = 0; j < width_; j += kWidth) {
      vfloat sums = load(partial(0) + j);
      for (int64_t chunk = 1; chunk < chunks_; ++chunk) sums += load(partial(chunk) + j);
      store(columns_.moved + j, columns_.scale(j, sums, columns_.scaling, totals));
      if (columns_.relaxed()) store(columns_.target + j, load(columns_.moved + j) * sums);
    }
    return totals;
  }

  // False where a sum or a scaling leaves what float32 can tell.
  bool iterate_scaled() {
    float carried = 0;  // g = 0: the scalings undo g0
    for (int64_t j = 0; j < width_; ++j) {
      columns_.moved[j] = columns_.weight[j] * float(::exp2(-columns_.base[j] * scale_));
      carried += columns_.moved[j];
    }
    for (used_ = 0; used_ < options_.n_iters; ++used_) {
      const Totals rows = update_rows();
      if (used_ > 0 && reduce_add(rows.error) + rows_.stranded + columns_.stranded < options_.tol) break;
      if (!rows.trusted(carried)) return false;
      const Totals columns = update_columns();
      if (!columns.trusted(reduce_add(rows.moved))) return false;
      carried = reduce_add(columns.moved);
      record();
      const float phi = rows.scalings.greatest(), psi = columns.scalings.greatest();
      const bool large = phi * psi > kMostProduct || phi > kMostScaling || psi > kMostScaling ||
                         rows.scalings.least() < kLeastScaling || columns.scalings.least() < kLeastScaling;
      if ((large || !Source::kStored) && used_ + 1 < options_.n_iters) {
        rows_.absorb(options_.eps);
        columns_.absorb(options_.eps);
        build();
        carried = 0;
        for (int64_t j = 0; j < width_; ++j) carried += columns_.weight[j];
      }
    }
    return rows_.zeros_fit() && columns_.zeros_fit();
  }

  void iterate_logs();

  // Leaves the potentials of this iteration in the history.
  void record() const {
    if (problem_.history == nullptr) return;
    double* to = problem_.history + used_ * (rows_.padded + width_);
    for (const Side* side : {&rows_, &columns_}) {
      side->potentials(options_.eps, to);
      to += side->padded;
    }
  }

  // The plan and what is told of it. scaled: the kernel is stored, and the scalings are of its potentials.
  void finish(bool scaled) {
    double cost[kMostChunks] = {}, mass[kMostChunks] = {}, error[kMostChunks] = {};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      for (; first < last; ++first) {
        const float* block = kernel(first, scratch, scaled && Source::kStored);
        const auto costs = open(first);
        const int64_t i = first * kWidth, n_rows = std::min<int64_t>(kWidth, rows_.n - i);
        Tile rows;
        for (vfloat& x : rows) x = vfloat{};
        vfloat total{};
        for (int64_t j = 0; j < width_; j += kWidth) {
          const vfloat v = load(columns_.moved + j);
          vfloat column = load(column_sums + j);
          Tile p;
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            p[r] = rows_.moved[i + r] * load(block + (j + r) * kWidth) * v;
            rows[r] += p[r];
            column += p[r];
          }
          store(column_sums + j, column);
          if (problem_.cost != nullptr) {
            Tile c;
            costs.tile(j, c);
#pragma GCC unroll 16
            for (int r = 0; r < kWidth; ++r) total += p[r] * finite(c[r]);
          }
          if (problem_.plan != nullptr) store_tile(p, problem_.plan + i * columns_.n + j, n_rows, columns_.n - j);
        }
        const vfloat sums = reduce_rows(rows, Sum());
        const vfloat off = sums - load(rows_.target + i);
        cost[chunk] += reduce_add(total);
        mass[chunk] += reduce_add(sums);
        error[chunk] += reduce_add(maximum(off, -off));
      }
    });
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      cost[0] += cost[chunk];
      mass[0] += mass[chunk];
      error[0] += error[chunk];
    }
    for (int64_t j = 0; j < columns_.n; ++j) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial(chunk)[j];
      error[0] += std::abs(sum - columns_.target[j]);
    }
    rows_.absorb(options_.eps);
    columns_.absorb(options_.eps);
    const double value = dual(rows_, problem_.f, problem_.f_wide) + dual(columns_, problem_.g, problem_.g_wide) -
                         options_.eps * (mass[0] - rows_.mass * columns_.mass);
    if (problem_.cost != nullptr) *problem_.cost = float(cost[0]);
    *problem_.value = float(value);
    *problem_.error = float(error[0] + rows_.stranded + columns_.stranded);
    *problem_.n_iters = used_;
  }

  // Writes what of a tile is within the edges.
  DPDIFF_INLINE void store_tile(const Tile& p, float* to, int64_t n_rows, int64_t n_columns) const {
    if (n_rows == kWidth && n_columns >= kWidth) {
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(to + r * columns_.n, p[r]);
      return;
    }
    for (int64_t r = 0; r < n_rows; ++r) {
      memcpy(to + r * columns_.n, &p[r], std::min<int64_t>(n_columns, kWidth) * sizeof(float));
    }
  }

  // Writes a side's potentials and returns their part of the dual objective.
  double dual(const Side& side, float* potentials, double* wide) const {
    double sum = 0;
    for (int64_t i = 0; i < side.n; ++i) {
      const double potential = side.unreached[i] ? INFINITY : side.base[i];
      if (potentials != nullptr) potentials[i] = float(potential);
      if (wide != nullptr) wide[i] = potential;
      if (side.given[i] > 0) sum += side.given[i] * (side.relaxed() ? -side.tau * ::expm1(-potential / side.tau) : potential);
    }
    return sum;
  }

  void fail() const {
    const SinkhornProblem& p = problem_;
    if (p.plan != nullptr) std::fill_n(p.plan, p.n * p.m, NAN);
    if (p.f != nullptr) std::fill_n(p.f, p.n, NAN);
    if (p.g != nullptr) std::fill_n(p.g, p.m, NAN);
    if (p.f_wide != nullptr) std::fill_n(p.f_wide, p.n, NAN);
    if (p.g_wide != nullptr) std::fill_n(p.g_wide, p.m, NAN);
    if (p.cost != nullptr) *p.cost = NAN;
    *p.value = *p.error = NAN;
    *p.n_iters = options_.n_iters;
  }

  const Source& source_;
  const SinkhornOptions& options_;
  const SinkhornProblem& problem_;
  const bool parallel_;
  const double scale_;  // of costs to exponents of 2
  Side rows_, columns_;
  const int64_t blocks_, width_, chunks_;  // of rows_.padded, columns_.padded
  float *next_scaling_, *next_moved_, *next_target_;
  float* partial_;  // column sums of each chunk
  float* scratch_;
  float* kernel_;
  int64_t used_ = 0;
};
