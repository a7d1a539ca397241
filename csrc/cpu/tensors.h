// What the operators' entry points do with tensors.
#pragma once

#include <optional>
#include <stdexcept>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype.h"
#include "memory.h"
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

// Memory for a result, of the dtype of `like` unless told otherwise.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  prefer_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

inline Routes routes_of(const Tensor& groups, const Tensor& active_groups) {
  const Tensor group = dense(groups), active = dense(active_groups);
  return Routes(group.const_data_ptr<int64_t>(), group.size(0), active.const_data_ptr<int64_t>(), active.size(0),
                active.size(1));
}

}  // namespace dpdiff
