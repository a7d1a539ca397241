// A cost that is computed from points whenever it is read, a block of kWidth rows at a time.

struct PointsCost {
  static constexpr bool kStored = false;

  int64_t n, m, dim, width;
  bool cosine;
  const float* rows;     // (tiles of n, dim, kWidth): the points x, kWidth of them side by side
  const float* columns;  // (dim, width): the points y

  PointsCost(const float* x, const float* y, int64_t n, int64_t m, int64_t dim, SinkhornMetric metric, Arena& arena)
      : n(n), m(m), dim(dim), width(tiles_of(m) * kWidth), cosine(metric == SinkhornMetric::cosine) {
    float* packed_rows = arena.take<float>(tiles_of(n) * kWidth * dim);
    float* packed_columns = arena.take<float>(width * dim);
    std::fill_n(packed_rows, tiles_of(n) * kWidth * dim, 0.0f);
    std::fill_n(packed_columns, width * dim, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const float scale = scale_of(x + i * dim);
      float* to = packed_rows + i / kWidth * kWidth * dim + i % kWidth;
      for (int64_t d = 0; d < dim; ++d) to[d * kWidth] = x[i * dim + d] * scale;
    }
    for (int64_t j = 0; j < m; ++j) {
      const float scale = scale_of(y + j * dim);
      for (int64_t d = 0; d < dim; ++d) packed_columns[d * width + j] = y[j * dim + d] * scale;
    }
    rows = packed_rows;
    columns = packed_columns;
  }

  // 1 / |point| for the cosine, 1 otherwise; NaN for a point that isn't finite, which makes its costs NaN.
  float scale_of(const float* point) const {
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) square += double(point[d]) * point[d];
    if (!(square < double(INFINITY))) return NAN;
    return cosine ? float(1 / std::max(::sqrt(square), 1e-12)) : 1.0f;
  }

  struct Block {
    const float* costs;  // (width / kWidth) tiles

    DPDIFF_INLINE void tile(int64_t j, Tile& c) const {
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) c[r] = load(costs + (j + r) * kWidth);
    }
  };

  int64_t scratch_floats() const { return width * kWidth; }

  // Differences are squared rather than products subtracted: nothing cancels.
  Block block(int64_t i, float* scratch) const {
    const float* x = rows + i * dim;
    for (int64_t j = 0; j < width; j += kWidth) {
      Tile c;
      for (vfloat& v : c) v = vfloat{};
      if (cosine) {
        for (int64_t d = 0; d < dim; ++d) {
          const vfloat y = load(columns + d * width + j);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) c[r] += x[d * kWidth + r] * y;
        }
        for (vfloat& v : c) v = 1.0f - v;
      } else {
        for (int64_t d = 0; d < dim; ++d) {
          const vfloat y = load(columns + d * width + j);
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) {
            const vfloat apart = x[d * kWidth + r] - y;
            c[r] += apart * apart;
          }
        }
      }
      for (int r = 0; r < kWidth; ++r) {
        if (i + r >= n) c[r] = broadcast(INFINITY);
        for (int64_t beyond = m - j; beyond < kWidth; ++beyond) c[r][beyond] = INFINITY;
        store(scratch + (j + r) * kWidth, c[r]);
      }
    }
    return {scratch};
  }
};
