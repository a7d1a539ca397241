#include "result_memory.h"

#include <pthread.h>
#include <stdlib.h>

#include <iterator>
#include <new>

#include <torch/csrc/stable/library.h>

#include "memory.h"

namespace dpdiff {

// Never destroyed: tensors may outlive everything else. A process that forks, as for a data loader, has no thread that would
// open what another one had locked.
ResultMemory& ResultMemory::shared() {
  static ResultMemory* const memory = [] {
    pthread_atfork([] { shared().mutex_.lock(); }, [] { shared().mutex_.unlock(); }, [] { shared().mutex_.unlock(); });
    return new ResultMemory;
  }();
  return *memory;
}

ResultMemory::Block ResultMemory::take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = free_.rbegin(); block != free_.rend(); ++block) {  // the last first: a cache may still hold it
      if (block->bytes < bytes || block->bytes > bytes + bytes / 4) continue;
      const Block found = *block;
      kept_ -= found.bytes;
      free_.erase(std::next(block).base());
      return found;
    }
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, bytes) != 0) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return {memory, bytes};
}

void ResultMemory::give_back(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(block);
  kept_ += block.bytes;
  for (; kept_ > kMostKept; free_.pop_front()) {
    kept_ -= free_.front().bytes;
    free(free_.front().memory);
  }
}

int64_t ResultMemory::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (; !free_.empty(); free_.pop_front()) free(free_.front().memory);
  const size_t kept = kept_;
  kept_ = 0;
  return int64_t(kept);
}

namespace {

int64_t release_memory() { return ResultMemory::shared().release(); }

}  // namespace
}  // namespace dpdiff

STABLE_TORCH_LIBRARY_IMPL(dpdiff, CompositeExplicitAutograd, m) {
  m.impl("release_memory", TORCH_BOX(&dpdiff::release_memory));
}
