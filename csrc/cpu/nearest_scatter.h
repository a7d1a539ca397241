// Sums over the tokens of each prototype: statistics, and the backward pass. Included by nearest_kernels.h.
//
// Tokens are sorted by prototype first; each prototype's sum then runs over its tokens in their order, in double: the
// same bits every time, for any number of threads, and no atomics.

// Sorts entries 0 to n - 1 by indices[entry] (stable).
struct Members {
  std::vector<int64_t> begin;    // prototype j has entries[begin[j]] up to entries[begin[j + 1]]
  std::vector<int64_t> entries;

  Members(const int64_t* indices, int64_t n, int64_t n_prototypes) : begin(n_prototypes + 1), entries(n) {
    for (int64_t i = 0; i < n; ++i) ++begin[indices[i] + 1];
    for (int64_t j = 0; j < n_prototypes; ++j) begin[j + 1] += begin[j];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < n; ++i) entries[next[indices[i]]++] = i;
  }
};

// Calls work(first prototype, last, first channel, last) for shares of equal numbers of entries, in parallel.
template <typename Work>
void share_out(const Members& members, int64_t d, const Work& work) {
  const int64_t n_prototypes = members.begin.size() - 1, n = members.entries.size();
  const int64_t n_shares = std::max<int64_t>(1, std::min<int64_t>(n_prototypes, 4 * torch::stable::get_num_threads()));
  const auto cut = [&](int64_t share) {
    if (share == n_shares) return n_prototypes;
    const auto place = std::lower_bound(members.begin.begin(), members.begin.end() - 1, share * n / n_shares);
    return share == 0 ? 0 : int64_t(place - members.begin.begin());
  };
  // Whole rows keep to their pages; slices of them share out what few prototypes have.
  int64_t largest = 0;
  for (int64_t j = 0; j < n_prototypes; ++j) largest = std::max(largest, members.begin[j + 1] - members.begin[j]);
  const int64_t width = 4 * largest * torch::stable::get_num_threads() > n ? 256 : std::max<int64_t>(d, 1);
  const int64_t n_slices = (d + width - 1) / width;
  torch::stable::parallel_for(0, n_shares * n_slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % n_slices * width;
      work(cut(i / n_slices), cut(i / n_slices + 1), channel, std::min(d, channel + width));
    }
  });
}

// sum += factor * (scale * row) for each term, over n channels: eight rows at a time in float32, then in double. (For very
// short or long vectors, scale and factor are in float32's range but their product isn't.)
template <typename T>
struct Term {
  const T* row;
  float scale, factor;
};

// The same for up to eight terms and channels that fill kVectors vectors, or one that n don't fill. Rows lie anywhere in
// memory: the next eight are on their way meanwhile.
template <int kVectors, typename T>
DPDIFF_INLINE void add_terms(double* sum, const Term<T>* terms, int64_t n_terms, int64_t n_ahead, int64_t channel,
                             int64_t n) {
  vfloat totals[kVectors] = {};
  for (int64_t r = 0; r < n_terms; ++r) {
    const T* row = terms[r].row + channel;
    const char* ahead = reinterpret_cast<const char*>(terms[r + n_ahead].row + channel);
    const float scale = terms[r].scale, factor = terms[r].factor;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      totals[v] += factor * (scale * (kVectors > 1 ? load(row + v * kWidth) : load_some(row, n)));
      if (v * kWidth * sizeof(T) % 64 == 0) __builtin_prefetch(ahead + v * kWidth * sizeof(T), 0, 2);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    float lanes[kWidth];
    store(lanes, totals[v]);
    for (int lane = 0; lane < (kVectors > 1 ? kWidth : std::min<int64_t>(kWidth, n)); ++lane) {
      sum[channel + v * kWidth + lane] += double(lanes[lane]);
    }
  }
}

template <typename T>
void add_rows(double* sum, const Term<T>* terms, int64_t n_terms, int64_t n) {
  constexpr int64_t kRows = 8;
  constexpr int kVectors = kWidth == 16 ? 16 : 8;  // what registers hold
  for (int64_t first = 0; first < n_terms; first += kRows) {
    const int64_t n_rows = std::min(kRows, n_terms - first), n_ahead = first + 2 * kRows <= n_terms ? kRows : 0;
    int64_t channel = 0;
    for (; channel + kVectors * kWidth <= n; channel += kVectors * kWidth) {
      add_terms<kVectors>(sum, terms + first, n_rows, n_ahead, channel, n);
    }
    for (; channel < n; channel += kWidth) add_terms<1>(sum, terms + first, n_rows, n_ahead, channel, n - channel);
  }
}

// Adds up the terms that `list` gives for each entry, prototype by prototype; `finish` gets each sum.
template <typename T, typename List, typename Finish>
void sum_members(const Members& members, int64_t d, const List& list, const Finish& finish) {
  share_out(members, d, [&](int64_t first, int64_t last, int64_t channel, int64_t end) {
    std::vector<double> sum(end - channel);
    std::vector<Term<T>> terms;
    for (int64_t j = first; j < last; ++j) {
      terms.clear();
      for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) list(members.entries[e], channel, terms);
      std::fill(sum.begin(), sum.end(), 0.0);
      add_rows(sum.data(), terms.data(), terms.size(), end - channel);
      finish(j, channel, sum);
    }
  });
}

