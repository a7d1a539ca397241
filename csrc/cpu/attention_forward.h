// Attention, forward, with online softmax (Milakov and Gimelshein, 2018). A thread packs the banks of an instance once
// for all its queries; of those it takes kChunk at a time, past which the banks stream in blocks of kBlock prototypes.

template <class Engine>
class ForwardAttention {
 public:
  explicit ForwardAttention(const AttentionForward& problem)
      : problem_(problem),
        channels_(problem.channels),
        units_(units_of<Engine>(channels_)),
        padded_(round_up(channels_, kWidth * Engine::kPack)),
        exponent_scale_(problem.scale * float(kLog2e)) {
    const int64_t prototypes = packed_count(problem);
    key_tiles_ = arena_.take<float>(prototypes * units_);
    value_rows_ = arena_.take<float>(prototypes / Engine::kPack * padded_);
    staged_ = arena_.take<float>(kLanes * padded_);
    query_columns_ = arena_.take<float>(kSubBlocks * units_ * kLanes);
    scores_ = arena_.take<float>(kBlock * kLanes);
    weights_ = Engine::kPack == 1 ? scores_ : arena_.take<float>(kBlock / 2 * kLanes);
    answers_[0] = arena_.take<float>(kSubBlocks * padded_ * kLanes);
    answers_[1] = problem.gate == nullptr ? nullptr : arena_.take<float>(kSubBlocks * padded_ * kLanes);
  }

