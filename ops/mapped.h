// Weights that stay in their file because RAM has no room for them (arena.cpp marks them), and reading them ahead.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace unicorn {

// What `Arena.leave` says of a tensor.
enum class InFile { no, cached, passing };
InFile in_file(const at::Tensor& t);

// What one program reads from files, in its order. The kernel is told some pieces ahead, so that the disk works while
// other layers compute. Pages that are only passing are given back right after their step: else the kernel, which gives
// up what was used longest ago, would give up every page before its next use.
class FileReads {
 public:
  // Before the first run: step `step` reads `bytes` at `begin`.
  void add(size_t step, const void* begin, size_t bytes, bool passing) {
    for (size_t done = 0; done < bytes; done += kPiece) {
      const size_t size = std::min(kPiece, bytes - done);
      pieces_.push_back({step, static_cast<const char*>(begin) + done, size, passing});
    }
  }

  // A run begins. What the last one told beyond its end is the beginning of this one.
  void begin() {
    first_ = at_ = 0;
    told_ = told_ > pieces_.size() ? told_ - pieces_.size() : 0;
  }

  // `step` is next: what it reads is told, and at least `kAhead` bytes behind that, across the end of the run.
  void before(size_t step) {
    size_t end = at_, ahead = 0;
    while (end < pieces_.size() && pieces_[end].step <= step) ++end;
    if (end == at_) return;  // reads nothing from a file
    first_ = at_;
    at_ = end;
    while (ahead < kAhead && end - at_ < pieces_.size()) ahead += pieces_[end++ % pieces_.size()].bytes;
    for (; told_ < end; ++told_) pieces_[told_ % pieces_.size()].will_be_read();
  }

  // The step that `before` named is over.
  void after() {
    for (; first_ < at_; ++first_) {
      if (pieces_[first_].passing) pieces_[first_].give_back();
    }
  }

 private:
  struct Piece {
    size_t step;
    const char* begin;
    size_t bytes;
    bool passing;

    // Has the kernel read these pages, and those that they share with others. Returns before it has.
    void will_be_read() const { advise(address() / page() * page(), address() + bytes, MADV_WILLNEED); }

    // Tells the kernel that these whole pages need not stay in memory. (Linux 5.4 and newer.)
    void give_back() const {
#ifdef MADV_PAGEOUT
      advise((address() + page() - 1) / page() * page(), (address() + bytes) / page() * page(), MADV_PAGEOUT);
#endif
    }

   private:
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(begin); }
    static uintptr_t page() {
      static const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
      return size;
    }
    static void advise(uintptr_t first, uintptr_t last, int advice) {
      if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
    }
  };
  // The kernel reads no more at once than its own read-ahead, often 128 KB.
  static constexpr size_t kPiece = size_t(128) << 10, kAhead = size_t(64) << 20;

  std::vector<Piece> pieces_;
  size_t first_ = 0, at_ = 0;  // the pieces of the present step
  size_t told_ = 0;            // counted from this run's first
};

}  // namespace unicorn
