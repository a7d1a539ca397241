// Exact scores of single pairs, and prototypes packed for screening. Included by nearest_kernels.h.

typedef double vdouble __attribute__((vector_size(4 * DPDIFF_WIDTH)));
typedef float vfloat_half __attribute__((vector_size(2 * DPDIFF_WIDTH)));

struct Doubles {
  vdouble low, high;
};
DPDIFF_INLINE Doubles widen(vfloat v) {
  vfloat_half halves[2];
  memcpy(halves, &v, sizeof v);
  return {__builtin_convertvector(halves[0], vdouble), __builtin_convertvector(halves[1], vdouble)};
}
DPDIFF_INLINE vfloat narrow(Doubles v) {
  const vfloat_half halves[2] = {__builtin_convertvector(v.low, vfloat_half), __builtin_convertvector(v.high, vfloat_half)};
  vfloat out;
  memcpy(&out, halves, sizeof out);
  return out;
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

// The sum of term(a[i], b[i]) in double, in an order that depends on d only: equal rows have equal sums.
template <typename T, typename Term>
DPDIFF_INLINE double sum_over(const T* a, const T* b, int64_t d, Term term) {
  vdouble low{}, high{};
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) {
    const Doubles x = widen(load(a + i)), y = widen(load(b + i));
    low += term(x.low, y.low);
    high += term(x.high, y.high);
  }
  low += high;
  double total = 0;
  for (int lane = 0; lane < kWidth / 2; ++lane) total += low[lane];
  for (; i < d; ++i) total += term(double(to_float(a[i])), double(to_float(b[i])));
  return total;
}
template <typename T>
double dot(const T* a, const T* b, int64_t d) {
  return sum_over(a, b, d, [](auto x, auto y) __attribute__((always_inline)) { return x * y; });
}

// How good prototype p is for token x: the larger the better. norm_x and norm_p are read for cosine only.
template <typename T>
double goodness(const T* x, double norm_x, const T* p, double norm_p, int64_t d, Metric metric) {
  if (metric == Metric::l2) {
    return -sum_over(x, p, d, [](auto a, auto b) __attribute__((always_inline)) { return (a - b) * (a - b); });
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

// What the screening multiplies: vectors of elements that hold kChannels channels each. `pack` converts d channels,
// scaled, into whole vectors of elements (zeros at the end), and returns the squared norm of what rounding left out.
struct Float32 {
  typedef float Element;
  typedef vfloat Vector;
  static constexpr int kChannels = 1;
  static constexpr float kRounding = 0x1p-24f;  // the relative error of an addition

  static DPDIFF_INLINE vfloat multiply_add(vfloat sum, Vector a, Vector b) { return a * b + sum; }

  template <typename T>
  static float pack(const T* in, int64_t d, double scale, Element* out) {
    for (int64_t i = 0; i < d; i += kWidth) {
      const vfloat v = load_some(in + i, d - i);
      const Doubles w = widen(v);
      store(out + i, scale == 1 ? v : narrow({w.low * scale, w.high * scale}));
    }
    return 0;
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
  static float pack(const T* in, int64_t d, double scale, Element* out) {
    vfloat remainder{};
    for (int64_t i = 0; i < d; i += 2 * kWidth) {
      vfloat v[2] = {load_some(in + i, d - i), load_some(in + i + kWidth, d - i - kWidth)};
      if (scale != 1) {
        for (vfloat& half : v) half = narrow({widen(half).low * scale, widen(half).high * scale});
      }
      bfloat16 rounded[2 * kWidth];
      for (int half = 0; half < 2; ++half) {
        store(rounded + half * kWidth, v[half]);
        const vfloat left = v[half] - load(rounded + half * kWidth);
        remainder += left * left;
      }
      memcpy(out + i / 2, rounded, sizeof rounded);
    }
    return reduce_add(remainder);
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

DPDIFF_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Upper bounds of the norms in a panel: of its prototypes as they are searched, of what packing lost, of the biases.
struct PanelBounds {
  float norm = 0, remainder = 0, bias = 0;
};

// The prototypes of one search, packed: panels of kPanel prototypes (the last one of fewer vectors where they suffice),
// in each one element of all its prototypes after the other. Screening ranks prototype j for token x by the key
// x . p_j + bias_j: p_j is scaled to unit length for cosine, and bias_j is -|p_j|^2 / 2 for l2.
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
        norms_(n),
        bounds_(n_panels) {
    torch::stable::parallel_for(0, n_panels, 1, [&](int64_t begin, int64_t end) {
      Buffer<Element> packed(kWidth * stride());
      for (int64_t panel = begin; panel < end; ++panel) pack(panel, packed);
    });
    for (int64_t i = 0; i < n; ++i) finite = finite && norms_[i] - norms_[i] == 0;
  }

  int64_t row(int64_t i) const { return rows_ == nullptr ? first_ + i : rows_[first_ + i]; }
  const T* prototype(int64_t i) const { return prototypes_ + row(i) * d; }
  double norm(int64_t i) const { return norms_[i]; }
  const Element* elements(int64_t panel) const { return elements_ + panel * kPanel * depth; }
  const float* biases(int64_t panel) const { return biases_ + panel * kPanel; }
  const PanelBounds& bounds(int64_t panel) const { return bounds_[panel]; }
  int64_t size(int64_t panel) const { return std::min(kPanel, n - panel * kPanel); }
  // Elements from one packed row to the next: whole vectors, and never a multiple of a page.
  int64_t stride() const { return round_up(depth, kWidth) + kWidth; }

 private:
  void pack(int64_t panel, Element* packed) {
    const int64_t width = round_up(size(panel), kWidth);
    Element* out = elements_ + panel * kPanel * depth;
    PanelBounds& bounds = bounds_[panel];
    for (int64_t first = 0; first < width; first += kWidth) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t i = panel * kPanel + first + lane;
        Element* packed_row = packed + lane * stride();
        if (i >= n) {
          std::fill_n(packed_row, stride(), Element{});
          biases_[i] = -INFINITY;
          continue;
        }
        const T* p = prototype(i);
        const double square = dot(p, p, d), norm = sqrt(square);
        norms_[i] = norm;
        const double scale = metric == Metric::cosine && norm != 0 ? 1 / norm : 1;
        const float remainder = sqrtf(Screen::pack(p, d, scale, packed_row));
        biases_[i] = metric == Metric::l2 ? float(-0.5 * square) : 0.0f;
        const float length = 1.000001f * float(norm * scale);
        bounds.norm = upper(bounds.norm, length);
        bounds.remainder = upper(bounds.remainder, remainder + 0x1p-23f * length);  // the scale rounds too
        bounds.bias = upper(bounds.bias, -biases_[i]);
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

  // The maximum, or NaN if there is one.
  static float upper(float a, float b) { return a >= b || a != a ? a : b; }

  const T* prototypes_;
  const int32_t* rows_;
  const int64_t first_;

 public:
  const int64_t n, d, depth, n_panels;
  const Metric metric;
  bool finite = true;  // no norm is NaN or infinite

 private:
  Buffer<Element> elements_;
  Buffer<float> biases_;
  std::vector<double> norms_;
  std::vector<PanelBounds> bounds_;
};