template <typename T>
void statistics_of(const Statistics& in) {
  const Members members(in.indices, in.n_tokens, in.n_prototypes);
  const T* tokens = static_cast<const T*>(in.tokens);
  const auto weight = [&](int64_t i) { return in.weights == nullptr ? 1.0f : in.weights[i]; };
  for (int64_t j = 0; j < in.n_prototypes; ++j) {
    double count = 0;
    for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) count += weight(members.entries[e]);
    in.counts[j] = float(count);
  }
  sum_members<T>(
      members, in.d,
      [&](int64_t i, int64_t channel, std::vector<Term<T>>& terms) {
        terms.push_back({tokens + i * in.d + channel, 1, weight(i)});
      },
      [&](int64_t j, int64_t channel, const std::vector<double>& sum) {
        for (size_t c = 0; c < sum.size(); ++c) in.sums[j * in.d + channel + c] = float(sum[c]);
      });
}

// What a token x and one of its nearest prototypes p add to the gradients. With x' = x / |x| and p' = p / |p| for cosine,
// x' = x and p' = p otherwise, and s the factors 1 / |x| and 1 / |p|, or 1:
//   of x:  s_x (factor p' + own x')
//   of p:  s_p (factor x' + own p') + weight grad_values
struct Pair {
  float factor, own, weight;
};

// The factors s: zero for a zero vector, whose cosine is constant.
template <typename T>
std::vector<float> scales(const T* rows, int64_t n, int64_t d, Metric metric) {
  std::vector<float> out(n, 1.0f);
  if (metric != Metric::cosine) return out;
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double norm = vector_norm(rows + i * d, d);
      out[i] = norm == 0 ? 0 : float(1 / norm);
    }
  });
  return out;
}

template <typename T>
void backward_of(const NearestBackward& in) {
  const int64_t d = in.d, k = in.k, n = in.n_batch * in.n_tokens;
  const int64_t n_prototypes = in.shared ? in.n_prototypes : in.n_batch * in.n_prototypes;
  const bool l2 = in.metric == Metric::l2;
  const T* tokens = static_cast<const T*>(in.tokens);
  const T* prototypes = static_cast<const T*>(in.prototypes);
  const T* grad_values = static_cast<const T*>(in.grad_values);
  const std::vector<float> scale_x = scales(tokens, n, d, in.metric);
  const std::vector<float> scale_p = scales(prototypes, n_prototypes, d, in.metric);

  std::vector<int64_t> rows(n * k);  // of all images' prototypes together
  std::vector<Pair> pairs(n * k);
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> products(k);  // grad_values . p; not needed for k = 1, where the weight is constant
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * k;
      double mean = 0;
      for (int64_t j = 0; j < k; ++j) {
        rows[first + j] = in.indices[first + j] + (in.shared ? 0 : i / in.n_tokens * in.n_prototypes);
        if (grad_values == nullptr || k == 1) continue;
        products[j] = dot(grad_values + i * d, prototypes + rows[first + j] * d, d);
        mean += double(in.weights[first + j]) * products[j];
      }
      double own = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double weight = grad_values == nullptr ? 0 : in.weights[first + j];
        double gradient = in.grad_scores == nullptr ? 0 : in.grad_scores[first + j];
        gradient += (l2 ? -1 : 1) * weight * (products[j] - mean) / in.temperature;
        Pair& pair = pairs[first + j];
        pair.factor = float(l2 ? -2 * gradient : gradient);
        pair.own = float(l2 ? 2 * gradient : in.metric == Metric::cosine ? -gradient * in.scores[first + j] : 0);
        pair.weight = float(weight);
        own += pair.own;
      }
      if (in.grad_tokens == nullptr) continue;
      for (int64_t c = 0; c < d; c += kWidth) {
        const vfloat x = load_some(tokens + i * d + c, d - c);
        // for l2 the sum of factor (p - x), which loses less than two sums do
        vfloat sum = l2 ? vfloat{} : float(own) * scale_x[i] * (scale_x[i] * x);
        for (int64_t j = 0; j < k; ++j) {
          const int64_t row = rows[first + j];
          const vfloat p = load_some(prototypes + row * d + c, d - c);
          sum += pairs[first + j].factor * scale_x[i] * (l2 ? p - x : scale_p[row] * p);
        }
        store_some(static_cast<T*>(in.grad_tokens) + i * d + c, sum, d - c);
      }
    }
  });
  if (in.grad_prototypes == nullptr) return;

  const Members members(rows.data(), n * k, n_prototypes);
  T* grad_prototypes = static_cast<T*>(in.grad_prototypes);
  sum_members<T>(
      members, d,
      [&](int64_t entry, int64_t channel, std::vector<Term<T>>& terms) {
        const int64_t i = entry / k;
        terms.push_back({tokens + i * d + channel, scale_x[i], pairs[entry].factor * scale_p[rows[entry]]});
        if (grad_values != nullptr) terms.push_back({grad_values + i * d + channel, 1, pairs[entry].weight});
      },
      [&](int64_t j, int64_t channel, const std::vector<double>& sum) {
        double own = 0;
        for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) own += pairs[members.entries[e]].own;
        own *= double(scale_p[j]) * double(scale_p[j]);
        for (size_t c = 0; c < sum.size(); ++c) {
          const int64_t at = j * d + channel + c;
          grad_prototypes[at] = from_float<T>(float(sum[c] + own * double(to_float(prototypes[at]))));
        }
      });
}
