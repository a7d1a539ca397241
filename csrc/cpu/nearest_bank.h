// Exact scores of single pairs, and prototypes packed for screening. Included by nearest_kernels.h.

DPDIFF_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

typedef double vdouble __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef float vfloat_half __attribute__((vector_size(2 * DPDIFF_WIDTH)));

DPDIFF_INLINE vdouble widen(vfloat_half v) {
#if defined(DPDIFF_AVX512)
  return (vdouble)_mm512_cvtps_pd((__m256)v);  // GCC 12 converts in two halves
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

// A register tile is kTileRows tokens by up to kTileVectors vectors of prototypes.
#if defined(DPDIFF_AVX512) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(DPDIFF_AVX2)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int64_t kPanel = kTileVectors * kWidth;  // prototypes

// What packing a vector did: the squared norms of the vector as packed, before rounding, and of what rounding left out.
struct Packed {
  float square, remainder;
};

// What the screening multiplies: vectors of elements that hold kChannels channels each. `pack` converts d channels, scaled
// and less the centre's (whole vectors; null for zeros), into whole vectors of elements with zeros at the end.
struct Float32 {
  typedef float Element;
  typedef vfloat Vector;
  static constexpr int kChannels = 1;
  static constexpr float kRounding = 0x1p-24f;  // the relative error of an addition

  static DPDIFF_INLINE vfloat multiply_add(vfloat sum, Vector a, Vector b) { return a * b + sum; }

  template <typename T>
  static Packed pack(const T* in, float scale, const float* centre, int64_t d, Element* out) {
    vfloat square{};
    for (int64_t i = 0; i < d; i += kWidth) {
      vfloat v = load_some(in + i, d - i);
      if (centre != nullptr) v = v * scale - load(centre + i);
      square += v * v;
      store(out + i, v);
    }
    return {reduce_add(square), 0};
  }
};

#if defined(DPDIFF_AVX512)
struct Bfloat16 {
  typedef uint32_t Element;
  typedef uint32_t Vector __attribute__((vector_size(64)));
  static constexpr int kChannels = 2;
  static constexpr float kRounding = 0x1p-23f;  // the instruction does not promise rounding to nearest everywhere

  static DPDIFF_INLINE vfloat multiply_add(vfloat sum, Vector a, Vector b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  template <typename T>
  static Packed pack(const T* in, float scale, const float* centre, int64_t d, Element* out) {
    vfloat square{}, remainder{};
    for (int64_t i = 0; i < d; i += 2 * kWidth) {
      vfloat low = load_some(in + i, d - i), high = load_some(in + i + kWidth, d - i - kWidth);
      if (centre != nullptr) {
        low = low * scale - load(centre + i);
        high = high * scale - load(centre + i + kWidth);
      }
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      _mm512_storeu_si512(out + i / 2, rounded);
      const vfloat low_left = low - from_bits(_mm512_castsi512_si256(rounded));
      const vfloat high_left = high - from_bits(_mm512_extracti64x4_epi64(rounded, 1));
      square += low * low + high * high;
      remainder += low_left * low_left + high_left * high_left;
    }
    return {reduce_add(square), reduce_add(remainder)};
  }

 private:
  static DPDIFF_INLINE vfloat from_bits(__m256i bits) {
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
};
#endif

// Memory for vectors, uninitialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Upper bounds of the norms in a panel: of its prototypes as they are searched, of what packing lost, of the biases.
struct PanelBounds {
  float norm = 0, remainder = 0, bias = 0;
};

// The prototypes of one search, packed: panels of kPanel prototypes (the last one of fewer vectors where they suffice),
// in each one element of all its prototypes after the other. Screening ranks prototype p for token x by the key
//   (x - c) . (p - c) - |p - c|^2 / 2   for l2, which orders prototypes as -|x - p|^2 does,
//   (x - c) . (p - c) + c . (p - c)     for cosine, with x and p scaled to unit length,
//   x . (p - c)                         for dot,
// where the centre c is about the prototypes' mean: what all have in common ranks nothing, and costs precision. For l2 and
// dot, bfloat16 is packed as it is, without loss: there c = 0.
template <typename T, class Screen>
class Bank {
 public:
  typedef typename Screen::Element Element;

  // n prototypes: rows[first] to rows[first + n - 1], or first to first + n - 1 where rows is null.
  Bank(const T* prototypes, const int32_t* rows, int64_t first, int64_t n, int64_t d, Metric metric)
      : prototypes_(prototypes),
        rows_(rows),
        first_(first),
        n(n),
        d(d),
        depth((d + Screen::kChannels - 1) / Screen::kChannels),
        n_panels((n + kPanel - 1) / kPanel),
        metric(metric),
        elements_(round_up(n, kWidth) * depth),
        biases_(round_up(n, kWidth)),
        norms_(metric == Metric::cosine ? n : 0),
        bounds_(n_panels),
        centre_(round_up(d, 2 * kWidth)) {
    if (metric == Metric::cosine || !std::is_same<T, bfloat16>::value) find_centre();
    torch::stable::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> prepared(d);
      Buffer<Element> packed(kWidth * stride());
      for (int64_t panel = begin; panel < end; ++panel) pack(panel, prepared, packed);
    });
    for (const PanelBounds& bounds : bounds_) finite = finite && bounds.norm < INFINITY;
  }

  int64_t row(int64_t i) const { return rows_ == nullptr ? first_ + i : rows_[first_ + i]; }
  const T* prototype(int64_t i) const { return prototypes_ + row(i) * d; }
  double norm(int64_t i) const { return metric == Metric::cosine ? norms_[i] : 0; }
  const float* centre() const { return centre_.data(); }  // whole vectors
  const Element* elements(int64_t panel) const { return elements_ + panel * kPanel * depth; }
  const float* biases(int64_t panel) const { return biases_ + panel * kPanel; }
  const PanelBounds& bounds(int64_t panel) const { return bounds_[panel]; }
  int64_t size(int64_t panel) const { return std::min(kPanel, n - panel * kPanel); }
  // Elements from one packed row to the next: whole vectors, and never a multiple of a page.
  int64_t stride() const { return round_up(depth, kWidth) + kWidth; }

 private:
  double scale(double norm) const { return metric != Metric::cosine ? 1 : norm == 0 ? 0 : 1 / norm; }

  // The mean of about 128 prototypes, where it is finite.
  void find_centre() {
    const int64_t step = n / 128 + 1, n_drawn = (n + step - 1) / step;
    for (int64_t i = 0; i < n; i += step) {
      const T* p = prototype(i);
      const float share = float(scale(metric == Metric::cosine ? vector_norm(p, d) : 0) / n_drawn);
      for (int64_t c = 0; c < d; ++c) centre_[c] += share * to_float(p[c]);
    }
    const bool usable = std::all_of(centre_.begin(), centre_.end(), [](float c) { return c - c == 0; });
    if (!usable) std::fill(centre_.begin(), centre_.end(), 0.0f);
  }

  void pack(int64_t panel, float* prepared, Element* packed) {
    const int64_t width = round_up(size(panel), kWidth);
    Element* out = elements_ + panel * kPanel * depth;
    for (int64_t first = 0; first < width; first += kWidth) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        pack_row(panel, panel * kPanel + first + lane, prepared, packed + lane * stride());
      }
      for (int64_t t = 0; t < depth; t += kWidth) {
        vfloat block[kWidth];
        for (int lane = 0; lane < kWidth; ++lane) memcpy(&block[lane], packed + lane * stride() + t, sizeof block[lane]);
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(kWidth, depth - t); ++i) {
          memcpy(out + (t + i) * width + first, &block[i], sizeof block[i]);
        }
      }
    }
  }

  void pack_row(int64_t panel, int64_t i, float* prepared, Element* packed) {
    if (i >= n) {
      std::fill_n(packed, stride(), Element{});
      biases_[i] = -INFINITY;
      return;
    }
    const T* p = prototype(i);
    if (metric == Metric::cosine) norms_[i] = vector_norm(p, d);
    const double factor = scale(norm(i));
    for (int64_t c = 0; c < d; ++c) prepared[c] = float(factor * double(to_float(p[c])) - double(centre_[c]));
    const double length = vector_norm(prepared, d);
    biases_[i] = metric == Metric::l2 ? -0.5 * length * length : metric == Metric::cosine ? dot(centre(), prepared, d) : 0;
    const float remainder = sqrtf(Screen::pack(prepared, 1, nullptr, d, packed).remainder);
    PanelBounds& bounds = bounds_[panel];
    bounds.norm = upper(bounds.norm, 1.000001f * float(length));
    bounds.remainder = upper(bounds.remainder, remainder + 0x1p-23f * float(length));  // preparing rounds too
    bounds.bias = upper(bounds.bias, fabsf(biases_[i]));
  }

  // The maximum, or NaN if there is one.
  static float upper(float a, float b) { return a >= b || a != a ? a : b; }

  const T* prototypes_;
  const int32_t* rows_;
  const int64_t first_;

 public:
  const int64_t n, d, depth, n_panels;
  const Metric metric;
  bool finite = true;  // no prototype holds NaN or infinity

 private:
  Buffer<Element> elements_;
  Buffer<float> biases_;
  std::vector<double> norms_;
  std::vector<PanelBounds> bounds_;
  std::vector<float> centre_;
};
