// csrc/cuda/sinkhorn.cuh, compiled for the host and run on fibers.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "host_team.h"
#include "sinkhorn.cuh"

namespace dpdiff {
namespace {

template <int kLanes, int kQuads, int kHeld = 0>
void solve(const SinkhornTask& task, const SinkhornShape& shape, int64_t problem, unsigned seed) {
  HostBlocks blocks(shape.size, shape.threads, 2 * shape.board(), seed);
  // Neither more memory than the kernel asks for, nor anything in it.
  const int64_t columns = shape.columns() - 4 - 2 * shape.board(), all = columns + shape.of_rows();
  const float guard = 12345.0f;
  const auto guarded = [&](int64_t floats) {
    std::vector<float> memory(floats, NAN);
    memory.resize(floats + 16, guard);
    return memory;
  };
  std::vector<std::vector<float>> memory(shape.size, guarded(all)), held(shape.size, guarded(shape.of_held()));
  blocks.run([&](int rank, int thread) {
    const HostTeam team(blocks, rank, thread);
    float* shared = memory[rank].data();
    typedef Sinkhorn<HostTeam, kLanes, kQuads, kHeld> Solver;
    Solver::solve([&] { return Solver(team, task, shape, problem, shared, shared + columns, held[rank].data()); });
  });
  for (const auto* blocks : {&memory, &held}) {
    for (const auto& block : *blocks) {
      if (std::count(block.end() - 16, block.end(), guard) != 16) throw std::runtime_error("written beyond the end");
    }
  }
}

}  // namespace
}  // namespace dpdiff

using namespace dpdiff;

// On clusters of `size` blocks, whose rows are in shared or in global memory; with `held`, warps hold rows as often, once or as
// on GPUs. Returns false, and says why, where something went wrong.
extern "C" bool sinkhorn(const SinkhornTask* task, int64_t batch, int size, bool shared, int held, unsigned seed) {
  const SinkhornShape shape =
      sinkhorn_shape_of(task->n, task->m, task->tau_a < INFINITY, task->tau_b < INFINITY, size, shared, held);
  const auto run = held == 1           ? solve<kHeldLanes, kHeldQuads, 1>
                   : held > 1          ? solve<kHeldLanes, kHeldQuads, kHeldTwice>
                   : shape.quads == 1  ? solve<8, 1>
                   : shape.quads == 2  ? solve<8, 2>
                   : shape.lanes == 8  ? solve<8, 4>
                   : shape.lanes == 16 ? solve<16, 4>
                   : shape.lanes == 32 ? solve<32, 4>
                                       : solve<32 * kMostWarps, 4>;
  try {
    for (int64_t problem = 0; problem < batch; ++problem) run(*task, shape, problem, seed);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return false;
  }
  return true;
}

extern "C" SinkhornShape shape(int64_t batch, int n, int m, bool relaxed, SinkhornDevice device) {
  return sinkhorn_shape(batch, n, m, relaxed, relaxed, device);
}
extern "C" int64_t shared_bytes(SinkhornShape shape) { return shape.bytes(); }
