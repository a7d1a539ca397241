// Memory for large results, which is used again: malloc returns what is large to the system, and the system zeroes a page
// before it is written again, which takes as long as many a result.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <mutex>

namespace dpdiff {

class ResultMemory {
 public:
  static constexpr size_t kLeast = size_t(2) << 20;       // bytes of a result, from which on this pays
  static constexpr size_t kMostKept = size_t(128) << 20;  // bytes that are free and not the system's
  struct Block {
    void* memory;
    size_t bytes;
  };

  static ResultMemory& shared();

  // At least as many bytes, and at most a quarter more, from the beginning of a huge page on.
  Block take(size_t bytes);
  void give_back(Block block);
  // Gives to the system what is free. How many bytes that was.
  int64_t release();

 private:
  std::mutex mutex_;
  std::deque<Block> free_;  // the last to come back is the last
  size_t kept_ = 0;
};

}  // namespace dpdiff
