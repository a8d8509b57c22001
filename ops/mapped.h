// Weights that stay in their file because RAM has no room for them (arena.cpp marks them), and reading them ahead.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pages.h"

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

  bool empty() const { return pieces_.empty(); }

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
    for (; told_ < end; ++told_)
      will_read(pieces_[told_ % pieces_.size()].begin, pieces_[told_ % pieces_.size()].bytes);
  }

  // `step` is over.
  void after(size_t step) {
    for (; first_ < at_ && pieces_[first_].step <= step; ++first_) {
      if (pieces_[first_].passing) give_back(pieces_[first_].begin, pieces_[first_].bytes);
    }
  }

 private:
  struct Piece {
    size_t step;
    const char* begin;
    size_t bytes;
    bool passing;
  };
  // The kernel reads no more at once than its own read-ahead, often 128 KB.
  static constexpr size_t kPiece = size_t(128) << 10, kAhead = size_t(64) << 20;

  std::vector<Piece> pieces_;
  size_t first_ = 0, at_ = 0;  // the pieces of the present step
  size_t told_ = 0;            // counted from this run's first
};

}  // namespace unicorn
