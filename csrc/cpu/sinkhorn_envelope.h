// The gradient of a problem's value with respect to its cost, by the envelope theorem: the plan, times a factor.
//
// The plan of a large batch has passed by the caches. So AVX-512 makes it again, from a cost that the last cache may still
// hold, where the potentials in float32 tell it well enough (32 x 784 x 128: 0.44 -> 0.35 ms; AVX2 takes longer for the
// powers, 0.67).

class ValueGradient {
 public:
  ValueGradient(const SinkhornSolved& solved, float factor, bool streams, Arena& arena)
      : solved_(solved), factor_(factor), scale_(kLog2e / solved.eps), streams_(streams) {
    if (kWidth < 16 || !streams || solved.cost == nullptr || solved.m % kWidth != 0) return;
    rows_ = arena.take<float>(tiles_of(solved.n) * kWidth);
    columns_ = arena.take<float>(solved.m);
    again_ = exponents(solved.f, solved.n, rows_) && exponents(solved.g, solved.m, columns_);
  }

  // Of rows `first` to `last`, into `to` (n, m).
  void write(int64_t first, int64_t last, float* to) const {
    const int64_t m = solved_.m;
    const bool streams = streams_ && uintptr_t(to + first * m) % sizeof(vfloat) == 0;
    if (streams && again_) {
      make_again(first, last, to);
    } else {
      scale_plan(first * m, last * m, to, streams);
    }
    if (streams) stream_end();
  }

 private:
  // Of exponents of 2. Their rounding, and that of the exponents of pairs, changes entries by 5e-6 of themselves at most, and
  // those below 2^-40 of their weights' product by 1e-5.
  static constexpr float kModerate = 16;

  // Writes the exponents of n potentials, of which there is room for whole vectors; whether they are moderate.
  bool exponents(const float* potentials, int64_t n, float* to) const {
    vint good = ~vint{};
    for (int64_t i = 0; i < n; i += kWidth) {
      const vfloat some = load_first(potentials + i, n - i, 0.0f);
      const vfloat exponent = narrow(widen_low(some) * scale_, widen_high(some) * scale_);
      good &= absolute(exponent) <= broadcast(kModerate);
      store(to + i, exponent);
    }
    return !any(~good);
  }

  void make_again(int64_t first, int64_t last, float* to) const {
    const SinkhornSolved solved = solved_;  // here: what stores of numbers can't change
    const float coarse = float(scale_), fine = float(scale_ - coarse), factor = factor_;
    const float *rows = rows_, *columns = columns_;
    for (int64_t i = first; i < last; ++i) {
      const float *costs = solved.cost + i * solved.m, weight = factor * solved.a[i], row = rows[i];
      for (int64_t j = 0; j < solved.m; j += kWidth) {
        const vfloat cost = load(costs + j);
        const vfloat power = bounded_exp2((row + load(columns + j)) - cost * coarse - cost * fine);
        stream(to + i * solved.m + j, power * weight * load(solved.b + j));
      }
    }
  }

  void scale_plan(int64_t first, int64_t last, float* to, bool streams) const {
    const float *plan = solved_.plan, factor = factor_;
    if (streams) {
      for (; first + kWidth <= last; first += kWidth) stream(to + first, load(plan + first) * factor);
    }
    for (; first + kWidth <= last; first += kWidth) store(to + first, load(plan + first) * factor);
    if (first < last) store_first(to + first, load_first(plan + first, last - first, 0.0f) * factor, last - first);
  }

  const SinkhornSolved& solved_;
  const float factor_;
  const double scale_;  // of potentials to exponents of 2
  const bool streams_;
  bool again_ = false;
  float *rows_ = nullptr, *columns_ = nullptr;  // exponents of the potentials
};
