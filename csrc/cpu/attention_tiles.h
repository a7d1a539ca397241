// What both directions of attention are made of. The lanes of vectors are queries: a block holds kLanes of them, scores
// and probabilities are matrices [prototype][query], and every product is a sum of outer products of kRows broadcast
// values with a few vectors, held in registers.
//
// An Engine is how numbers are multiplied. Its units, of 32 bits, are floats, or pairs of bfloat16 that are neighbours
// along the summed axis: channels for scores, then prototypes or queries. kRun units in a row are summed up, and then
// these sums: the roundings of one long sum would add up to more than in other libraries. An engine whose kInTiles is true
// multiplies in AMX's tiles, in steps of kSteps units.

#if defined(DPDIFF_AVX512)
constexpr int kRows = 8, kVectors = 3;
#elif defined(DPDIFF_AVX2)
constexpr int kRows = 4, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kLanes = kVectors * kWidth;
constexpr int kBlock = 128;  // prototypes whose scores are held at a time
constexpr int kGroup = 2 * kWidth;  // prototypes that are packed at a time

DPDIFF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct FloatEngine {
  typedef float Element;
  struct Setup {};
  static constexpr bool kInTiles = false;
  static constexpr int kTile = kRows, kPack = 1, kSteps = 1;  // rows in a tile, elements in a unit
  static constexpr int64_t kRun = 32;
  static DPDIFF_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return a * b + c; }
  static DPDIFF_INLINE vfloat add(vfloat sum, vfloat units) { return sum + units; }
  static DPDIFF_INLINE vfloat power_of_two(vfloat x) { return exp2(x); }
};

#if defined(DPDIFF_AVX512)
struct BFloat16Engine {
  typedef bfloat16 Element;
  struct Setup {};
  static constexpr bool kInTiles = false;
  static constexpr int kTile = kRows, kPack = 2, kSteps = 1;
  static constexpr int64_t kRun = 64;  // bfloat16 itself rounds far more
  static DPDIFF_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
    return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // Both numbers of each unit, as they are rounded: what they weigh is then normalised by what they sum up to.
  static DPDIFF_INLINE vfloat add(vfloat sum, vfloat units) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)units, (__m512bh)_mm512_set1_epi32(0x3f803f80));
  }
  // To 2^-13.5, relative: what follows is rounded to 2^-9.
  static DPDIFF_INLINE vfloat power_of_two(vfloat x) {
    const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
    vfloat p = broadcast(7.70664141e-2f);
    p = p * f + 2.27645680e-1f;
    p = p * f + 6.95116639e-1f;
    p = p * f + 1.0f;
    return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
  // Units of two neighbouring rows: the low halves from one, the high halves from the next.
  static DPDIFF_INLINE vfloat pair(vfloat low, vfloat high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vfloat)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  static DPDIFF_INLINE vfloat pair(const bfloat16* low, const bfloat16* high) {
    const __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
    const __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
    return (vfloat)_mm512_or_si512(l, _mm512_slli_epi32(h, 16));
  }
};
#endif

#if defined(DPDIFF_AMX)
struct BFloat16TileEngine : BFloat16Engine {
  typedef AmxTiles Setup;
  static constexpr bool kInTiles = true;
  static constexpr int kTile = 16, kSteps = 16;

  template <int Vectors>
  static DPDIFF_INLINE void multiply(
      int64_t steps, const float* a, int64_t a_step, int64_t a_row, const float* b, int64_t b_step, const float* start,
      float* c, int64_t c_row) {
    multiply_in_tiles<Vectors>(steps, a, a_step, a_row, b, b_step, start, c_row, c, c_row);
  }
};
#endif

// Runs a direction of attention on the engine for the problem's type and this processor.
template <template <class> class Direction, class Problem>
void run_on_engine(const Problem& problem, int64_t begin, int64_t end) {
#if defined(DPDIFF_AVX512)
  if (problem.dtype == DType::bfloat16 && bfloat16_as() == BFloat16As::pairs) {
    return Direction<BFloat16Engine>(problem).run(begin, end);
  }
#endif
#if defined(DPDIFF_AMX)
  if (problem.dtype == DType::bfloat16 && bfloat16_as() == BFloat16As::tiles) {
    return Direction<BFloat16TileEngine>(problem).run(begin, end);
  }
#endif
  Direction<FloatEngine>(problem).run(begin, end);
}

// Units that hold so many elements, in whole steps.
template <class Engine>
DPDIFF_INLINE int64_t units_of(int64_t elements) {
  return round_up((elements + Engine::kPack - 1) / Engine::kPack, Engine::kSteps);
}

