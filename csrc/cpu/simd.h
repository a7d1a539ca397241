// Vectors of DPDIFF_WIDTH floats, in GCC/Clang vector extensions: a + b * c, comparisons and selects are written as
// for scalars, and the compiler contracts them to FMA. No include guard: foreach_isa.h includes it once per
// instruction set, inside that set's namespace.

constexpr int kWidth = DPDIFF_WIDTH;
typedef float vfloat __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef uint16_t vhalf __attribute__((vector_size(2 * DPDIFF_WIDTH)));
typedef double vdouble __attribute__((vector_size(4 * DPDIFF_WIDTH)));    // kWidth / 2 lanes
typedef float vfloat_half __attribute__((vector_size(2 * DPDIFF_WIDTH)));  // kWidth / 2 lanes

#define DPDIFF_INLINE inline __attribute__((always_inline))

constexpr double kLog2e = 1.4426950408889634;

DPDIFF_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A bfloat16 and an IEEE half as stored in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DPDIFF_INLINE vfloat broadcast(float x) { return x - vfloat{}; }

DPDIFF_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
DPDIFF_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

// The first n lanes from memory, the others `beyond`; n may be more than there are.
DPDIFF_INLINE vfloat load_first(const float* p, int64_t n, float beyond) {
  if (n >= kWidth) return load(p);
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_mask_loadu_ps((__m512)broadcast(beyond), (1u << n) - 1, p);
#else
  vfloat v = broadcast(beyond);
  memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}
DPDIFF_INLINE void store_first(float* p, vfloat v, int64_t n) {
  if (n >= kWidth) return store(p, v);
#if defined(DPDIFF_AVX512)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#else
  memcpy(p, &v, n * sizeof(float));
#endif
}

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

// kWidth elements of another storage type.
DPDIFF_INLINE vfloat load(const bfloat16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vint) << 16);
}
DPDIFF_INLINE void store(bfloat16* p, vfloat v) {
#if defined(DPDIFF_AVX512)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<bfloat16>(v[i]);
#endif
}
DPDIFF_INLINE vfloat load(const float16* p) {
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(DPDIFF_AVX2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
DPDIFF_INLINE void store(float16* p, vfloat v) {
#if defined(DPDIFF_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(DPDIFF_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<float16>(v[i]);
#endif
}

// Stores that pass by the caches, for what is too large to be found there again; p on a boundary of the vector's size.
// Others may read it after stream_end().
#if defined(DPDIFF_AVX512)
DPDIFF_INLINE void stream(float* p, vfloat v) { _mm512_stream_ps(p, (__m512)v); }
DPDIFF_INLINE void stream(bfloat16* p, vfloat v) { _mm256_stream_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
DPDIFF_INLINE void stream(float16* p, vfloat v) { _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
DPDIFF_INLINE void stream_end() { _mm_sfence(); }
#else
template <typename T>
DPDIFF_INLINE void stream(T* p, vfloat v) { store(p, v); }
DPDIFF_INLINE void stream_end() {}
#endif

DPDIFF_INLINE vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
// The maximum, where a NaN in b is passed over and one in a stays. GCC makes a comparison and a blend of b > a ? b : a.
DPDIFF_INLINE vfloat maximum(vfloat a, vfloat b) {
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(DPDIFF_AVX2)
  return (vfloat)_mm256_max_ps((__m256)b, (__m256)a);
#else
  return b > a ? b : a;
#endif
}
DPDIFF_INLINE vfloat minimum(vfloat a, vfloat b) {
#if defined(DPDIFF_AVX512)
  return (vfloat)_mm512_min_ps((__m512)b, (__m512)a);
#elif defined(DPDIFF_AVX2)
  return (vfloat)_mm256_min_ps((__m256)b, (__m256)a);
#else
  return b < a ? b : a;
#endif
}
DPDIFF_INLINE vfloat absolute(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

DPDIFF_INLINE bool any(vint mask) {
#if defined(DPDIFF_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kWidth; ++i) found |= mask[i];
  return found != 0;
#endif
}

DPDIFF_INLINE float reduce_add(vfloat v) {
#if defined(DPDIFF_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}
DPDIFF_INLINE float reduce_max(vfloat v) {
#if defined(DPDIFF_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// a0 b0 a1 b1 ... of the first, and of the last, kWidth / 2 lanes.
#if DPDIFF_WIDTH == 16
DPDIFF_INLINE vfloat interleave_low(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
DPDIFF_INLINE vfloat interleave_high(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif DPDIFF_WIDTH == 8
DPDIFF_INLINE vfloat interleave_low(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
DPDIFF_INLINE vfloat interleave_high(vfloat a, vfloat b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
DPDIFF_INLINE vfloat interleave_low(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
DPDIFF_INLINE vfloat interleave_high(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Halves of a vector, by shuffles: one copied out of memory would keep the vector in memory from then on.
#if DPDIFF_WIDTH == 16
DPDIFF_INLINE vfloat_half low_half(vfloat v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
DPDIFF_INLINE vfloat_half high_half(vfloat v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
DPDIFF_INLINE vfloat join(vfloat_half low, vfloat_half high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#elif DPDIFF_WIDTH == 8
DPDIFF_INLINE vfloat_half low_half(vfloat v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
DPDIFF_INLINE vfloat_half high_half(vfloat v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
DPDIFF_INLINE vfloat join(vfloat_half low, vfloat_half high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#else
DPDIFF_INLINE vfloat_half low_half(vfloat v) { return __builtin_shufflevector(v, v, 0, 1); }
DPDIFF_INLINE vfloat_half high_half(vfloat v) { return __builtin_shufflevector(v, v, 2, 3); }
DPDIFF_INLINE vfloat join(vfloat_half low, vfloat_half high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3); }
#endif

// Between float32 and float64, kWidth / 2 numbers at a time; GCC 12 would convert 8 in two steps.
DPDIFF_INLINE vdouble widen(vfloat_half v) {
#if defined(DPDIFF_AVX512)
  return (vdouble)_mm512_cvtps_pd((__m256)v);
#else
  return __builtin_convertvector(v, vdouble);
#endif
}
DPDIFF_INLINE vfloat_half narrow(vdouble v) {
#if defined(DPDIFF_AVX512)
  return (vfloat_half)_mm512_cvtpd_ps((__m512d)v);
#else
  return __builtin_convertvector(v, vfloat_half);
#endif
}

// Transposes a kWidth x kWidth matrix of 32-bit values of any kind, one row a vector: log2(kWidth) perfect shuffles.
DPDIFF_INLINE void transpose(vfloat (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int step = 1; step < kWidth; step *= 2) {
    vfloat shuffled[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + kWidth / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}

// p * 2^n for integers n in [-127, 128]: -127 gives zero, 128 infinity.
DPDIFF_INLINE vfloat scale_by_power_of_two(vfloat p, vint n) { return p * (vfloat)((n + 127) << 23); }

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds a float to the nearest integer

// 2^x: zero below -126.5 (AVX-512: gradually, below -149), infinity from 128, NaN stays NaN; within 3 ulp in between.
DPDIFF_INLINE vfloat exp2(vfloat x) {
#if defined(DPDIFF_AVX512)
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x), in [0, 1); zero where x is infinite
  vfloat p = broadcast(1.86712982e-3f);  // minimax in relative error, exact at 0: below 2^-22.7 with rounding
  p = p * f + 9.01703071e-3f;
  p = p * f + 5.57999127e-2f;
  p = p * f + 2.40164444e-1f;
  p = p * f + 6.93151295e-1f;
  p = p * f + 1.0f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
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
#endif
}
