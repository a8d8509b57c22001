// torch shell of the weight quantizer: shapes, allocation, threads, errors.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quantize.h"

namespace {

using at::Tensor;
using unicorn::FloatType;
using unicorn::QuantizeArgs;
using unicorn::Scheme;

constexpr int64_t kRows = 16, kGroup = 32;
constexpr int64_t kScanBlock = 1 << 20;  // elements per task of the scan for NaN and Inf

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FloatType float_type(const Tensor& w) {
  switch (w.scalar_type()) {
    case at::kBFloat16:
      return FloatType::bf16;
    case at::kHalf:
      return FloatType::f16;
    case at::kFloat:
      return FloatType::f32;
    default:
      TORCH_CHECK(false, "quantize: expected a bf16, fp16 or fp32 tensor, got ", w.scalar_type());
  }
}

int64_t count_nonfinite(const Tensor& tensor) {
  const Tensor w = tensor.contiguous();
  const FloatType type = float_type(w);
  const auto* data = static_cast<const char*>(w.const_data_ptr());
  std::atomic<int64_t> bad{0};
  at::parallel_for(0, w.numel(), kScanBlock, [&](int64_t begin, int64_t end) {
    bad += unicorn::quantizer().count_nonfinite(data + begin * w.element_size(), type, end - begin);
  });
  return bad;
}

// dtype and shape of one packed tensor.
struct Part {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

// The packed tensors of a weight, as in unicorn_backend/layouts.py (PARTS).
std::vector<Part> parts(Scheme scheme, const Tensor& w) {
  TORCH_CHECK(w.dim() == 2, "quantize: expected a matrix, got ", w.sizes());
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup), k256 = ceil_div(k32, 8);
  const auto packed = [&](int64_t bits) { return Part{at::kByte, {n16, k32, bits, kRows, 4}}; };
  const Part grouped{at::kHalf, {n16, k32, kRows}}, per_row{at::kFloat, {n16, kRows}};
  const auto pairs = [&](at::ScalarType dtype) { return Part{dtype, {n16, k32, 2, kRows}}; };
  switch (scheme) {
    case Scheme::w4g32:
      return {packed(4), grouped};
    case Scheme::w4n32:
      return {packed(4), grouped, {at::kChar, {unicorn::kCodebookSize}}};
    case Scheme::w4m32:
      return {packed(4), grouped, grouped};
    case Scheme::q4k:
      return {packed(4), pairs(at::kByte), {at::kHalf, {n16, k256, 2, kRows}}};
    case Scheme::q5k:
      return {packed(5), pairs(at::kByte), {at::kHalf, {n16, k256, 2, kRows}}};
    case Scheme::q6k:
      return {packed(6), pairs(at::kChar), {at::kHalf, {n16, k256, 1, kRows}}};
    case Scheme::w8c:
      return {packed(8), per_row};
    case Scheme::w8a:
      return {packed(8), per_row, {at::kByte, {n16, kRows}}};
    case Scheme::w8g32:
      return {packed(8), grouped};
  }
  TORCH_INTERNAL_ASSERT(false);
}

QuantizeArgs arguments(const Tensor& w, const std::vector<Tensor>& packed) {
  QuantizeArgs args{w.const_data_ptr(),
                    float_type(w),
                    w.size(0),
                    w.size(1),
                    w.stride(0) * static_cast<int64_t>(w.element_size()),
                    packed[0].mutable_data_ptr<uint8_t>(),
                    packed[1].mutable_data_ptr(),
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr};
  if (packed.size() < 3) return args;
  const at::ScalarType third = packed[2].scalar_type();
  if (third == at::kChar) args.codebook = packed[2].const_data_ptr<int8_t>();
  if (third == at::kByte) args.zero = packed[2].mutable_data_ptr<uint8_t>();
  if (third == at::kHalf) args.half = static_cast<uint16_t*>(packed[2].mutable_data_ptr());
  return args;
}

Tensor rows_of(const Tensor& w) {
  TORCH_CHECK(w.dim() == 2, "quantize: expected a matrix, got ", w.sizes());
  return w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
}

std::vector<Tensor> quantize(Scheme scheme, const Tensor& weight, const std::optional<Tensor>& importance) {
  std::vector<Tensor> packed;
  for (const Part& part : parts(scheme, weight)) packed.push_back(at::empty(part.shape, part.dtype));
  const Tensor w = rows_of(weight);
  QuantizeArgs args = arguments(w, packed);
  Tensor held;
  if (importance) {
    TORCH_CHECK(importance->scalar_type() == at::kFloat && importance->dim() == 1 && importance->size(0) == w.size(1),
                "quantize: expected importance as fp32 [", w.size(1), "], got ", importance->scalar_type(), " ",
                importance->sizes());
    held = importance->contiguous();
    args.importance = held.const_data_ptr<float>();
  }
  const auto tiles = unicorn::quantizer().quantize[static_cast<int>(scheme)];
  std::atomic<bool> good{true};
  at::parallel_for(0, ceil_div(w.size(0), kRows), 1, [&](int64_t begin, int64_t end) {
    if (!tiles(args, begin, end)) good = false;
  });
  TORCH_CHECK_VALUE(good, "quantize: ", count_nonfinite(w), " of ", w.numel(), " elements are NaN or Inf");
  if (scheme == Scheme::w4n32)
    std::copy_n(unicorn::kCodebook, unicorn::kCodebookSize, packed[2].mutable_data_ptr<int8_t>());
  return packed;
}

template <Scheme S>
std::tuple<Tensor, Tensor> two_parts(const Tensor& w) {
  const auto packed = quantize(S, w, {});
  return {packed[0], packed[1]};
}
template <Scheme S>
std::tuple<Tensor, Tensor, Tensor> three_parts(const Tensor& w) {
  const auto packed = quantize(S, w, {});
  return {packed[0], packed[1], packed[2]};
}
template <Scheme S>
std::tuple<Tensor, Tensor> two_parts_weighted(const Tensor& w, const std::optional<Tensor>& importance) {
  const auto packed = quantize(S, w, importance);
  return {packed[0], packed[1]};
}
template <Scheme S>
std::tuple<Tensor, Tensor, Tensor> three_parts_weighted(const Tensor& w, const std::optional<Tensor>& importance) {
  const auto packed = quantize(S, w, importance);
  return {packed[0], packed[1], packed[2]};
}

// Which scheme these tensors are; no two have the same dtypes and shapes.
Scheme scheme_of(at::TensorList packed, const Tensor& w) {
  for (int s = 0; s < unicorn::kSchemes; ++s) {
    const std::vector<Part> wanted = parts(Scheme(s), w);
    bool same = wanted.size() == packed.size();
    for (size_t i = 0; same && i < wanted.size(); ++i)
      same = packed[i].scalar_type() == wanted[i].dtype && packed[i].sizes() == at::IntArrayRef(wanted[i].shape);
    if (same) return Scheme(s);
  }
  TORCH_CHECK(false, "quantization_noise: the packed tensors do not belong to a weight of shape ", w.sizes());
}

std::tuple<double, double> quantization_noise(const Tensor& weight, at::TensorList packed) {
  const Tensor w = rows_of(weight);
  const auto tiles = unicorn::quantizer().noise[static_cast<int>(scheme_of(packed, w))];
  std::vector<Tensor> held;
  for (const Tensor& tensor : packed) held.push_back(tensor.contiguous());
  const QuantizeArgs args = arguments(w, held);
  const int64_t n16 = ceil_div(w.size(0), kRows);
  std::vector<unicorn::Noise> sums(static_cast<size_t>(n16));  // per tile: the sum does not depend on the threads
  at::parallel_for(0, n16, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[static_cast<size_t>(i)] = tiles(args, i, i + 1);
  });
  unicorn::Noise total;
  for (const unicorn::Noise& part : sums) total.signal += part.signal, total.noise += part.noise;
  return {total.signal, total.noise};
}

// "" asks for the best. Returns the name of the instruction set in use.
std::string quantize_isa(const std::string& name) {
  TORCH_CHECK_VALUE(unicorn::quantizer_set_isa(name.c_str()), "this CPU cannot run the quantizer for ", name);
  return unicorn::quantizer().isa;
}

}  // namespace

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("quantize_w4g32", &two_parts_weighted<Scheme::w4g32>);
  m.impl("quantize_w4n32", &three_parts_weighted<Scheme::w4n32>);
  m.impl("quantize_w4m32", &three_parts_weighted<Scheme::w4m32>);
  m.impl("quantize_q4k", &three_parts_weighted<Scheme::q4k>);
  m.impl("quantize_q5k", &three_parts_weighted<Scheme::q5k>);
  m.impl("quantize_q6k", &three_parts_weighted<Scheme::q6k>);
  m.impl("quantize_w8c", &two_parts<Scheme::w8c>);
  m.impl("quantize_w8a", &three_parts<Scheme::w8a>);
  m.impl("quantize_w8g32", &two_parts<Scheme::w8g32>);
  m.impl("quantization_noise", &quantization_noise);
  m.impl("count_nonfinite", &count_nonfinite);
}

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) { m.impl("quantize_isa", &quantize_isa); }
