// Costs between points, computed a tile at a time whenever they are read.

// Adds to sums (depth, kWidth), which has a row of the tile in each lane, what the tile makes of vectors (kWidth, depth):
// sums_dr += sum_j tile_rj vectors_jd. The tile comes transposed.
DPDIFF_INLINE void add_products(const Tile& transposed, const float* vectors, int64_t n, int64_t depth, float* sums) {
  for (int64_t d = 0; d < depth; ++d) {
    vfloat even = load(sums + d * kWidth), odd{};
    if (n >= kWidth) {
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; j += 2) {
        even += transposed[j] * vectors[j * depth + d];
        odd += transposed[j + 1] * vectors[(j + 1) * depth + d];
      }
    } else {
      for (int64_t j = 0; j < n; ++j) even += transposed[j] * vectors[j * depth + d];
    }
    store(sums + d * kWidth, even + odd);
  }
}

// Points (count, dim) as (tiles, dim, kWidth), kWidth of them side by side.
inline float* pack_points(const float* points, int64_t count, int64_t dim, Arena& arena) {
  float* packed = arena.take<float>(tiles_of(count) * kWidth * dim);
  std::fill_n(packed, tiles_of(count) * kWidth * dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    float* to = packed + i / kWidth * kWidth * dim + i % kWidth;
    for (int64_t d = 0; d < dim; ++d) to[d * kWidth] = points[i * dim + d];
  }
  return packed;
}

// Inner products of kWidth packed points with kWidth others.
DPDIFF_INLINE void inner_products(const float* x, const float* y, int64_t dim, Tile& products) {
  Tile sums;
  for (vfloat& v : sums) v = vfloat{};
  for (int64_t d = 0; d < dim; ++d) {
    const vfloat q = load(y + d * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) sums[r] += x[d * kWidth + r] * q;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r) products[r] = sums[r];
}

// Squared distances. Differences are squared rather than products subtracted: nothing cancels.
DPDIFF_INLINE void squared_distances(const float* x, const float* y, int64_t dim, Tile& distances) {
  Tile sums;
  for (vfloat& v : sums) v = vfloat{};
  for (int64_t d = 0; d < dim; ++d) {
    const vfloat q = load(y + d * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) {
      const vfloat apart = x[d * kWidth + r] - q;
      sums[r] += apart * apart;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r) distances[r] = sums[r];
}

struct PointsCost {
  static constexpr bool kStored = false;

  int64_t n, m, dim, width;
  bool cosine;
  const float *xs, *ys;  // packed

  PointsCost(const SinkhornPoints& points, int64_t n, int64_t m, Arena& arena)
      : n(n), m(m), dim(points.dim), width(tiles_of(m) * kWidth), cosine(points.cosine) {
    xs = checked(pack_points(points.x, n, dim, arena), n);
    ys = checked(pack_points(points.y, m, dim, arena), m);
  }

  // A point whose squared distances could overflow becomes NaN, and its costs with it: infinite ones would mean something.
  const float* checked(float* packed, int64_t count) const {
    for (int64_t tile = 0; tile < tiles_of(count); ++tile) {
      float* points = packed + tile * kWidth * dim;
      vfloat squares{};
      for (int64_t d = 0; d < dim; ++d) squares += load(points + d * kWidth) * load(points + d * kWidth);
      const vint bad = ~(squares < broadcast(8e37f));
      if (any(bad)) {
        for (int64_t d = 0; d < dim; ++d) store(points + d * kWidth, select(bad, broadcast(NAN), load(points + d * kWidth)));
      }
    }
    return packed;
  }

  struct Block {
    const PointsCost& cost;
    int64_t i;

    DPDIFF_INLINE void tile(int64_t j, Tile& c) const {
      const float *x = cost.xs + i * cost.dim, *y = cost.ys + j * cost.dim;
      if (cost.cosine) {
        inner_products(x, y, cost.dim, c);
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) c[r] = 1.0f - c[r];
      } else {
        squared_distances(x, y, cost.dim, c);
      }
      if (i + kWidth <= cost.n && j + kWidth <= cost.m) return;
      for (int64_t r = 0; r < kWidth; ++r) {
        if (i + r >= cost.n) c[r] = broadcast(INFINITY);
        for (int64_t lane = cost.m - j; lane < kWidth; ++lane) c[r][lane] = INFINITY;
      }
    }
  };

  Block block(int64_t i) const { return {*this, i}; }

  // A block's costs in scratch, laid out as the kernel.
  struct Rows {
    const float* costs;
    int64_t width;

    DPDIFF_INLINE vfloat load(int r, int64_t j, float = INFINITY) const { return load_first(entry(costs, width, j, r), kWidth, 0); }
  };
  Rows rows(int64_t i, float* scratch) const {
    for (int64_t j = 0; j < width; j += kWidth) {
      Tile c;
      block(i).tile(j, c);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(entry(scratch, width, j, r), c[r]);
    }
    return {scratch, width};
  }
};

// Takes the gradient of the cost, tile by tile, on to the points. The gradients of y are collected chunk by chunk of rows,
// as column sums are.
class PointsSink {
 public:
  // As many chunks as keep these parts below 16 MB.
  static int64_t most_chunks(int64_t m, int64_t dim) {
    return std::max<int64_t>((int64_t(1) << 22) / std::max<int64_t>(m * dim, 1), 1);
  }

