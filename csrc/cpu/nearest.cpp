// Entry points of the nearest-prototype operators on CPU: outputs, routes, and the choice of instruction set.
#include "nearest.h"

#include <new>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "tensors.h"

#define DPDIFF_KERNELS "nearest_kernels.h"
#include "foreach_isa.h"

namespace dpdiff {
namespace {

Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::cosine;
  if (name == "dot") return Metric::dot;
  STD_TORCH_CHECK(name == "l2", "metric is ", name, ": expected cosine, dot or l2");
  return Metric::l2;
}

// The prototypes whose group is active, for each image, which needs k.
Routes route(const Tensor& groups, const Tensor& active_groups, int64_t k) {
  Routes routes = routes_of(groups, active_groups);
  for (int64_t b = 0; b < active_groups.size(0); ++b) {
    const auto first = routes.rows.begin() + routes.begin[b], last = routes.rows.begin() + routes.begin[b + 1];
    if (!std::is_sorted(first, last)) std::sort(first, last);
    if (routes.count(b) >= k) continue;
    throw std::invalid_argument(  // a ValueError in Python
        "active_groups leaves batch element " + std::to_string(b) + " with " + std::to_string(routes.count(b)) +
        " prototypes: expected at least k=" + std::to_string(k));
  }
  return routes;
}

void search(const Tensor& tokens, const Tensor& prototypes, int64_t k, const std::string& metric, double temperature,
            const MaybeTensor& groups, const MaybeTensor& active_groups, Tensor* scores, Tensor& indices, Tensor* values, Tensor* weights) {
  Nearest in;
  in.tokens = tokens.const_data_ptr();
  in.prototypes = prototypes.const_data_ptr();
  in.dtype = dtype_of(tokens);
  in.metric = parse_metric(metric);
  in.shared = prototypes.dim() == 2;
  in.n_batch = tokens.size(0);
  in.n_tokens = tokens.size(1);
  in.n_prototypes = prototypes.size(prototypes.dim() - 2);
  in.d = tokens.size(2);
  in.k = k;
  in.temperature = temperature;
  in.scores = scores == nullptr ? nullptr : scores->mutable_data_ptr<float>();
  in.indices = indices.mutable_data_ptr<int64_t>();
  in.values = values == nullptr ? nullptr : values->mutable_data_ptr();
  in.weights = weights == nullptr ? nullptr : weights->mutable_data_ptr<float>();
  STD_TORCH_CHECK(in.n_prototypes <= std::numeric_limits<int32_t>::max(), "more than 2^31 - 1 prototypes");
  STD_TORCH_CHECK(k >= 1 && (k <= in.n_prototypes || in.n_batch * in.n_tokens == 0), "k is ", k, " of ", in.n_prototypes,
                  " prototypes");
  std::optional<Routes> routes;
  if (groups.has_value()) routes = route(*groups, *active_groups, k);
  in.routes = groups.has_value() ? &*routes : nullptr;
  DPDIFF_DISPATCH(nearest)(in);
}

std::tuple<Tensor, Tensor> nearest_prototype(const Tensor& tokens_, const Tensor& prototypes, int64_t k,
                                             const std::string& metric, const MaybeTensor& groups,
                                             const MaybeTensor& active_groups) {
  const Tensor tokens = dense(tokens_);
  const std::vector<int64_t> shape{tokens.size(0), tokens.size(1), k};
  Tensor scores = empty(tokens, shape, ScalarType::Float);
  Tensor indices = empty(tokens, shape, ScalarType::Long);
  search(tokens, dense(prototypes), k, metric, 1, groups, active_groups, &scores, indices, nullptr, nullptr);
  return {scores, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> aggregate_nearest(const Tensor& tokens_, const Tensor& prototypes, int64_t k,
                                                             const std::string& metric, double temperature,
                                                             const MaybeTensor& groups, const MaybeTensor& active_groups) {
  const Tensor tokens = dense(tokens_);
  const std::vector<int64_t> shape{tokens.size(0), tokens.size(1), k};
  Tensor values = empty(tokens, tokens.sizes());
  Tensor scores = empty(tokens, shape, ScalarType::Float);
  Tensor indices = empty(tokens, shape, ScalarType::Long);
  Tensor weights = empty(scores, shape);
  search(tokens, dense(prototypes), k, metric, temperature, groups, active_groups, &scores, indices, &values, &weights);
  return {values, scores, indices, weights};
}

std::tuple<Tensor, Tensor> nearest_backward(const Tensor& tokens_, const Tensor& prototypes_, const Tensor& indices_,
                                            const Tensor& scores_, const MaybeTensor& weights_,
                                            const MaybeTensor& grad_values_, const MaybeTensor& grad_scores_,
                                            const std::string& metric, double temperature, bool of_tokens,
                                            bool of_prototypes) {
  const Tensor tokens = dense(tokens_), prototypes = dense(prototypes_), indices = dense(indices_), scores = dense(scores_);
  const MaybeTensor weights = dense(weights_), grad_values = dense(grad_values_), grad_scores = dense(grad_scores_);
  Tensor grad_tokens = of_tokens ? empty(tokens, tokens.sizes()) : empty(tokens, {0});
  Tensor grad_prototypes = of_prototypes ? empty(prototypes, prototypes.sizes()) : empty(prototypes, {0});
  NearestBackward in;
  in.tokens = tokens.const_data_ptr();
  in.prototypes = prototypes.const_data_ptr();
  in.indices = indices.const_data_ptr<int64_t>();
  in.scores = scores.const_data_ptr<float>();
  in.weights = weights.has_value() ? weights->const_data_ptr<float>() : nullptr;
  STD_TORCH_CHECK(weights.has_value() || !grad_values.has_value(), "grad_values is given without weights");
  in.grad_values = grad_values.has_value() ? grad_values->const_data_ptr() : nullptr;
  in.grad_scores = grad_scores.has_value() ? grad_scores->const_data_ptr<float>() : nullptr;
  in.dtype = dtype_of(tokens);
  in.metric = parse_metric(metric);
  in.shared = prototypes.dim() == 2;
  in.n_batch = tokens.size(0);
  in.n_tokens = tokens.size(1);
  in.n_prototypes = prototypes.size(prototypes.dim() - 2);
  in.d = tokens.size(2);
  in.k = indices.size(2);
  in.temperature = temperature;
  for (int64_t i = 0; i < indices.numel(); ++i) {
    STD_TORCH_CHECK(in.indices[i] >= 0 && in.indices[i] < in.n_prototypes, "index ", in.indices[i], " is out of range");
  }
  in.grad_tokens = of_tokens ? grad_tokens.mutable_data_ptr() : nullptr;
  in.grad_prototypes = of_prototypes ? grad_prototypes.mutable_data_ptr() : nullptr;
  DPDIFF_DISPATCH(nearest_backward)(in);
  return {grad_tokens, grad_prototypes};
}

std::tuple<Tensor, Tensor, Tensor> prototype_statistics(const Tensor& tokens_, const Tensor& prototypes_,
                                                        const std::string& metric, const MaybeTensor& weights_,
                                                        bool with_inertia) {
  const Tensor tokens = dense(tokens_), prototypes = dense(prototypes_);
  const MaybeTensor weights = dense(weights_);
  const int64_t n = tokens.size(0), d = tokens.size(1), n_prototypes = prototypes.size(0);
  Tensor scores = empty(tokens, {1, n, 1}, ScalarType::Float);
  Tensor indices = empty(tokens, {1, n, 1}, ScalarType::Long);
  Tensor counts = empty(tokens, {n_prototypes}, ScalarType::Float);
  Tensor sums = empty(tokens, {n_prototypes, d}, ScalarType::Float);
  Tensor inertia = empty(tokens, {}, ScalarType::Float);
  search(torch::stable::unsqueeze(tokens, 0), prototypes, 1, metric, 1, std::nullopt, std::nullopt,
         with_inertia ? &scores : nullptr, indices, nullptr, nullptr);

  Statistics in;
  in.tokens = tokens.const_data_ptr();
  in.indices = indices.const_data_ptr<int64_t>();
  in.weights = weights.has_value() ? weights->const_data_ptr<float>() : nullptr;
  in.dtype = dtype_of(tokens);
  in.n_tokens = n;
  in.n_prototypes = n_prototypes;
  in.d = d;
  in.counts = counts.mutable_data_ptr<float>();
  in.sums = sums.mutable_data_ptr<float>();
  DPDIFF_DISPATCH(prototype_statistics)(in);

  const float* score = scores.const_data_ptr<float>();
  const double sign = metric == "l2" ? 1 : -1, offset = metric == "cosine" ? 1 : 0;
  double total = 0;
  for (int64_t i = 0; i < n && with_inertia; ++i) {
    total += (offset + sign * double(score[i])) * (in.weights == nullptr ? 1.0 : double(in.weights[i]));
  }
  *inertia.mutable_data_ptr<float>() = float(total);
  return {counts, sums, inertia};
}

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CPU, m) {
  m.impl("nearest_prototype", TORCH_BOX(&dpdiff::nearest_prototype));
  m.impl("aggregate_nearest", TORCH_BOX(&dpdiff::aggregate_nearest));
  m.impl("nearest_backward", TORCH_BOX(&dpdiff::nearest_backward));
  m.impl("prototype_statistics", TORCH_BOX(&dpdiff::prototype_statistics));
}
