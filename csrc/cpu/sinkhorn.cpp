// Entry points of the Sinkhorn operators on CPU: outputs, threads, and the choice of instruction set.
#include "sinkhorn.h"

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define DPDIFF_KERNELS "sinkhorn_kernels.h"
#include "foreach_isa.h"

namespace dpdiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

SinkhornOptions options(double eps, int64_t n_iters, std::optional<double> tol, std::optional<double> tau_a,
                        std::optional<double> tau_b) {
  return {eps, n_iters, tol.value_or(0.0), tau_a.value_or(INFINITY), tau_b.value_or(INFINITY)};
}

const float* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected float32 tensors");
  return static_cast<const float*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& cost_, const Tensor& a_, const Tensor& b_, double eps, int64_t n_iters, std::optional<double> tol,
    std::optional<double> tau_a, std::optional<double> tau_b, bool return_plan) {
  const Tensor cost = torch::stable::contiguous(cost_), a = torch::stable::contiguous(a_), b = torch::stable::contiguous(b_);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const Tensor plan = torch::stable::new_empty(cost, {return_plan ? batch : 0, n, m});
  const Tensor f = torch::stable::new_empty(cost, {batch, n}), g = torch::stable::new_empty(cost, {batch, m});
  const Tensor total = torch::stable::new_empty(cost, {batch}), value = torch::stable::new_empty(cost, {batch});
  const Tensor used = torch::stable::new_empty(cost, {batch}, ScalarType::Long);
  const Tensor error = torch::stable::new_empty(cost, {batch});

  const SinkhornOptions chosen = options(eps, n_iters, tol, tau_a, tau_b);
  const float *costs = data(cost), *as = data(a), *bs = data(b);
  SinkhornProblem first{n, m, as, bs};
  first.plan = return_plan ? plan.mutable_data_ptr<float>() : nullptr;
  first.f = f.mutable_data_ptr<float>();
  first.g = g.mutable_data_ptr<float>();
  first.cost = total.mutable_data_ptr<float>();
  first.value = value.mutable_data_ptr<float>();
  first.error = error.mutable_data_ptr<float>();
  first.n_iters = used.mutable_data_ptr<int64_t>();
  const auto solve = DPDIFF_DISPATCH(sinkhorn_dense);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    SinkhornProblem problem = first;
    problem.a += i * n;
    problem.b += i * m;
    if (problem.plan != nullptr) problem.plan += i * n * m;
    problem.f += i * n;
    problem.g += i * m;
    problem.cost += i;
    problem.value += i;
    problem.error += i;
    problem.n_iters += i;
    solve(costs + i * n * m, chosen, problem, arena, parallel);
  });
  return {plan, f, g, total, value, used, error};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_points(
    const Tensor& x_, const Tensor& y_, const Tensor& a_, const Tensor& b_, double eps, int64_t n_iters,
    std::optional<double> tol, std::optional<double> tau_a, std::optional<double> tau_b, const std::string& metric) {
  const Tensor x = torch::stable::contiguous(x_), y = torch::stable::contiguous(y_);
  const Tensor a = torch::stable::contiguous(a_), b = torch::stable::contiguous(b_);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), dim = x.size(2);
  const Tensor f = torch::stable::new_empty(x, {batch, n}, ScalarType::Double);
  const Tensor g = torch::stable::new_empty(x, {batch, m}, ScalarType::Double);
  const Tensor value = torch::stable::new_empty(x, {batch}), error = torch::stable::new_empty(x, {batch});
  const Tensor used = torch::stable::new_empty(x, {batch}, ScalarType::Long);

  const SinkhornOptions chosen = options(eps, n_iters, tol, tau_a, tau_b);
  const SinkhornMetric kind = metric == "cosine" ? SinkhornMetric::cosine : SinkhornMetric::l2;
  const float *xs = data(x), *ys = data(y), *as = data(a), *bs = data(b);
  const auto solve = DPDIFF_DISPATCH(sinkhorn_points);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    SinkhornProblem problem{n, m, as + i * n, bs + i * m};
    problem.f_wide = f.mutable_data_ptr<double>() + i * n;
    problem.g_wide = g.mutable_data_ptr<double>() + i * m;
    problem.value = value.mutable_data_ptr<float>() + i;
    problem.error = error.mutable_data_ptr<float>() + i;
    problem.n_iters = used.mutable_data_ptr<int64_t>() + i;
    solve(xs + i * n * dim, ys + i * m * dim, dim, kind, chosen, problem, arena, parallel);
  });
  return {f, g, value, used, error};
}

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&dpdiff::sinkhorn));
  m.impl("sinkhorn_points", TORCH_BOX(&dpdiff::sinkhorn_points));
}
