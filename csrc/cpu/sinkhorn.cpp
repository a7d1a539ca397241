// Entry points of the Sinkhorn operators on CPU: outputs, threads, and the choice of instruction set.
#include "sinkhorn.h"

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "tensors.h"

#define DPDIFF_KERNELS "sinkhorn_kernels.h"
#include "foreach_isa.h"

namespace dpdiff {
namespace {

SinkhornOptions options(double eps, int64_t n_iters, std::optional<double> tol, std::optional<double> tau_a,
                        std::optional<double> tau_b) {
  return {eps, n_iters, tol.value_or(0.0), tau_a.value_or(INFINITY), tau_b.value_or(INFINITY)};
}

const float* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected float32 tensors");
  return static_cast<const float*>(tensor.const_data_ptr());
}
const float* data(const MaybeTensor& tensor) { return tensor ? data(*tensor) : nullptr; }
const double* wide_data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "expected float64 potentials");
  return static_cast<const double*>(tensor.const_data_ptr());
}

float* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

// The part of problem i in an array with `size` numbers for each; null stays null.
template <typename T>
T* at(T* array, int64_t i, int64_t size) {
  return array == nullptr ? nullptr : array + i * size;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& cost_, const Tensor& a_, const Tensor& b_, double eps, int64_t n_iters, std::optional<double> tol,
    std::optional<double> tau_a, std::optional<double> tau_b, bool return_plan) {
  const Tensor cost = dense(cost_), a = dense(a_), b = dense(b_);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const Tensor plan = empty(cost, {return_plan ? batch : 0, n, m}), f = empty(cost, {batch, n}), g = empty(cost, {batch, m});
  const Tensor total = empty(cost, {batch}), value = empty(cost, {batch}), error = empty(cost, {batch});
  const Tensor used = empty(cost, {batch}, ScalarType::Long);

  const SinkhornOptions chosen = options(eps, n_iters, tol, tau_a, tau_b);
  const float *costs = data(cost), *as = data(a), *bs = data(b);
  float* plans = return_plan ? data_of(plan) : nullptr;
  float *fs = data_of(f), *gs = data_of(g), *totals = data_of(total), *values = data_of(value), *errors = data_of(error);
  int64_t* counts = used.mutable_data_ptr<int64_t>();
  const auto solve = DPDIFF_DISPATCH(sinkhorn_dense);
  const int64_t together = DPDIFF_DISPATCH(sinkhorn_together)(chosen, n, m);
  for_problems((batch + together - 1) / together, together * n * m, [&](int64_t group, Arena& arena, bool parallel) {
    const int64_t first = group * together, count = std::min(together, batch - first);
    std::vector<SinkhornProblem> problems;
    for (int64_t i = first; i < first + count; ++i) {
      SinkhornProblem problem{n, m, at(as, i, n), at(bs, i, m)};
      problem.plan = at(plans, i, n * m);
      problem.streams = batch * n * m >= kLeastStreamed;
      problem.f = at(fs, i, n);
      problem.g = at(gs, i, m);
      problem.cost = totals + i;
      problem.value = values + i;
      problem.error = errors + i;
      problem.n_iters = counts + i;
      problems.push_back(problem);
    }
    solve(costs + first * n * m, chosen, problems.data(), count, arena, parallel);
  });
  return {plan, f, g, total, value, used, error};
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_backward(
    const Tensor& cost_, const Tensor& a_, const Tensor& b_, const Tensor& used_, const MaybeTensor& of_plan_,
    const MaybeTensor& of_f_, const MaybeTensor& of_g_, const MaybeTensor& of_total_, double eps, int64_t n_iters,
    std::optional<double> tau_a, std::optional<double> tau_b) {
  const Tensor cost = dense(cost_), a = dense(a_), b = dense(b_), used = dense(used_);
  const MaybeTensor of_plan = dense(of_plan_), of_f = dense(of_f_), of_g = dense(of_g_), of_total = dense(of_total_);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const Tensor of_cost = empty(cost, {batch, n, m}), of_a = empty(cost, {batch, n}), of_b = empty(cost, {batch, m});

  const SinkhornOptions chosen = options(eps, n_iters, std::nullopt, tau_a, tau_b);
  const float *costs = data(cost), *as = data(a), *bs = data(b);
  const float *plans = data(of_plan), *fs = data(of_f), *gs = data(of_g), *totals = data(of_total);
  float *to_cost = data_of(of_cost), *to_a = data_of(of_a), *to_b = data_of(of_b);
  int64_t* counts = used.mutable_data_ptr<int64_t>();
  const auto differentiate = DPDIFF_DISPATCH(sinkhorn_dense_backward);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    SinkhornProblem problem{n, m, at(as, i, n), at(bs, i, m)};
    problem.n_iters = counts + i;
    const SinkhornGradients gradients{at(plans, i, n * m), at(fs, i, n),  at(gs, i, m), totals == nullptr ? 0.0f : totals[i],
                                      at(to_a, i, n),      at(to_b, i, m)};
    differentiate(costs + i * n * m, chosen, problem, gradients, to_cost + i * n * m, arena, parallel);
  });
  return {of_cost, of_a, of_b};
}

