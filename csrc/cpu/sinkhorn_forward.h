// Solves one problem. The plan is P_ij = a_i phi_i K_ij psi_j b_j: a kernel K = exp((f0_i + g0_j - cost_ij) / eps), and
// scalings phi and psi of its potentials f0 and g0, which absorb the scalings where these get large (Schmitzer, 2019). The
// first f0 and g0 are hard c-transforms, min_j cost_ij and min_i (cost_ij - f0_i): K is then at most 1, and 1 somewhere in
// each row and column, whatever eps is. An iteration reads K once: the row sums of a block give its phi, and with that its
// part of the column sums. What float32 scalings can't represent is iterated in the log domain (sinkhorn_logs.h).

// K is without what is below 2^-126: with phi psi <= 2^80 that is an error of 2^-46 relative to the sums.
constexpr float kMostProduct = 0x1p80f, kMostScaling = 0x1p60f, kLeastScaling = 0x1p-60f;
constexpr float kLeastSum = 0x1p-96f;  // relative to the sum of the other side's scaled weights
// The rows are taken in up to this many chunks, each with column sums of its own, whether or not they run in parallel: the
// result doesn't depend on the number of threads.
constexpr int64_t kMostChunks = 32;

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
        chunks_(std::max<int64_t>(std::min({problem.n * problem.m >> 16, kMostChunks, blocks_}), 1)) {
    next_scaling_ = rows_.floats(arena);
    next_moved_ = rows_.floats(arena);
    next_target_ = rows_.floats(arena);
    std::copy_n(rows_.target, rows_.padded, next_target_);
    partial_ = arena.take<float>(chunks_ * width_);
    scratch_ = arena.take<float>(parallel ? 0 : scratch_floats());
    kernel_ = Source::kStored ? arena.take<float>(blocks_ * width_ * kWidth) : nullptr;
  }

  void solve() {
    if (!start()) return fail();
    const bool scaled = iterate_scaled();
    if (!scaled) iterate_logs();
    finish(scaled);
  }

 private:
  int64_t scratch_floats() const { return width_ * kWidth + source_.scratch_floats(); }

  // Calls work(chunk, first block, last block, scratch) for each chunk.
  template <class Work>
  void for_chunks(const Work& work) const {
    for_ranges(parallel_, chunks_, [&](int64_t first, int64_t last) {
      Arena local;
      float* scratch = parallel_ ? local.take<float>(scratch_floats()) : scratch_;
      for (; first < last; ++first) work(first, first * blocks_ / chunks_, (first + 1) * blocks_ / chunks_, scratch);
    });
  }
  float* partial(int64_t chunk) const { return partial_ + chunk * width_; }
  typename Source::Block open(int64_t block, float* scratch) const {
    return source_.block(block * kWidth, scratch + width_ * kWidth);
  }

  // The first potentials. False where an input has no meaning.
  bool start() {
    if (!(rows_.check() & columns_.check())) return false;
    float* penalty = columns_.moved;  // a row isn't near to what has no weight
    for (int64_t j = 0; j < width_; ++j) penalty[j] = columns_.weight[j] > 0 ? 0.0f : INFINITY;
    std::atomic<bool> good{true};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      float* nearest = partial(chunk);
      std::fill_n(nearest, width_, INFINITY);
      vint bad{};
      for (; first < last; ++first) {
        const auto block = open(first, scratch);
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
    for_chunks([&](int64_t, int64_t first, int64_t last, float* scratch) {
      for (; first < last; ++first) {
        const auto block = open(first, scratch);
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
    make_kernel(block, scratch, scratch);
    return scratch;
  }
  void make_kernel(int64_t block, float* kernel, float* scratch) const {
    const auto costs = open(block, scratch);
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
      for_chunks([&](int64_t, int64_t first, int64_t last, float* scratch) {
        for (; first < last; ++first) make_kernel(first, kernel_ + first * width_ * kWidth, scratch);
      });
    }
    for (Side* side : {&rows_, &columns_}) {
      if (!side->relaxed()) continue;
      for (int64_t i = 0; i < side->n; ++i) side->pull[i] = float(::exp(-side->base[i] / (side->tau + options_.eps)));
    }
  }

  // The rows' scalings, kept beside the old ones, and the column sums that these give, chunk by chunk.
  Totals update_rows() {
    Totals totals[kMostChunks];
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      Totals found;
      std::fill_n(partial(chunk), width_, 0.0f);
      for (; first < last; ++first) update_block(kernel(first, scratch, Source::kStored), first * kWidth, partial(chunk), found);
      totals[chunk] = found;
    });
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) totals[0].include(totals[chunk]);
    return totals[0];
  }

  void update_block(const float* kernel, int64_t i, float* column_sums, Totals& totals) const {
    Tile rows;
    for (vfloat& x : rows) x = vfloat{};
    for (int64_t j = 0; j < width_; j += kWidth) {
      const vfloat v = load(columns_.moved + j);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) rows[r] += load(kernel + (j + r) * kWidth) * v;
    }
    const vfloat sums = reduce_rows(rows, Sum());
    const vfloat off = load(rows_.moved + i) * sums - load(rows_.target + i);
    totals.error += maximum(off, -off);
    store(next_moved_ + i, rows_.scale(i, sums, next_scaling_, totals));
    if (rows_.relaxed()) store(next_target_ + i, load(next_moved_ + i) * sums);

    Tile u;
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) u[r] = broadcast(next_moved_[i + r]);
    for (int64_t j = 0; j < width_; j += kWidth) {
      vfloat even = load(column_sums + j), odd{};
#pragma GCC unroll 8
      for (int r = 0; r < kWidth; r += 2) {
        even += u[r] * load(kernel + (j + r) * kWidth);
        odd += u[r + 1] * load(kernel + (j + r + 1) * kWidth);
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
    build();
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

  // The plan and what is told of it. scaled: the kernel is stored, and the scalings are of its potentials.
  void finish(bool scaled) {
    double cost[kMostChunks] = {}, mass[kMostChunks] = {}, error[kMostChunks] = {};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      for (; first < last; ++first) {
        const float* block = kernel(first, scratch, scaled && Source::kStored);
        const auto costs = open(first, scratch);
        const int64_t i = first * kWidth, n_rows = std::min<int64_t>(kWidth, rows_.n - i);
        Tile rows, c;
        for (vfloat& x : rows) x = vfloat{};
        vfloat total{};
        for (int64_t j = 0; j < width_; j += kWidth) {
          const vfloat v = load(columns_.moved + j);
          vfloat column = load(column_sums + j);
          if (problem_.cost != nullptr) costs.tile(j, c);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            const vfloat p = rows_.moved[i + r] * load(block + (j + r) * kWidth) * v;
            rows[r] += p;
            column += p;
            if (problem_.cost != nullptr) total += p * select(c[r] < broadcast(INFINITY), c[r], vfloat{});
            if (problem_.plan != nullptr && r < n_rows) {
              float* to = problem_.plan + (i + r) * columns_.n + j;
              if (j + kWidth <= columns_.n) {
                store(to, p);
              } else {
                store_partial(to, p, columns_.n - j);
              }
            }
          }
          store(column_sums + j, column);
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
