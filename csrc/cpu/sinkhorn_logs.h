// The iterations in the log domain: slower, for what leaves the range of scalings. Each exponent is relative to the
// greatest of its row or column, so that no sum is lost.

// eps log sum_j exp(x_j / eps), from the greatest x and the sum of exponentials relative to it.
DPDIFF_INLINE double log_sum(double greatest, double sum, double eps) {
  return sum > 0 ? greatest + eps * ::log(sum) : -INFINITY;
}

template <class Source>
void Sinkhorn<Source>::iterate_logs() {
  const double eps = options_.eps;
  std::vector<double> f(rows_.padded), h(columns_.padded), k(rows_.padded), shift(width_), sums(width_);
  std::vector<float> narrow_h(width_), greatest(chunks_ * width_);
  const auto carry = [eps](const Side& side, double potential, int64_t i) {
    return side.weight[i] > 0 && potential < INFINITY ? potential + eps * ::log(double(side.weight[i])) : -INFINITY;
  };
  for (int64_t j = 0; j < width_; ++j) h[j] = carry(columns_, 0.0, j);
  std::fill_n(rows_.base, rows_.padded, 0.0);

  for (used_ = 0; used_ < options_.n_iters; ++used_) {
    for (int64_t j = 0; j < width_; ++j) narrow_h[j] = float(h[j]);
    double error[kMostChunks] = {};
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float*) {
      float* column_greatest = greatest.data() + chunk * width_;
      std::fill_n(column_greatest, width_, -INFINITY);
      for (; first < last; ++first) {
        const auto block = source_.block(first * kWidth);
        Tile c, most, rows;
        for (int r = 0; r < kWidth; ++r) most[r] = broadcast(-INFINITY), rows[r] = vfloat{};
        for (int64_t j = 0; j < width_; j += kWidth) {
          block.tile(j, c);
          for (int r = 0; r < kWidth; ++r) most[r] = maximum(most[r], load(&narrow_h[j]) - c[r]);
        }
        const vfloat top = reduce_rows(most, Maximum());
        for (int64_t j = 0; j < width_; j += kWidth) {
          block.tile(j, c);
          for (int r = 0; r < kWidth; ++r) {
            if (top[r] > -INFINITY) rows[r] += bounded_exp2(exponent(-double(top[r]), &h[j], c[r], scale_));
          }
        }
        const vfloat total = reduce_rows(rows, Sum());
        vfloat carried;
        for (int r = 0; r < kWidth; ++r) {
          const int64_t i = first * kWidth + r;
          const double softmin = -log_sum(top[r], total[r], eps);
          if (rows_.weight[i] > 0) {
            error[chunk] += std::abs(rows_.weight[i] * ::exp((rows_.base[i] - softmin) / eps) - rows_.target[i]);
          }
          f[i] = rows_.damp * softmin;
          k[i] = carry(rows_, f[i], i);
          carried[r] = float(k[i]);
        }
        for (int64_t j = 0; j < width_; j += kWidth) {
          block.tile(j, c);
          vfloat column = load(column_greatest + j);
          for (int r = 0; r < kWidth; ++r) column = maximum(column, carried[r] - c[r]);
          store(column_greatest + j, column);
        }
      }
    });
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) error[0] += error[chunk];
    if (used_ > 0 && error[0] + rows_.stranded + columns_.stranded < options_.tol) break;
    std::copy(f.begin(), f.end(), rows_.base);

    for (int64_t j = 0; j < width_; ++j) {
      float top = -INFINITY;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) top = std::max(top, greatest[chunk * width_ + j]);
      shift[j] = top > -INFINITY ? -double(top) : 0.0;
      sums[j] = 0;
    }
    for_chunks([&](int64_t chunk, int64_t first, int64_t last, float*) {
      float* column_sums = partial(chunk);
      std::fill_n(column_sums, width_, 0.0f);
      for (; first < last; ++first) {
        const auto block = source_.block(first * kWidth);
        for (int64_t j = 0; j < width_; j += kWidth) {
          Tile c;
          block.tile(j, c);
          vfloat column = load(column_sums + j);
          for (int r = 0; r < kWidth; ++r) {
            const double from = k[first * kWidth + r];
            if (from > -INFINITY) column += bounded_exp2(exponent(from, &shift[j], c[r], scale_));
          }
          store(column_sums + j, column);
        }
      }
    });
    for (int64_t j = 0; j < width_; ++j) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sums[j] += partial(chunk)[j];
      columns_.base[j] = -columns_.damp * log_sum(-shift[j], sums[j], eps);
      h[j] = carry(columns_, columns_.base[j], j);
    }
    for (Side* side : {&rows_, &columns_}) {
      if (!side->relaxed()) continue;
      for (int64_t i = 0; i < side->n; ++i) {
        side->target[i] = side->weight[i] > 0 ? float(side->weight[i] * ::exp(-side->base[i] / side->tau)) : 0.0f;
      }
    }
    if (problem_.history != nullptr) {
      double* to = problem_.history + used_ * (rows_.padded + width_);
      std::copy_n(columns_.base, width_, std::copy_n(rows_.base, rows_.padded, to));
    }
  }
  for (Side* side : {&rows_, &columns_}) {
    for (int64_t i = 0; i < side->padded; ++i) {
      if (!(side->base[i] < INFINITY)) side->leave_out(i);
    }
    std::fill_n(side->scaling, side->padded, 1.0f);
    std::copy_n(side->weight, side->padded, side->moved);
  }
}