Tensor sinkhorn_value_backward(const Tensor& of_value_, const Tensor& plan_, const Tensor& cost_, const Tensor& a_,
                               const Tensor& b_, const Tensor& f_, const Tensor& g_, double eps) {
  const Tensor of_value = dense(of_value_), plan = dense(plan_), cost = dense(cost_);
  const Tensor a = dense(a_), b = dense(b_), f = dense(f_), g = dense(g_);
  const int64_t batch = plan.size(0), n = plan.size(1), m = plan.size(2), pairs = batch * n * m;
  const Tensor of_cost = empty(plan, plan.sizes());
  const float *factors = data(of_value), *plans = data(plan), *as = data(a), *bs = data(b), *fs = data(f), *gs = data(g);
  const float* costs = pairs < kMostReread ? data(cost) : nullptr;
  float* to_cost = data_of(of_cost);
  const auto differentiate = DPDIFF_DISPATCH(sinkhorn_value_gradient);
  for_ranges(pairs >= kWorthThread, batch * n, [&](int64_t first, int64_t last) {
    Arena arena;
    while (first < last) {
      const int64_t i = first / n, begin = i * n, end = std::min(last, begin + n);
      const SinkhornSolved solved{n, m, eps, at(plans, i, n * m), at(as, i, n), at(bs, i, m), at(fs, i, n), at(gs, i, m),
                                  at(costs, i, n * m)};
      differentiate(solved, factors[i], pairs >= kLeastStreamed, first - begin, end - begin, at(to_cost, i, n * m), arena);
      first = end;
    }
  });
  return of_cost;
}

// The points of problem i.
struct Points {
  const Tensor x, y;
  const bool cosine;
  const int64_t batch, n, m, dim;

  Points(const Tensor& x_, const Tensor& y_, const std::string& metric)
      : x(dense(x_)),
        y(dense(y_)),
        cosine(metric == "cosine"),
        batch(x.size(0)),
        n(x.size(1)),
        m(y.size(1)),
        dim(x.size(2)) {
    STD_TORCH_CHECK(cosine || metric == "l2", "metric is ", metric, ": expected l2 or cosine");
  }
  SinkhornPoints operator[](int64_t i) const { return {at(data(x), i, n * dim), at(data(y), i, m * dim), dim, cosine}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_points(
    const Tensor& x, const Tensor& y, const Tensor& a_, const Tensor& b_, double eps, int64_t n_iters,
    std::optional<double> tol, std::optional<double> tau_a, std::optional<double> tau_b, const std::string& metric) {
  const Points points(x, y, metric);
  const int64_t batch = points.batch, n = points.n, m = points.m;
  const Tensor a = dense(a_), b = dense(b_);
  const Tensor f = empty(x, {batch, n}, ScalarType::Double), g = empty(x, {batch, m}, ScalarType::Double);
  const Tensor value = empty(x, {batch}), used = empty(x, {batch}, ScalarType::Long), error = empty(x, {batch});

  const SinkhornOptions chosen = options(eps, n_iters, tol, tau_a, tau_b);
  const float *as = data(a), *bs = data(b);
  double *fs = f.mutable_data_ptr<double>(), *gs = g.mutable_data_ptr<double>();
  float *values = data_of(value), *errors = data_of(error);
  int64_t* counts = used.mutable_data_ptr<int64_t>();
  const auto solve = DPDIFF_DISPATCH(sinkhorn_points);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    SinkhornProblem problem{n, m, at(as, i, n), at(bs, i, m)};
    problem.f_wide = at(fs, i, n);
    problem.g_wide = at(gs, i, m);
    problem.value = values + i;
    problem.error = errors + i;
    problem.n_iters = counts + i;
    solve(points[i], chosen, problem, arena, parallel);
  });
  return {f, g, value, used, error};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_points_backward(
    const Tensor& x, const Tensor& y, const Tensor& a_, const Tensor& b_, const Tensor& used_, const MaybeTensor& of_f_,
    const MaybeTensor& of_g_, double eps, int64_t n_iters, std::optional<double> tau_a, std::optional<double> tau_b,
    const std::string& metric) {
  const Points points(x, y, metric);
  const int64_t batch = points.batch, n = points.n, m = points.m, dim = points.dim;
  const Tensor a = dense(a_), b = dense(b_), used = dense(used_);
  const MaybeTensor of_f = dense(of_f_), of_g = dense(of_g_);
  const Tensor of_x = empty(x, {batch, n, dim}), of_y = empty(x, {batch, m, dim});
  const Tensor of_a = empty(x, {batch, n}), of_b = empty(x, {batch, m});

  const SinkhornOptions chosen = options(eps, n_iters, std::nullopt, tau_a, tau_b);
  const float *as = data(a), *bs = data(b), *fs = data(of_f), *gs = data(of_g);
  float *to_x = data_of(of_x), *to_y = data_of(of_y), *to_a = data_of(of_a), *to_b = data_of(of_b);
  int64_t* counts = used.mutable_data_ptr<int64_t>();
  const auto differentiate = DPDIFF_DISPATCH(sinkhorn_points_backward);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    SinkhornProblem problem{n, m, at(as, i, n), at(bs, i, m)};
    problem.n_iters = counts + i;
    const SinkhornGradients gradients{nullptr, at(fs, i, n), at(gs, i, m), 0.0f, at(to_a, i, n), at(to_b, i, m)};
    differentiate(points[i], chosen, problem, gradients, at(to_x, i, n * dim), at(to_y, i, m * dim), arena, parallel);
  });
  return {of_x, of_y, of_a, of_b};
}