// c[r][v] (+)= sum over k of a[k * a_step + r * a_row] * b[k * b_step + v], for kTile rows and Vectors vectors; in
// units of a and b, in runs of Run steps. The order of the sum doesn't depend on Vectors: scores come out the same in both
// directions. Engines with tiles want neighbouring units in rows of a, and a_step between every kSteps of them.
template <class Engine, int Vectors, bool Accumulate, int64_t Run>
DPDIFF_INLINE void multiply_tile(
    int64_t steps, const float* a, int64_t a_step, int64_t a_row, const float* b, int64_t b_step, float* c,
    int64_t c_row) {
  if constexpr (Engine::kInTiles) {
    return Engine::template multiply<Vectors>(steps, a, a_step, a_row, b, b_step, Accumulate ? c : nullptr, c, c_row);
  }
  bool accumulate = Accumulate;
  do {
    vfloat sums[kRows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[r][v] = vfloat{};
    }
    for (int64_t k = smaller(Run, steps); k > 0; --k, a += a_step, b += b_step) {
      vfloat columns[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sums[r][v] = Engine::multiply_add(broadcast(a[r * a_row]), columns[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) {
        float* at = c + r * c_row + v * kWidth;
        store(at, accumulate ? load(at) + sums[r][v] : sums[r][v]);
      }
    }
    accumulate = true, steps -= Run;
  } while (steps > 0);
}

// Scores of a tile of prototypes, as pack_bank leaves it, with columns.
template <class Engine, int Vectors>
DPDIFF_INLINE void score_tile(int64_t units, const float* tile, const float* columns, float* scores) {
  const int64_t step = Engine::kInTiles ? Engine::kSteps : kRows, row = Engine::kInTiles ? units : 1;
  multiply_tile<Engine, Vectors, false, Engine::kRun>(units, tile, step, row, columns, kLanes, scores, kLanes);
}

// Adds to sums of channels [e, e + kTile), [channel][lane], those of the rows of a bank, as pack_bank leaves them, times
// weights in units of prototypes.
template <class Engine, int Vectors, bool Accumulate, int64_t Run>
DPDIFF_INLINE void weigh_tile(
    int64_t steps, const float* rows, int64_t padded, int64_t e, const float* weights, int64_t weights_step, float* sums) {
  const float* a = rows + e * Engine::kSteps;
  const int64_t step = padded * Engine::kSteps, row = Engine::kSteps;
  multiply_tile<Engine, Vectors, Accumulate, Run>(steps, a, step, row, weights, weights_step, sums + e * kLanes, kLanes);
}

// Weights after those of `count` prototypes, zero to the end of a step: no number of theirs may reach the sums.
template <class Engine>
DPDIFF_INLINE void clear_steps(int64_t count, float* weights) {
  const int64_t units = (count + Engine::kPack - 1) / Engine::kPack;
  memset(weights + units * kLanes, 0, (units_of<Engine>(count) - units) * kLanes * sizeof(float));
}

// Scores lane by lane of a with b, both as columns, a as rows too: the sums of score_tile, in the same order.
template <class Engine>
DPDIFF_INLINE vfloat lane_scores(int64_t units, const float* rows, const float* a, const float* b) {
  if constexpr (Engine::kInTiles) {
    alignas(64) float all[Engine::kTile][kWidth];
    float own[kWidth];
    Engine::template multiply<1>(units, rows, Engine::kSteps, units, b, kLanes, nullptr, all[0], kWidth);
    for (int i = 0; i < kWidth; ++i) own[i] = all[i][i];
    return load(own);
  }
  vfloat scores{};
  for (int64_t first = 0; first < units; first += Engine::kRun) {
    vfloat sum{};
    for (int64_t u = first; u < smaller(first + Engine::kRun, units); ++u) {
      sum = Engine::multiply_add(load(a + u * kLanes), load(b + u * kLanes), sum);
    }
    scores = first == 0 ? sum : scores + sum;
  }
  return scores;
}

template <typename T>
DPDIFF_INLINE void load_row(const T* from, int64_t n, float* to) {
  int64_t e = 0;
  for (; e + kWidth <= n; e += kWidth) store(to + e, load(from + e));
  for (; e < n; ++e) to[e] = to_float(from[e]);
}
template <typename T>
DPDIFF_INLINE void store_row(const float* from, int64_t n, T* to, bool streamed) {
  int64_t e = 0;
  if (streamed && reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(T)) == 0) {
    for (; e + kWidth <= n; e += kWidth) stream(to + e, load(from + e));
  }
  for (; e + kWidth <= n; e += kWidth) store(to + e, load(from + e));
  for (; e < n; ++e) to[e] = from_float<T>(from[e]);
}

// n channels of any type from or to memory, as floats.
inline void load_row(DType dtype, const void* from, int64_t n, float* to) {
  switch (dtype) {
    case DType::float32: return load_row(static_cast<const float*>(from), n, to);
    case DType::float16: return load_row(static_cast<const float16*>(from), n, to);
    case DType::bfloat16: return load_row(static_cast<const bfloat16*>(from), n, to);
  }
}
inline void store_row(DType dtype, const float* from, int64_t n, void* to, bool streamed = false) {
  switch (dtype) {
    case DType::float32: return store_row(from, n, static_cast<float*>(to), streamed);
    case DType::float16: return store_row(from, n, static_cast<float16*>(to), streamed);
    case DType::bfloat16: return store_row(from, n, static_cast<bfloat16*>(to), streamed);
  }
}

// A row as the engine's elements, zeros after it up to `padded` channels; null: all zeros.
DPDIFF_INLINE void copy_row(DType dtype, const void* from, int64_t channels, float* to, int64_t padded) {
  const int64_t n = from == nullptr ? 0 : channels;
  load_row(dtype, from, n, to);
  for (int64_t e = n; e < padded; ++e) to[e] = 0;
}
DPDIFF_INLINE void copy_row(DType, const void* from, int64_t channels, bfloat16* to, int64_t padded) {
  const int64_t n = from == nullptr ? 0 : channels;
  if (n > 0) memcpy(to, from, n * sizeof(bfloat16));
  for (int64_t e = n; e < padded; ++e) to[e] = bfloat16{0};
}

// rows [kLanes][ld] of units -> columns [units][kLanes], for the first `vectors` vectors of lanes.
DPDIFF_INLINE void transpose_rows(const float* rows, int64_t ld, int64_t units, int vectors, float* columns) {
  for (int v = 0; v < vectors; ++v) {
    for (int64_t u = 0; u < units; u += kWidth) {
      vfloat square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(rows + (v * kWidth + i) * ld + u);
      transpose(square);
      const int64_t n = smaller(kWidth, units - u);
      for (int64_t i = 0; i < n; ++i) store(columns + (u + i) * kLanes + v * kWidth, square[i]);
    }
  }
}

// columns [channels][kLanes] of floats, times a factor for each lane -> rows [kWidth][ld], for vector v of the lanes.
DPDIFF_INLINE void transpose_columns(const float* columns, int64_t channels, int v, vfloat factor, float* rows, int64_t ld) {
  for (int64_t e = 0; e < channels; e += kWidth) {
    vfloat square[kWidth];
    const int64_t n = smaller(kWidth, channels - e);
    for (int64_t i = 0; i < kWidth; ++i) square[i] = i < n ? load(columns + (e + i) * kLanes + v * kWidth) * factor : vfloat{};
    transpose(square);
    for (int i = 0; i < kWidth; ++i) store(rows + i * ld + e, square[i]);
  }
}

// rows [kWidth][ld] of units -> tiles [kWidth / kRows][units][kRows], whose values multiply_tile broadcasts.
DPDIFF_INLINE void tile_rows(const float* rows, int64_t ld, int64_t units, float* tiles) {
  for (int64_t u = 0; u < units; u += kWidth) {
    vfloat square[kWidth];
    for (int i = 0; i < kWidth; ++i) square[i] = load(rows + i * ld + u);
    transpose(square);
    const int64_t n = smaller(kWidth, units - u);
    for (int64_t i = 0; i < n; ++i) {
      float column[kWidth];
      store(column, square[i]);
      for (int t = 0; t < kWidth / kRows; ++t) memcpy(tiles + (t * units + u + i) * kRows, column + t * kRows, sizeof(float) * kRows);
    }
  }
}

// rows [n][padded] of elements -> [n / kPack][padded] of units of neighbouring rows; n is even.
template <class Engine>
DPDIFF_INLINE void pack_rows(const typename Engine::Element* rows, int64_t n, int64_t padded, float* units) {
  if constexpr (Engine::kPack == 1) {
    memcpy(units, rows, n * padded * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; i += 2) {
      for (int64_t e = 0; e < padded; e += kWidth) {
        store(units + i / 2 * padded + e, Engine::pair(rows + i * padded + e, rows + (i + 1) * padded + e));
      }
    }
  }
}

// An instance of the banks: which prototypes one image and head see, in the order in which they are packed: the local
// ones, and, from `second` on, the global ones. Each softmax covers a range of them, which starts with a group.
struct BankView {
  const AttentionProblem& problem;
  int64_t image, head, local_count, second, total;

  BankView(const AttentionProblem& p, int64_t image, int64_t head)
      : problem(p), image(image), head(head), local_count(p.local_count(image)),
        second(p.gate != nullptr ? round_up(local_count, kGroup) : local_count), total(second + p.global.count) {}

  int softmaxes() const { return problem.gate != nullptr ? 2 : 1; }
  int64_t begin(int softmax) const { return softmax == 0 ? 0 : second; }
  int64_t end(int softmax) const { return softmax == 0 && softmaxes() == 2 ? local_count : total; }
  int64_t local_row(int64_t i) const { return problem.routed() ? problem.active[problem.offsets[image] + i] : i; }

  // Where a token of the instance is: its image, its place there, and both with the head as one number.
  int64_t image_of(int64_t token) const { return problem.folded() ? token / problem.tokens : image; }
  int64_t place_of(int64_t token) const { return problem.folded() ? token % problem.tokens : token; }
  int64_t flat(int64_t of_image, int64_t place) const {
    return (of_image * problem.heads + head) * problem.tokens + place;
  }

  // So many of them at a time, about.
  int64_t tiles(int64_t prototypes) const { return total / prototypes + 1; }

  // Row i of the keys or of the values; null where there is only padding.
  const void* row(Rows Bank::*part, int64_t i) const {
    if (i < local_count) return (problem.local.*part).at(image, head, local_row(i));
    if (i >= second && i < total) return (problem.global.*part).at(image, head, i - second);
    return nullptr;
  }
};

// Room for the packed prototypes of any instance.
inline int64_t packed_count(const AttentionProblem& problem) {
  int64_t local = problem.routed() ? 0 : problem.local.count;
  for (int64_t image = 0; image < problem.batch; ++image) local = std::max(local, problem.local_count(image));
  return round_up(round_up(local, kGroup) + problem.global.count, kGroup);
}

// Packs one part of a bank: in tiles whose rows are prototypes and steps are channels, for products with queries, and
// as rows of channels, for products with probabilities; either may be null. With an engine of tiles the former are plain
// rows of prototypes, and the latter, for each group of prototypes, its kSteps units of each channel.
template <class Engine>
void pack_bank(const BankView& bank, Rows Bank::*part, int64_t padded, float* stage, float* tiles, float* rows) {
  typedef typename Engine::Element Element;
  const int64_t channels = bank.problem.channels;
  const int64_t units = units_of<Engine>(channels), ld = padded / Engine::kPack;
  Element* staged = reinterpret_cast<Element*>(stage);
  for (int64_t i = 0; i < bank.total; i += kGroup) {
    for (int64_t j = 0; j < kGroup; ++j) {
      copy_row(bank.problem.dtype, bank.row(part, i + j), channels, staged + j * padded, padded);
    }
    float* own_rows = rows == nullptr ? nullptr : rows + i / Engine::kPack * padded;
    if constexpr (Engine::kInTiles) {
      if (tiles != nullptr) memcpy(tiles + i * units, stage, kGroup * units * sizeof(float));
      for (int64_t e = 0; own_rows != nullptr && e < padded; e += kWidth) {
        vfloat square[kWidth];
        for (int j = 0; j < kWidth; ++j) {
          const Element* pair = staged + 2 * j * padded + e;
          square[j] = Engine::pair(pair, pair + padded);
        }
        transpose(square);
        for (int j = 0; j < kWidth; ++j) store(own_rows + (e + j) * kWidth, square[j]);
      }
    } else {
      for (int64_t j = 0; tiles != nullptr && j < kGroup; j += kWidth) {
        tile_rows(stage + j * ld, ld, units, tiles + (i + j) * units);
      }
      if (own_rows != nullptr) pack_rows<Engine>(staged, kGroup, padded, own_rows);
    }
  }
}

// Fetches the rows of a run of tokens into the cache while others are being multiplied: a few at each of `steps` steps,
// as memory takes hundreds of cycles, and only some fetches can be under way at once.
class Ahead {
 public:
  Ahead(const BankView& bank, int64_t first, int64_t last, int64_t steps)
      : bank_(bank), next_(first), last_(last), a_step_((last - first + steps - 1) / steps),
        bytes_(bank.problem.channels * (bank.problem.dtype == DType::float32 ? 4 : 2)) {}

  // Of those tensors that have data.
  DPDIFF_INLINE void step(std::initializer_list<const Rows*> tensors) {
    for (const int64_t end = smaller(next_ + a_step_, last_); next_ < end; ++next_) {
      const int64_t image = bank_.image_of(next_), place = bank_.place_of(next_);
      for (const Rows* rows : tensors) {
        if (rows->data == nullptr) continue;
        const char* row = static_cast<const char*>(rows->at(image, bank_.head, place));
        for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(row + b, 0, 2);
      }
    }
  }

 private:
  const BankView& bank_;
  int64_t next_;
  const int64_t last_, a_step_, bytes_;
};
