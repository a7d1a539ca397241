// What kernels need of the machine, apart from themselves: a kernel written over a team compiles for the host too, where
// its tests run it on a team of their own.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#define DPDIFF_DEVICE __device__ __forceinline__
#define DPDIFF_APART __device__ __noinline__
#else
#define DPDIFF_DEVICE inline
#define DPDIFF_APART
#endif

namespace dpdiff {

struct alignas(16) Quad {
  float x[4];
};

#ifdef __CUDACC__
// The blocks that work together on one problem: a thread-block cluster (on architectures without, a single block). Each
// has a board, which the others can read.
class Cluster {
 public:
  static constexpr int kMostThreads = 256;

  __device__ Cluster(int size, char* board) : size_(size), board_(board) {}

  DPDIFF_DEVICE int thread() const { return threadIdx.x; }
  DPDIFF_DEVICE int threads() const { return blockDim.x; }
  DPDIFF_DEVICE int size() const { return size_; }
  DPDIFF_DEVICE int rank() const { return blockIdx.x % size_; }

  // Waits for the block's threads; sync_all, for those of all blocks, whose boards are then written.
  DPDIFF_DEVICE void sync() const { __syncthreads(); }
  DPDIFF_DEVICE bool sync_or(bool x) const { return __syncthreads_or(x); }
  DPDIFF_DEVICE void sync_all() const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  DPDIFF_DEVICE char* board(int rank) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) return cooperative_groups::this_cluster().map_shared_rank(board_, rank);
#endif
    return board_;
  }

  template <typename T>
  DPDIFF_DEVICE T swap_lanes(T x, int mask) const {
    return __shfl_xor_sync(~0u, x, mask);
  }
  template <typename T>
  DPDIFF_DEVICE T of_lane(T x, int lane) const {
    return __shfl_sync(~0u, x, lane);
  }

 private:
  const int size_;
  char* const board_;
};
#endif

}  // namespace dpdiff