// plan_ij = exp((h_x_i + h_y_j - cost_ij) / eps), and v that it is applied to.
struct Applied {
  const Tensor h_x, h_y, v;
  const int64_t n, m, depth;
  const double eps;

  Applied(const Tensor& h_x_, const Tensor& h_y_, const Tensor& v_, double eps)
      : h_x(dense(h_x_)), h_y(dense(h_y_)), v(dense(v_)), n(h_x.size(1)), m(h_y.size(1)), depth(v.size(2)), eps(eps) {}
  SinkhornApplied operator[](int64_t i) const {
    return {n, m, depth, at(wide_data(h_x), i, n), at(wide_data(h_y), i, m), at(data(v), i, m * depth), eps};
  }
};

Tensor sinkhorn_apply(const Tensor& x, const Tensor& y, const Tensor& h_x, const Tensor& h_y, const Tensor& v, double eps,
                      const std::string& metric) {
  const Points points(x, y, metric);
  const Applied applied(h_x, h_y, v, eps);
  const int64_t n = points.n, depth = applied.depth;
  const Tensor out = empty(x, {points.batch, n, depth});
  float* outs = data_of(out);
  const auto apply = DPDIFF_DISPATCH(sinkhorn_apply);
  for_problems(points.batch, n * points.m, [&](int64_t i, Arena& arena, bool parallel) {
    apply(points[i], applied[i], at(outs, i, n * depth), arena, parallel);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_apply_backward(const Tensor& of_out_, const Tensor& x, const Tensor& y,
                                                                   const Tensor& h_x, const Tensor& h_y, const Tensor& v,
                                                                   double eps, const std::string& metric) {
  const Points points(x, y, metric);
  const Applied applied(h_x, h_y, v, eps);
  const int64_t batch = points.batch, n = points.n, m = points.m, dim = points.dim;
  const Tensor of_out = dense(of_out_);
  const Tensor of_x = empty(x, {batch, n, dim}), of_y = empty(x, {batch, m, dim});
  const Tensor of_h_x = empty(x, {batch, n}, ScalarType::Double), of_h_y = empty(x, {batch, m}, ScalarType::Double);
  const float* outs = data(of_out);
  float *to_x = data_of(of_x), *to_y = data_of(of_y);
  double *to_h_x = of_h_x.mutable_data_ptr<double>(), *to_h_y = of_h_y.mutable_data_ptr<double>();
  const auto differentiate = DPDIFF_DISPATCH(sinkhorn_apply_backward);
  for_problems(batch, n * m, [&](int64_t i, Arena& arena, bool parallel) {
    differentiate(points[i], applied[i], at(outs, i, n * applied.depth), at(to_x, i, n * dim), at(to_y, i, m * dim),
                  at(to_h_x, i, n), at(to_h_y, i, m), arena, parallel);
  });
  return {of_x, of_y, of_h_x, of_h_y};
}

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&dpdiff::sinkhorn));
  m.impl("sinkhorn_value_backward", TORCH_BOX(&dpdiff::sinkhorn_value_backward));
  m.impl("sinkhorn_backward", TORCH_BOX(&dpdiff::sinkhorn_backward));
  m.impl("sinkhorn_points", TORCH_BOX(&dpdiff::sinkhorn_points));
  m.impl("sinkhorn_points_backward", TORCH_BOX(&dpdiff::sinkhorn_points_backward));
  m.impl("sinkhorn_apply", TORCH_BOX(&dpdiff::sinkhorn_apply));
  m.impl("sinkhorn_apply_backward", TORCH_BOX(&dpdiff::sinkhorn_apply_backward));
}
