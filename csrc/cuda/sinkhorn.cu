// The Sinkhorn operator on NVIDIA GPUs: outputs, launch, and the kernel for each width of the costs.
#include "sinkhorn.cuh"

#include <optional>
#include <tuple>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define DPDIFF_CUDA_CHECK(call)                                                       \
  do {                                                                                \
    const cudaError_t status = (call);                                                \
    STD_TORCH_CHECK(status == cudaSuccess, "CUDA error: ", cudaGetErrorString(status)); \
  } while (false)

namespace dpdiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern __shared__ Quad memory[];

// The solver of this block, in any function: memory is seen to be shared memory.
template <int kLanes, int kQuads, bool kShared, int kHeld>
struct Make {
  typedef Sinkhorn<Cluster, kLanes, kQuads, kHeld> Solver;
  const SinkhornTask& task;
  const SinkhornShape& shape;

  DPDIFF_DEVICE Cluster team() const { return Cluster(shape.size, reinterpret_cast<char*>(memory)); }
  DPDIFF_DEVICE Solver operator()() const {
    float* const shared = reinterpret_cast<float*>(memory);
    float* const rows = kShared ? shared + shape.columns() : task.room + blockIdx.x * shape.of_rows();
    float* const columns = shared + Cluster::kBytes / 4 + 2 * shape.board();
    return Solver(team(), task, shape, blockIdx.x / shape.size, columns, rows, task.room + blockIdx.x * shape.of_held());
  }
};

// Two blocks share a multiprocessor's registers, where they may share its memory, and don't hold rows in them.
template <int kLanes, int kQuads, bool kShared, int kHeld = 0>
__global__ void __launch_bounds__(32 * kMostWarps, kShared && kHeld == 0 ? 2 : 1)
    sinkhorn_kernel(const __grid_constant__ SinkhornTask task, const __grid_constant__ SinkhornShape shape) {
  const Make<kLanes, kQuads, kShared, kHeld> make{task, shape};
  make.team().begin();
  Sinkhorn<Cluster, kLanes, kQuads, kHeld>::solve(make);
}

typedef void (*Kernel)(SinkhornTask, SinkhornShape);

Kernel kernel_for(const SinkhornShape& shape) {
  if (!shape.shared) return shape.lanes == 32 ? sinkhorn_kernel<32, 4, false> : sinkhorn_kernel<32 * kMostWarps, 4, false>;
  if (shape.held > 0) return sinkhorn_kernel<kHeldLanes, kHeldQuads, true, kHeldTwice>;
  if (shape.quads == 1) return sinkhorn_kernel<8, 1, true>;
  if (shape.quads == 2) return sinkhorn_kernel<8, 2, true>;
  if (shape.lanes == 8) return sinkhorn_kernel<8, 4, true>;
  if (shape.lanes == 16) return sinkhorn_kernel<16, 4, true>;
  return sinkhorn_kernel<32, 4, true>;
}

SinkhornDevice device_of(int index) {
  int values[4];
  const cudaDeviceAttr names[] = {cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                  cudaDevAttrMultiProcessorCount, cudaDevAttrClusterLaunch};
  for (int i = 0; i < 4; ++i) DPDIFF_CUDA_CHECK(cudaDeviceGetAttribute(&values[i], names[i], index));
  return {values[0], values[1], values[2], values[3] != 0};
}

void launch(const SinkhornTask& task, const SinkhornShape& shape, int64_t batch, cudaStream_t stream) {
  const Kernel kernel = kernel_for(shape);
  DPDIFF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.bytes())));
  DPDIFF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(batch * shape.size));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = size_t(shape.bytes());
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.size > 1 ? 1 : 0;
  DPDIFF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, task, shape));
}

// Contiguous, from a multiple of 16 bytes on.
Tensor dense(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "expected float32 tensors");
  const Tensor whole = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : torch::stable::clone(whole);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& cost_, const Tensor& a_, const Tensor& b_, double eps, int64_t n_iters, std::optional<double> tol,
    std::optional<double> tau_a, std::optional<double> tau_b, bool return_plan) {
  const torch::stable::accelerator::DeviceGuard guard(cost_.get_device_index());
  const Tensor cost = dense(cost_), a = dense(a_), b = dense(b_);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  STD_TORCH_CHECK(m <= kMostColumns, "backend 'cuda' takes at most ", kMostColumns, " columns, cost has ", m,
                  ": expected backend='triton'");
  STD_TORCH_CHECK(n <= INT32_MAX / 64 && batch <= INT32_MAX / 8, "backend 'cuda' takes fewer rows and problems than ", n,
                  " and ", batch);
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) {
    return torch::stable::new_empty(cost, sizes, dtype);
  };
  const Tensor plan = empty({return_plan ? batch : 0, n, m}), f = empty({batch, n}), g = empty({batch, m});
  const Tensor total = empty({batch}), value = empty({batch}), error = empty({batch});
  const Tensor used = empty({batch}, ScalarType::Long);
  if (batch > 0) {
    const SinkhornShape shape = sinkhorn_shape(batch, int(n), int(m), tau_a.has_value(), tau_b.has_value(),
                                               device_of(cost.get_device_index()));
    const Tensor room = empty({batch * (shape.shared ? shape.of_held() : shape.size * shape.of_rows())});
    const auto of = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
    const SinkhornTask task{of(cost), of(a), of(b), return_plan ? of(plan) : nullptr, of(f), of(g), of(total), of(value),
                            of(error), static_cast<int64_t*>(used.mutable_data_ptr()), of(room), int(n), int(m), n_iters,
                            eps, tol.value_or(0.0), tau_a.value_or(INFINITY), tau_b.value_or(INFINITY)};
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(cost.get_device_index(), &stream));
    launch(task, shape, batch, static_cast<cudaStream_t>(stream));
  }
  return {plan, f, g, total, value, used, error};
}

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CUDA, m) { m.impl("sinkhorn", TORCH_BOX(&dpdiff::sinkhorn)); }
