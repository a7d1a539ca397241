// The search itself: screen, shortlist, score the shortlist exactly. Included by nearest_kernels.h.
//
// Screening computes every key with an error of at most `error`, which is proven there. A prototype whose
// key plus error stays below the k-th best of the keys minus their errors can't be among the k best; all others are
// scored in double. So the answer is exact whatever the screening's precision, and where no bound can be given (NaN,
// overflow) the error is infinite and everything is scored in double.

// Bit j is set where v[j] < limit does not hold.
DPDIFF_INLINE uint32_t lanes_not_below(vfloat v, float limit) {
#if defined(DPDIFF_AVX512)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_NLT_UQ);
#elif defined(DPDIFF_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_NLT_UQ));
#else
  uint32_t lanes = 0;
  for (int j = 0; j < kWidth; ++j) lanes |= uint32_t(!(v[j] < limit)) << j;
  return lanes;
#endif
}

// What was found for a token so far is better where its score is, NaN before all, and at equal scores the lower index.
struct Match {
  double goodness;
  int64_t index;
};
constexpr Match kNoMatch = {-INFINITY, INT64_MAX};
DPDIFF_INLINE bool better(const Match& a, const Match& b) {
  const bool a_nan = a.goodness != a.goodness, b_nan = b.goodness != b.goodness;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.index < b.index);
  return a.goodness > b.goodness || (a.goodness == b.goodness && a.index < b.index);
}

// Searches one bank for blocks of tokens.
template <typename T, class Screen>
class Search {
 public:
  typedef typename Screen::Element Element;
  typedef typename Screen::Vector Vector;

  // decide: a candidate that is left alone is the match, with a goodness that means nothing. Only where the bank holds
  // all prototypes, k = 1, and indices alone are wanted.
  Search(const Bank<T, Screen>& bank, int64_t k, bool decide)
      : bank_(bank),
        k_(k),
        decide_(decide),
        rows_(kBlock * bank.stride()),
        shortlists_(kBlock * kShortlist),
        lows_(kBlock * k) {}

  // Tokens in a block: what fits the second-level cache beside a panel, a whole number of tiles, at most kBlock.
  static int64_t block(int64_t d) {
    const int64_t fitting = (256 << 10) / (sizeof(Element) * (d / Screen::kChannels + 1));
    return std::max<int64_t>(1, std::min<int64_t>(kBlock, fitting) / Screen::kRows) * Screen::kRows;
  }

  // Improves the k best matches of each of n tokens, n <= block(d), by this bank's prototypes.
  void run(const T* tokens, int64_t n, Match* matches) {
    tokens_ = tokens;
    matches_ = matches;
    for (int64_t i = 0; i < round_up(n, Screen::kRows); ++i) prepare(i, i < n);
    for (int64_t panel = 0; panel < bank_.n_panels; ++panel) {
      bound_errors(panel, round_up(n, Screen::kRows));
      const int64_t vectors = round_up(bank_.size(panel), kWidth) / kWidth;
      for (int64_t i = 0; i < n; i += Screen::kRows) {
        if (vectors == 1) score_tile<1>(panel, i);
        if (vectors == 2) score_tile<2>(panel, i);
        if (kTileVectors > 2 && vectors == 3) score_tile<3>(panel, i);
        if (kTileVectors > 2 && vectors == 4) score_tile<4>(panel, i);
      }
    }
    for (int64_t i = 0; i < n; ++i) prune(i);
    for (int64_t i = 0; i < n; ++i) {
      if (i + 1 < n && sizes_[i + 1] > 0) prefetch(shortlists_[(i + 1) * kShortlist].i);
      settle(i);
    }
  }

 private:
  static constexpr int64_t kBlock = 96;
  static constexpr int64_t kShortlist = 64;

  struct Candidate {
    float upper;  // bound of its key
    int32_t i;    // in the bank
  };

  void prepare(int64_t i, bool exists) {
    sizes_[i] = 0;
    lowest_[i] = -INFINITY;
    std::fill_n(lows_ + i * k_, k_, -INFINITY);
    Element* row = rows_ + i * bank_.stride();
    searching_[i] = exists && pack(i, row);
    if (searching_[i]) return;
    std::fill_n(row, bank_.stride(), Element{});
    lengths_[i] = remainders_[i] = 0;
    lowest_[i] = INFINITY;  // no key reaches it
  }

