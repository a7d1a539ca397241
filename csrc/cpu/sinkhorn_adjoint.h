// The derivative that sinkhorn_backward.h has, for problems whose iterations all scale one kernel: without an exponential in
// an iteration. Q_ij = a_i phi_i K_ij / (column sum j) and R_ij = K_ij psi'_j b_j / (row sum i), for the scalings phi and psi
// of an iteration and psi' of the one before. Back through it goes one read of K, as forward: a row's sum, of K and what
// columns pass on, gives what the row passes on, and with that its part of the column sums.
//
// What an iteration adds to the gradient of the cost is K times the outer products (a phi) x + y (psi' b), for its x of columns
// and y of rows. All of them are put together in the end, as a product of two matrices. From where the iterations were at
// rest on, they have the same phi and psi, and one term between them.

// What rows pass on: y = offset - slope * sum. Without weight the slope is 0, and the sum whatever: K isn't bounded where
// neither the row nor the column has weight.
struct AdjointUpdate {
  const float *offset, *slope;
  float *sums, *next_moved;

  DPDIFF_INLINE vfloat operator()(int64_t i, vfloat row_sums) const {
    const vfloat own = load_quad(offset + i), factor = load_quad(slope + i);
    const vfloat y = select(factor > vfloat{}, own - factor * row_sums, own);
    store_quad(sums + i, row_sums);
    store_quad(next_moved + i, y);
    return y;
  }
};

class SinkhornAdjoint : Sinkhorn<DenseCost> {
 public:
  SinkhornAdjoint(const DenseCost& source, const SinkhornOptions& options, const SinkhornProblem& problem,
                  const SinkhornGradients& gradients, Arena& arena, bool parallel)
      : Sinkhorn(source, options, problem, arena, parallel),
        gradients_(gradients),
        arena_(arena),
        sweep_back_(choose_sweep<AdjointUpdate>(width_)),
        height_(rows_.padded) {
    for (float** array : {&offset_, &slope_, &row_sums_, &y_}) *array = rows_.floats(arena);
    for (float** array : {&of_g_, &x_}) *array = columns_.floats(arena);
    of_a_ = arena.take<double>(height_);
    of_b_ = arena.take<double>(width_);
    std::fill_n(of_a_, height_, 0.0);
    std::fill_n(of_b_, width_, 0.0);
  }

  // False, with nothing done, where the problem isn't such a one.
  bool run(float* of_cost) {
    if (!(rows_.check() & columns_.check()) || !prepare()) return false;
    std::vector<float> scalings, first(width_);
    for (int64_t j = 0; j < width_; ++j) first[j] = undoing(j);
    scalings_ = &scalings;
    if (!calm(first) || !iterate_scaled() || !calm(scalings)) return false;
    const int64_t stride = 2 * (height_ + width_), ran = int64_t(scalings.size()) / stride;
    const auto at = [&](int64_t k) { return Scalings{&scalings[k * stride], height_, width_}; };
    const int64_t most_terms = 2 * (ran + 1);
    left_ = arena_.take<float>(most_terms * height_);
    right_ = arena_.take<float>(most_terms * width_);
    of_results(at(ran - 1));
    if (used_ > ran) add_term(at(ran - 1), at(ran - 1).psi(), used_ - ran);
    for (int64_t k = ran; k-- > 0;) add_term(at(k), k > 0 ? at(k - 1).psi() : first.data(), 1);
    multiply(of_cost);
    for (int64_t i = 0; i < rows_.n; ++i) gradients_.a[i] = rows_.weight[i] > 0 ? float(of_a_[i] * options_.eps) : 0.0f;
    for (int64_t j = 0; j < columns_.n; ++j) gradients_.b[j] = columns_.weight[j] > 0 ? float(of_b_[j] * options_.eps) : 0.0f;
    return true;
  }

 private:
  // Of an iteration.
  struct Scalings {
    const float* from;
    int64_t height, width;

    const float* phi() const { return from; }
    const float* row_sums() const { return from + height; }
    const float* psi() const { return from + 2 * height; }
    const float* column_sums() const { return from + 2 * height + width; }
  };
  static bool calm(const std::vector<float>& numbers) {
    vint all = ~vint{};
    for (size_t i = 0; i < numbers.size(); i += kWidth) {
      all &= (load(&numbers[i]) >= broadcast(kTimid)) & (load(&numbers[i]) <= broadcast(kBold));
    }
    return !any(~all);
  }

