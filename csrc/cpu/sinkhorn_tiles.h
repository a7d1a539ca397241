// Tiles of kWidth rows by kWidth columns: where the cost comes from, and what the iterations do with a tile. A block is
// all tiles of kWidth rows, in the order of its columns, row after row within a tile.

typedef vfloat Tile[kWidth];

constexpr double kLn2 = 0.6931471805599453;
constexpr float kTiny = 0x1p-126f;

DPDIFF_INLINE int64_t tiles_of(int64_t count) { return (count + kWidth - 1) / kWidth; }

DPDIFF_INLINE vdouble load(const double* p) {
  vdouble v;
  memcpy(&v, p, sizeof v);
  return v;
}
DPDIFF_INLINE void store(double* p, vdouble v) { memcpy(p, &v, sizeof v); }

// The halves of a vector, in float64.
DPDIFF_INLINE vdouble widen_low(vfloat v) { return widen(low_half(v)); }
DPDIFF_INLINE vdouble widen_high(vfloat v) { return widen(high_half(v)); }
DPDIFF_INLINE vfloat narrow(vdouble low, vdouble high) { return join(narrow(low), narrow(high)); }

// The sums of a number for each lane, in float64.
struct LaneSums {
  vdouble low, high;

  LaneSums() : low{}, high{} {}
  DPDIFF_INLINE void add(vfloat x) { low += widen_low(x), high += widen_high(x); }
  double operator[](int lane) const { return lane < kWidth / 2 ? low[lane] : high[lane - kWidth / 2]; }
  double total() const {
    const vdouble both = low + high;
    double sum = 0;
    for (int i = 0; i < kWidth / 2; ++i) sum += both[i];
    return sum;
  }
};

// (f + g_j - cost_j) * scale: the difference in float64, for it is small where it matters and its parts are not.
DPDIFF_INLINE vfloat exponent(double f, const double* g, vfloat cost, double scale) {
  return narrow((f + load(g) - widen_low(cost)) * scale, (f + load(g + kWidth / 2) - widen_high(cost)) * scale);
}

// The cost, or 0 where it is infinite: the plan is 0 there, and their product should be.
DPDIFF_INLINE vfloat finite(vfloat cost) { return select(cost < broadcast(INFINITY), cost, vfloat{}); }

// 2^x without subnormals and infinities, which 0 times would not be 0.
DPDIFF_INLINE vfloat bounded_exp2(vfloat x) {
  return select(x >= broadcast(-126.0f), exp2(minimum(x, broadcast(126.0f))), vfloat{});
}

// What rounding lost of product = a * b; zero without fused multiply-add.
DPDIFF_INLINE vfloat rounding_of(vfloat a, vfloat b, vfloat product) {
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)product);
#elif defined(DPDIFF_AVX2)
  return (vfloat)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)product);
#else
  return vfloat{};
#endif
}

// The kernel of zero potentials, exp(-cost / eps), of small finite costs.
struct Unshifted {
  static constexpr double kMostExponent = 30;
  float scale, rest;
  vint limit;  // of what costs come to as integers

  explicit Unshifted(double eps) : scale(float(kLog2e / eps)), rest(float(kLog2e / eps - scale)) {
    limit = (vint)broadcast(float(std::min(kMostExponent * eps / kLog2e, 1e38)));
  }

  // Raises `worst` to the costs, as integers: ordered are finite numbers, infinity and NaN.
  DPDIFF_INLINE vfloat operator()(vfloat cost, vint& worst) const {
    const vint size = (vint)cost & 0x7fffffff;
    worst = size > worst ? size : worst;
    const vfloat x = cost * scale;
    const vfloat lost = rounding_of(cost, broadcast(scale), x) + cost * rest, power = exp2(-x);
    return power - power * (lost * float(kLn2));
  }
};

// log2(x) = whole + part for normal x > 0, part in [-0.5, 0.5].
DPDIFF_INLINE void split_log2(vfloat x, vfloat& whole, vfloat& part) {
  const vint bits = (vint)x;
  const vint power = (bits - 0x3f3504f3) >> 23;  // of two, such that what remains is in [sqrt(1/2), sqrt(2))
  const vfloat rest = (vfloat)(bits - (power << 23));
  const vfloat z = (rest - 1.0f) / (rest + 1.0f), z2 = z * z;  // log(rest) = 2 atanh(z)
  vfloat p = broadcast(0.32059890f);
  p = p * z2 + 0.41219858f;
  p = p * z2 + 0.57707802f;
  p = p * z2 + 0.96179670f;
  p = p * z2 + 2.8853901f;
  whole = __builtin_convertvector(power, vfloat);
  part = p * z;
}

// The two halves of unit log2(x), of normal x > 0, in float64.
struct Potentials {
  vdouble low, high;

  DPDIFF_INLINE Potentials(vfloat x, double unit) {
    vfloat whole, part;
    split_log2(x, whole, part);
    low = (widen_low(whole) + widen_low(part)) * unit;
    high = (widen_high(whole) + widen_high(part)) * unit;
  }
};

// x^-power for normal x > 0 and power in (0, 1].
DPDIFF_INLINE vfloat inverse_power(vfloat x, float power) {
  vfloat whole, part;
  split_log2(x, whole, part);
  const vfloat nearest = (whole * power + kRound) - kRound;
  const vfloat rest = (whole * power - nearest) + part * power;
  return scale_by_power_of_two(exp2(-rest), -__builtin_convertvector(nearest, vint));
}

struct Sum {
  DPDIFF_INLINE vfloat operator()(vfloat a, vfloat b) const { return a + b; }
};
struct Maximum {
  DPDIFF_INLINE vfloat operator()(vfloat a, vfloat b) const { return maximum(a, b); }
};

// Combines the quads of a vector (four lanes each), which are then all alike.
template <class Combine>
DPDIFF_INLINE vfloat fold_quads(vfloat x, Combine combine) {
#if DPDIFF_WIDTH == 16
  x = combine(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = combine(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#elif DPDIFF_WIDTH == 8
  x = combine(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
  return x;
}

// Reduces each vector of a tile to one lane: lane r of the result is of rows[r]. Overwrites the tile.
template <class Combine>
DPDIFF_INLINE vfloat reduce_rows(Tile& rows, Combine combine) {
#pragma GCC unroll 4
  for (int half = kWidth / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      rows[i] = combine(interleave_low(rows[i], rows[i + half]), interleave_high(rows[i], rows[i + half]));
    }
  }
  return rows[0];
}

// A cost in memory. Its pairs are read a block of kWidth rows at a time: block(i).tile(j, c) loads the tile of columns j on,
// infinite beyond the edges; rows(i, scratch).load(r, j, beyond) a vector of a row: the order that memory is best at.
struct DenseCost {
  static constexpr bool kStored = true;  // exp(-cost / eps) is worth keeping

  const float* cost;
  int64_t n, m;

  struct Block {
    const float* first;
    int64_t n_rows, m;

    DPDIFF_INLINE vfloat load(int r, int64_t j, float beyond = INFINITY) const {
      return r < n_rows ? load_first(first + r * m + j, m - j, beyond) : broadcast(beyond);
    }
    DPDIFF_INLINE void tile(int64_t j, Tile& c) const {
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) c[r] = load(r, j);
    }
  };

  Block block(int64_t i) const { return {cost + i * m, std::min<int64_t>(kWidth, n - i), m}; }
  Block rows(int64_t i, float*) const { return block(i); }
};
