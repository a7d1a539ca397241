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

// Of a quad, alike in all quads: each number in all lanes.
DPDIFF_INLINE void spread(vfloat quads, vfloat (&numbers)[kGroup]) {
  numbers[0] = DPDIFF_PICK(quads, quads, 0, 0, 0, 0);
  numbers[1] = DPDIFF_PICK(quads, quads, 1, 1, 1, 1);
  numbers[2] = DPDIFF_PICK(quads, quads, 2, 2, 2, 2);
  numbers[3] = DPDIFF_PICK(quads, quads, 3, 3, 3, 3);
}

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
      totals.error += absolute(off);
    }
    return totals;
  }
};

// The rows of `n_groups` groups of the kernel, from row i on: scales them and adds their part to the column sums.
template <class Update>
using Sweep = void(const float* kernel, int64_t n_groups, int64_t width, const float* v, float* column_sums,
                   const Update& update, int64_t i);

// The sweep for kernels kTiles wide, whose v (the columns' scaled weights) and column sums stay in registers. Row sums run a
// few groups ahead of column sums, so that neither waits for the scalings in between, nor both for memory.
template <class Update, int kTiles>
void sweep_narrow(const float* kernel, int64_t n_groups, int64_t, const float* v, float* column_sums, const Update& given,
                  int64_t i) {
  constexpr int kAhead = 4, kSize = kTiles * kGroup * kWidth;
  // Chains of dependent sums: of few tiles, several each.
  constexpr int kChains = kTiles <= 2 ? 4 : kTiles <= 4 && DPDIFF_WIDTH == 16 ? 2 : 1;
  // Loads that step by 2 KB from one turn of a loop to the next halve the rate of Zen 5's second cache; in a turn of several
  // groups each steps further (784 x 128: 2.8 -> 1.8 us).
  constexpr int kTurn = kSize * sizeof(float) == 2048 ? 8 : 1;
  const Update update = given;  // what the stores below can't change
  vfloat v_held[kTiles], sums[kTiles][kChains] = {};
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; ++t) {
    v_held[t] = load(v + t * kWidth);
    sums[t][0] = load(column_sums + t * kWidth);
  }
  const float *ahead = kernel, *u = update.next_moved + i;
  const auto step = [&](bool rows_too, bool columns_too) __attribute__((always_inline)) {
    vfloat rows[kGroup] = {};
#pragma GCC unroll 8
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
      for (int r = 0; rows_too && r < kGroup; ++r) rows[r] += load(ahead + (t * kGroup + r) * kWidth) * v_held[t];
#pragma GCC unroll 4
      for (int r = 0; columns_too && r < kGroup; ++r) {
        sums[t][r % kChains] += broadcast(u[r]) * load(kernel + (t * kGroup + r) * kWidth);
      }
    }
    if (columns_too) u += kGroup, kernel += kSize;
    if (rows_too) update(i, sum_rows(rows)), i += kGroup, ahead += kSize;
  };
  const int64_t first = std::min<int64_t>(kAhead, n_groups);
  int64_t rest = n_groups - first;
  for (int64_t k = 0; k < first; ++k) step(true, false);
  for (; rest >= kTurn; rest -= kTurn) {
#pragma GCC unroll 8
    for (int k = 0; k < kTurn; ++k) step(true, true);
  }
  for (; rest > 0; --rest) step(true, true);
  for (int64_t k = 0; k < first; ++k) step(false, true);
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
    for (int k = 1; k < kChains; ++k) sums[t][0] += sums[t][k];
    store(column_sums + t * kWidth, sums[t][0]);
  }
}

// The sweep for kernels of any width.
template <class Update>
void sweep_wide(const float* kernel, int64_t n_groups, int64_t width, const float* v, float* column_sums, const Update& given,
                int64_t i) {
  const Update update = given;
  for (int64_t group = 0; group < n_groups; ++group, i += kGroup, kernel += kGroup * width) {
    vfloat rows[kGroup] = {}, odd[kGroup] = {};
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
    vfloat u[kGroup];
    spread(update(i, sum_rows(rows)), u);
    for (int64_t j = 0; j < width; j += kWidth) {
      const float* tile = kernel + j * kGroup;
      const vfloat even = load(column_sums + j) + u[0] * load(tile) + u[2] * load(tile + 2 * kWidth);
      const vfloat odd = u[1] * load(tile + kWidth) + u[3] * load(tile + 3 * kWidth);
      store(column_sums + j, even + odd);
    }
  }
}

// The sweep for kernels of `width` columns.
template <class Update>
Sweep<Update>* choose_sweep(int64_t width) {
  switch (width / kWidth) {
    case 1: return sweep_narrow<Update, 1>;
    case 2: return sweep_narrow<Update, 2>;
    case 3: return sweep_narrow<Update, 3>;
    case 4: return sweep_narrow<Update, 4>;
#if defined(DPDIFF_AVX512)  // has 32 registers
    case 5: return sweep_narrow<Update, 5>;
    case 6: return sweep_narrow<Update, 6>;
    case 7: return sweep_narrow<Update, 7>;
    case 8: return sweep_narrow<Update, 8>;
#endif
    default: return sweep_wide<Update>;
  }
}

#undef DPDIFF_LANE
#undef DPDIFF_QUAD
#undef DPDIFF_QUADS
#undef DPDIFF_PICK