  PointsSink(const PointsCost& cost, const SinkhornPoints& points, float* of_x, float* of_y, int64_t chunks, Arena& arena)
      : cost_(cost), x_(points.x), y_(points.y), of_x_(of_x), of_y_(of_y), chunks_(chunks) {
    const int64_t dim = cost.dim;
    row_parts_ = zeros(chunks * (dim + 1) * kWidth, arena);
    column_parts_ = zeros(chunks * (dim + 1) * cost.width, arena);
    std::fill_n(of_x, cost.n * dim, 0.0f);
  }

  DPDIFF_INLINE void add(int64_t chunk, int64_t i, int64_t j, const Tile& change) const {
    const int64_t dim = cost_.dim;
    float* to_y = column_part(chunk) + j * (dim + 1);
    const float* x = cost_.xs + i * dim;
    vfloat total = load(to_y + dim * kWidth);
    for (int r = 0; r < kWidth; ++r) total += change[r];
    store(to_y + dim * kWidth, total);
    for (int64_t d = 0; d < dim; ++d) {
      vfloat even = load(to_y + d * kWidth), odd{};
#pragma GCC unroll 8
      for (int r = 0; r < kWidth; r += 2) {
        even += change[r] * x[d * kWidth + r];
        odd += change[r + 1] * x[d * kWidth + r + 1];
      }
      store(to_y + d * kWidth, even + odd);
    }

    Tile transposed;
    for (int r = 0; r < kWidth; ++r) transposed[r] = change[r];
    transpose(transposed);
    float* to_x = row_part(chunk);
    add_products(transposed, y_ + j * dim, cost_.m - j, dim, to_x);
    total = load(to_x + dim * kWidth);
    for (int c = 0; c < kWidth; ++c) total += transposed[c];
    store(to_x + dim * kWidth, total);
  }

  // After the tiles of a block of rows.
  void end_block(int64_t chunk, int64_t i) const {
    float* sums = row_part(chunk);
    for (int64_t r = 0; r < kWidth && i + r < cost_.n; ++r) pull(sums + r, x_ + (i + r) * cost_.dim, of_x_ + (i + r) * cost_.dim);
    std::fill_n(sums, (cost_.dim + 1) * kWidth, 0.0f);
  }

  void finish() const {
    const int64_t floats = (cost_.dim + 1) * cost_.width;
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (int64_t i = 0; i < floats; ++i) column_parts_[i] += column_part(chunk)[i];
    }
    std::fill_n(of_y_, cost_.m * cost_.dim, 0.0f);
    for (int64_t j = 0; j < cost_.m; ++j) {
      pull(column_parts_ + j / kWidth * kWidth * (cost_.dim + 1) + j % kWidth, y_ + j * cost_.dim, of_y_ + j * cost_.dim);
    }
  }

 private:
  // From sum_j w_j q_j and sum_j w_j, for weights w of the costs between p and q_j.
  void pull(const float* sums, const float* p, float* to) const {
    const float total = sums[cost_.dim * kWidth];
    for (int64_t d = 0; d < cost_.dim; ++d) {
      const float sum = sums[d * kWidth];
      to[d] += cost_.cosine ? -sum : 2 * (total * p[d] - sum);
    }
  }
  static float* zeros(int64_t count, Arena& arena) {
    float* array = arena.take<float>(count);
    std::fill_n(array, count, 0.0f);
    return array;
  }
  float* row_part(int64_t chunk) const { return row_parts_ + chunk * (cost_.dim + 1) * kWidth; }
  float* column_part(int64_t chunk) const { return column_parts_ + chunk * (cost_.dim + 1) * cost_.width; }

  const PointsCost& cost_;
  const float *x_, *y_;
  float *of_x_, *of_y_;
  const int64_t chunks_;
  float* row_parts_;     // (chunks, dim + 1, kWidth): sum_j w_j y_j and sum_j w_j of the block at hand
  float* column_parts_;  // (chunks, tiles, dim + 1, kWidth)
};

// out (n, depth) = plan @ v
inline void apply_plan(const PointsCost& cost, const SinkhornApplied& applied, float* out, bool parallel) {
  const int64_t depth = applied.depth;
  std::vector<double> h_y(cost.width, -INFINITY);
  std::copy_n(applied.h_y, cost.m, h_y.begin());
  for_ranges(parallel, tiles_of(cost.n), [&](int64_t first, int64_t last) {
    Arena arena;
    float* sums = arena.take<float>(depth * kWidth);
    for (; first < last; ++first) {
      const int64_t i = first * kWidth, n_rows = std::min<int64_t>(kWidth, cost.n - i);
      const auto block = cost.block(i);
      std::fill_n(sums, depth * kWidth, 0.0f);
      for (int64_t j = 0; j < cost.width; j += kWidth) {
        Tile p;
        block.tile(j, p);
        for (int r = 0; r < kWidth; ++r) {
          const double h_x = r < n_rows ? applied.h_x[i + r] : -INFINITY;
          p[r] = bounded_exp2(exponent(h_x, &h_y[j], p[r], kLog2e / applied.eps));
        }
        transpose(p);
        add_products(p, applied.v + j * depth, cost.m - j, depth, sums);
      }
      for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t d = 0; d < depth; ++d) out[(i + r) * depth + d] = sums[d * kWidth + r];
      }
    }
  });
}