  // The gradient of plan_ij: it, and that of <plan, cost>, of column j on of a block's row r.
  DPDIFF_INLINE vfloat incoming(const DenseCost::Block& costs, int64_t i, int r, int64_t j) const {
    const vfloat of_total = gradients_.of_total * finite(costs.load(r, j, 0.0f));
    if (gradients_.of_plan == nullptr) return of_total;
    return of_total + load_first(gradients_.of_plan + (i + r) * columns_.n + j, columns_.n - j, 0.0f);
  }
  bool through_plan() const { return gradients_.of_plan != nullptr || gradients_.of_total != 0; }

  // Sets the gradients of the last f, as an offset of what rows pass on, and g from those of the results.
  void of_results(const Scalings& final) {
    const float inverse = float(1 / options_.eps), damp = float(rows_.damp);
    for (int64_t j = 0; gradients_.of_g != nullptr && j < columns_.n; ++j) of_g_[j] = gradients_.of_g[j];
    for (int64_t i = 0; gradients_.of_f != nullptr && i < rows_.n; ++i) {
      offset_[i] = damp * gradients_.of_f[i] / final.row_sums()[i];
    }
    if (!through_plan()) return;
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float*) {
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      for (; first < last; ++first) {
        const auto costs = source_.block(first * kWidth);
        const float* block = kernel_ + first * width_ * kWidth;
        for (int r = 0; r < costs.n_rows; ++r) {
          const int64_t i = first * kWidth + r;
          const float u = rows_.moved[i] * inverse;
          vfloat sum{};
          for (int64_t j = 0; j < width_; j += kWidth) {
            const vfloat moved = load(entry(block, width_, j, r)) * load(columns_.moved + j);  // 0 without weight
            const vfloat part = incoming(costs, first * kWidth, r, j) * moved;
            sum += part;
            store(column_sums + j, load(column_sums + j) + u * part);
          }
          const float total = reduce_add(sum) * inverse * rows_.scaling[i];  // of row i, but for its weight
          offset_[i] += damp * total * rows_.weight[i] / final.row_sums()[i];
          of_a_[i] += total;
        }
      }
    });
    for (int64_t j = 0; j < width_; j += kWidth) {
      const vfloat sums = column_sums(j), weight = load(columns_.weight + j);
      store(of_g_ + j, load(of_g_ + j) + sums);
      subtract(of_b_ + j, select(weight > vfloat{}, -sums / weight, vfloat{}));
    }
  }

  // The part of the gradient of g that shifts all of it: of balanced sides, one number for each weight.
  float shift_of_g() const {
    vfloat sum{}, mass{};
    for (int64_t j = 0; j < width_; j += kWidth) sum += load(of_g_ + j), mass += load(columns_.weight + j);
    const float whole = reduce_add(mass);
    return !rows_.relaxed() && !columns_.relaxed() && whole > 0 ? reduce_add(sum) / whole : 0.0f;
  }
  // Adds it, and returns the greatest number that is left.
  float add_shift(float shift) {
    vfloat greatest{};
    for (int64_t j = 0; j < width_; j += kWidth) {
      const vfloat some = load(of_g_ + j) + shift * load(columns_.weight + j);
      store(of_g_ + j, some);
      greatest = maximum(greatest, absolute(some));
    }
    return reduce_max(greatest);
  }

  // Goes back through `count` iterations alike. The first may have to pass on what f is given; from then on they fade, but for
  // what shifts all of g. That goes on and on, and the half-steps take from the gradient of the cost what the other has added.
  // Sums in float32 would not do so to the last digit: it is left out, and added to what it changes, the weights' gradients.
  void add_term(const Scalings& now, const float* psi_before, int64_t count) {
    const float damp_a = float(rows_.damp), damp_b = float(columns_.damp), *phi = now.phi();
    float *of_x = left_ + terms_ * height_, *y_sum = of_x + height_;
    float *x_sum = right_ + terms_ * width_, *of_y = x_sum + width_;
    terms_ += 2;
    std::fill_n(y_sum, height_, 0.0f);
    std::fill_n(x_sum, width_, 0.0f);
    for (int64_t i = 0; i < height_; i += kWidth) {
      const vfloat moved = load(rows_.weight + i) * load(phi + i);
      store(of_x + i, moved);
      store(slope_ + i, damp_a * moved / load(now.row_sums() + i));
    }
    for (int64_t j = 0; j < width_; j += kWidth) store(of_y + j, load(columns_.weight + j) * load(psi_before + j));
    const AdjointUpdate update{offset_, slope_, row_sums_, y_};
    float shift = 0, first = 0;
    double shifted = 0;  // in all iterations
    for (int64_t k = 0; k < count; ++k) {
      if (k > 0) {
        const float part = shift_of_g(), left = add_shift(-part);
        shift += part;
        shifted += double(part) * double(count - k);
        if (k == 1) first = left;
        if (left <= 0x1p-30f * first) break;
      }
      for (int64_t j = 0; j < width_; j += kWidth) {
        const vfloat x = damp_b * load(of_g_ + j) / load(now.column_sums() + j);
        store(x_ + j, x);
        store(x_sum + j, load(x_sum + j) + x);
      }
      for_chunks([&](int64_t chunk, int64_t first, int64_t last, float*) {
        std::fill_n(partial(chunk), width_, 0.0f);
        const float* kernel = kernel_ + first * width_ * kWidth;
        sweep_back_(kernel, (last - first) * kGroups, width_, x_, partial(chunk), update, first * kWidth);
      });
      for (int64_t i = 0; i < height_; i += kWidth) {
        store(y_sum + i, load(y_sum + i) + load(y_ + i));
        subtract(of_a_ + i, load(phi + i) * load(row_sums_ + i));
        store(offset_ + i, vfloat{});
      }
      for (int64_t j = 0; j < width_; j += kWidth) {
        const vfloat sums = column_sums(j);
        subtract(of_b_ + j, load(psi_before + j) * sums);
        const vfloat factor = load(of_y + j);
        store(of_g_ + j, select(factor > vfloat{}, -(factor * sums), vfloat{}));
      }
    }
    add_shift(shift);
    for (int64_t i = 0; i < height_; ++i) of_a_[i] -= shifted;
    for (int64_t j = 0; j < width_; ++j) of_b_[j] += shifted;
  }
  static DPDIFF_INLINE void subtract(double* from, vfloat x) {
    store(from, load(from) - widen_low(x));
    store(from + kWidth / 2, load(from + kWidth / 2) - widen_high(x));
  }

  // Writes the gradient of the cost: K times the product of left and right, and times what goes through the plan alone.
  void multiply(float* of_cost) const {
    constexpr int kSpan = kWidth == 16 ? 4 : 2;  // tiles, whose sums for four rows stay in registers
    const int64_t n = rows_.n, m = columns_.n;
    const float inverse = float(1 / options_.eps);
    for_chunks([&](int64_t, int64_t first, int64_t last, float*) {
      for (; first < last; ++first) {
        const auto costs = source_.block(first * kWidth);
        const float* block = kernel_ + first * width_ * kWidth;
        for (int64_t j = 0; j < width_; j += kSpan * kWidth) {
          const int span = int(std::min<int64_t>(kSpan, (width_ - j) / kWidth));
          for (int r = 0; r < costs.n_rows; r += kGroup) {
            const int64_t i = first * kWidth + r;
            vfloat sums[kGroup][kSpan] = {};
            span == kSpan ? add_products<kSpan>(i, j, sums) : add_products<1>(i, j, sums, span);
            for (int q = 0; q < kGroup && i + q < n; ++q) {
              for (int t = 0; t < span; ++t) {
                const int64_t at = j + t * kWidth;
                vfloat sum = sums[q][t];
                if (through_plan()) {
                  const vfloat direct = gradients_.of_total - incoming(costs, first * kWidth, r + q, at) * inverse;
                  sum += rows_.moved[i + q] * load(columns_.moved + at) * direct;
                }
                store_first(of_cost + (i + q) * m + at, sum * load(entry(block, width_, at, r + q)), m - at);
              }
            }
          }
        }
      }
    });
  }

  // For four rows from i on: the products of `span` tiles from column j on, kAtOnce at a time.
  template <int kAtOnce, int kSpan>
  DPDIFF_INLINE void add_products(int64_t i, int64_t j, vfloat (&sums)[kGroup][kSpan], int span = kSpan) const {
    for (int first = 0; first < span; first += kAtOnce) {
      vfloat some[kGroup][kAtOnce] = {};
      const float *left = left_ + i, *right = right_ + j + first * kWidth;
      for (int64_t k = 0; k < terms_; ++k, left += height_, right += width_) {
#pragma GCC unroll 4
        for (int t = 0; t < kAtOnce; ++t) {
          const vfloat x = load(right + t * kWidth);
#pragma GCC unroll 4
          for (int q = 0; q < kGroup; ++q) some[q][t] += left[q] * x;
        }
      }
      for (int q = 0; q < kGroup; ++q) {
        for (int t = 0; t < kAtOnce; ++t) sums[q][first + t] = some[q][t];
      }
    }
  }

  const SinkhornGradients& gradients_;
  Arena& arena_;
  Sweep<AdjointUpdate>* const sweep_back_;
  const int64_t height_;
  float *offset_, *slope_, *row_sums_, *y_;  // of rows
  float *of_g_, *x_;                         // of columns: the gradient of g, and what they pass on
  double *of_a_, *of_b_;                     // gradients of the weights, by eps
  int64_t terms_ = 0;
  float *left_, *right_;  // (terms_, height_), (terms_, width_)
};
