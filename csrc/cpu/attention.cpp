// prototype_attention on CPUs: from tensors to what the kernels take.
#include "attention.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/library.h>

#include "memory.h"
#include "tensors.h"

#define DPDIFF_KERNELS "attention_kernels.h"
#include "foreach_isa.h"

namespace dpdiff {
namespace {

// The kernels want neighbouring channels; whatever else the strides are is fine.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : dense(tensor);
}
Tensor with_dense_rows(const MaybeTensor& tensor) { return tensor ? with_dense_rows(*tensor) : Tensor(); }

// Of (B, H, N, E), or (H, M, E) shared by all images.
Rows rows_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  const size_t head = tensor.dim() - 3;
  const int64_t size = tensor.element_size();
  return {tensor.data_ptr(), head == 0 ? 0 : strides[0] * size, strides[head] * size, strides[head + 1] * size};
}

Tensor floats(const Tensor& like, std::initializer_list<int64_t> sizes) { return empty(like, sizes, ScalarType::Float); }
// Larger than a thread's share of the caches, so that whoever reads it next reads it from memory anyway.
constexpr int64_t kStreamedBytes = 16 << 20;

float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Zeros that take neither time nor memory until they are touched, where the system can: of a large bank of which a batch
// uses little, the gradient then costs what the used prototypes do.
Tensor untouched_zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
#if defined(__linux__)
  int64_t bytes = like.element_size();
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; bytes *= sizes[i]) strides[i] = bytes / like.element_size();
  if (bytes > 1 << 20) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return torch::stable::from_blob(
        memory, sizes, strides, like.device(), like.scalar_type(), [bytes](void* memory) { munmap(memory, bytes); });
  }
#endif
  return torch::stable::new_zeros(like, sizes);
}

// Like the query, with tokens outside and heads inside in memory: the layout in which heads are joined again.
Tensor empty_like_query(const Tensor& query) {
  const auto sizes = query.sizes();
  return torch::stable::transpose(empty(query, {sizes[0], sizes[2], sizes[1], sizes[3]}), 1, 2);
}

// The inputs of both directions, kept alive in the layout that the kernels read.
struct Inputs {
  Tensor query, local_key, local_value, global_key, global_value, gate;
  std::optional<Routes> routes;

  Inputs(const Tensor& query, const Tensor& local_key, const Tensor& local_value, const MaybeTensor& global_key,
         const MaybeTensor& global_value, const MaybeTensor& gate, double scale, const MaybeTensor& groups,
         const MaybeTensor& active_groups, AttentionProblem& problem)
      : query(with_dense_rows(query)),
        local_key(with_dense_rows(local_key)),
        local_value(with_dense_rows(local_value)),
        global_key(with_dense_rows(global_key)),
        global_value(with_dense_rows(global_value)) {
    const auto sizes = query.sizes();
    problem.dtype = dtype_of(query);
    problem.batch = sizes[0], problem.heads = sizes[1], problem.tokens = sizes[2], problem.channels = sizes[3];
    problem.scale = float(scale);
    problem.query = rows_of(this->query);
    problem.streamed = query.numel() * query.element_size() > kStreamedBytes;
    problem.local = bank(this->local_key, this->local_value);
    if (global_key) problem.global = bank(this->global_key, this->global_value);
    if (gate) {
      this->gate = dense(*gate);
      problem.gate = float_data(this->gate);
    }
    if (groups) {
      routes = routes_of(*groups, *active_groups);
      problem.active = routes->rows.data();
      problem.offsets = routes->begin.data();
    }
    for (int64_t b = 0; b < problem.batch && problem.global.count == 0; ++b) {
      if (problem.local_count(b) == 0) {  // a ValueError in Python
        throw std::invalid_argument(
            "active_groups leaves batch element " + std::to_string(b) +
            " without local prototypes, and there is no global bank: expected at least one active prototype");
      }
    }
  }

