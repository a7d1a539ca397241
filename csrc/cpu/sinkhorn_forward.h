// Solves one problem. The plan is P_ij = a_i phi_i K_ij psi_j b_j: a kernel K = exp((f0_i + g0_j - cost_ij) / eps), and
// scalings phi and psi of its potentials f0 and g0, which absorb the scalings where these get large (Schmitzer, 2019). The
// first f0 and g0 are hard c-transforms, min_j cost_ij and min_i (cost_ij - f0_i): K is then at most 1, and 1 somewhere in
// each row and column, whatever eps is. An iteration reads K once: the row sums of a block give its phi, and with that its
// part of the column sums. What float32 scalings can't represent is iterated in the log domain (sinkhorn_logs.h).

// The rows are taken in up to this many chunks, each with column sums of its own, whether or not they run in parallel: the
// result doesn't depend on the number of threads.
constexpr int64_t kMostChunks = 32;

constexpr int64_t kLeastInPlan = int64_t(1) << 20;  // pairs: kernels that stay in a second cache have memory of their own

inline int64_t chunks_of(int64_t n, int64_t m) {
  return std::max<int64_t>(std::min({n * m >> 16, kMostChunks, tiles_of(n)}), 1);
}

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
        chunks_(chunks_of(problem.n, problem.m)),
        sweep_(choose_sweep<RowUpdate>(width_)),
        in_plan_(Source::kStored && problem.plan != nullptr && problem.n * problem.m >= kLeastInPlan &&
                 problem.n % kWidth == 0 && problem.m % kWidth == 0),
        looks_(options.n_iters, 8) {
    next_scaling_ = rows_.floats(arena);
    next_moved_ = rows_.floats(arena);
    next_target_ = rows_.floats(arena);
    std::copy_n(rows_.target, rows_.padded, next_target_);
    potentials_ = arena.take<double>(width_);
    seen_ = arena.take<double>(width_);
    std::fill_n(seen_, width_, 0.0);
    partial_ = arena.take<float>(chunks_ * width_);
    totals_ = arena.take<Totals>(chunks_);
    scratch_ = arena.take<float>(parallel ? 0 : width_ * kWidth);
    kernel_ = !Source::kStored ? nullptr : in_plan_ ? problem.plan : arena.take<float>(blocks_ * width_ * kWidth);
  }

  void solve() {
    if (!(rows_.check() & columns_.check())) return fail();
    if (!prepare()) return fail();
    const bool scaled = iterate_scaled();
    if (!scaled) iterate_logs();
    finish(scaled);
  }

 protected:
  // The first kernel. False where a cost has no meaning.
  bool prepare() {
    if constexpr (Source::kStored) {
      if (build_unshifted()) return true;
    }
    if (!start()) return false;
    build();
    return true;
  }

  // Calls work(chunk, first block, last block, scratch) for each chunk, each thread's from the last on if `backward`.
  template <class Work>
  void for_chunks(const Work& work, bool backward = false) const {
    for_ranges(parallel_, chunks_, [&](int64_t first, int64_t last) {
      Arena local;
      float* scratch = parallel_ ? local.take<float>(width_ * kWidth) : scratch_;
      for (int64_t k = first; k < last; ++k) {
        const int64_t chunk = backward ? first + last - 1 - k : k;
        work(chunk, chunk * blocks_ / chunks_, (chunk + 1) * blocks_ / chunks_, scratch);
      }
    });
  }
  float* partial(int64_t chunk) const { return partial_ + chunk * width_; }
  // Of columns j on, of all chunks.
  DPDIFF_INLINE vfloat column_sums(int64_t j) const {
    vfloat sums = load(partial(0) + j);
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) sums += load(partial(chunk) + j);
    return sums;
  }

  // The kernel of zero potentials, in one pass, where float32 holds it: small finite costs. Otherwise false.
  bool build_unshifted() {
    if (rows_.mass == 0 || columns_.mass == 0) return false;
    std::atomic<bool> good{true};
    for_chunks([&](int64_t, int64_t first, int64_t last, float* scratch) {
      const Unshifted unshifted(options_.eps);  // of its own, like the width: what the stores below can't change
      const int64_t width = width_;
      for (; first < last && good.load(std::memory_order_relaxed); ++first) {
        const auto costs = source_.rows(first * kWidth, scratch);
        float* block = kernel_ + first * width * kWidth;
        vint worst{};
        for (int r = 0; r < kWidth; ++r) {
          float* row = entry(block, width, 0, r);
          for (int64_t j = 0; j < width; j += kWidth) {
            store(row + j * kGroup, unshifted(costs.load(r, j, 0.0f), worst));
          }
        }
        if (any(worst > unshifted.limit)) good = false;
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
        const auto costs = source_.rows(first * kWidth, scratch);
        for (int r = 0; r < kWidth; ++r) {
          const int64_t i = first * kWidth + r;
          vfloat least = broadcast(INFINITY);
          for (int64_t j = 0; j < width_; j += kWidth) {
            const vfloat c = costs.load(r, j);
            bad |= ~(c > broadcast(-INFINITY));
            least = minimum(least, c + load(penalty + j));
          }
          const float base = -reduce_max(-least);
          rows_.base[i] = base;
          if (!(base < INFINITY && rows_.weight[i] > 0)) continue;
          for (int64_t j = 0; j < width_; j += kWidth) {
            store(nearest + j, minimum(load(nearest + j), costs.load(r, j) - base));
          }
        }
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
        const auto costs = source_.rows(first * kWidth, scratch);
        for (int r = 0; r < kWidth; ++r) {
          const int64_t i = first * kWidth + r;
          if (rows_.weight[i] != 0 || rows_.unreached[i]) continue;
          vfloat least = broadcast(INFINITY);
          for (int64_t j = 0; j < width_; j += kWidth) {
            const vfloat g = narrow(load(columns_.base + j), load(columns_.base + j + kWidth / 2));
            const vint present = load(columns_.weight + j) > vfloat{};
            least = minimum(least, select(present, costs.load(r, j) - g, broadcast(INFINITY)));
          }
          const float base = -reduce_max(-least);
          if (base < INFINITY) rows_.base[i] = base;
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
  void make_kernel(int64_t block, float* scratch, float* kernel) const {
    const auto costs = source_.rows(block * kWidth, scratch);
    for (int r = 0; r < kWidth; ++r) {
      const double f = rows_.base[block * kWidth + r];
      for (int64_t j = 0; j < width_; j += kWidth) {
        store(entry(kernel, width_, j, r), bounded_exp2(exponent(f, columns_.base + j, costs.load(r, j), scale_)));
      }
    }
  }

  void build() {
    if (Source::kStored) {
      for_chunks([&](int64_t, int64_t first, int64_t last, float* scratch) {
        for (; first < last; ++first) make_kernel(first, scratch, kernel_ + first * width_ * kWidth);
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

  // The rows' scalings, kept beside the old ones, and the column sums that these give, chunk by chunk.
  Totals update_rows() {
    const RowUpdate update{rows_.rule(), rows_.weight,  rows_.pull,  rows_.moved, rows_.target,
                           rows_.sums,   next_scaling_, next_moved_, next_target_};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      const auto go = [&](const float* kernel, int64_t block, int64_t blocks) {
        sweep_(kernel, blocks * kGroups, width_, columns_.moved, column_sums, update, block * kWidth);
      };
      if (Source::kStored) {
        go(kernel_ + first * width_ * kWidth, first, last - first);
      } else {
        for (int64_t block = first; block < last; ++block) go(kernel(block, scratch, false), block, 1);
      }
      totals_[chunk] = update.review(first * kWidth, last * kWidth, options_.tol > 0);
    }, used_ % 2 == 1);  // to and fro: of a large kernel, the chunks read last are still in a cache
    Totals totals;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) totals.include(totals_[chunk]);
    return totals;
  }

  // Sets `carried`, the sum of weight * scaling.
  Totals update_columns(vfloat& carried) {
    std::swap(rows_.scaling, next_scaling_);
    std::swap(rows_.moved, next_moved_);
    if (rows_.relaxed()) std::swap(rows_.target, next_target_);
    const Rule rule = columns_.rule();
    Totals totals;
    carried = vfloat{};
    for (int64_t j = 0; j < width_; j += kWidth) {
      vfloat moved;
      const vfloat sums = column_sums(j);
      const vfloat weight = load(columns_.weight + j), scaling = rule.scale(weight, sums, load(columns_.pull + j), moved);
      totals.restless |= rule.restless(weight, sums, scaling);
      carried += moved;
      store(columns_.sums + j, sums);
      store(columns_.scaling + j, scaling);
      store(columns_.moved + j, moved);
      if (rule.relaxed) store(columns_.target + j, moved * sums);
    }
    return totals;
  }

  // The scaling of g = 0, which undoes g0: infinite too, where there is no weight, for which any does.
  float undoing(int64_t j) const {
    const bool plain = columns_.weight[j] == 0 || columns_.base[j] == 0;
    return plain ? 1.0f : float(::exp2(-columns_.base[j] * scale_));
  }

  // False where a sum or a scaling leaves what float32 can tell.
  bool iterate_scaled() {
    for (int64_t j = 0; j < width_; ++j) columns_.moved[j] = columns_.weight[j] * undoing(j);
    vfloat carried = broadcast(columns_.carried() / kWidth);
    const bool light = std::max(rows_.mass, columns_.mass) <= kMostMass;
    bool calm = light && reduce_add(carried) <= kMostMass * kBold;
    // Not where a tolerance ends the iterations, which the results tell of, nor where the history has the potentials of each.
    int64_t look = options_.tol > 0 || problem_.history != nullptr ? 0 : looks_.every();
    for (used_ = 0; used_ < options_.n_iters; ++used_) {
      const Totals rows = update_rows();
      if (used_ > 0 && reduce_add(rows.error) + rows_.stranded + columns_.stranded < options_.tol) break;
      const vfloat carried_before = carried;
      const Totals columns = update_columns(carried);
      bool large = false;
      if (!calm || any(rows.restless | columns.restless)) {
        Extent phis, psis;
        if (!rows_.trusted(reduce_add(carried_before), phis) || !columns_.trusted(rows_.carried(), psis)) return false;
        const float phi = phis.greatest(), psi = psis.greatest();
        large = phi * psi > kMostProduct || phi > kMostScaling || psi > kMostScaling || phis.least() < kLeastScaling ||
                psis.least() < kLeastScaling;
      }
      record();
      if (used_ + 1 == look) {
        look += looks_.every();
        if (at_rest(used_ + 1)) {
          used_ = options_.n_iters;
          break;
        }
      }
      calm = light && !any(columns.restless);
      if ((large || !Source::kStored) && used_ + 1 < options_.n_iters) {
        if (scalings_ != nullptr) return false;
        rows_.absorb(options_.eps);
        columns_.absorb(options_.eps);
        build();
        carried = broadcast(columns_.carried() / kWidth);
        calm = light;
      }
    }
    return rows_.zeros_fit() && columns_.zeros_fit();
  }

  // Whether the iterations left may be spared, by what the columns' potentials have changed since the last look.
  bool at_rest(int64_t used) {
    columns_.potentials(options_.eps, potentials_);
    double least = INFINITY, greatest = -INFINITY;
    for (int64_t j = 0; j < columns_.n; ++j) {
      if (columns_.weight[j] == 0) continue;
      least = std::min(least, potentials_[j] - seen_[j]);
      greatest = std::max(greatest, potentials_[j] - seen_[j]);
    }
    std::swap(potentials_, seen_);
    return looks_.at_rest(least / options_.eps, greatest / options_.eps, rows_.relaxed() || columns_.relaxed(), used);
  }

  void iterate_logs();

  // Leaves the potentials of this iteration in the history, or its scalings.
  void record() const {
    for (const Side* side : {&rows_, &columns_}) {
      if (scalings_ == nullptr) break;
      for (const float* array : {side->scaling, side->sums}) {
        scalings_->insert(scalings_->end(), array, array + side->n);
        scalings_->insert(scalings_->end(), side->padded - side->n, 1.0f);
      }
    }
    if (problem_.history == nullptr) return;
    double* to = problem_.history + used_ * (rows_.padded + width_);
    for (const Side* side : {&rows_, &columns_}) {
      side->potentials(options_.eps, to);
      to += side->padded;
    }
  }

  // What comes after the iterations (sinkhorn_results.h). scaled: the kernel is stored, and the scalings are of its potentials.
  void finish(bool scaled);
  void finish_group(const float* block, int64_t i, int r, float* column_sums, vfloat (&sums)[kGroup],
                    vfloat (&costs)[kGroup]) const;
  double dual(const Side& side, float* potentials, double* wide) const;
  void fail() const;

  const Source& source_;
  const SinkhornOptions& options_;
  const SinkhornProblem& problem_;
  const bool parallel_;
  const double scale_;  // of costs to exponents of 2
  Side rows_, columns_;
  const int64_t blocks_, width_, chunks_;  // of rows_.padded, columns_.padded
  Sweep<RowUpdate>* const sweep_;
  const bool in_plan_;  // the plan's memory is the kernel's, until a block of it becomes the plan's
  float *next_scaling_, *next_moved_, *next_target_;
  const SinkhornLooks looks_;
  double *potentials_, *seen_;  // of the columns, now and at the last look
  std::vector<float>* scalings_ = nullptr;  // and sums of each iteration, where they are wanted, all of the same kernel
  float* partial_;  // column sums of each chunk
  Totals* totals_;  // of each chunk
  float* scratch_;
  float* kernel_;
  int64_t used_ = 0;
};
