// One read of the kernel for both half-steps: the sums of four rows give their scalings, and with these the rows' part of
// the column sums, while they are still in the first cache. Four sums fill a quad (four lanes); in a vector of four row sums
// all quads are alike.
//
// A block of the kernel, of kWidth rows, is stored as its groups of four rows, one after the other; a group as its tiles of
// kWidth columns; and of a tile one row after the other.

constexpr int kGroup = 4, kGroups = kWidth / kGroup;

// Where a block of `width` columns has those from j on of row r.
template <class T>
DPDIFF_INLINE T* entry(T* block, int64_t width, int64_t j, int r) {
  return block + (r / kGroup * width + j) * kGroup + r % kGroup * kWidth;
}

#define DPDIFF_LANE(quad, lane) 4 * (quad) + (lane) % 4 + (lane) / 4 * kWidth
#define DPDIFF_QUAD(quad, a, b, c, d) \
  DPDIFF_LANE(quad, a), DPDIFF_LANE(quad, b), DPDIFF_LANE(quad, c), DPDIFF_LANE(quad, d)
#if DPDIFF_WIDTH == 16
#define DPDIFF_QUADS(a, b, c, d) \
  DPDIFF_QUAD(0, a, b, c, d), DPDIFF_QUAD(1, a, b, c, d), DPDIFF_QUAD(2, a, b, c, d), DPDIFF_QUAD(3, a, b, c, d)
#elif DPDIFF_WIDTH == 8
#define DPDIFF_QUADS(a, b, c, d) DPDIFF_QUAD(0, a, b, c, d), DPDIFF_QUAD(1, a, b, c, d)
#else
#define DPDIFF_QUADS(a, b, c, d) DPDIFF_QUAD(0, a, b, c, d)
#endif
// In each quad the lanes a, b, c, d: 0 to 3 of x, 4 to 7 of y.
#define DPDIFF_PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, DPDIFF_QUADS(a, b, c, d))

// Four numbers in each quad.
DPDIFF_INLINE vfloat load_quad(const float* p) {
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(DPDIFF_AVX2)
  return (vfloat)_mm256_broadcast_ps((const __m128*)p);
#else
  return load(p);
#endif
}
DPDIFF_INLINE void store_quad(float* p, vfloat v) { memcpy(p, &v, kGroup * sizeof(float)); }

// The sums of four vectors.
DPDIFF_INLINE vfloat sum_rows(const vfloat (&rows)[kGroup]) {
  const vfloat x = DPDIFF_PICK(rows[0], rows[1], 0, 4, 1, 5) + DPDIFF_PICK(rows[0], rows[1], 2, 6, 3, 7);
  const vfloat y = DPDIFF_PICK(rows[2], rows[3], 0, 4, 1, 5) + DPDIFF_PICK(rows[2], rows[3], 2, 6, 3, 7);
  return fold_quads(DPDIFF_PICK(x, y, 0, 1, 4, 5) + DPDIFF_PICK(x, y, 2, 3, 6, 7), Sum());
}

// How rows are scaled. The new scalings are kept beside the old ones.
struct RowUpdate {
  Rule rule;
  const float *weight, *pull, *moved, *target;
  float *sums, *next_scaling, *next_moved, *next_target;

  // Of four rows from i on: returns weight * scaling.
  DPDIFF_INLINE vfloat operator()(int64_t i, vfloat row_sums) const {
    vfloat scaled;
    const vfloat pulls = rule.relaxed ? load_quad(pull + i) : vfloat{};
    store_quad(next_scaling + i, rule.scale(load_quad(weight + i), row_sums, pulls, scaled));
    store_quad(sums + i, row_sums);
    store_quad(next_moved + i, scaled);
    return scaled;
  }

