// Memory of one thread, and large memory.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace dpdiff {

struct Free {
  void operator()(void* memory) const { free(memory); }
};

constexpr size_t kHugePage = size_t(1) << 21;

// Asks for huge pages where `memory` spans several: a new page of 4 KiB costs about 2 microseconds, more than what is
// written to it, and as much as an answer's attention to hundreds of prototypes.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (uintptr_t(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (uintptr_t(memory) + bytes) / kHugePage * kHugePage;
  if (last >= first + 2 * kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised memory on cache lines, for what one thread does at a time: problems one after the other, each after
// reset().
class Arena {
 public:
  void reset() {
    if (blocks_.size() > 1) {
      const size_t total = total_;
      blocks_.clear();
      total_ = 0;
      grow(total);
    }
    used_ = 0;
  }

  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > size_) grow(bytes);
    T* taken = reinterpret_cast<T*>(blocks_.back().get() + used_);
    used_ += bytes;
    return taken;
  }

 private:
  void grow(size_t bytes) {
    bytes = std::max<size_t>(bytes, 1 << 14);
    char* memory = static_cast<char*>(aligned_alloc(64, bytes));
    if (memory == nullptr) throw std::bad_alloc();
    prefer_huge_pages(memory, bytes);
    blocks_.emplace_back(memory);
    size_ = bytes;
    total_ += bytes;
    used_ = 0;
  }

  std::vector<std::unique_ptr<char, Free>> blocks_;
  size_t size_ = 0, used_ = 0, total_ = 0;
};

}  // namespace dpdiff
