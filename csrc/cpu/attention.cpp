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
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define DPDIFF_KERNELS "attention_kernels.h"
#include "foreach_isa.h"

namespace dpdiff {

Scratch::~Scratch() {
  for (int i = 0; i < count_; ++i) free(taken_[i]);
}

float* Scratch::take(int64_t floats) {
  const size_t bytes = (size_t(floats) * sizeof(float) / 64 + 1) * 64;
  void* memory = count_ < kMost ? aligned_alloc(64, bytes) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  taken_[count_++] = memory;
  return static_cast<float*>(memory);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> MaybeTensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::invalid_argument("prototype_attention: expected float32, float16 or bfloat16");
  }
}

// The kernels want neighbouring channels; whatever else the strides are is fine.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}
Tensor with_dense_rows(const MaybeTensor& tensor) { return tensor ? with_dense_rows(*tensor) : Tensor(); }

// Of (B, H, N, E), or (H, M, E) shared by all images.
Rows rows_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  const size_t head = tensor.dim() - 3;
  const int64_t size = tensor.element_size();
  return {tensor.data_ptr(), head == 0 ? 0 : strides[0] * size, strides[head] * size, strides[head + 1] * size};
}

Tensor floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}
// Larger than a thread's share of the caches, so that whoever reads it next reads it from memory anyway.
constexpr int64_t kStreamedBytes = 16 << 20;

float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// Fresh memory, in huge pages where it is large: page faults, at 2 microseconds for 4 KiB, would take as long for an
// answer as its attention to hundreds of prototypes.
Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes) {
  const Tensor tensor = torch::stable::new_empty(like, sizes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.numel() * tensor.element_size();
  if (end > begin + kHugePage) madvise(reinterpret_cast<void*>(begin), (end - begin) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return tensor;
}

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
  return torch::stable::transpose(fresh(query, {sizes[0], sizes[2], sizes[1], sizes[3]}), 1, 2);
}

// For each image, the local prototypes of its active groups, group by group; and all that some image uses.
struct Routes {
  std::vector<int64_t> active, offsets, used;

  Routes(const Tensor& groups, const Tensor& active_groups) {
    const int64_t* group = static_cast<const int64_t*>(groups.data_ptr());
    const int64_t prototypes = groups.numel(), batch = active_groups.sizes()[0], n = active_groups.sizes()[1];
    std::vector<int64_t> order(prototypes);
    for (int64_t i = 0; i < prototypes; ++i) order[i] = i;
    if (!std::is_sorted(group, group + prototypes)) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });
    }
    std::vector<int64_t> wanted;
    offsets.push_back(0);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t* row = static_cast<const int64_t*>(active_groups.data_ptr()) + b * n;
      wanted.assign(row, row + n);
      std::sort(wanted.begin(), wanted.end());
      wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
      for (const int64_t g : wanted) {
        if (g < 0) continue;
        auto at = std::lower_bound(order.begin(), order.end(), g, [&](int64_t i, int64_t g) { return group[i] < g; });
        for (; at != order.end() && group[*at] == g; ++at) active.push_back(*at);
      }
      offsets.push_back(active.size());
    }
    used = active;
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
  }
};

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
      this->gate = torch::stable::contiguous(*gate);
      problem.gate = float_data(this->gate);
    }
    if (groups) {
      routes.emplace(torch::stable::contiguous(*groups), torch::stable::contiguous(*active_groups));
      problem.active = routes->active.data();
      problem.offsets = routes->offsets.data();
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
  Tensor reference = floats(query, {0}), total = floats(query, {0}), difference = torch::stable::new_empty(query, {0});
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

struct Free {
  void operator()(void* memory) const { free(memory); }
};

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

  // A row for each prototype in each part with an image that uses it.
  PartialSums(int64_t parts, int64_t batch, const Routes& routes)
      : routed(true), prototypes(routes.used), of_active(routes.active.size()) {
    std::vector<std::pair<int64_t, int64_t>> found;  // prototype, row
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = routes.offsets[batch * part / parts], end = routes.offsets[batch * (part + 1) / parts];
      std::vector<int64_t> seen(routes.active.begin() + begin, routes.active.begin() + end);
      std::sort(seen.begin(), seen.end());
      seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
      for (int64_t k = begin; k < end; ++k) {
        of_active[k] = rows + (std::lower_bound(seen.begin(), seen.end(), routes.active[k]) - seen.begin());
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
      : key(torch::stable::new_empty(query, {0})), value(torch::stable::new_empty(query, {0})) {
    if (bank.count == 0) return;
    const bool direct = bank.shared && problem.parts == 1 && !sums.routed && problem.dtype == DType::float32;
    for (Tensor* gradient : {&key, &value}) {
      std::vector<int64_t> sizes{problem.heads, bank.count, problem.channels};
      if (!bank.shared) sizes.insert(sizes.begin(), problem.batch);
      *gradient = sums.routed ? untouched_zeros(query, sizes) : fresh(query, sizes);
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
  const Tensor dense_reference = torch::stable::contiguous(reference), dense_total = torch::stable::contiguous(total);
  const Tensor dense_difference = gate ? with_dense_rows(difference) : Tensor();
  problem.grad_out = rows_of(dense_grad_out);
  problem.out = rows_of(dense_out);
  if (gate) problem.difference = rows_of(dense_difference);
  problem.sums = {float_data(dense_reference), float_data(dense_total)};
  problem.parts = parts_of(problem, inputs.routes ? inputs.routes->used.size() : problem.local.count);
  const PartialSums local_sums = inputs.routes ? PartialSums(problem.parts, problem.batch, *inputs.routes)
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