  // What is to be told of rows i to `end`, after their update.
  Totals review(int64_t i, int64_t end, bool wants_error) const {
    Totals totals;
    for (; i < end; i += kWidth) {
      const vfloat sum = load(sums + i);
      totals.restless |= rule.restless(load(weight + i), sum, load(next_scaling + i));
      if (rule.relaxed) store(next_target + i, load(next_moved + i) * sum);
      if (!wants_error) continue;
      const vfloat off = load(moved + i) * sum - load(target + i);
      totals.error += maximum(off, -off);
    }
    return totals;
  }
};

// The rows of `n_groups` groups of the kernel, from row i on: scales them and adds their part to the column sums. Of narrow
// kernels, kTiles wide, v (the columns' scaled weights) and the column sums stay in registers; kTiles = 0: any width.
template <int kTiles>
void sweep(const float* kernel, int64_t n_groups, int64_t width, const float* v, float* column_sums, const RowUpdate& given,
           int64_t i) {
  const RowUpdate update = given;  // what the stores below can't change
  vfloat v_held[kTiles + 1], sums_held[kTiles + 1];
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; ++t) {
    v_held[t] = load(v + t * kWidth);
    sums_held[t] = load(column_sums + t * kWidth);
  }
  for (int64_t group = 0; group < n_groups; ++group, i += kGroup, kernel += kGroup * width) {
    vfloat rows[kGroup] = {};
    if (kTiles > 0) {
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
        for (int r = 0; r < kGroup; ++r) rows[r] += load(kernel + (t * kGroup + r) * kWidth) * v_held[t];
      }
    } else {
      vfloat odd[kGroup] = {};
      int64_t j = 0;
      for (; j + 2 * kWidth <= width; j += 2 * kWidth) {
        const vfloat low = load(v + j), high = load(v + j + kWidth);
        const float* tiles = kernel + j * kGroup;
#pragma GCC unroll 4
        for (int r = 0; r < kGroup; ++r) {
          rows[r] += load(tiles + r * kWidth) * low;
          odd[r] += load(tiles + (kGroup + r) * kWidth) * high;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
        if (j < width) rows[r] += load(kernel + j * kGroup + r * kWidth) * load(v + j);
        rows[r] += odd[r];
      }
    }
    const vfloat scaled = update(i, sum_rows(rows));
    const vfloat u[kGroup] = {DPDIFF_PICK(scaled, scaled, 0, 0, 0, 0), DPDIFF_PICK(scaled, scaled, 1, 1, 1, 1),
                              DPDIFF_PICK(scaled, scaled, 2, 2, 2, 2), DPDIFF_PICK(scaled, scaled, 3, 3, 3, 3)};
    if (kTiles > 0) {
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 8
        for (int t = 0; t < kTiles; ++t) sums_held[t] += u[r] * load(kernel + (t * kGroup + r) * kWidth);
      }
    } else {
      for (int64_t j = 0; j < width; j += kWidth) {
        const float* tile = kernel + j * kGroup;
        const vfloat even = load(column_sums + j) + u[0] * load(tile) + u[2] * load(tile + 2 * kWidth);
        const vfloat odd = u[1] * load(tile + kWidth) + u[3] * load(tile + 3 * kWidth);
        store(column_sums + j, even + odd);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; ++t) store(column_sums + t * kWidth, sums_held[t]);
}

// The sweep for kernels of `width` columns.
inline decltype(&sweep<0>) choose_sweep(int64_t width) {
  switch (width / kWidth) {
    case 1: return sweep<1>;
    case 2: return sweep<2>;
    case 3: return sweep<3>;
    case 4: return sweep<4>;
#if defined(DPDIFF_AVX512)  // has 32 registers
    case 5: return sweep<5>;
    case 6: return sweep<6>;
    case 7: return sweep<7>;
    case 8: return sweep<8>;
#endif
    default: return sweep<0>;
  }
}

#undef DPDIFF_LANE
#undef DPDIFF_QUAD
#undef DPDIFF_QUADS
#undef DPDIFF_PICK
