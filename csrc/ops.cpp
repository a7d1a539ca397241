// Every operator's schema, in one place. The kernels register themselves for their device beside their code
// (STABLE_TORCH_LIBRARY_IMPL); fake kernels and autograd formulas are Python's, in dpdiff_kernels/<operator>.py.
//
// Batch dimensions are flattened by Python before they get here: B images of N tokens with D channels, K prototypes,
// H heads of E channels, M bank entries, G active groups. Shapes and dtypes are validated there too.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dpdiff, m) {
  // tokens (B, N, D); prototypes (K, D) or (B, K, D); groups (K,) int64; active_groups (B, G) int64
  m.def(
      "nearest_prototype(Tensor tokens, Tensor prototypes, int k, str metric, Tensor? groups, Tensor? active_groups)"
      " -> (Tensor scores, Tensor indices)");
  m.def(
      "aggregate_nearest(Tensor tokens, Tensor prototypes, int k, str metric, float temperature, Tensor? groups,"
      " Tensor? active_groups) -> (Tensor values, Tensor scores, Tensor indices, Tensor weights)");
  // Of both, from the gradients of values (B, N, D) and scores (B, N, k) float32; a gradient not wanted is empty.
  m.def(
      "nearest_backward(Tensor tokens, Tensor prototypes, Tensor indices, Tensor scores, Tensor? weights,"
      " Tensor? grad_values, Tensor? grad_scores, str metric, float temperature, bool of_tokens, bool of_prototypes)"
      " -> (Tensor grad_tokens, Tensor grad_prototypes)");
  // tokens (N, D); prototypes (K, D); weights (N,) float32. Without inertia that result is zero.
  m.def(
      "prototype_statistics(Tensor tokens, Tensor prototypes, str metric, Tensor? weights, bool with_inertia)"
      " -> (Tensor counts, Tensor sums, Tensor inertia)");
  // query (B, H, N, E); banks (H, M, E) or (B, H, M, E); gate (B, H, N) float32; scale not negative. For the backward
  // pass, of each softmax (two with a gate): reference and total (S, B, H, N) float32, the score that exponents are
  // relative to and the sum of exponentials; with a gate, difference (B, H, N, E): the global minus the local answer.
  m.def(
      "prototype_attention(Tensor query, Tensor local_key, Tensor local_value, Tensor? global_key,"
      " Tensor? global_value, Tensor? gate, float scale, Tensor? groups, Tensor? active_groups, bool for_backward)"
      " -> (Tensor out, Tensor reference, Tensor total, Tensor difference)");
  // Empty where there is no such input.
  m.def(
      "prototype_attention_backward(Tensor grad_out, Tensor query, Tensor local_key, Tensor local_value,"
      " Tensor? global_key, Tensor? global_value, Tensor? gate, float scale, Tensor? groups, Tensor? active_groups,"
      " Tensor out, Tensor reference, Tensor total, Tensor difference)"
      " -> (Tensor grad_query, Tensor grad_local_key, Tensor grad_local_value, Tensor grad_global_key,"
      " Tensor grad_global_value, Tensor grad_gate)");
  // cost (B, N, M), a (B, N), b (B, M), all float32 as the outputs; without return_plan, plan is (0, N, M).
  m.def(
      "sinkhorn(Tensor cost, Tensor a, Tensor b, float eps, int n_iters, float? tol, float? tau_a, float? tau_b,"
      " bool return_plan) -> (Tensor plan, Tensor f, Tensor g, Tensor cost, Tensor value, Tensor n_iters, Tensor error)");
  // Value's gradient with respect to the cost: grad_value (B,) times plan, which may be made again from the rest.
  m.def(
      "sinkhorn_value_backward(Tensor grad_value, Tensor plan, Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g,"
      " float eps) -> Tensor grad_cost");
  // From the gradients of plan, f, g and cost, of which any may be missing; used is the n_iters that came back.
  m.def(
      "sinkhorn_backward(Tensor cost, Tensor a, Tensor b, Tensor used, Tensor? grad_plan, Tensor? grad_f,"
      " Tensor? grad_g, Tensor? grad_cost, float eps, int n_iters, float? tau_a, float? tau_b)"
      " -> (Tensor grad_cost, Tensor grad_a, Tensor grad_b)");
  // x (B, N, D), y (B, M, D), a (B, N), b (B, M) float32, points of unit length for the cosine; f and g are in float64.
  m.def(
      "sinkhorn_points(Tensor x, Tensor y, Tensor a, Tensor b, float eps, int n_iters, float? tol, float? tau_a,"
      " float? tau_b, str metric) -> (Tensor f, Tensor g, Tensor value, Tensor n_iters, Tensor error)");
  m.def(
      "sinkhorn_points_backward(Tensor x, Tensor y, Tensor a, Tensor b, Tensor used, Tensor? grad_f, Tensor? grad_g,"
      " float eps, int n_iters, float? tau_a, float? tau_b, str metric)"
      " -> (Tensor grad_x, Tensor grad_y, Tensor grad_a, Tensor grad_b)");
  // plan @ v for v (B, M, C), where plan_ij = exp((h_x_i + h_y_j - cost_ij) / eps), h_x (B, N) and h_y (B, M) float64
  m.def(
      "sinkhorn_apply(Tensor x, Tensor y, Tensor h_x, Tensor h_y, Tensor v, float eps, str metric) -> Tensor");
  // But for v's gradient, which is sinkhorn_apply with x and y exchanged.
  m.def(
      "sinkhorn_apply_backward(Tensor grad_out, Tensor x, Tensor y, Tensor h_x, Tensor h_y, Tensor v, float eps,"
      " str metric) -> (Tensor grad_x, Tensor grad_y, Tensor grad_h_x, Tensor grad_h_y)");
  m.def("cpu_capability() -> str");
  // Gives the memory of freed results on CPUs, which is kept for later ones, back to the system, and tells how many bytes.
  m.def("release_memory() -> int");
}
