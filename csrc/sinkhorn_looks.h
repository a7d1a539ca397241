// When Sinkhorn's iterations may end before the last, on CPUs and GPUs: once those left can't change an entry of the plan by
// more than 2^-17 of itself.
//
// An iteration takes two potentials g, as vectors, no farther apart: in the spread of their differences or, where a side is
// relaxed, in the largest (Franklin and Lorenz, 1989). So what g moves in some iterations bounds what it will in as many more.
// And the plan changes, in units of eps, by no more than that, or twice that where relaxed: balanced, f takes back what all
// of g is shifted by. Such a shift comes from rounding, or from weights whose sums differ, and then goes on.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace dpdiff {

class SinkhornLooks {
 public:
  // Closer looks end earlier where they end, which they do where little is rounded.
  DPDIFF_BOTH SinkhornLooks(int64_t n_iters, int64_t looks) : n_iters_(n_iters), every_((n_iters + looks - 1) / looks) {}

  // The first look after `used` iterations; the next one is `every` later.
  DPDIFF_BOTH int64_t after(int64_t used) const { return (used / every_ + 1) * every_; }
  DPDIFF_BOTH int64_t every() const { return every_; }

  // Whether the iterations left may be spared: from the least and the greatest that g has changed by since the last look, in
  // units of eps.
  DPDIFF_BOTH bool at_rest(double least, double greatest, bool relaxed, int64_t used) const {
    const double size = -least > greatest ? -least : greatest, spread = greatest - least;
    return (relaxed ? 2 * size : spread) * double(n_iters_ - used) <= 0x1p-17 * double(every_) &&
           (relaxed || size <= 0x1p-20 * double(every_));
  }

 private:
  const int64_t n_iters_, every_;
};

}  // namespace dpdiff
