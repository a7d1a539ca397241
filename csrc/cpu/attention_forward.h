// Attention, forward: for a block of queries, the banks stream by in blocks of kBlock prototypes, with online softmax
// (Milakov and Gimelshein, 2018). A thread packs the banks of an instance once for all its queries.

template <class Engine>
class ForwardAttention {
 public:
  explicit ForwardAttention(const AttentionForward& problem)
      : problem_(problem),
        channels_(problem.channels),
        units_((channels_ + Engine::kPack - 1) / Engine::kPack),
        padded_(round_up(channels_, kWidth * Engine::kPack)),
        exponent_scale_(problem.scale * kLog2E) {
    const int64_t prototypes = packed_count(problem);
    key_tiles_ = scratch_.take(prototypes * units_);
    values_ = scratch_.take(prototypes / Engine::kPack * padded_);
    staged_ = scratch_.take(kLanes * padded_);
    queries_ = scratch_.take(units_ * kLanes);
    scores_ = scratch_.take(kBlock * kLanes);
    pairs_ = Engine::kPack == 1 ? scores_ : scratch_.take(kBlock / 2 * kLanes);
    answer_ = scratch_.take(padded_ * kLanes);
    if (problem.gate != nullptr) local_answer_ = scratch_.take(padded_ * kLanes);
  }

