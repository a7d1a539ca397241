// Vectors of DPDIFF_WIDTH floats, in GCC/Clang vector extensions: a + b * c, comparisons and selects are written as
// for scalars, and the compiler contracts them to FMA. No include guard: foreach_isa.h includes it once per
// instruction set, inside that set's namespace.

constexpr int kWidth = DPDIFF_WIDTH;
typedef float vfloat __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef uint16_t vhalf __attribute__((vector_size(2 * DPDIFF_WIDTH)));

#define DPDIFF_INLINE inline __attribute__((always_inline))

// A bfloat16 and an IEEE half as stored in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DPDIFF_INLINE vfloat broadcast(float x) { return x - vfloat{}; }
DPDIFF_INLINE vint broadcast_int(int32_t x) { return x - vint{}; }

DPDIFF_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
DPDIFF_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

// The first n of a vector's lanes (0 < n < kWidth); the others read as zero and are not written.
DPDIFF_INLINE vfloat load_partial(const float* p, int64_t n) {
  vfloat v{};
  memcpy(&v, p, n * sizeof(float));
  return v;
}
DPDIFF_INLINE void store_partial(float* p, vfloat v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

DPDIFF_INLINE float to_float(float x) { return x; }
DPDIFF_INLINE float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
DPDIFF_INLINE float to_float(float16 x) {
  // Exponent and mantissa moved into place, then rescaled by 2^112: exact for subnormals too.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  float f;
  memcpy(&f, &magnitude, sizeof f);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // infinity or NaN
  bits |= sign;
  memcpy(&f, &bits, sizeof f);
  return f;
}

template <typename T>
DPDIFF_INLINE T from_float(float x);
template <>
DPDIFF_INLINE float from_float<float>(float x) {
  return x;
}
template <>
DPDIFF_INLINE bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};  // keep a NaN a NaN
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
template <>
DPDIFF_INLINE float16 from_float<float16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  float16 out;
  memcpy(&out, &h, sizeof out);
  return out;
}

DPDIFF_INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
// The maximum, where a NaN in b is passed over and one in a stays.
DPDIFF_INLINE vfloat maximum(vfloat a, vfloat b) { return b > a ? b : a; }
DPDIFF_INLINE vfloat minimum(vfloat a, vfloat b) { return b < a ? b : a; }

DPDIFF_INLINE float reduce_add(vfloat v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}
DPDIFF_INLINE float reduce_max(vfloat v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// p * 2^n for integers n in [-127, 128]: -127 gives zero, 128 infinity.
DPDIFF_INLINE vfloat scale_by_power_of_two(vfloat p, vint n) { return p * (vfloat)((n + 127) << 23); }

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to the nearest integer

// 2^x: zero below -126.5, infinity from 128, NaN stays NaN; within 2 ulp in between.
DPDIFF_INLINE vfloat exp2(vfloat x) {
  const vfloat clamped = maximum(minimum(x, broadcast(128.0f)), broadcast(-127.0f));
  const vfloat shifted = clamped + kRound;
  const vfloat f = clamped - (shifted - kRound);  // in [-0.5, 0.5]
  vfloat p = broadcast(1.5403530e-4f);            // Taylor in f ln 2: the remainder is below 2^-25 there
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return select(x == x, scale_by_power_of_two(p, (vint)shifted - (vint)broadcast(kRound)), x);
}

// e^x: zero below about -87.7, infinity from 88.73, NaN stays NaN; within 2 ulp in between.
DPDIFF_INLINE vfloat exp(vfloat x) {
  const vfloat clamped = maximum(minimum(x, broadcast(88.7228394f)), broadcast(-88.0f));
  const vfloat shifted = clamped * 1.44269502f + kRound;
  const vfloat n = shifted - kRound;
  const vfloat r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts (Cody and Waite)
  vfloat p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vfloat y = scale_by_power_of_two(p, (vint)shifted - (vint)broadcast(kRound));
  return select(x == x, select(x > broadcast(88.7228394f), broadcast(INFINITY), y), x);
}
