// Anonymous memory in huge pages: weights in 2 MB pages are read 5 to 20 % faster than in 4 KB pages on two threads
// (fewer TLB misses, and the hardware prefetcher is not stopped as often).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace unicorn {

class Pages {
 public:
  // Zeroed on first touch. A hint, not a demand: without huge pages to be had it is ordinary memory.
  explicit Pages(size_t bytes) : mapped_((bytes + kHuge - 1) / kHuge * kHuge + kHuge) {
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = (reinterpret_cast<uintptr_t>(base_) + kHuge - 1) / kHuge * kHuge;
    data_ = reinterpret_cast<char*>(start);
#ifdef MADV_HUGEPAGE
    madvise(data_, mapped_ - kHuge, MADV_HUGEPAGE);
#endif
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { munmap(base_, mapped_); }

  char* data() const { return data_; }

  static constexpr size_t kHuge = size_t(2) << 20;

 private:
  size_t mapped_;
  void* base_;
  char* data_;
};

}  // namespace unicorn
