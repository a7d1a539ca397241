// The derivative of the iterations that ran, exact whether or not they converged. They run once more, and leave their
// potentials; from the last to the first, each half-step g = -damp eps log sum_i a_i exp((f_i - cost_ij) / eps) then passes
// its gradient on through the softmax Q_ij = d g_j / d cost_ij, and f likewise through R_ij = d f_i / d cost_ij. For most
// problems sinkhorn_adjoint.h has the same at less cost.

// Passes over all pairs that end in gradients: of the cost, which the sink takes, and of rows and columns.
template <class Source, class Sink>
class PairsBackward {
 public:
  PairsBackward(const Source& source, const Sink& sink, double eps, int64_t chunks, bool parallel)
      : source_(source),
        sink_(sink),
        eps_(eps),
        scale_(kLog2e / eps),
        blocks_(tiles_of(source.n)),
        height_(tiles_of(source.n) * kWidth),
        width_(tiles_of(source.m) * kWidth),
        chunks_(chunks),
        parallel_(parallel),
        of_rows_(height_, 0.0),
        of_columns_(width_, 0.0),
        partial_(chunks * width_, 0.0f) {}

  // Through P_ij = exp((h_i + k_j - cost_ij) / eps), for padded h and k; incoming(i, j, tile) loads the gradient of P. And
  // through <P, cost>, whose gradient is `of_total`. Sets the gradients of h and k.
  template <class Incoming>
  void of_plan(const double* h, const double* k, float of_total, const Incoming& incoming) {
    const float inverse = float(1 / eps_);
    for_blocks([&](int64_t chunk, int64_t i, const typename Source::Block& block, float*, float* column_sums) {
      Tile rows;
      for (vfloat& x : rows) x = vfloat{};
      for (int64_t j = 0; j < width_; j += kWidth) {
        Tile c, of_p, change;
        block.tile(j, c);
        incoming(i, j, of_p);
        vfloat column = load(column_sums + j);
        for (int r = 0; r < kWidth; ++r) {
          const vfloat p = bounded_exp2(exponent(h[i + r], k + j, c[r], scale_));
          const vfloat s = (of_p[r] + of_total * finite(c[r])) * p * inverse;
          rows[r] += s;
          column += s;
          change[r] = of_total * p - s;
        }
        store(column_sums + j, column);
        sink_.add(chunk, i, j, change);
      }
      const vfloat sums = reduce_rows(rows, Sum());
      for (int r = 0; r < kWidth; ++r) of_rows_[i + r] = sums[r];
    });
    for (int64_t j = 0; j < width_; ++j) of_columns_[j] = column_total(j);
  }

  const double* of_rows() const { return of_rows_.data(); }
  const double* of_columns() const { return of_columns_.data(); }

 protected:
  // Calls work(chunk, first row, costs, scratch for a block, column sums of the chunk) for each block of rows.
  template <class Work>
  void for_blocks(const Work& work) {
    std::fill(partial_.begin(), partial_.end(), 0.0f);
    for_ranges(parallel_, chunks_, [&](int64_t first, int64_t last) {
      Arena arena;
      float* scratch = arena.take<float>(width_ * kWidth);
      for (; first < last; ++first) {
        const int64_t end = (first + 1) * blocks_ / chunks_;
        for (int64_t block = first * blocks_ / chunks_; block < end; ++block) {
          work(first, block * kWidth, source_.block(block * kWidth), scratch, partial_.data() + first * width_);
          sink_.end_block(first, block * kWidth);
        }
      }
    });
  }
  float column_total(int64_t j) const {
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial_[chunk * width_ + j];
    return sum;
  }

  const Source& source_;
  const Sink& sink_;
  const double eps_, scale_;
  const int64_t blocks_, height_, width_, chunks_;
  const bool parallel_;
  std::vector<double> of_rows_, of_columns_;
  std::vector<float> partial_;
};

template <class Source, class Sink>
class SinkhornBackward : PairsBackward<Source, Sink> {
 public:
  SinkhornBackward(const Source& source, const Sink& sink, const SinkhornOptions& options, const SinkhornProblem& problem,
                   const SinkhornGradients& gradients, int64_t chunks, bool parallel)
      : PairsBackward<Source, Sink>(source, sink, options.eps, chunks, parallel),
        problem_(problem),
        gradients_(gradients),
        damp_a_(options.tau_a < INFINITY ? options.tau_a / (options.tau_a + options.eps) : 1.0),
        damp_b_(options.tau_b < INFINITY ? options.tau_b / (options.tau_b + options.eps) : 1.0),
        of_a_(this->height_, 0.0),
        of_b_(this->width_, 0.0),
        from_(this->height_, -INFINITY),
        to_(this->width_, -INFINITY),
        column_base_(this->width_, 0.0),
        column_factor_(this->width_, 0.0f) {}

