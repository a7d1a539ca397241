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
  constexpr int64_t kChannels = 256;
  const int64_t n_prototypes = members.begin.size() - 1, n = members.entries.size();
  const int64_t n_shares = std::max<int64_t>(1, std::min<int64_t>(n_prototypes, 4 * torch::stable::get_num_threads()));
  const auto cut = [&](int64_t share) {
    if (share == n_shares) return n_prototypes;
    const auto place = std::lower_bound(members.begin.begin(), members.begin.end() - 1, share * n / n_shares);
    return share == 0 ? 0 : int64_t(place - members.begin.begin());
  };
  const int64_t n_slices = (d + kChannels - 1) / kChannels;
  torch::stable::parallel_for(0, n_shares * n_slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % n_slices * kChannels;
      work(cut(i / n_slices), cut(i / n_slices + 1), channel, std::min(d, channel + kChannels));
    }
  });
}

// sum += factor * x over n channels.
template <typename T>
DPDIFF_INLINE void add_scaled(double* sum, double factor, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kHalf <= n; i += kHalf) {
    vdouble s;
    memcpy(&s, sum + i, sizeof s);
    s += factor * load_double(x + i);
    memcpy(sum + i, &s, sizeof s);
  }
  for (; i < n; ++i) sum[i] += factor * double(to_float(x[i]));
}

template <typename T>
void statistics_of(const Statistics& in) {
  const Members members(in.indices, in.n_tokens, in.n_prototypes);
  const T* tokens = static_cast<const T*>(in.tokens);
  const auto weight = [&](int64_t i) { return in.weights == nullptr ? 1.0 : double(in.weights[i]); };
  for (int64_t j = 0; j < in.n_prototypes; ++j) {
    double count = 0;
    for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) count += weight(members.entries[e]);
    in.counts[j] = float(count);
  }
  share_out(members, in.d, [&](int64_t first, int64_t last, int64_t channel, int64_t end) {
    std::vector<double> sum(end - channel);
    for (int64_t j = first; j < last; ++j) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) {
        const int64_t i = members.entries[e];
        add_scaled(sum.data(), weight(i), tokens + i * in.d + channel, end - channel);
      }
      for (int64_t c = channel; c < end; ++c) in.sums[j * in.d + c] = float(sum[c - channel]);
    }
  });
}

DPDIFF_INLINE void softmax(const Match* matches, int64_t k, double temperature, double* weights) {
  double total = 0;
  for (int64_t j = 0; j < k; ++j) {
    weights[j] = ::exp((matches[j].goodness - matches[0].goodness) / temperature);
    total += weights[j];
  }
  for (int64_t j = 0; j < k; ++j) weights[j] /= total;
}

// A pair of a token x and one of its nearest prototypes p contributes, to the gradients
//   of x:  x_by_p p + x_by_x x
//   of p:  p_by_x x + p_by_p p + weight grad_values
struct PairGradient {
  double x_by_p, x_by_x, p_by_x, p_by_p, weight;
};

// From the gradient of a pair's goodness to those of its vectors.
DPDIFF_INLINE PairGradient pair_gradient(Metric metric, double gradient, double goodness, double norm_x, double norm_p) {
  if (metric == Metric::l2) return {2 * gradient, -2 * gradient, 2 * gradient, -2 * gradient, 0};
  if (metric == Metric::dot) return {gradient, 0, gradient, 0, 0};
  if (norm_x == 0 || norm_p == 0) return {0, 0, 0, 0, 0};
  const double cross = gradient / (norm_x * norm_p);
  return {cross, -gradient * goodness / (norm_x * norm_x), cross, -gradient * goodness / (norm_p * norm_p), 0};
}

template <typename T>
void backward_of(const NearestBackward& in) {
  const int64_t d = in.d, k = in.k, n = in.n_batch * in.n_tokens;
  const int64_t n_prototypes = in.shared ? in.n_prototypes : in.n_batch * in.n_prototypes;
  const T* tokens = static_cast<const T*>(in.tokens);
  const T* prototypes = static_cast<const T*>(in.prototypes);
  const T* grad_values = static_cast<const T*>(in.grad_values);

  std::vector<double> norms(n_prototypes);
  std::vector<int64_t> rows(n * k);  // of all images' prototypes together
  std::vector<PairGradient> pairs(n * k);
  if (in.metric == Metric::cosine) {
    torch::stable::parallel_for(0, n_prototypes, 64, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) norms[j] = vector_norm(prototypes + j * d, d);
    });
  }
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<Match> matches(k);
    std::vector<double> weights(k), products(k), sum(d);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = tokens + i * d;
      const double norm = in.metric == Metric::cosine ? vector_norm(x, d) : 0;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t row = in.indices[i * k + j] + (in.shared ? 0 : i / in.n_tokens * in.n_prototypes);
        rows[i * k + j] = row;
        matches[j] = {goodness(x, norm, prototypes + row * d, norms[row], d, in.metric), row};
      }
      double mean = 0;
      if (grad_values != nullptr) {
        softmax(matches.data(), k, in.temperature, weights.data());
        for (int64_t j = 0; j < k; ++j) {
          products[j] = dot(grad_values + i * d, prototypes + matches[j].index * d, d);
          mean += weights[j] * products[j];
        }
      }
      std::fill(sum.begin(), sum.end(), 0.0);
      double x_by_x = 0;
      for (int64_t j = 0; j < k; ++j) {
        double gradient = 0;
        if (in.grad_scores != nullptr) gradient = (in.metric == Metric::l2 ? -1 : 1) * double(in.grad_scores[i * k + j]);
        if (grad_values != nullptr) gradient += weights[j] * (products[j] - mean) / in.temperature;
        PairGradient& pair = pairs[i * k + j];
        pair = pair_gradient(in.metric, gradient, matches[j].goodness, norm, norms[matches[j].index]);
        pair.weight = weights[j];
        x_by_x += pair.x_by_x;
        if (in.grad_tokens != nullptr) add_scaled(sum.data(), pair.x_by_p, prototypes + matches[j].index * d, d);
      }
      if (in.grad_tokens == nullptr) continue;
      add_scaled(sum.data(), x_by_x, x, d);
      T* grad = static_cast<T*>(in.grad_tokens) + i * d;
      for (int64_t c = 0; c < d; ++c) grad[c] = from_float<T>(float(sum[c]));
    }
  });
  if (in.grad_prototypes == nullptr) return;

  const Members members(rows.data(), n * k, n_prototypes);
  share_out(members, d, [&](int64_t first, int64_t last, int64_t channel, int64_t end) {
    const int64_t size = end - channel;
    std::vector<double> sum(size);
    for (int64_t j = first; j < last; ++j) {
      std::fill(sum.begin(), sum.end(), 0.0);
      double p_by_p = 0;
      for (int64_t e = members.begin[j]; e < members.begin[j + 1]; ++e) {
        const int64_t entry = members.entries[e], i = entry / k;
        const PairGradient& pair = pairs[entry];
        add_scaled(sum.data(), pair.p_by_x, tokens + i * d + channel, size);
        if (grad_values != nullptr) add_scaled(sum.data(), pair.weight, grad_values + i * d + channel, size);
        p_by_p += pair.p_by_p;
      }
      add_scaled(sum.data(), p_by_p, prototypes + j * d + channel, size);
      T* grad = static_cast<T*>(in.grad_prototypes) + j * d + channel;
      for (int64_t c = 0; c < size; ++c) grad[c] = from_float<T>(float(sum[c]));
    }
  });
}
