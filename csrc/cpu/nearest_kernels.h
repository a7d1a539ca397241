// Nearest-prototype search and aggregation for one instruction set; included once for each (foreach_isa.h).
#include "nearest_exact.h"
#include "nearest_bank.h"
#include "nearest_search.h"
#include "nearest_scatter.h"

// Prototypes are packed this many bytes at a time.
constexpr int64_t kBankBytes = 12 << 20;

// weights = softmax(goodness / temperature), values = sum_j weights_j p_j; NaN where a score isn't finite.
template <typename T>
void aggregate(const Nearest& in, const Match* matches, const T* prototypes, float* weights, T* values) {
  double total = 0;
  const auto power = [&](int64_t j) { return ::exp((matches[j].goodness - matches[0].goodness) / in.temperature); };
  for (int64_t j = 0; j < in.k; ++j) total += power(j);
  for (int64_t j = 0; j < in.k; ++j) weights[j] = float(power(j) / total);
  for (int64_t i = 0; i < in.d; i += kWidth) {
    vfloat sum{};
    for (int64_t j = 0; j < in.k; ++j) {
      sum += weights[j] * load_some(prototypes + matches[j].index * in.d + i, in.d - i);
    }
    store_some(values + i, sum, in.d - i);
  }
}

// Searches `rows`, or all prototypes where that is null, for the tokens of one image.
template <typename T, class Screen>
void search_image(const Nearest& in, int64_t image, const int64_t* rows, int64_t n_rows) {
  const int64_t n = in.n_tokens, d = in.d, k = in.k;
  const T* tokens = static_cast<const T*>(in.tokens) + image * n * d;
  const T* prototypes = static_cast<const T*>(in.prototypes) + (in.shared ? 0 : image * in.n_prototypes * d);
  T* values = in.values == nullptr ? nullptr : static_cast<T*>(in.values) + image * n * d;
  float* scores = in.scores == nullptr ? nullptr : in.scores + image * n * k;
  int64_t* indices = in.indices + image * n * k;

  Buffer<Match> matches(n * k);
  std::fill_n(static_cast<Match*>(matches), n * k, kNoMatch);
  const int64_t bank_size = round_up(kBankBytes / int64_t(sizeof(T) * (d + 1)) + 1, kPanel);
  const int64_t block = Search<T, Screen>::block(d), n_blocks = (n + block - 1) / block;
  for (int64_t first = 0; first < n_rows; first += bank_size) {
    const Bank<T, Screen> bank(prototypes, rows, first, std::min(bank_size, n_rows - first), d, in.metric);
    const bool last = first + bank_size >= n_rows;
    torch::stable::parallel_for(0, n_blocks, 1, [&](int64_t begin, int64_t end) {
      Search<T, Screen> search(bank, k, scores == nullptr && k == 1 && n_rows <= bank_size);
      for (int64_t token = begin * block; token < std::min(n, end * block); token += block) {
        const int64_t size = std::min(block, n - token);
        search.run(tokens + token * d, size, matches + token * k);
        if (!last) continue;
        for (int64_t i = token * k; i < (token + size) * k; ++i) {
          const double goodness = matches[i].goodness;
          if (scores != nullptr) scores[i] = float(in.metric == Metric::l2 ? -goodness : goodness);
          indices[i] = matches[i].index;
        }
        for (int64_t i = token; values != nullptr && i < token + size; ++i) {
          aggregate(in, matches + i * k, prototypes, in.weights + (image * n + i) * k, values + i * d);
        }
      }
    });
  }
}

template <typename T, class Screen>
void search_images(const Nearest& in) {
  const auto search = [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      if (in.routes == nullptr) {
        search_image<T, Screen>(in, image, nullptr, in.n_prototypes);
      } else {
        search_image<T, Screen>(in, image, in.routes->rows.data() + in.routes->begin[image], in.routes->count(image));
      }
    }
  };
  // Many images: each thread takes whole ones (a nested parallel_for runs in its caller). Few: all threads share each.
  if (in.n_batch >= 4 * int64_t(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, in.n_batch, 1, search);
  } else {
    search(0, in.n_batch);
  }
}

template <typename T>
void nearest_of(const Nearest& in) {
#if defined(DPDIFF_AVX512)
  if (bfloat16_as() == BFloat16As::pairs) return search_images<T, Bfloat16>(in);
#endif
#if defined(DPDIFF_AMX)
  if (bfloat16_as() == BFloat16As::tiles) return search_images<T, Bfloat16InTiles>(in);
#endif
  search_images<T, Float32>(in);
}

void nearest(const Nearest& in) {
  switch (in.dtype) {
    case DType::float32: return nearest_of<float>(in);
    case DType::float16: return nearest_of<float16>(in);
    case DType::bfloat16: return nearest_of<bfloat16>(in);
  }
}

void nearest_backward(const NearestBackward& in) {
  switch (in.dtype) {
    case DType::float32: return backward_of<float>(in);
    case DType::float16: return backward_of<float16>(in);
    case DType::bfloat16: return backward_of<bfloat16>(in);
  }
}

void prototype_statistics(const Statistics& in) {
  switch (in.dtype) {
    case DType::float32: return statistics_of<float>(in);
    case DType::float16: return statistics_of<float16>(in);
    case DType::bfloat16: return statistics_of<bfloat16>(in);
  }
}
