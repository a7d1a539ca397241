// Attention, backward: scores and probabilities are recomputed block by block (Dao et al., "FlashAttention", 2022). A
// thread takes the tokens of a part of the batch, kChunk at a time, and sums up the gradients of the packed banks.
//
// With p = w softmax(scale q k^T), w the gate's weight of the bank, and delta = (gradient of the answer) . answer:
//   dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q.

template <class Engine>
class BackwardAttention {
  typedef typename Engine::Element Element;

 public:
  explicit BackwardAttention(const AttentionBackward& problem)
      : problem_(problem),
        channels_(problem.channels),
        units_(units_of<Engine>(channels_)),
        padded_(round_up(channels_, kWidth * Engine::kPack)),
        prototypes_(packed_count(problem)) {
    key_tiles_ = arena_.take<float>(prototypes_ * units_);
    value_tiles_ = arena_.take<float>(prototypes_ * units_);
    key_rows_ = arena_.take<float>(prototypes_ / Engine::kPack * padded_);
    key_gradient_ = arena_.take<float>(prototypes_ * padded_);
    value_gradient_ = arena_.take<float>(prototypes_ * padded_);
    staged_ = arena_.take<float>(kLanes * padded_);
    query_columns_ = arena_.take<float>(kSubBlocks * units_ * kLanes);
    out_columns_ = arena_.take<float>(kSubBlocks * units_ * kLanes);
    answer_columns_ = arena_.take<float>(units_ * kLanes);
    query_rows_ = arena_.take<float>(kSubBlocks * kLanes / Engine::kPack * padded_);
    out_rows_ = arena_.take<float>(kSubBlocks * kLanes / Engine::kPack * padded_);
    query_gradient_ = arena_.take<float>(kSubBlocks * padded_ * kLanes);
    scores_ = arena_.take<float>(kBlock * kLanes);
    slopes_ = arena_.take<float>(kBlock * kLanes);
    weight_rows_ = arena_.take<float>(kBlock * kChunkUnits);
    slope_rows_ = arena_.take<float>(kBlock * kChunkUnits);
  }