  // Packs a token, or matches it at once and returns false where all its scores are the same: NaN, or zero.
  bool pack(int64_t i, Element* row) {
    const T* x = tokens_ + i * bank_.d;
    const bool cosine = bank_.metric == Metric::cosine;
    float scale = 1;
    if (cosine) {
      norms_[i] = vector_norm(x, bank_.d);
      scale = norms_[i] == 0 ? 0 : float(1 / norms_[i]);
    }
    const Packed packed = Screen::pack(x, scale, bank_.metric == Metric::dot ? nullptr : bank_.centre(), bank_.d, row);
    const bool all_nan = cosine ? norms_[i] - norms_[i] != 0 : packed.square != packed.square;
    const bool all_zero = cosine ? norms_[i] == 0 : bank_.metric == Metric::dot && packed.square == 0 && is_zero(x);
    if (all_nan || (all_zero && bank_.finite)) {
      for (int64_t j = 0; j < std::min(k_, bank_.n); ++j) insert(i, {all_nan ? NAN : 0.0, bank_.row(j)});
      return false;
    }
    const float underflow = sqrtf(float(bank_.d)) * 0x1p-63f;  // what the squares may have lost
    const float length = 1.0001f * sqrtf(packed.square) + underflow;
    remainders_[i] = 1.0001f * sqrtf(packed.remainder) + underflow;
    if (bank_.metric != Metric::dot) remainders_[i] += 0x1p-22f * (length + (cosine ? 1 : 0));  // scaling and centring
    lengths_[i] = length + remainders_[i];
    if (cosine && !(scale > 1e-30f && scale < 1e30f)) lengths_[i] = INFINITY;
    return true;
  }

  bool is_zero(const T* x) const {
    return std::all_of(x, x + bank_.d, [](T value) { return to_float(value) == 0; });
  }

  // The largest error of each token's keys in this panel.
  void bound_errors(int64_t panel, int64_t n) {
    const PanelBounds bounds = bank_.bounds(panel);
    for (int64_t i = 0; i < n; ++i) {
      const bool in_range = lengths_[i] * (bounds.norm + bounds.remainder) + bounds.bias < 1e38f;
      errors_[i] = in_range ? error(lengths_[i], remainders_[i], bounds.norm, bounds.remainder, bounds.bias) : INFINITY;
      limits_[i] = lowest_[i] - errors_[i];
    }
  }

  // Bounds the error of a key: what packing lost, by Cauchy and Schwarz, plus d + 8 roundings of partial sums, plus
  // underflow. 1.001 covers the roundings of the norms and of this formula.
  template <typename Float>
  DPDIFF_INLINE Float error(float length, float lost, Float p_norm, Float p_lost, Float bias) const {
    const float rounding = float(bank_.d + 8) * Screen::kRounding, underflow = float(bank_.d + 2) * 0x1p-125f;
    const Float p_length = p_norm + p_lost;
    return 1.001f * (length * p_lost + lost * p_norm + rounding * (length * p_length + bias) +
                     underflow * ((1 + length) + p_length));
  }