  // history: f (height) and g (width) after each iteration, +inf where nothing reaches.
  void run(const double* history, int64_t used) {
    const int64_t n = problem_.n, m = problem_.m, stride = height_ + width_;
    if (gradients_.of_plan != nullptr || gradients_.of_total != 0) {
      const double* last = history + (used - 1) * stride;
      for (int64_t i = 0; i < n; ++i) from_[i] = carried(last[i], problem_.a[i]);
      for (int64_t j = 0; j < m; ++j) to_[j] = carried(last[height_ + j], problem_.b[j]);
      this->of_plan(from_.data(), to_.data(), gradients_.of_total, [&](int64_t i, int64_t j, Tile& tile) {
        for (int r = 0; r < kWidth; ++r) {
          tile[r] = vfloat{};
          if (gradients_.of_plan == nullptr || i + r >= n) continue;
          memcpy(&tile[r], gradients_.of_plan + (i + r) * m + j, std::min<int64_t>(kWidth, m - j) * sizeof(float));
        }
      });
      for (int64_t i = 0; i < n; ++i) of_a_[i] = eps_ * of_rows_[i];
      for (int64_t j = 0; j < m; ++j) of_b_[j] = eps_ * of_columns_[j];
    }
    for (int64_t i = 0; gradients_.of_f != nullptr && i < n; ++i) of_rows_[i] += gradients_.of_f[i];
    for (int64_t j = 0; gradients_.of_g != nullptr && j < m; ++j) of_columns_[j] += gradients_.of_g[j];
    for (int64_t k = used; k-- > 0;) {
      const double* now = history + k * stride;
      of_iteration(now, now + height_, k > 0 ? now - width_ : nullptr);
    }
    for (int64_t i = 0; i < n; ++i) gradients_.a[i] = problem_.a[i] > 0 ? float(of_a_[i] / problem_.a[i]) : 0.0f;
    for (int64_t j = 0; j < m; ++j) gradients_.b[j] = problem_.b[j] > 0 ? float(of_b_[j] / problem_.b[j]) : 0.0f;
  }

 private:
  using Base = PairsBackward<Source, Sink>;
  using Base::eps_, Base::scale_, Base::height_, Base::width_, Base::of_rows_, Base::of_columns_, Base::sink_;

  // potential + eps log(weight), -inf where there is nothing to carry
  double carried(double potential, float weight) const {
    return weight > 0 && potential < INFINITY ? potential + eps_ * ::log(double(weight)) : -INFINITY;
  }
  static double or_zero(double potential) { return potential < INFINITY ? potential : 0.0; }

  // Through g from f, then f from the g before (null: zero).
  void of_iteration(const double* f, const double* g, const double* g_before) {
    for (int64_t j = 0; j < width_; ++j) {
      column_factor_[j] = j < problem_.m && g[j] < INFINITY ? float(damp_b_ * of_columns_[j]) : 0.0f;
      column_base_[j] = or_zero(g[j]) / damp_b_;
      to_[j] = j < problem_.m ? carried(g_before == nullptr ? 0.0 : g_before[j], problem_.b[j]) : -INFINITY;
    }
    this->for_blocks([&](int64_t chunk, int64_t i, const typename Source::Block& block, float* products, float* column_sums) {
      Tile rows;
      for (vfloat& x : rows) x = vfloat{};
      double from[kWidth], softmin[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        from[r] = i + r < problem_.n ? carried(f[i + r], problem_.a[i + r]) : -INFINITY;
        softmin[r] = i + r < problem_.n ? or_zero(f[i + r]) / damp_a_ : 0.0;
      }
      for (int64_t j = 0; j < width_; j += kWidth) {
        Tile c;
        block.tile(j, c);
        const vfloat factor = load(&column_factor_[j]);
        for (int r = 0; r < kWidth; ++r) {
          const vfloat product = bounded_exp2(exponent(from[r], &column_base_[j], c[r], scale_)) * factor;
          rows[r] += product;
          store(products + (j + r) * kWidth, product);
        }
      }
      const vfloat sums = reduce_rows(rows, Sum());
      float row_factor[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        of_a_[i + r] -= eps_ * sums[r];
        row_factor[r] = i + r < problem_.n && f[i + r] < INFINITY ? float(damp_a_ * (of_rows_[i + r] - sums[r])) : 0.0f;
        of_rows_[i + r] = 0;
      }
      for (int64_t j = 0; j < width_; j += kWidth) {
        Tile c, change;
        block.tile(j, c);
        vfloat column = load(column_sums + j);
        for (int r = 0; r < kWidth; ++r) {
          const vfloat product = bounded_exp2(exponent(softmin[r], &to_[j], c[r], scale_)) * row_factor[r];
          column += product;
          change[r] = product + load(products + (j + r) * kWidth);
        }
        store(column_sums + j, column);
        sink_.add(chunk, i, j, change);
      }
    });
    for (int64_t j = 0; j < width_; ++j) {
      const double sum = this->column_total(j);
      of_columns_[j] = -sum;
      of_b_[j] -= eps_ * sum;
    }
  }

  const SinkhornProblem& problem_;
  const SinkhornGradients& gradients_;
  const double damp_a_, damp_b_;
  std::vector<double> of_a_, of_b_, from_, to_, column_base_;
  std::vector<float> column_factor_;
};

// Takes the gradient of a cost in memory.
struct DenseSink {
  float* cost;
  int64_t n, m;

  DPDIFF_INLINE void add(int64_t, int64_t i, int64_t j, const Tile& change) const {
    const int64_t n_rows = std::min<int64_t>(kWidth, n - i), n_columns = m - j;
    for (int64_t r = 0; r < n_rows; ++r) {
      float* to = cost + (i + r) * m + j;
      store_first(to, load_first(to, n_columns, 0) + change[r], n_columns);
    }
  }
  void end_block(int64_t, int64_t) const {}
};
