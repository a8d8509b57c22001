// The regions with packed weights, in two steps: the constructor checks and reads what stays (weights, norms,
// settings), a call only what changes. An op does both; a program (program.cpp) that runs again and again keeps the
// first.
#pragma once

#include <tuple>
#include <vector>

#include "threads.h"
#include "torch_arguments.h"

namespace unicorn {

using at::TensorList;
using OptionalFloat = std::optional<double>;

// Memory of this thread's calls.
Workspace& workspace();
int threads();
// The sizes of x with n for the last one.
std::vector<int64_t> with_last(const Tensor& x, int64_t n);

// The memory of a result, given again once nobody else holds it. Kept for few tokens only: freeing the 0.5 MB of logits
// makes malloc tidy up its heap and often return it to the system, in all 1 % of a token of the 1B.
class Result {
 public:
  // Uninitialized, contiguous. rows: tokens of the call.
  Tensor take(at::IntArrayRef sizes, const at::TensorOptions& options, int64_t rows) const;

 private:
  mutable c10::Storage storage_;
  mutable const void* data_ = nullptr;
};

class LinearRegion {
 public:
  LinearRegion(int64_t width, TensorList w, const OptionalTensor& bias, int64_t n);
  Tensor operator()(const Tensor& x) const;

 private:
  Arguments arguments_;
  Weight w_;
  Array bias_;
  int64_t width_, n_;
  Result result_;
};

class QkvRegion {
 public:
  // wq, wk, wv may be empty: then the weights are float, and `part` is used without its `w` and `bias`.
  QkvRegion(int64_t width, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
            TensorList wq, TensorList wk, TensorList wv, TensorList bias, const OptionalTensor& q_norm_w,
            const OptionalTensor& k_norm_w, const OptionalFloat& qk_norm_eps, double qk_norm_offset, int64_t heads,
            int64_t kv_heads, int64_t head_dim, bool interleaved, bool v_norm);
  std::tuple<Tensor, Tensor, Tensor> operator()(const Tensor& x, const OptionalTensor& cos,
                                                const OptionalTensor& sin) const;
  // Everything but x: results allocated, rotary embedding checked. `kept` owns what it made dense.
  QkvArgs begin(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin, Tensor (&out)[3],
                Arguments& kept) const;

 private:
  Arguments arguments_;
  QkvArgs args_;
  int64_t width_;
  Result results_[3];
};

class AttentionRegion {
 public:
  AttentionRegion(int64_t width, bool causal, double scale, double softcap, TensorList wo, const OptionalTensor& bo,
                  int64_t n, const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset);
  Tensor operator()(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                    const OptionalTensor& residual) const;

 private:
  Arguments arguments_;
  Weight w_;
  Array bias_;
  Norm post_;
  bool causal_;
  double scale_, softcap_;
  int64_t width_, n_;
  Result joined_, result_;
};

class FfnRegion {
 public:
  FfnRegion(int64_t width, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
            TensorList wg, TensorList wu, TensorList wd, TensorList bias, Act act, int64_t f, int64_t n,
            const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
            const OptionalFloat& cutoff);
  Tensor operator()(const Tensor& x, const OptionalTensor& residual) const;

 private:
  Arguments arguments_;
  FfnArgs args_;
  int64_t width_;
  Result result_;
};

// The values that a row [..., S, D] of K or V holds.
int64_t row_width(const Tensor& t);
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v);
// q k^T, softmax, v: fp32 [B, T, H * Dv].
Tensor attended(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                double scale, double softcap, const Result& memory = {});

}  // namespace unicorn
