// Memory for large results, which is used again: malloc returns what is large to the system, and the system zeroes a page
// before it is written again, which takes as long as many a result.
#pragma once

#include <deque>
#include <mutex>

#include "memory.h"

namespace dpdiff {

class ResultMemory {
 public:
  static constexpr size_t kLeast = size_t(2) << 20;       // bytes of a result, from which on this pays
  static constexpr size_t kMostKept = size_t(128) << 20;  // bytes that are free and not the system's
  struct Block {
    void* memory;
    size_t bytes;
  };

  // Never destroyed: tensors may outlive everything else.
  static ResultMemory& shared() {
    static ResultMemory* memory = new ResultMemory;
    return *memory;
  }

  // At least as many bytes, and at most a quarter more, on a huge page.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {  // the last first: it may be in the cache
        if (block->bytes < bytes || block->bytes > bytes + bytes / 4) continue;
        const Block found = *block;
        kept_ -= found.bytes;
        free_.erase(std::next(block).base());
        return found;
      }
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, size_t(1) << 21, bytes) != 0) throw std::bad_alloc();
    prefer_huge_pages(memory, bytes);
    return {memory, bytes};
  }

  void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += block.bytes;
    for (; kept_ > kMostKept; free_.pop_front()) {
      kept_ -= free_.front().bytes;
      free(free_.front().memory);
    }
  }

 private:
  std::mutex mutex_;
  std::deque<Block> free_;
  size_t kept_ = 0;
};

}  // namespace dpdiff
