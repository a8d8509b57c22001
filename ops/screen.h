// A model's head whose rows are screened (impl/screen.inl), for who wants the largest scores only.
#pragma once

#include <torch/custom_class.h>

#include <atomic>

#include "pages.h"
#include "torch_regions.h"

namespace unicorn {

// The planes of a weight, for as long as it is used.
class Screen : public torch::CustomClassHolder {
 public:
  // w: packed, w8c or w8a, with scales from 0 to 1e15. Nothing of it is kept.
  explicit Screen(const std::vector<Tensor>& w);

  int64_t bytes() const { return bytes_; }
  // Bytes of the head that calls for the best scores have read, and how many calls.
  std::tuple<int64_t, int64_t> read() const { return {read_, calls_}; }

 private:
  friend class ScreenedLinear;
  int64_t tiles_, groups_, bytes_;
  Pages pages_;
  Planes planes_;
  std::atomic<int64_t> read_{0}, calls_{0};
  // Calls until less is tried again: to screen at all, and to start with five bits.
  std::atomic<int64_t> whole_{0}, six_{0};
  std::atomic<float> share_{0.7f};  // of the head's bytes that is read, on average
  std::atomic<float> open_{0.0f};   // part of the tiles that five bits leave, on average
};

class ScreenedLinear {
 public:
  ScreenedLinear(TensorList w, int64_t n, c10::intrusive_ptr<Screen> screen);
  // The scores [..., n] of x, one row: those that may be among the `best` largest, -inf for the others. Empty where
  // that is no gain.
  std::optional<Tensor> operator()(const Tensor& x, int64_t best) const;

 private:
  Arguments arguments_;
  Weight w_;
  c10::intrusive_ptr<Screen> screen_;
  Result result_;
};

}  // namespace unicorn
