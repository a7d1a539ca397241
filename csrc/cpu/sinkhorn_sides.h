// The two sides of a problem: its rows and its columns, with the potentials and scalings of each.

// K is without what is below 2^-126: with phi psi <= 2^80 that is an error of 2^-46 relative to the sums.
constexpr float kMostProduct = 0x1p80f, kMostScaling = 0x1p60f, kLeastScaling = 0x1p-60f;
constexpr float kTimid = 0x1p-40f, kBold = 0x1p40f;  // scalings between these need no second look
constexpr float kLeastSum = 0x1p-96f;                // relative to the sum of the other side's scaled weights
constexpr float kMostMass = 0x1p16f;                 // such that sums of calm scalings can't be below kLeastSum

// What a half-step finds out on its way, of what carries weight.
struct Totals {
  vfloat error;   // |marginal - target|, before the update
  vint restless;  // where a sum or a scaling isn't calm

  Totals() : error{}, restless{} {}  // spelled out: GCC compiles implicit ones for the wrong target
  DPDIFF_INLINE void include(const Totals& other) {
    error += other.error;
    restless |= other.restless;
  }
};

// The least and the greatest of positive numbers.
struct Extent {
  vfloat low, high;

  Extent() : low(broadcast(INFINITY)), high{} {}
  DPDIFF_INLINE void include(vfloat x, vint where) {
    low = minimum(low, select(where, x, broadcast(INFINITY)));
    high = maximum(high, select(where, x, vfloat{}));
  }
  float least() const { return -reduce_max(-low); }
  float greatest() const { return reduce_max(high); }
};

// The rule by which sums become scalings: their inverse, or a power of it where the marginal is relaxed.
struct Rule {
  bool relaxed;
  float damp;

  // The scalings; sets weight * scaling.
  DPDIFF_INLINE vfloat scale(vfloat weight, vfloat sums, vfloat pull, vfloat& moved) const {
    const vfloat s = relaxed ? inverse_power(maximum(sums, broadcast(kTiny)), damp) * pull : 1.0f / sums;
    moved = select(weight > vfloat{}, weight * s, vfloat{});
    return s;
  }

  // Whether a scaling, or a sum that it doesn't tell of, is beyond [kTimid, kBold], or NaN, where there is weight.
  DPDIFF_INLINE vint restless(vfloat weight, vfloat sums, vfloat scaling) const {
    vint calm = (scaling >= broadcast(kTimid)) & (scaling <= broadcast(kBold));
    if (relaxed) calm &= (sums >= broadcast(kTimid)) & (sums <= broadcast(kBold));
    return (weight > vfloat{}) & ~calm;
  }
};

// The rows or the columns, padded to whole tiles with weights of zero.
struct Side {
  int64_t n, padded;
  double tau, damp;
  const float* given;   // weights
  float* weight;        // the same, but zero where nothing reaches
  uint8_t* unreached;
  double* base;         // f0, g0
  float* pull;          // relaxed: exp(-base / (tau + eps))
  float* sums;          // of the kernel and the other side's scaled weights
  float* scaling;       // phi, psi
  float* moved;         // weight * scaling
  float* target;        // of the marginal: the weight, or weight exp(-potential / tau)
  double mass = 0;      // sum of the given weights
  double stranded = 0;  // what of it nothing reaches; a relaxed marginal just leaves that
  bool has_zeros = false;

  Side(int64_t n, const float* weights, double tau, double eps, Arena& arena)
      : n(n), padded(tiles_of(n) * kWidth), tau(tau), damp(relaxed() ? tau / (tau + eps) : 1.0), given(weights) {
    weight = floats(arena);
    unreached = arena.take<uint8_t>(padded);
    base = arena.take<double>(padded);
    pull = floats(arena);
    sums = floats(arena);
    scaling = floats(arena);
    moved = floats(arena);
    target = floats(arena);
    std::fill_n(unreached, padded, 0);
    std::fill_n(base, padded, 0.0);
    std::copy_n(weights, n, weight);
    std::copy_n(weights, n, target);
  }

  bool relaxed() const { return tau < INFINITY; }
  Rule rule() const { return {relaxed(), float(damp)}; }

  // False where a weight has no meaning.
  bool check() {
    LaneSums sums;
    vint good = ~vint{}, zeros{};
    for (int64_t i = 0; i < padded; i += kWidth) {
      const vfloat some = load_first(given + i, n - i, 1.0f);
      good &= (some >= vfloat{}) & (some < broadcast(INFINITY));
      zeros |= some == vfloat{};
      sums.add(load(weight + i));
    }
    mass = sums.total();
    has_zeros = any(zeros);
    return !any(~good);
  }

  void leave_out(int64_t i) {
    base[i] = 0;
    unreached[i] = 1;
    if (!relaxed()) stranded += weight[i];
    weight[i] = target[i] = 0;
  }

  // The extents of the scalings, and whether the sums, of kernels at most 1 times weights of `carried` in all, are right to
  // float32.
  bool trusted(float carried, Extent& scalings) const {
    Extent all;
    vint wrong{};  // where a sum is too large, or NaN, which extents pass over
    for (int64_t i = 0; i < padded; i += kWidth) {
      const vint present = load(weight + i) > vfloat{};
      const vfloat sum = load(sums + i);
      wrong |= present & ~(sum < broadcast(0x1p120f));
      all.include(sum, present);
      scalings.include(load(scaling + i), present);
    }
    if (any(wrong)) return false;
    const float low = all.least();  // infinite where nothing is present
    return low == INFINITY || (low >= kLeastSum * carried && low >= kTiny && scalings.least() >= 0x1p-100f &&
                               scalings.greatest() < 0x1p100f);
  }

  float carried() const {
    vfloat sum{};
    for (int64_t i = 0; i < padded; i += kWidth) sum += load(moved + i);
    return reduce_add(sum);
  }

  // base + eps log(scaling), +inf where nothing reaches
  void potentials(double eps, double* to) const {
    const double unit = kLn2 * eps;
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Potentials change(load(scaling + i), unit);
      store(to + i, load(base + i) + change.low);
      store(to + i + kWidth / 2, load(base + i + kWidth / 2) + change.high);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (unreached[i]) to[i] = INFINITY;
    }
  }

  // Moves the scalings into base. Those that float32 can't hold stay: they are of zero weights.
  void absorb(double eps) {
    const double unit = kLn2 * eps;
    for (int64_t i = 0; i < padded; i += kWidth) {
      const vfloat s = load(scaling + i);
      const vint fit = (s >= broadcast(kTiny)) & (s < broadcast(INFINITY));
      const Potentials absorbed(select(fit, s, broadcast(1.0f)), unit);
      double *low = base + i, *high = base + i + kWidth / 2;
      store(low, load(low) + absorbed.low);
      store(high, load(high) + absorbed.high);
      store(scaling + i, select(fit, broadcast(1.0f), s));
      store(moved + i, load(weight + i));
    }
  }

  // Whether zero weights have scalings, and where these don't tell of them sums, from which a potential can be told.
  bool zeros_fit() const {
    for (int64_t i = 0; has_zeros && i < n; ++i) {
      if (given[i] != 0 || unreached[i]) continue;
      if (!(scaling[i] > kLeastScaling && scaling[i] < kMostScaling)) return false;
      if (relaxed() && !(sums[i] > 1 / kMostScaling && sums[i] < 1 / kLeastScaling)) return false;
    }
    return true;
  }

  float* floats(Arena& arena) const {
    float* array = arena.take<float>(padded);
    std::fill_n(array, padded, 0.0f);
    return array;
  }
};