  // Parts [begin, end) of the heads.
  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / problem_.parts, part = i % problem_.parts;
      if (problem_.folded()) {
        const int64_t sequence = problem_.sequence(), chunks = (sequence + kChunk - 1) / kChunk;
        instance(BankView(problem_, 0, head), part, chunks * part / problem_.parts * kChunk,
                 smaller(sequence, chunks * (part + 1) / problem_.parts * kChunk));
      } else {
        const int64_t first = problem_.batch * part / problem_.parts, last = problem_.batch * (part + 1) / problem_.parts;
        for (int64_t image = first; image < last; ++image) instance(BankView(problem_, image, head), part, 0, problem_.tokens);
      }
    }
    stream_end();
  }

 private:
  static constexpr int kSubBlocks = kChunk / kLanes, kChunkUnits = kChunk / Engine::kPack;
  static_assert(kChunk % kLanes == 0);

  // What is known of each query before its scores are.
  struct Lanes {
    int64_t images[kLanes], places[kLanes];
    float reference[2][kLanes], factor[2][kLanes], delta[2][kLanes];
    int count, vectors;
  };

  void instance(const BankView& bank, int64_t part, int64_t first, int64_t last) {
    pack_bank<Engine>(bank, &Bank::key, padded_, staged_, key_tiles_, key_rows_);
    pack_bank<Engine>(bank, &Bank::value, padded_, staged_, value_tiles_, nullptr);
    memset(key_gradient_, 0, round_up(bank.total, Engine::kTile) * padded_ * sizeof(float));
    memset(value_gradient_, 0, round_up(bank.total, Engine::kTile) * padded_ * sizeof(float));
    for (int64_t chunk = first; chunk < last; chunk += kChunk) {
      int n = 0;
      for (int64_t token = chunk; token < smaller(chunk + kChunk, last); token += kLanes, ++n) {
        prepare(bank, token, int(smaller(kLanes, last - token)), n);
      }
      Ahead ahead(bank, chunk + kChunk, smaller(chunk + 2 * kChunk, last), n * bank.tiles(Engine::kTile));
      for (int s = 0; s < bank.softmaxes(); ++s) {
        for (int64_t m = bank.begin(s); m < bank.end(s); m += kBlock) {
          const int64_t count = smaller(kBlock, bank.end(s) - m);
          for (int i = 0; i < n; ++i) {
            switch (lanes_[i].vectors) {
              case 1: block<1>(s, m, count, i, ahead); break;
              case 2: block<2>(s, m, count, i, ahead); break;
              default: block<kVectors>(s, m, count, i, ahead);
            }
          }
          int queries = 0;
          for (int i = 0; i < n; ++i) queries += lanes_[i].vectors * kWidth;
          add_outer(count, queries / Engine::kPack, weight_rows_, out_rows_, value_gradient_ + m * padded_);
          add_outer(count, queries / Engine::kPack, slope_rows_, query_rows_, key_gradient_ + m * padded_);
        }
      }
      for (int i = 0; i < n; ++i) write_query_gradient(bank, i);
    }
    for (int64_t i = 0; i < bank.local_count; ++i) {
      const int64_t row = bank.local_row(i);
      const int64_t place = problem_.routed() ? problem_.rows[problem_.offsets[bank.image] + i] : part * problem_.local.count + row;
      write_bank_gradient(bank, i, problem_.grad_local, row, place);
    }
    for (int64_t i = 0; i < problem_.global.count; ++i) {
      write_bank_gradient(bank, bank.second + i, problem_.grad_global, i, part * problem_.global.count + i);
    }
  }

  void prepare(const BankView& bank, int64_t first, int count, int n) {
    Lanes& lanes = lanes_[n];
    memset(&lanes, 0, sizeof lanes);
    lanes.count = count;
    lanes.vectors = (count + kWidth - 1) / kWidth;
    const int64_t rows = problem_.batch * problem_.heads * problem_.tokens;
    for (int i = 0; i < count; ++i) {
      lanes.images[i] = bank.image_of(first + i);
      lanes.places[i] = bank.place_of(first + i);
    }
    float *query_columns = query_columns_ + n * units_ * kLanes, *out_columns = out_columns_ + n * units_ * kLanes;
    stage(bank, problem_.query, lanes, query_columns);
    pack_rows<Engine>(staged(), lanes.vectors * kWidth, padded_, query_rows_ + n * kLanes / Engine::kPack * padded_);
    stage(bank, problem_.grad_out, lanes, out_columns);
    pack_rows<Engine>(staged(), lanes.vectors * kWidth, padded_, out_rows_ + n * kLanes / Engine::kPack * padded_);
    memset(query_gradient_ + n * padded_ * kLanes, 0, padded_ * kLanes * sizeof(float));

    float delta[kLanes], slope[kLanes] = {};
    dots(bank, lanes, out_columns, problem_.out, delta);
    if (bank.softmaxes() == 2) dots(bank, lanes, out_columns, problem_.difference, slope);
    for (int i = 0; i < count; ++i) {
      const int64_t flat = bank.flat(lanes.images[i], lanes.places[i]);
      float gate = 0;
      if (bank.softmaxes() == 2) {
        gate = bank.local_count == 0 ? 1.0f : problem_.gate[flat];
        problem_.grad_gate[flat] = slope[i];
      }
      for (int s = 0; s < bank.softmaxes(); ++s) {
        const float reference = problem_.sums.reference[s * rows + flat];
        lanes.reference[s][i] = reference == -INFINITY ? 0.0f : reference;
        lanes.factor[s][i] = (s == 0 ? 1.0f - gate : gate) / problem_.sums.total[s * rows + flat];
        lanes.delta[s][i] = delta[i] + (s == 0 ? -gate : 1.0f - gate) * slope[i];
      }
    }
  }

  // For each query of a sub-block, the products with the gradient of the answer, in the order of score_tile: where one
  // prototype is all that is seen, and the answer its value, slopes minus delta are exactly zero.
  void dots(const BankView& bank, const Lanes& lanes, const float* gradient, const Rows& other, float* products) {
    stage(bank, other, lanes, answer_columns_);
    for (int v = 0; v < lanes.vectors; ++v) {
      const float *rows = staged_ + v * kWidth * units_, *columns = answer_columns_ + v * kWidth;
      store(products + v * kWidth, lane_scores<Engine>(units_, rows, columns, gradient + v * kWidth));
    }
  }

  Element* staged() { return reinterpret_cast<Element*>(staged_); }

  // Stages the rows of a sub-block's queries, and writes them as columns.
  void stage(const BankView& bank, const Rows& from, const Lanes& lanes, float* columns) {
    for (int i = 0; i < lanes.vectors * kWidth; ++i) {
      const void* row = i < lanes.count ? from.at(lanes.images[i], bank.head, lanes.places[i]) : nullptr;
      copy_row(problem_.dtype, row, channels_, staged() + i * padded_, padded_);
    }
    transpose_rows(staged_, padded_ / Engine::kPack, units_, lanes.vectors, columns);
  }

  // What prototypes [m, m + count) of softmax s and the queries of one sub-block give to each other's gradients.
  template <int Vectors>
  void block(int s, int64_t m, int64_t count, int n, Ahead& ahead) {
    for (int64_t i = 0; i < count; i += Engine::kTile) {
      ahead.step({&problem_.query, &problem_.grad_out, &problem_.out, &problem_.difference});
      score_tile<Engine, Vectors>(
          units_, key_tiles_ + (m + i) * units_, query_columns_ + n * units_ * kLanes, scores_ + i * kLanes);
      score_tile<Engine, Vectors>(
          units_, value_tiles_ + (m + i) * units_, out_columns_ + n * units_ * kLanes, slopes_ + i * kLanes);
    }
    differentiate<Vectors>(s, count, n);

    const float* keys = key_rows_ + m / Engine::kPack * padded_;
    const float* slopes = Engine::kPack == 1 ? slope_rows_ + n * kLanes : slopes_;
    float* query_gradient = query_gradient_ + n * padded_ * kLanes;
    const int64_t steps = units_of<Engine>(count), slopes_step = Engine::kPack == 1 ? kChunk : kLanes;
    for (int64_t e = 0; e < channels_; e += Engine::kTile) {
      weigh_tile<Engine, Vectors, true, 2 * Engine::kRun>(steps, keys, padded_, e, slopes, slopes_step, query_gradient);
    }
  }

  // Scores become probabilities, times the gate's weight; the products of values and gradients become ds. Both are kept
  // as [prototype][query of the chunk], and ds also as what the queries' gradient is a product with.
  template <int Vectors>
  DPDIFF_INLINE void differentiate(int s, int64_t count, int n) {
    const Lanes& lanes = lanes_[n];
    const float exponent_scale = problem_.scale * float(kLog2e);
    Element *weights = reinterpret_cast<Element*>(weight_rows_) + n * kLanes;
    Element *slopes = reinterpret_cast<Element*>(slope_rows_) + n * kLanes;
    vfloat reference[Vectors], factor[Vectors], delta[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      reference[v] = load(lanes.reference[s] + v * kWidth);
      factor[v] = load(lanes.factor[s] + v * kWidth);
      delta[v] = load(lanes.delta[s] + v * kWidth);
    }
    for (int64_t m = 0; m < count; m += Engine::kPack) {
      for (int v = 0; v < Vectors; ++v) {
        vfloat ds[Engine::kPack] = {};
        for (int i = 0; i < Engine::kPack && m + i < count; ++i) {
          const int64_t from = (m + i) * kLanes + v * kWidth, to = (m + i) * kChunk + v * kWidth;
          const vfloat p = Engine::power_of_two((load(scores_ + from) - reference[v]) * exponent_scale) * factor[v];
          ds[i] = p * (load(slopes_ + from) - delta[v]);
          store(weights + to, p);
          store(slopes + to, ds[i]);
        }
        if constexpr (Engine::kPack == 2) store(slopes_ + m / 2 * kLanes + v * kWidth, Engine::pair(ds[0], ds[1]));
      }
    }
    clear_steps<Engine>(count, slopes_);
  }

  // gradient[m][channel] += sum over queries of weights[m][query] rows[query][channel], in units of queries.
  void add_outer(int64_t count, int64_t queries, float* weights, float* rows, float* gradient) {
    const int64_t vectors = (channels_ + kWidth - 1) / kWidth, steps = round_up(queries, Engine::kSteps);
    for (int64_t k = queries; k < steps; ++k) {  // what is left there may be anything
      memset(rows + k * padded_, 0, padded_ * sizeof(float));
      for (int64_t i = 0; i < count; ++i) weights[i * kChunkUnits + k] = 0;
    }
    for (int64_t i = 0; i < count; i += Engine::kTile) {
      const float* own_weights = weights + i * kChunkUnits;
      float* own = gradient + i * padded_;
      for (int64_t v = 0; v < vectors;) {
        constexpr int kMost = Engine::kInTiles ? 4 : kVectors;
        const int64_t left = vectors - v;
        if (kMost >= 3 && left >= kMost && (kMost == 4 || left != 4)) {
          outer_tile<kMost>(steps, own_weights, rows + v * kWidth, own + v * kWidth), v += kMost;
        } else if (left >= 2) {
          outer_tile<2>(steps, own_weights, rows + v * kWidth, own + v * kWidth), v += 2;
        } else {
          outer_tile<1>(steps, own_weights, rows + v * kWidth, own + v * kWidth), v += 1;
        }
      }
    }
  }
  template <int Columns>
  DPDIFF_INLINE void outer_tile(int64_t steps, const float* weights, const float* rows, float* gradient) {
    multiply_tile<Engine, Columns, true, 2 * Engine::kRun>(
        steps, weights, Engine::kSteps, kChunkUnits, rows, padded_, gradient, padded_);
  }

  void write_query_gradient(const BankView& bank, int n) {
    const Lanes& lanes = lanes_[n];
    const int64_t ld = round_up(channels_, kWidth);
    for (int v = 0; v < lanes.vectors; ++v) {
      transpose_columns(query_gradient_ + n * padded_ * kLanes, channels_, v, broadcast(problem_.scale), staged_, ld);
      for (int i = v * kWidth; i < (v + 1) * kWidth && i < lanes.count; ++i) {
        store_row(problem_.dtype, staged_ + (i - v * kWidth) * ld, channels_,
                  problem_.grad_query.at(lanes.images[i], bank.head, lanes.places[i]), problem_.streamed);
      }
    }
  }

  // Hands on the gradients of packed row i: of prototype `row`, or a term of it at `place`.
  void write_bank_gradient(const BankView& bank, int64_t i, const BankGradient& to, int64_t row, int64_t place) {
    float *key = key_gradient_ + i * padded_, *value = value_gradient_ + i * padded_;
    for (int64_t e = 0; e < channels_; ++e) key[e] *= problem_.scale;
    if (to.key_rows == nullptr) {
      store_row(problem_.dtype, key, channels_, to.key.at(bank.image, bank.head, row));
      store_row(problem_.dtype, value, channels_, to.value.at(bank.image, bank.head, row));
      return;
    }
    const int64_t at = (bank.head * to.rows + place) * channels_;
    for (int64_t e = 0; e < channels_; ++e) to.key_rows[at + e] += key[e];
    for (int64_t e = 0; e < channels_; ++e) to.value_rows[at + e] += value[e];
  }

  const AttentionBackward& problem_;
  const int64_t channels_, units_, padded_, prototypes_;
  typename Engine::Setup setup_;
  Arena arena_;
  float *key_tiles_, *value_tiles_, *key_rows_, *key_gradient_, *value_gradient_, *staged_;
  float *query_columns_, *out_columns_, *answer_columns_, *query_rows_, *out_rows_, *query_gradient_;
  float *scores_, *slopes_, *weight_rows_, *slope_rows_;
  Lanes lanes_[kSubBlocks];
};

void attention_backward(const AttentionBackward& problem, int64_t begin, int64_t end) {
  run_on_engine<BackwardAttention>(problem, begin, end);
}

// Adds up the parts of a shared bank's gradient, of prototypes [begin, end) of (H, n_prototypes).
void attention_add_parts(const AttentionBackward& problem, const BankGradient& to, int64_t begin, int64_t end) {
  const int64_t n = problem.channels;
  std::vector<float> sums(n);
  const auto add = [&](const float* rows, const Rows& gradient, int64_t head, int64_t i) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = to.first[i]; k < to.first[i + 1]; ++k) {
      const float* terms = rows + (head * to.rows + to.places[k]) * n;
      for (int64_t e = 0; e < n; ++e) sums[e] += terms[e];
    }
    store_row(problem.dtype, sums.data(), n, gradient.at(0, head, to.prototypes[i]));
  };
  for (int64_t i = begin; i < end; ++i) {
    add(to.key_rows, to.key, i / to.n_prototypes, i % to.n_prototypes);
    add(to.value_rows, to.value, i / to.n_prototypes, i % to.n_prototypes);
  }
}
