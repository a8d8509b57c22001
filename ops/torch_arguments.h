// From tensors to the structures of kernels.h: every check of an argument is here. Only torch_bindings.cpp
// includes this.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace unicorn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Names are put together where a check fails only: making them took longer than the checks.
inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), "unicorn::", op, ": ", name, ": got a tensor on ", t.device(),
              ", unicorn runs on the CPU");
  const auto type = t.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "unicorn::", op, ": ", name,
              ": got dtype ", type, ", allowed are bfloat16, float16 and float32");
  return type == at::kFloat ? DType::f32 : type == at::kBFloat16 ? DType::bf16 : DType::f16;
}

// Structures of kernels.h from tensors; it owns the memory that they point to.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  Array array(const Tensor& t, const char* name, int64_t numel = -1) {
    const DType dtype = dtype_of(t, op_, name);
    TORCH_CHECK(numel < 0 || t.numel() == numel, label(name), ": got shape ", t.sizes(), ", expected ", numel,
                " elements");
    const Tensor dense = t.contiguous();
    kept_.push_back(dense.storage());
    return {dense.const_data_ptr(), dtype};
  }
  Array array(const OptionalTensor& t, const char* name, int64_t numel) { return t ? array(*t, name, numel) : Array{}; }
  // K of a checked input [..., K].
  int64_t width(const Tensor& x) const {
    TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, label("x"), ": got shape ", x.sizes(), ", expected [..., K] with K > 0");
    dtype_of(x, op_, "x");
    return x.size(-1);
  }
  Rows rows(const Tensor& x, int64_t expected = -1) {
    const int64_t k = width(x);
    TORCH_CHECK(expected < 0 || k == expected, label("x"), ": got last dim ", k, ", expected ", expected);
    return {array(x, "x"), x.numel() / k, k};
  }
  Norm norm(const OptionalTensor& w, const std::optional<double>& eps, double offset, int64_t width, const char* name) {
    TORCH_CHECK(eps || !w, label(name), ": got a weight without an eps");
    if (!eps) return {};
    return {true, array(w, name, width), static_cast<float>(*eps), static_cast<float>(offset)};
  }
  Post post(const OptionalTensor& w, const std::optional<double>& eps, double offset, const OptionalTensor& residual,
            int64_t rows, int64_t width) {
    return {norm(w, eps, offset, width, "post_w"), array(residual, "residual", rows * width)};
  }
  std::vector<OptionalTensor> biases(at::TensorList list) {
    TORCH_CHECK(list.empty() || list.size() == 3, label("bias"), ": got ", list.size(),
                " tensors, allowed are 0 and 3");
    if (list.empty()) return std::vector<OptionalTensor>(3);
    return {list[0], list[1], list[2]};
  }
  // A packed weight; scheme and padding from dtypes and shapes (see unicorn_backend/ops.py).
  Weight weight(at::TensorList list, int64_t n, int64_t k, const char* name) {
    TORCH_CHECK(list.size() == 2 || list.size() == 3, label(name), ": got ", list.size(),
                " tensors, allowed are 1 (float), 2 and 3 (packed, see unicorn_backend/ops.py)");
    const int64_t n16 = (n + kRows - 1) / kRows, k32 = (k + kGroup - 1) / kGroup, k256 = (k32 + kSuper - 1) / kSuper;
    const auto scales = list[1].scalar_type();
    const auto third = list.size() == 3 ? list[2].scalar_type() : at::ScalarType::Undefined;
    const int64_t bits = list[0].dim() == 5 ? list[0].size(2) : 0;
    Weight w;
    w.scheme = scheme_of(bits, scales, third, name);
    w.n = n;
    w.k = k;
    packed(list[0], name, "bytes", at::kByte, {n16, k32, bits, kRows, 4});
    w.q = list[0].const_data_ptr<uint8_t>();
    if (w.scheme == Scheme::w8c || w.scheme == Scheme::w8a) {
      packed(list[1], name, "scales", at::kFloat, {n16, kRows});
    } else if (scales == at::kHalf) {
      packed(list[1], name, "scales", at::kHalf, {n16, k32, kRows});
    } else {
      packed(list[1], name, "scales", scales, {n16, k32, 2, kRows});
    }
    w.scale = list[1].const_data_ptr();
    switch (w.scheme) {
      case Scheme::w4n32:
        packed(list[2], name, "codebook", at::kChar, {16});
        w.codebook = list[2].const_data_ptr<int8_t>();
        break;
      case Scheme::w8a:
        packed(list[2], name, "zero points", at::kByte, {n16, kRows});
        w.zero = list[2].const_data_ptr<uint8_t>();
        break;
      case Scheme::w4m32:
        packed(list[2], name, "minima", at::kHalf, {n16, k32, kRows});
        break;
      case Scheme::q4k:
      case Scheme::q5k:
        packed(list[2], name, "super scales", at::kHalf, {n16, k256, 2, kRows});
        break;
      case Scheme::q6k:
        packed(list[2], name, "super scales", at::kHalf, {n16, k256, 1, kRows});
        break;
      default:
        break;
    }
    for (const Tensor& t : list) kept_.push_back(t.storage());
    if (third == at::kHalf) w.extra = reinterpret_cast<const uint16_t*>(list[2].const_data_ptr<at::Half>());
    return w;
  }
  std::string label(const char* name) const { return std::string("unicorn::") + op_ + ": " + name; }

 private:
  Scheme scheme_of(int64_t bits, at::ScalarType scales, at::ScalarType third, const char* name) const {
    struct Known {
      int64_t bits;
      at::ScalarType scales, third;
      Scheme scheme;
    };
    constexpr auto kNone = at::ScalarType::Undefined;
    static const Known known[] = {
        {4, at::kHalf, kNone, Scheme::w4g32},     {4, at::kHalf, at::kChar, Scheme::w4n32},
        {4, at::kHalf, at::kHalf, Scheme::w4m32}, {4, at::kByte, at::kHalf, Scheme::q4k},
        {5, at::kByte, at::kHalf, Scheme::q5k},   {6, at::kChar, at::kHalf, Scheme::q6k},
        {8, at::kFloat, kNone, Scheme::w8c},      {8, at::kFloat, at::kByte, Scheme::w8a},
        {8, at::kHalf, kNone, Scheme::w8g32},
    };
    for (const Known& one : known) {
      if (one.bits == bits && one.scales == scales && one.third == third) return one.scheme;
    }
    TORCH_CHECK(false, label(name), ": bytes of ", bits, " bits with scales of ", scales, " and a third tensor of ",
                third, " are no scheme; see unicorn_backend/ops.py");
  }
  void packed(const Tensor& t, const char* name, const char* part, at::ScalarType type, at::IntArrayRef shape) const {
    TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == type && t.sizes() == shape && t.is_contiguous(), label(name),
                ": ", part, " must be contiguous ", type, " ", shape, " on the CPU, got ", t.scalar_type(), " ",
                t.sizes(), " on ", t.device(), t.is_contiguous() ? "" : ", not contiguous",
                "; pack them with unicorn_backend.layouts");
  }

  const char* op_;
  std::vector<c10::Storage> kept_;
};

inline Out out_of(Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t, "result", "")}; }

inline Act activation_of(c10::string_view name) {
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "gelu") return Act::gelu;
  if (name == "silu") return Act::silu;
  TORCH_CHECK(name == "relu", "unicorn::int4_ffn: act: got '", name, "', allowed are gelu_tanh, gelu, silu, relu");
  return Act::relu;
}

}  // namespace unicorn
