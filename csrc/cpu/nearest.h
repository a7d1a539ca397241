// What the nearest-prototype kernels, compiled once per instruction set, and their entry points share.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "routes.h"

namespace dpdiff {

enum class Metric { cosine, dot, l2 };

struct Nearest {
  const void* tokens;      // (n_batch, n_tokens, d)
  const void* prototypes;  // (n_prototypes, d) if shared, else (n_batch, n_prototypes, d)
  const Routes* routes;    // with rows ascending; null: all prototypes
  DType dtype;             // of tokens, prototypes and values
  Metric metric;
  bool shared;
  int64_t n_batch, n_tokens, n_prototypes, d, k;
  double temperature;
  float* scores;     // (n_batch, n_tokens, k), or null
  int64_t* indices;  // (n_batch, n_tokens, k)
  void* values;      // (n_batch, n_tokens, d), or null: only scores and indices are wanted
  float* weights;    // (n_batch, n_tokens, k), of the values
};

// Gradients of the scores, and of the values where grad_values is given, at the indices that the forward pass chose.
struct NearestBackward {
  const void* tokens;
  const void* prototypes;
  const int64_t* indices;
  const float* scores;
  const float* weights;      // of the values; read only with grad_values
  const void* grad_values;   // (n_batch, n_tokens, d), or null
  const float* grad_scores;  // (n_batch, n_tokens, k), or null
  DType dtype;               // of tokens, prototypes, grad_values and the results
  Metric metric;
  bool shared;
  int64_t n_batch, n_tokens, n_prototypes, d, k;
  double temperature;
  void* grad_tokens;      // or null where not wanted
  void* grad_prototypes;  // or null where not wanted
};

struct Statistics {
  const void* tokens;  // (n_tokens, d)
  const int64_t* indices;
  const float* weights;  // (n_tokens,), or null: all 1
  DType dtype;
  int64_t n_tokens, n_prototypes, d;
  float* counts;  // (n_prototypes,)
  float* sums;    // (n_prototypes, d)
};

}  // namespace dpdiff
