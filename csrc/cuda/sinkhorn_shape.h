// How a batch of Sinkhorn problems is spread over a GPU: what the kernels, their launch and their tests agree on.
#pragma once

#include <stdint.h>

#include "../host_device.h"

namespace dpdiff {

// A batch of costs (n, m) with weights (n,) and (m,), and where the results go.
struct SinkhornTask {
  const float *cost, *a, *b;
  float *plan, *f, *g, *total, *value, *error;  // plan may be null
  int64_t* used;
  float* room;  // the blocks' rows, or those that threads hold, where shared memory is too small for them
  int n, m;
  int64_t n_iters;
  double eps, tol, tau_a, tau_b;  // tol 0: none; tau infinity: balanced
};

// What a block of threads may have, in bytes of shared memory, and whether blocks form clusters.
struct SinkhornDevice {
  int per_block, per_multiprocessor, multiprocessors;
  bool clusters;
};

constexpr int kMostColumns = 4096, kMostSharedColumns = 512, kMostWarps = 8, kMostBlocks = 8;

// Where threads hold rows: lanes and quads as below, the widest rows, and how often a warp holds twice those that it takes
// at once: 192 numbers a thread.
constexpr int kHeldLanes = 16, kHeldQuads = 2, kHeldColumns = 4 * kHeldLanes * kHeldQuads, kHeldTwice = 3;

// Rows that a thread takes at once, each with `quads` groups of four columns: as many as registers hold.
DPDIFF_BOTH constexpr int sinkhorn_rows(int quads) { return 8 / quads; }

// The rows of a problem are divided among the blocks of a cluster. `lanes` threads share a row, each with `quads` groups of
// four columns.
struct SinkhornShape {
  int lanes, quads;
  int size, threads;        // blocks of a cluster, threads of a block
  int rows, padded, width;  // of a block's kernel, of what else is known of its rows, and of a row
  int held;                 // of the kernel's rows: the first, in registers during iterations, else in global memory
  bool shared;              // whether the rows are in shared memory, or in global memory
  bool relaxed_a, relaxed_b;

  // Rows of a warp, or of a block.
  DPDIFF_BOTH int span() const { return sinkhorn_rows(quads) * (lanes > 32 ? 1 : 32 / lanes); }
  DPDIFF_BOTH int warps() const { return unsigned(threads) / 32; }

  // Floats of all that is known of the rows and of the columns but the kernel; of what a block tells the others, and of a
  // board of it, where each block has a place, unless rows are so long that it stays on its own, or each warp of a block
  // that is alone; of what warps tell their block elsewhere; of all in shared memory but the rows, with what Cluster and
  // reduce_row need; of the rows; and of those that threads hold, in global memory.
  DPDIFF_BOTH int64_t side_of_rows() const { return int64_t(relaxed_a ? 8 : 5) * padded; }
  DPDIFF_BOTH int64_t side_of_columns() const { return int64_t(relaxed_b ? 8 : 6) * width; }
  DPDIFF_BOTH int message() const { return 4 + width; }
  DPDIFF_BOTH int board() const { return (lanes > 32 ? 1 : size == 1 ? warps() : size) * message(); }
  DPDIFF_BOTH int parts() const { return lanes > 32 ? 8 * warps() : size == 1 ? 0 : warps() * message(); }
  DPDIFF_BOTH int64_t columns() const {
    return 4 + 2 * board() + side_of_columns() + parts() + (lanes > 32 ? 8 * warps() : 0);
  }
  DPDIFF_BOTH int64_t of_rows() const { return int64_t(rows - held) * width + side_of_rows(); }
  DPDIFF_BOTH int64_t of_held() const { return int64_t(held) * width; }
  int64_t bytes() const { return 4 * (columns() + (shared ? of_rows() : 0)); }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline SinkhornShape sinkhorn_shape_of(int n, int m, bool relaxed_a, bool relaxed_b, int size, bool shared,
                                       int held_twice = 0) {
  SinkhornShape shape{};
  if (held_twice > 0) {
    shape.lanes = kHeldLanes, shape.quads = kHeldQuads;
  } else if (shared) {
    shape.lanes = m <= 128 ? 8 : m <= 256 ? 16 : 32;
    shape.quads = m <= 32 ? 1 : m <= 64 ? 2 : 4;
  } else {
    shape.lanes = m <= 512 ? 32 : 32 * kMostWarps;
    shape.quads = 4;
  }
  shape.size = size;
  const int of_block = n > 0 ? ceil_div(n, size) : 1, of_thread = sinkhorn_rows(shape.quads);
  const int spans = ceil_div(of_block, shape.span());
  shape.rows = ceil_div(of_block, of_thread) * of_thread;
  shape.padded = ceil_div(spans * shape.span(), 4) * 4;  // whatever follows begins at a multiple of 16 bytes
  shape.width = shape.lanes < 32 ? 4 * shape.lanes * shape.quads : m > 0 ? ceil_div(m, 4) * 4 : 4;
  // as few warps as take no more rounds than the most would
  const int rounds = ceil_div(spans, kMostWarps);
  const int warps = held_twice > 0 ? kMostWarps : ceil_div(spans, rounds);
  shape.threads = shape.lanes > 32 ? shape.lanes : 32 * warps;
  if (held_twice > 0) shape.rows = shape.padded;
  shape.held = 2 * held_twice * warps * shape.span();
  shape.shared = shared;
  shape.relaxed_a = relaxed_a, shape.relaxed_b = relaxed_b;
  return shape;
}

// The smallest cluster of which two blocks share a multiprocessor, so that one computes while the other waits; else the
// smallest that fits at all; larger ones where the batch leaves multiprocessors idle. Where clusters would take turns, one
// block whose threads hold rows, if that fits, since it waits for no others. What fits nowhere stays in global memory, and
// in the L2 cache as far as that goes.
inline SinkhornShape sinkhorn_shape(int64_t batch, int n, int m, bool relaxed_a, bool relaxed_b,
                                    const SinkhornDevice& device) {
  constexpr int kLeastRows = 32;
  const int largest = device.clusters ? kMostBlocks : 1;
  const int reserved = 1024;  // of each block, for the system
  int size = 0;
  for (int64_t limit : {int64_t(device.per_multiprocessor / 2 - reserved), int64_t(device.per_block)}) {
    for (int s = 1; s <= largest && size == 0 && m <= kMostSharedColumns; s *= 2) {
      if (sinkhorn_shape_of(n, m, relaxed_a, relaxed_b, s, true).bytes() <= limit) size = s;
    }
  }
  const bool shared = size > 0;
  if (!shared) size = largest;
  const SinkhornShape held = sinkhorn_shape_of(n, m, false, false, 1, true, kHeldTwice);
  const bool turns = !shared || (size > 1 && size * batch > 2 * device.multiprocessors);
  const bool fits = m <= kHeldColumns && n > held.held && held.bytes() <= device.per_block && !relaxed_a && !relaxed_b;
  if (turns && fits && m > kHeldColumns / 2) return held;
  while (2 * size <= largest && 2 * size * batch <= device.multiprocessors && n >= 2 * size * kLeastRows) size *= 2;
  return sinkhorn_shape_of(n, m, relaxed_a, relaxed_b, size, shared);
}

}  // namespace dpdiff