  // Chunks [begin, end) of kChunk tokens, instance by instance.
  void run(int64_t begin, int64_t end) {
    const int64_t sequence = problem_.sequence(), chunks = (sequence + kChunk - 1) / kChunk;
    const int64_t images = problem_.instances() / problem_.heads;
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t instance = i / chunks;
      const BankView bank(problem_, instance % images, instance / images);
      if (instance != packed) {
        pack_bank<Engine>(bank, &Bank::key, padded_, staged_, key_tiles_, nullptr);
        pack_bank<Engine>(bank, &Bank::value, padded_, staged_, nullptr, value_rows_);
        packed = instance;
      }
      const int64_t first = i % chunks * kChunk;
      chunk(bank, first, smaller(first + kChunk, sequence));
    }
    stream_end();
  }

 private:
  // How far, in powers of two, scores may exceed what exponents are taken relative to before that is raised.
  static constexpr float kSlack = 8;
  static constexpr int kSubBlocks = kChunk / kLanes;
  static_assert(kChunk % kLanes == 0);

  struct Lanes {
    int64_t images[kLanes], places[kLanes];
    float reference[2][kLanes], total[2][kLanes], gate[kLanes];
    int count, vectors;
  };

  void chunk(const BankView& bank, int64_t first, int64_t last) {
    int n = 0;
    for (int64_t token = first; token < last; token += kLanes, ++n) prepare(bank, token, int(smaller(kLanes, last - token)), n);
    Ahead ahead(bank, last, smaller(last + kChunk, problem_.sequence()), n * bank.tiles(Engine::kTile));
    for (int s = 0; s < bank.softmaxes(); ++s) {
      for (int64_t m = bank.begin(s); m < bank.end(s); m += kBlock) {
        const int64_t count = smaller(kBlock, bank.end(s) - m);
        for (int i = 0; i < n; ++i) {
          switch (lanes_[i].vectors) {
            case 1: block<1>(s, m, count, m > bank.begin(s), i, ahead); break;
            case 2: block<2>(s, m, count, m > bank.begin(s), i, ahead); break;
            default: block<kVectors>(s, m, count, m > bank.begin(s), i, ahead);
          }
        }
      }
    }
    for (int i = 0; i < n; ++i) finish(bank, i);
  }

  void prepare(const BankView& bank, int64_t first, int count, int n) {
    typedef typename Engine::Element Element;
    Element* staged = reinterpret_cast<Element*>(staged_);
    Lanes& lanes = lanes_[n];
    lanes.count = count;
    lanes.vectors = (count + kWidth - 1) / kWidth;
    for (int i = 0; i < lanes.vectors * kWidth; ++i) {
      const void* row = nullptr;
      for (int s = 0; s < 2; ++s) lanes.reference[s][i] = -INFINITY, lanes.total[s][i] = 0;
      lanes.gate[i] = 0;
      if (i < count) {
        const int64_t image = lanes.images[i] = bank.image_of(first + i), place = lanes.places[i] = bank.place_of(first + i);
        row = problem_.query.at(image, bank.head, place);
        if (problem_.gate != nullptr) lanes.gate[i] = bank.local_count == 0 ? 1.0f : problem_.gate[bank.flat(image, place)];
      }
      copy_row(problem_.dtype, row, channels_, staged + i * padded_, padded_);
    }
    transpose_rows(staged_, padded_ / Engine::kPack, units_, lanes.vectors, query_columns_ + n * units_ * kLanes);
  }

  // Adds prototypes [m, m + count) to the answers of one sub-block's queries: for softmax s,
  // answer[channel][query] = sum over prototypes of 2^(scale (score - reference)) value[prototype][channel].
  template <int Vectors>
  void block(int s, int64_t m, int64_t count, bool started, int n, Ahead& ahead) {
    float* answer = answers_[s] + n * padded_ * kLanes;
    for (int64_t i = 0; i < count; i += Engine::kTile) {
      ahead.step({&problem_.query});
      score_tile<Engine, Vectors>(
          units_, key_tiles_ + (m + i) * units_, query_columns_ + n * units_ * kLanes, scores_ + i * kLanes);
    }
    raise<Vectors>(count, started, answer, lanes_[n].reference[s], lanes_[n].total[s]);
    exponentiate<Vectors>(count, lanes_[n].reference[s], lanes_[n].total[s]);
    const float* values = value_rows_ + m / Engine::kPack * padded_;
    const int64_t steps = units_of<Engine>(count);
    for (int64_t e = 0; e < channels_; e += Engine::kTile) {
      if (started) {
        weigh_tile<Engine, Vectors, true, kBlock>(steps, values, padded_, e, weights_, kLanes, answer);
      } else {
        weigh_tile<Engine, Vectors, false, kBlock>(steps, values, padded_, e, weights_, kLanes, answer);
      }
    }
  }

  // Raises the reference of those queries that have a score far above it, and scales down what they have summed up.
  // Each query decides for itself, so that its answer doesn't depend on its neighbours.
  template <int Vectors>
  DPDIFF_INLINE void raise(int64_t count, bool started, float* answer, float* reference, float* total) {
    vfloat best[Vectors], factor[Vectors];
    for (int v = 0; v < Vectors; ++v) best[v] = broadcast(-INFINITY);
    for (int64_t m = 0; m < count; ++m) {
      for (int v = 0; v < Vectors; ++v) best[v] = maximum(best[v], load(scores_ + m * kLanes + v * kWidth));
    }
    vint above[Vectors], some{};
    for (int v = 0; v < Vectors; ++v) some |= above[v] = best[v] > load(reference + v * kWidth) + kSlack / exponent_scale_;
    if (!any(some)) return;
    for (int v = 0; v < Vectors; ++v) {
      const vfloat old = load(reference + v * kWidth);
      factor[v] = select(above[v], exp2((old - best[v]) * exponent_scale_), broadcast(1.0f));
      store(reference + v * kWidth, select(above[v], best[v], old));
      store(total + v * kWidth, load(total + v * kWidth) * factor[v]);
    }
    if (!started) return;
    for (int64_t e = 0; e < channels_; ++e) {
      for (int v = 0; v < Vectors; ++v) {
        float* at = answer + e * kLanes + v * kWidth;
        store(at, load(at) * factor[v]);
      }
    }
  }

  template <int Vectors>
  DPDIFF_INLINE void exponentiate(int64_t count, const float* reference, float* total) {
    vfloat from[Vectors], sum[Vectors] = {};
    for (int v = 0; v < Vectors; ++v) {  // a query whose scores are all -inf so far gets weights of zero, not NaN
      from[v] = load(reference + v * kWidth);
      from[v] = select(from[v] == broadcast(-INFINITY), vfloat{}, from[v]);
    }
    for (int64_t m = 0; m < count; m += Engine::kPack) {
      for (int v = 0; v < Vectors; ++v) {
        const float* score = scores_ + m * kLanes + v * kWidth;
        vfloat p = Engine::power_of_two((load(score) - from[v]) * exponent_scale_);
        if constexpr (Engine::kPack == 2) {
          vfloat next{};
          if (m + 1 < count) next = Engine::power_of_two((load(score + kLanes) - from[v]) * exponent_scale_);
          p = Engine::pair(p, next);
        }
        sum[v] = Engine::add(sum[v], p);
        store(weights_ + m / Engine::kPack * kLanes + v * kWidth, p);
      }
    }
    for (int v = 0; v < Vectors; ++v) store(total + v * kWidth, load(total + v * kWidth) + sum[v]);
    clear_steps<Engine>(count, weights_);
  }

  // Normalises and blends the answers of one sub-block, and writes what is wanted.
  void finish(const BankView& bank, int n) {
    const Lanes& lanes = lanes_[n];
    float *local = answers_[0] + n * padded_ * kLanes, *global = answers_[1] + n * padded_ * kLanes;
    const int64_t rows = problem_.batch * problem_.heads * problem_.tokens;
    for (int i = 0; i < lanes.count && problem_.sums.total != nullptr; ++i) {
      const int64_t at = bank.flat(lanes.images[i], lanes.places[i]);
      for (int s = 0; s < bank.softmaxes(); ++s) {
        problem_.sums.reference[s * rows + at] = lanes.reference[s][i];
        problem_.sums.total[s * rows + at] = lanes.total[s][i];
      }
    }
    for (int v = 0; v < lanes.vectors; ++v) {
      vfloat factor = 1.0f / load(lanes.total[0] + v * kWidth);
      if (bank.softmaxes() == 2) {
        const vfloat gate = load(lanes.gate + v * kWidth), global_factor = 1.0f / load(lanes.total[1] + v * kWidth);
        for (int64_t at = v * kWidth; at < channels_ * kLanes; at += kLanes) {
          const vfloat g = load(global + at) * global_factor;
          const vfloat l = bank.local_count == 0 ? vfloat{} : load(local + at) * factor;
          store(local + at, (1.0f - gate) * l + gate * g);
          store(global + at, bank.local_count == 0 ? vfloat{} : g - l);
        }
        factor = broadcast(1.0f);
        if (problem_.difference.data != nullptr) write(bank, lanes, v, global, factor, problem_.difference);
      }
      write(bank, lanes, v, local, factor, problem_.out);
    }
  }

  void write(const BankView& bank, const Lanes& lanes, int v, const float* columns, vfloat factor, const Rows& to) {
    const int64_t ld = round_up(channels_, kWidth);
    transpose_columns(columns, channels_, v, factor, staged_, ld);
    for (int i = v * kWidth; i < smaller((v + 1) * kWidth, lanes.count); ++i) {
      store_row(problem_.dtype, staged_ + (i - v * kWidth) * ld, channels_, to.at(lanes.images[i], bank.head, lanes.places[i]),
                problem_.streamed);
    }
  }

  const AttentionForward& problem_;
  const int64_t channels_, units_, padded_;
  const float exponent_scale_;
  typename Engine::Setup setup_;
  Arena arena_;
  float *key_tiles_, *value_rows_, *staged_, *query_columns_, *scores_, *weights_;
  float* answers_[2];  // of each softmax
  Lanes lanes_[kSubBlocks];
};

void attention_forward(const AttentionForward& problem, int64_t begin, int64_t end) {
  run_on_engine<ForwardAttention>(problem, begin, end);
}
