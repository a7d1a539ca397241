// Vectors of any length in double, and the exact scores of single pairs. Included by nearest_kernels.h.

constexpr int kHalf = kWidth / 2;  // lanes of a vdouble
DPDIFF_INLINE vdouble load_double(const float* p) {
  vfloat_half v;
  memcpy(&v, p, sizeof v);
  return widen(v);
}
DPDIFF_INLINE vdouble load_double(const bfloat16* p) {
  typedef uint16_t vbits __attribute__((vector_size(DPDIFF_WIDTH)));
  typedef uint32_t vshifted __attribute__((vector_size(2 * DPDIFF_WIDTH)));
  vbits bits;
  memcpy(&bits, p, sizeof bits);
  return widen((vfloat_half)(__builtin_convertvector(bits, vshifted) << 16));
}
DPDIFF_INLINE vdouble load_double(const float16* p) {
#if defined(DPDIFF_AVX512)
  return widen((vfloat_half)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  vdouble v;
  for (int i = 0; i < kHalf; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first n elements at p, with zeros after them; n may exceed a vector's lanes, or be negative.
template <typename T>
DPDIFF_INLINE vfloat load_some(const T* p, int64_t n) {
  if (n >= kWidth) return load(p);
  T some[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}

// The first n lanes, or all of them where n exceeds those.
template <typename T>
DPDIFF_INLINE void store_some(T* p, vfloat v, int64_t n) {
  if (n >= kWidth) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
}

// The sum of term(at) over d channels, where at(x) gives the channels at one place of x: a vdouble or a double. The
// order of the sum depends on d only, so that equal rows have equal sums.
struct VectorAt {
  int64_t i;
  template <typename T>
  DPDIFF_INLINE vdouble operator()(const T* x) const {
    return load_double(x + i);
  }
};
struct ScalarAt {
  int64_t i;
  template <typename T>
  DPDIFF_INLINE double operator()(const T* x) const {
    return to_float(x[i]);
  }
};
template <typename Term>
DPDIFF_INLINE double sum_channels(int64_t d, Term term) {
  vdouble sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kHalf <= d; i += 4 * kHalf) {
    for (int j = 0; j < 4; ++j) sums[j] += term(VectorAt{i + j * kHalf});
  }
  for (; i + kHalf <= d; i += kHalf) sums[0] += term(VectorAt{i});
  const vdouble sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kHalf; ++lane) total += sum[lane];
  for (; i < d; ++i) total += term(ScalarAt{i});
  return total;
}
template <typename T>
double dot(const T* x, const T* y, int64_t d) {
  return sum_channels(d, [=](auto at) { return at(x) * at(y); });
}
template <typename T>
double vector_norm(const T* x, int64_t d) {
  return sqrt(sum_channels(d, [=](auto at) {
    const auto v = at(x);
    return v * v;
  }));
}

// How good prototype p is for token x: the larger the better. norm_x and norm_p are read for cosine only.
template <typename T>
double goodness(const T* x, double norm_x, const T* p, double norm_p, int64_t d, Metric metric) {
  if (metric == Metric::l2) {
    return -sum_channels(d, [=](auto at) {
      const auto v = at(x) - at(p);
      return v * v;
    });
  }
  const double product = dot(x, p, d);
  if (metric == Metric::dot) return product;
  return norm_x * norm_p == 0 ? 0 : product / (norm_x * norm_p);
}