  static Bank bank(const Tensor& key, const Tensor& value) {
    return {rows_of(key), rows_of(value), key.sizes()[key.dim() - 2], key.dim() == 3};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_attention(
    const Tensor& query, const Tensor& local_key, const Tensor& local_value, MaybeTensor global_key,
    MaybeTensor global_value, MaybeTensor gate, double scale, MaybeTensor groups, MaybeTensor active_groups,
    bool for_backward) {
  AttentionForward problem;
  const Inputs inputs(
      query, local_key, local_value, global_key, global_value, gate, scale, groups, active_groups, problem);

  const Tensor out = empty_like_query(query);
  Tensor reference = floats(query, {0}), total = floats(query, {0}), difference = empty(query, {0});
  problem.out = rows_of(out);
  if (for_backward) {
    const int64_t softmaxes = gate ? 2 : 1;
    reference = floats(query, {softmaxes, problem.batch, problem.heads, problem.tokens});
    total = floats(query, {softmaxes, problem.batch, problem.heads, problem.tokens});
    problem.sums = {float_data(reference), float_data(total)};
    if (gate) {
      difference = empty_like_query(query);
      problem.difference = rows_of(difference);
    }
  }
  if (problem.batch * problem.heads * problem.tokens == 0) return {out, reference, total, difference};

  const int64_t chunks = problem.instances() * ((problem.sequence() + kChunk - 1) / kChunk);
  const int64_t chunk_work = kChunk * (problem.channels + 1) * (problem.local_count(0) + problem.global.count + 1);
  const auto kernel = DPDIFF_DISPATCH(attention_forward);
  torch::stable::parallel_for(0, chunks, std::max<int64_t>(1, (1 << 18) / chunk_work), [&](int64_t begin, int64_t end) {
    kernel(problem, begin, end);
  });
  return {out, reference, total, difference};
}

// The rows in which a shared bank's gradient is summed up in parts, see BankGradient.
struct PartialSums {
  bool routed = false;
  int64_t rows = 0;
  std::vector<int64_t> prototypes, first{0}, places;
  std::vector<int64_t> of_active;  // with routes: the row of each of Routes::active

  // A row for each prototype in each part.
  PartialSums(int64_t parts, int64_t count) : rows(parts * count) {
    for (int64_t i = 0; i < count; ++i) {
      prototypes.push_back(i);
      for (int64_t part = 0; part < parts; ++part) places.push_back(part * count + i);
      first.push_back(places.size());
    }
  }

  // A row for each prototype in each part with an image that uses it; used: all that some image does, ascending.
  PartialSums(int64_t parts, int64_t batch, const Routes& routes, std::vector<int64_t> used)
      : routed(true), prototypes(std::move(used)), of_active(routes.rows.size()) {
    std::vector<std::pair<int64_t, int64_t>> found;  // prototype, row
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = routes.begin[batch * part / parts], end = routes.begin[batch * (part + 1) / parts];
      const std::vector<int64_t> seen = ascending_distinct(routes.rows.data() + begin, routes.rows.data() + end);
      for (int64_t k = begin; k < end; ++k) {
        of_active[k] = rows + (std::lower_bound(seen.begin(), seen.end(), routes.rows[k]) - seen.begin());
      }
      for (const int64_t prototype : seen) found.emplace_back(prototype, rows++);
    }
    std::sort(found.begin(), found.end());
    for (size_t k = 0; k < found.size(); ++k) {
      places.push_back(found[k].second);
      if (k + 1 == found.size() || found[k + 1].first != found[k].first) first.push_back(k + 1);
    }
  }
};

// The gradients of a bank (both empty without one), and the rows that they are summed up in.
struct BankGradients {
  Tensor key, value;
  std::unique_ptr<float, Free> rows;

  BankGradients(const Tensor& query, const Bank& bank, const PartialSums& sums, const AttentionBackward& problem, BankGradient& to)
      : key(empty(query, {0})), value(empty(query, {0})) {
    if (bank.count == 0) return;
    const bool direct = bank.shared && problem.parts == 1 && !sums.routed && problem.dtype == DType::float32;
    for (Tensor* gradient : {&key, &value}) {
      std::vector<int64_t> sizes{problem.heads, bank.count, problem.channels};
      if (!bank.shared) sizes.insert(sizes.begin(), problem.batch);
      *gradient = sums.routed ? untouched_zeros(query, sizes) : empty(query, sizes);
      if (direct) torch::stable::zero_(*gradient);
    }
    to.key = rows_of(key), to.value = rows_of(value);
    to.rows = sums.rows;
    to.prototypes = sums.prototypes.data(), to.n_prototypes = sums.prototypes.size();
    to.first = sums.first.data(), to.places = sums.places.data();
    if (direct) {
      to.key_rows = float_data(key), to.value_rows = float_data(value);
    } else if (bank.shared) {
      const size_t size = problem.heads * sums.rows * problem.channels;
      rows.reset(static_cast<float*>(calloc(2 * size + 1, sizeof(float))));
      if (rows == nullptr) throw std::bad_alloc();
      to.key_rows = rows.get(), to.value_rows = rows.get() + size;
    }
  }

