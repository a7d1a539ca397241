// Prototypes packed for screening. Included by nearest_kernels.h.

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

// What is scored at a time is some tokens, kTileRows or of a screening's own, by up to kTileVectors vectors of prototypes.
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

// What the screening multiplies: vectors of elements that hold kChannels channels each, a multiple of kDepth of them; in
// registers, or in AMX's tiles. `pack` converts d channels, scaled and less the centre's (whole vectors; null for zeros),
// into whole vectors of elements with zeros at the end.
struct Float32 {
  typedef float Element;
  typedef vfloat Vector;
  struct Setup {};
  static constexpr bool kInTiles = false;
  static constexpr int kRows = kTileRows, kChannels = 1, kDepth = 1;
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
  struct Setup {};
  static constexpr bool kInTiles = false;
  static constexpr int kRows = kTileRows, kChannels = 2, kDepth = 1;
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

#if defined(DPDIFF_AMX)
struct Bfloat16InTiles : Bfloat16 {
  typedef AmxTiles Setup;
  static constexpr bool kInTiles = true;
  static constexpr int kRows = 16, kDepth = 16;

  template <int kVectors>
  static DPDIFF_INLINE void score(
      int64_t depth, const Element* tokens, int64_t stride, const Element* panel, const float* biases, float* keys) {
    constexpr int64_t kWide = kVectors * kWidth;
    multiply_in_tiles<kVectors>(depth, tokens, 16, stride, panel, kWide, biases, 0, keys, kWide);
  }
};
#endif

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
  Bank(const T* prototypes, const int64_t* rows, int64_t first, int64_t n, int64_t d, Metric metric)
      : prototypes_(prototypes),
        rows_(rows),
        first_(first),
        n(n),
        d(d),
        depth(round_up((d + Screen::kChannels - 1) / Screen::kChannels, Screen::kDepth)),
        n_panels((n + kPanel - 1) / kPanel),
        metric(metric),
        elements_(round_up(n, kWidth) * depth),
        biases_(round_up(n, kWidth)),
        norms_(metric == Metric::cosine ? n : 0),
        lengths_(round_up(n, kWidth)),
        remainders_(round_up(n, kWidth)),
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
  // Upper bounds for each prototype, as those of a panel.
  const float* lengths(int64_t panel) const { return lengths_.data() + panel * kPanel; }
  const float* remainders(int64_t panel) const { return remainders_.data() + panel * kPanel; }
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
    lengths_[i] = 1.000001f * float(length);
    remainders_[i] = remainder + 0x1p-23f * float(length);  // preparing rounds too
    PanelBounds& bounds = bounds_[panel];
    bounds.norm = upper(bounds.norm, lengths_[i]);
    bounds.remainder = upper(bounds.remainder, remainders_[i]);
    bounds.bias = upper(bounds.bias, fabsf(biases_[i]));
  }

  // The maximum, or NaN if there is one.
  static float upper(float a, float b) { return a >= b || a != a ? a : b; }

  const T* prototypes_;
  const int64_t* rows_;
  const int64_t first_;

 public:
  const int64_t n, d, depth, n_panels;
  const Metric metric;
  bool finite = true;  // no prototype holds NaN or infinity

 private:
  Buffer<Element> elements_;
  Buffer<float> biases_;
  std::vector<double> norms_;
  std::vector<float> lengths_, remainders_;
  std::vector<PanelBounds> bounds_;
  std::vector<float> centre_;
};