  // Chunks [begin, end) of kChunk tokens, instance by instance.
  void run(int64_t begin, int64_t end) {
    const int64_t sequence = problem_.sequence(), chunks = (sequence + kChunk - 1) / kChunk;
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t instance = i / chunks, images = problem_.instances() / problem_.heads;
      const BankView bank(problem_, instance % images, instance / images);
      if (instance != packed) {
        pack_bank<Engine>(bank, &Bank::key, padded_, staged_, key_tiles_, nullptr);
        pack_bank<Engine>(bank, &Bank::value, padded_, staged_, nullptr, values_);
        packed = instance;
      }
      const int64_t first = i % chunks * kChunk, last = smaller(first + kChunk, sequence);
      for (int64_t token = first; token < last; token += kLanes) {
        const int count = int(smaller(kLanes, last - token));
        switch ((count + kWidth - 1) / kWidth) {
          case 1: block<1>(bank, token, count); break;
          case 2: block<2>(bank, token, count); break;
          default: block<kVectors>(bank, token, count);
        }
      }
    }
  }

 private:
  // How far, in powers of two, scores may exceed what exponents are taken relative to before that is raised.
  static constexpr float kSlack = 8;

  template <int Vectors>
  void block(const BankView& bank, int64_t first, int count) {
    typedef typename Engine::Element Element;
    Element* staged = reinterpret_cast<Element*>(staged_);
    int64_t images[kLanes], places[kLanes];
    float gate[kLanes] = {};
    for (int i = 0; i < Vectors * kWidth; ++i) {
      const void* row = nullptr;
      if (i < count) {
        images[i] = bank.image_of(first + i);
        places[i] = bank.place_of(first + i);
        row = problem_.query.at(images[i], bank.head, places[i]);
        if (problem_.gate != nullptr) {
          gate[i] = bank.local_count == 0 ? 1.0f : problem_.gate[bank.flat(images[i], places[i])];
        }
      }
      copy_row(problem_.dtype, row, channels_, staged + i * padded_, padded_);
    }
    transpose_rows(staged_, padded_ / Engine::kPack, units_, Vectors, queries_);

    vfloat normaliser[Vectors];
    for (int s = 0; s < bank.softmaxes(); ++s) {
      vfloat reference[Vectors], total[Vectors];
      attend<Vectors>(bank.begin(s), bank.end(s), reference, total);
      if (problem_.sums.total != nullptr) {
        float* references = problem_.sums.reference + s * problem_.batch * problem_.heads * problem_.tokens;
        float* totals = problem_.sums.total + s * problem_.batch * problem_.heads * problem_.tokens;
        for (int i = 0; i < count; ++i) {
          const int64_t at = bank.flat(images[i], places[i]);
          references[at] = reference[i / kWidth][i % kWidth];
          totals[at] = total[i / kWidth][i % kWidth];
        }
      }
      for (int v = 0; v < Vectors; ++v) normaliser[v] = 1.0f / total[v];
      if (s == 0 && bank.softmaxes() == 2) {  // keep this answer, normalised, and go on to the global bank's
        for (int64_t e = 0; e < channels_; ++e) {
          for (int v = 0; v < Vectors; ++v) {
            const int64_t at = e * kLanes + v * kWidth;
            store(local_answer_ + at, bank.local_count == 0 ? vfloat{} : load(answer_ + at) * normaliser[v]);
          }
        }
      }
    }
    if (bank.softmaxes() == 2) {
      for (int64_t e = 0; e < channels_; ++e) {
        for (int v = 0; v < Vectors; ++v) {
          const int64_t at = e * kLanes + v * kWidth;
          const vfloat local = load(local_answer_ + at), global = load(answer_ + at) * normaliser[v];
          const vfloat g = load(gate + v * kWidth);
          store(answer_ + at, (1.0f - g) * local + g * global);
          store(local_answer_ + at, bank.local_count == 0 ? vfloat{} : global - local);
        }
      }
      for (int v = 0; v < Vectors; ++v) normaliser[v] = broadcast(1.0f);
      if (problem_.difference.data != nullptr) write<Vectors>(bank.head, local_answer_, normaliser, images, places, count, problem_.difference);
    }
    write<Vectors>(bank.head, answer_, normaliser, images, places, count, problem_.out);
  }

  // answer_[channel][query] = sum over prototypes m in [begin, end) of 2^(scale (score - reference)) value[m][channel].
  template <int Vectors>
  DPDIFF_INLINE void attend(int64_t begin, int64_t end, vfloat (&reference)[Vectors], vfloat (&total)[Vectors]) {
    const vfloat lowest = broadcast(-INFINITY);
    for (int v = 0; v < Vectors; ++v) reference[v] = lowest, total[v] = vfloat{};
    for (int64_t m = begin; m < end; m += kBlock) {
      const int64_t count = smaller(kBlock, end - m);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply_tile<Engine, Vectors, false>(
            units_, key_tiles_ + (m + i) * units_, kRows, 1, queries_, kLanes, scores_ + i * kLanes, kLanes);
      }
      raise<Vectors>(count, m > begin, reference, total);
      exponentiate<Vectors>(count, reference, total);
      const float* values = values_ + m / Engine::kPack * padded_;
      const int64_t steps = (count + Engine::kPack - 1) / Engine::kPack;
      for (int64_t e = 0; e < channels_; e += kRows) {
        if (m > begin) {
          multiply_tile<Engine, Vectors, true>(steps, values + e, padded_, 1, pairs_, kLanes, answer_ + e * kLanes, kLanes);
        } else {
          multiply_tile<Engine, Vectors, false>(steps, values + e, padded_, 1, pairs_, kLanes, answer_ + e * kLanes, kLanes);
        }
      }
    }
  }

  // Raises the reference of those queries that have a score far above it, and scales down what they have summed up.
  // Each query decides for itself, so that its answer doesn't depend on its neighbours.
  template <int Vectors>
  DPDIFF_INLINE void raise(int64_t count, bool started, vfloat (&reference)[Vectors], vfloat (&total)[Vectors]) {
    vfloat best[Vectors];
    for (int v = 0; v < Vectors; ++v) best[v] = broadcast(-INFINITY);
    for (int64_t m = 0; m < count; ++m) {
      for (int v = 0; v < Vectors; ++v) best[v] = maximum(best[v], load(scores_ + m * kLanes + v * kWidth));
    }
    vint above[Vectors], some{};
    for (int v = 0; v < Vectors; ++v) some |= above[v] = best[v] > reference[v] + kSlack / exponent_scale_;
    if (!any(some)) return;
    vfloat factor[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      factor[v] = select(above[v], exp2((reference[v] - best[v]) * exponent_scale_), broadcast(1.0f));
      reference[v] = select(above[v], best[v], reference[v]);
      total[v] = total[v] * factor[v];
    }
    if (!started) return;
    for (int64_t e = 0; e < channels_; ++e) {
      for (int v = 0; v < Vectors; ++v) {
        float* at = answer_ + e * kLanes + v * kWidth;
        store(at, load(at) * factor[v]);
      }
    }
  }

  template <int Vectors>
  DPDIFF_INLINE void exponentiate(int64_t count, const vfloat (&reference)[Vectors], vfloat (&total)[Vectors]) {
    vfloat from[Vectors], sum[Vectors] = {};
    for (int v = 0; v < Vectors; ++v) {  // a query whose scores are all -inf so far gets weights of zero, not NaN
      from[v] = select(reference[v] == broadcast(-INFINITY), vfloat{}, reference[v]);
    }
    for (int64_t m = 0; m < count; m += Engine::kPack) {
      for (int v = 0; v < Vectors; ++v) {
        float* score = scores_ + m * kLanes + v * kWidth;
        vfloat p = Engine::power_of_two((load(score) - from[v]) * exponent_scale_);
        sum[v] += p;
        if constexpr (Engine::kPack == 2) {
#if defined(DPDIFF_AVX512)
          vfloat next{};
          if (m + 1 < count) next = Engine::power_of_two((load(score + kLanes) - from[v]) * exponent_scale_);
          sum[v] += next;
          p = pair(p, next);
#endif
        }
        store(pairs_ + m / Engine::kPack * kLanes + v * kWidth, p);
      }
    }
    for (int v = 0; v < Vectors; ++v) total[v] += sum[v];
  }

  template <int Vectors>
  void write(int64_t head, const float* answer, const vfloat (&factor)[Vectors], const int64_t* images, const int64_t* places,
             int count, const Rows& to) {
    for (int v = 0; v < Vectors; ++v) {
      transpose_columns(answer, channels_, v, factor[v], staged_, round_up(channels_, kWidth));
      for (int i = 0; i < kWidth && v * kWidth + i < count; ++i) {
        const int lane = v * kWidth + i;
        store_row(problem_.dtype, staged_ + i * round_up(channels_, kWidth), channels_, to.at(images[lane], head, places[lane]));
      }
    }
  }

  const AttentionForward& problem_;
  const int64_t channels_, units_, padded_;
  const float exponent_scale_;
  Scratch scratch_;
  float *key_tiles_, *values_, *staged_, *queries_, *scores_, *pairs_, *answer_, *local_answer_ = nullptr;
};

void attention_forward(const AttentionForward& problem, int64_t begin, int64_t end) {
#if defined(DPDIFF_AVX512)
  if (problem.dtype == DType::bfloat16) return ForwardAttention<BFloat16Engine>(problem).run(begin, end);
#endif
  ForwardAttention<FloatEngine>(problem).run(begin, end);
}