  void add_parts(const AttentionBackward& problem, const BankGradient& to) const {
    if (rows == nullptr) return;
    const auto kernel = DPDIFF_DISPATCH(attention_add_parts);
    torch::stable::parallel_for(0, problem.heads * to.n_prototypes, 256, [&](int64_t begin, int64_t end) {
      kernel(problem, to, begin, end);
    });
  }
};

// Into how many parts the tokens of a head are split: enough for many threads, as far as 32 MiB of sums allow.
int64_t parts_of(const AttentionProblem& problem, int64_t local_rows) {
  const int64_t chunks = (problem.sequence() + kChunk - 1) / kChunk;
  const int64_t possible = std::max<int64_t>(1, problem.folded() ? chunks : problem.batch);
  const int64_t wanted = 31 / std::max<int64_t>(1, problem.heads) + 1;
  const int64_t rows = (problem.local.shared ? local_rows : 0) + (problem.global.shared ? problem.global.count : 0);
  if (rows == 0) return possible;
  const int64_t bytes = problem.heads * rows * 2 * problem.channels * sizeof(float);
  return std::min({possible, wanted, std::max<int64_t>(1, (32 << 20) / std::max<int64_t>(1, bytes))});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& local_key, const Tensor& local_value,
    MaybeTensor global_key, MaybeTensor global_value, MaybeTensor gate, double scale, MaybeTensor groups,
    MaybeTensor active_groups, const Tensor& out, const Tensor& reference, const Tensor& total,
    const Tensor& difference) {
  AttentionBackward problem;
  const Inputs inputs(
      query, local_key, local_value, global_key, global_value, gate, scale, groups, active_groups, problem);
  const Tensor dense_grad_out = with_dense_rows(grad_out), dense_out = with_dense_rows(out);
  const Tensor dense_reference = dense(reference), dense_total = dense(total);
  const Tensor dense_difference = gate ? with_dense_rows(difference) : Tensor();
  problem.grad_out = rows_of(dense_grad_out);
  problem.out = rows_of(dense_out);
  if (gate) problem.difference = rows_of(dense_difference);
  problem.sums = {float_data(dense_reference), float_data(dense_total)};
  const auto& routes = inputs.routes;
  std::vector<int64_t> used;
  if (routes) used = ascending_distinct(routes->rows.data(), routes->rows.data() + routes->rows.size());
  problem.parts = parts_of(problem, routes ? used.size() : problem.local.count);
  const PartialSums local_sums = routes ? PartialSums(problem.parts, problem.batch, *routes, std::move(used))
                                        : PartialSums(problem.parts, problem.local.count);
  const PartialSums global_sums(problem.parts, problem.global.count);
  problem.rows = local_sums.of_active.data();

  const Tensor grad_query = empty_like_query(query);
  const Tensor grad_gate = gate ? floats(query, {problem.batch, problem.heads, problem.tokens}) : floats(query, {0});
  problem.grad_query = rows_of(grad_query);
  problem.grad_gate = float_data(grad_gate);
  const BankGradients local(query, problem.local, local_sums, problem, problem.grad_local);
  const BankGradients global(query, problem.global, global_sums, problem, problem.grad_global);

  const auto kernel = DPDIFF_DISPATCH(attention_backward);
  torch::stable::parallel_for(
      0, problem.heads * problem.parts, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  local.add_parts(problem, problem.grad_local);
  global.add_parts(problem, problem.grad_global);
  return {grad_query, local.key, local.value, global.key, global.value, grad_gate};
}

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CPU, m) {
  m.impl("prototype_attention", TORCH_BOX(&dpdiff::prototype_attention));
  m.impl("prototype_attention_backward", TORCH_BOX(&dpdiff::prototype_attention_backward));
}
