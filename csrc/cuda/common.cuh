// What kernels need of the machine, apart from themselves: a kernel written over a team compiles for the host too, where
// its tests run it on a team of their own.
#pragma once

#include <math.h>
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

// To a unit in the last place, exp_2 to two, log_2 near 0 to 2^-22. Of denormal numbers, reciprocal and exp_2 make zeros, in
// and out.
#ifdef __CUDACC__
DPDIFF_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DPDIFF_DEVICE float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DPDIFF_DEVICE float log_2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float reciprocal(float x) { return 1.0f / x; }
inline float exp_2(float x) { return exp2f(x); }
inline float log_2(float x) { return log2f(x); }
#endif

#ifdef __CUDACC__
// The blocks that work together on one problem: a thread-block cluster (on architectures without, a single block). Each
// has a board, to which the others can send, and which they can read.
class Cluster {
 public:
  static constexpr int kBytes = 16;  // of shared memory before the board: two mbarriers

  DPDIFF_DEVICE Cluster(int size, char* memory)
      : size_(size), barriers_(address(memory)), board_(reinterpret_cast<float*>(memory + kBytes)) {}

  // Before all else, once.
  DPDIFF_DEVICE void begin() const {
#if __CUDA_ARCH__ >= 900
    if (size_ == 1) return;
    if (thread() == 0) {
      for (unsigned turn = 0; turn < 2; ++turn) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier(turn)) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    sync_all();
#endif
  }

  DPDIFF_DEVICE int thread() const { return threadIdx.x; }
  DPDIFF_DEVICE int threads() const { return blockDim.x; }
  DPDIFF_DEVICE int size() const { return size_; }
  DPDIFF_DEVICE int rank() const { return blockIdx.x % size_; }

  // Waits for the block's threads; sync_all, for those of all blocks, which see then what these have written.
  DPDIFF_DEVICE void sync() const { __syncthreads(); }
  DPDIFF_DEVICE bool sync_or(bool x) const { return __syncthreads_or(x); }
  DPDIFF_DEVICE void sync_all() const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  DPDIFF_DEVICE float* board() const { return board_; }
  DPDIFF_DEVICE const float* board_of(int rank) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) return cooperative_groups::this_cluster().map_shared_rank(board_, rank);
#endif
    return board_;
  }

  // Messages: in turn 0, 1, 2, ... every block sends some to the boards of all, itself included. One thread of each block
  // expects as many bytes as come; all threads receive them. Two barriers, since a block may be a turn ahead of another.
  DPDIFF_DEVICE void expect(unsigned turn, int bytes) const {
#if __CUDA_ARCH__ >= 900
    if (size_ == 1) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier(turn)), "r"(bytes) : "memory");
#endif
  }
  DPDIFF_DEVICE void send(int rank, unsigned turn, int at, const Quad& x) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                       of_rank(address(board_ + at), rank)),
                   "f"(x.x[0]), "f"(x.x[1]), "f"(x.x[2]), "f"(x.x[3]), "r"(of_rank(barrier(turn), rank))
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Quad*>(board_ + at) = x;
  }
  DPDIFF_DEVICE void receive(unsigned turn) const {
#if __CUDA_ARCH__ >= 900
    if (size_ > 1) {
      for (uint32_t done = 0; !done;) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier(turn)), "r"(turn / 2 % 2)
            : "memory");
      }
      return;
    }
#endif
    __syncthreads();
  }

  template <typename T>
  DPDIFF_DEVICE T swap_lanes(T x, int mask) const {
    return __shfl_xor_sync(~0u, x, mask);
  }
  // From a lane of those kGroup, counted from their first, that this one is of.
  template <int kGroup>
  DPDIFF_DEVICE float of_lane(float x, int lane) const {
    return __shfl_sync(~0u, x, lane, kGroup);
  }

 private:
  static DPDIFF_DEVICE uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }
  static DPDIFF_DEVICE uint32_t of_rank(uint32_t mine, int rank) {
    uint32_t its = mine;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(its) : "r"(mine), "r"(rank));
#endif
    return its;
  }
  DPDIFF_DEVICE uint32_t barrier(unsigned turn) const { return barriers_ + turn % 2 * 8; }

  const int size_;
  const uint32_t barriers_;
  float* const board_;
};
#endif

}  // namespace dpdiff