  template <int kVectors>
  void score_tile(int64_t panel, int64_t first) {
    const int64_t depth = bank_.depth, stride = bank_.stride();
    const Element* a = rows_ + first * stride;
    const Element* b = bank_.elements(panel);
    if constexpr (Screen::kInTiles) {
      alignas(64) float rows[Screen::kRows][kVectors * kWidth];
      Screen::template score<kVectors>(depth, a, stride, b, bank_.biases(panel), rows[0]);
      for (int r = 0; r < Screen::kRows; ++r) {
        vfloat keys[kVectors];
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) keys[v] = load(rows[r] + v * kWidth);
        take_in(first + r, panel, keys);
      }
      return;
    }
    vfloat keys[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) keys[r][v] = load(bank_.biases(panel) + v * kWidth);
    }
    for (int64_t t = 0; t < depth; ++t, b += kVectors * kWidth) {
      Vector p[kVectors];
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) memcpy(&p[v], b + v * kWidth, sizeof p[v]);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const Vector x = a[r * stride + t] - Vector{};
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) keys[r][v] = Screen::multiply_add(keys[r][v], x, p[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) take_in(first + r, panel, keys[r]);
  }

  template <int kVectors>
  DPDIFF_INLINE void take_in(int64_t i, int64_t panel, const vfloat (&keys)[kVectors]) {
    uint32_t reached = 0;
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) reached |= lanes_not_below(keys[v], limits_[i]);
    if (__builtin_expect(reached != 0, 0)) {
      float row[kVectors * kWidth];
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) store(row + v * kWidth, keys[v]);
      shortlist(i, panel, row);
    }
  }

  // Takes in what of a token's keys against one panel may be among the k best, by each prototype's own bound: one long
  // prototype makes that of its panel a loose one.
  __attribute__((noinline)) void shortlist(int64_t i, int64_t panel, const float* keys) {
    if (!searching_[i]) return;
    const int64_t size = bank_.size(panel);
    float lows[kPanel], uppers[kPanel];
    vfloat best = broadcast(-INFINITY);
    for (int64_t j = 0; j < size; j += kWidth) {
      const vfloat key = load(keys + j), bias = load(bank_.biases(panel) + j);
      vfloat bound = broadcast(errors_[i]);
      if (errors_[i] < INFINITY) {
        bound = error(lengths_[i], remainders_[i], load(bank_.lengths(panel) + j), load(bank_.remainders(panel) + j),
                      absolute(bias));
      }
      store(lows + j, key - bound);
      store(uppers + j, key + bound);
      best = maximum(best, key - bound);
    }
    float lowest = lowest_[i];
    if (k_ == 1) lowest = std::max(lowest, reduce_max(best));  // raises the limit once for the whole panel
    for (int64_t j = 0; j < size; j += kWidth) {
      for (uint32_t lanes = lanes_not_below(load(uppers + j), lowest); lanes != 0; lanes &= lanes - 1) {
        const int64_t lane = j + __builtin_ctz(lanes);
        if (uppers[lane] < lowest || lane >= size) continue;
        if (k_ > 1) lowest = enter_low(lows_ + i * k_, lows[lane]);
        lowest_[i] = lowest;
        if (sizes_[i] == kShortlist) make_room(i);
        shortlists_[i * kShortlist + sizes_[i]++] = {uppers[lane], int32_t(panel * kPanel + lane)};
      }
    }
    limits_[i] = lowest - errors_[i];
  }

  // Inserts into the descending k best, and returns the k-th.
  float enter_low(float* lows, float low) const {
    int64_t place = k_;
    for (; place > 0 && lows[place - 1] < low; --place) {
      if (place < k_) lows[place] = lows[place - 1];
    }
    if (place < k_) lows[place] = low;
    return lows[k_ - 1];
  }

  void make_room(int64_t i) {
    prune(i);
    if (sizes_[i] > kShortlist / 2) settle(i);
  }

  void prune(int64_t i) {
    Candidate* candidates = shortlists_ + i * kShortlist;
    int32_t kept = 0;
    for (int32_t c = 0; c < sizes_[i]; ++c) {
      if (!(candidates[c].upper < lowest_[i])) candidates[kept++] = candidates[c];
    }
    sizes_[i] = kept;
  }

  void settle(int64_t i) {
    const T* x = tokens_ + i * bank_.d;
    const Candidate* candidates = shortlists_ + i * kShortlist;
    if (decide_ && sizes_[i] == 1 && matches_[i].index == kNoMatch.index) {
      matches_[i] = {0, bank_.row(candidates[0].i)};
      sizes_[i] = 0;
    }
    for (int32_t c = 0; c < sizes_[i]; ++c) {
      const int64_t j = candidates[c].i;
      if (c + 1 < sizes_[i]) prefetch(candidates[c + 1].i);
      insert(i, {goodness(x, norms_[i], bank_.prototype(j), bank_.norm(j), bank_.d, bank_.metric), bank_.row(j)});
    }
    sizes_[i] = 0;
  }

  void prefetch(int64_t i) const {
    const char* row = reinterpret_cast<const char*>(bank_.prototype(i));
    for (size_t byte = 0; byte < bank_.d * sizeof(T); byte += 64) __builtin_prefetch(row + byte);
  }

  void insert(int64_t i, Match match) {
    Match* matches = matches_ + i * k_;
    if (!better(match, matches[k_ - 1])) return;
    int64_t place = k_ - 1;
    for (; place > 0 && better(match, matches[place - 1]); --place) matches[place] = matches[place - 1];
    matches[place] = match;
  }

  typename Screen::Setup setup_;
  const Bank<T, Screen>& bank_;
  const int64_t k_;
  const bool decide_;
  const T* tokens_ = nullptr;
  Match* matches_ = nullptr;
  Buffer<Element> rows_;          // the block's tokens, packed
  Buffer<Candidate> shortlists_;  // kShortlist for each token
  Buffer<float> lows_;            // for each token the k best lower bounds of keys, descending; not used for k = 1
  // for each token of the block
  bool searching_[kBlock];
  int32_t sizes_[kBlock];      // of the shortlist
  double norms_[kBlock];       // |x|
  float lengths_[kBlock];      // bound of the packed token's norm
  float remainders_[kBlock];   // bound of the norm of what packing lost
  float errors_[kBlock];       // bound of its keys' errors in the current panel
  float lowest_[kBlock];       // the k-th best lower bound of a key
  float limits_[kBlock];       // lowest_ - errors_: what a key must reach
};
