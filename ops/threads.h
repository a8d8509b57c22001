// One parallel region per op on torch's OpenMP threads, and the memory that ops work in.
#pragma once

#include <omp.h>

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
