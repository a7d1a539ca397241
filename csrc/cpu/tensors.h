// What the operators' entry points do with tensors.
#pragma once

#include <optional>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype.h"
#include "result_memory.h"
#include "routes.h"

namespace dpdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> MaybeTensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: throw std::invalid_argument("expected float32, float16 or bfloat16 tensors");
  }
}

// For kernels that know no strides.
inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
inline MaybeTensor dense(const MaybeTensor& tensor) { return tensor ? MaybeTensor(dense(*tensor)) : std::nullopt; }

inline size_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    default: throw std::invalid_argument("no result has such a dtype");
  }
}

// Memory for a result, of the dtype of `like` unless told otherwise.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  size_t bytes = bytes_of(type);
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(), stride = 1; i-- > 0; stride *= sizes[i]) strides[i] = stride, bytes *= sizes[i];
  if (bytes < ResultMemory::kLeast) return torch::stable::new_empty(like, sizes, dtype);
  const ResultMemory::Block block = ResultMemory::shared().take(bytes);
  const auto give_back = [block](void*) { ResultMemory::shared().give_back(block); };
  return torch::stable::from_blob(block.memory, sizes, strides, like.device(), type, give_back);
}

inline Routes routes_of(const Tensor& groups, const Tensor& active_groups) {
  const Tensor group = dense(groups), active = dense(active_groups);
  return Routes(group.const_data_ptr<int64_t>(), group.size(0), active.const_data_ptr<int64_t>(), active.size(0),
                active.size(1));
}

}  // namespace dpdiff
