// One parallel region per op on torch's OpenMP threads, and the memory that ops work in.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace unicorn {

// The threads of a region. Every thread calls barrier() equally often.
struct Team {
  int rank, size;

  // This thread's share of n items, contiguous.
  Range share(int64_t n) const { return {n * rank / size, n * (rank + 1) / size}; }
  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// Items 0 .. n - 1, split evenly; who is done takes pieces off the end of another's part. Cores differ (Zen 5 and
// 5c on one die) and get interrupted. Each thread still reads one stream: taking turns on a common stream cost 10 to
// 20 % of the bandwidth on two Sapphire Rapids cores. A thread takes half of what it has left at a time, because the
// atomic exchange waits for all loads under way: with 64 KB at a time, 6 % of the bandwidth.
class Queue {
 public:
  Queue(int64_t items, int64_t smallest, int threads)
      : items_(items), smallest_(smallest > 0 ? smallest : 1), threads_(threads) {
    if (!stealing()) return;
    for (int i = 0; i < threads; ++i) parts_[i].left = pack({items * i / threads, items * (i + 1) / threads});
  }

  // Calls work(Range) until nothing is left.
  template <class Work>
  void drain(const Team& team, const Work& work) {
    if (!stealing() || team.size != threads_) {
      const Range mine = team.share(items_);
      if (mine.begin < mine.end) work(mine);
      return;
    }
    Range range;
    while (take(team.rank, true, range)) work(range);
    for (int i = 1; i < threads_; ++i) {
      while (take((team.rank + i) % threads_, false, range)) work(range);
    }
  }

 private:
  static constexpr int kMost = 64;
  struct alignas(64) Part {
    std::atomic<uint64_t> left;
  };

  bool stealing() const { return threads_ > 1 && threads_ <= kMost; }
  static uint64_t pack(Range r) { return static_cast<uint64_t>(r.begin) << 32 | static_cast<uint64_t>(r.end); }

  bool take(int part, bool front, Range& range) {
    std::atomic<uint64_t>& left = parts_[part].left;
    for (uint64_t seen = left.load(std::memory_order_relaxed);;) {
      const int64_t begin = seen >> 32, end = seen & 0xffffffff;
      if (begin >= end) return false;
      const int64_t half = (end - begin) / 2, wanted = half > smallest_ ? half : smallest_;
      const int64_t size = wanted < end - begin ? wanted : end - begin;
      range = front ? Range{begin, begin + size} : Range{end - size, end};
      const Range rest = front ? Range{begin + size, end} : Range{begin, end - size};
      if (left.compare_exchange_weak(seen, pack(rest), std::memory_order_relaxed)) return true;
    }
  }

  const int64_t items_, smallest_;
  const int threads_;
  Part parts_[kMost];
};

template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1 || omp_in_parallel()) {
    body(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Memory that only grows, so that a decode loop stops allocating after its first step.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out aligned pieces of one block. Over null it only counts: run the same code twice.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  Activations activations(int64_t rows, int64_t width) {
    const int64_t groups = (width + kGroup - 1) / kGroup;
    return {take<int8_t>(rows * groups * kGroup), take<float>(rows * groups), take<int32_t>(rows * groups), rows,
            groups};
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace unicorn
