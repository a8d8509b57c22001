// torch shell of the weight quantizer: shapes, allocation, threads, errors.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "quantize.h"

namespace {

using at::Tensor;
using unicorn::FloatType;
using unicorn::QuantizeArgs;

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

QuantizeArgs arguments(const Tensor& w, void* packed, void* scale, void* zero) {
  return {w.const_data_ptr(),
          float_type(w),
          w.size(0),
          w.size(1),
          w.stride(0) * static_cast<int64_t>(w.element_size()),
          static_cast<uint8_t*>(packed),
          scale,
          static_cast<uint8_t*>(zero)};
}

// Allocates nothing: `packed` [N16, K32, ...] and the others are the caller's.
void run(const Tensor& w, unicorn::QuantizeTiles tiles, Tensor packed, Tensor scale, uint8_t* zero) {
  const QuantizeArgs args = arguments(w, packed.mutable_data_ptr(), scale.mutable_data_ptr(), zero);
  std::atomic<bool> good{true};
  at::parallel_for(0, ceil_div(w.size(0), kRows), 1, [&](int64_t begin, int64_t end) {
    if (!tiles(args, begin, end)) good = false;
  });
  TORCH_CHECK_VALUE(good, "quantize: ", count_nonfinite(w), " of ", w.numel(), " elements are NaN or Inf");
}

Tensor rows_of(const Tensor& w) {
  TORCH_CHECK(w.dim() == 2, "quantize: expected a matrix, got ", w.sizes());
  return w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
}

std::tuple<Tensor, Tensor> quantize_w4g32(const Tensor& weight) {
  const Tensor w = rows_of(weight);
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  Tensor packed = at::empty({n16, k32, 4, kRows, 4}, at::kByte), scale = at::empty({n16, k32, kRows}, at::kHalf);
  run(w, unicorn::quantizer().w4g32, packed, scale, nullptr);
  return {packed, scale};
}

std::tuple<Tensor, Tensor> quantize_w8c(const Tensor& weight) {
  const Tensor w = rows_of(weight);
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  Tensor packed = at::empty({n16, k32, 8, kRows, 4}, at::kByte), scale = at::empty({n16, kRows}, at::kFloat);
  run(w, unicorn::quantizer().w8c, packed, scale, nullptr);
  return {packed, scale};
}

std::tuple<Tensor, Tensor, Tensor> quantize_w8a(const Tensor& weight) {
  const Tensor w = rows_of(weight);
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  Tensor packed = at::empty({n16, k32, 8, kRows, 4}, at::kByte), scale = at::empty({n16, kRows}, at::kFloat);
  Tensor zero = at::empty({n16, kRows}, at::kByte);
  run(w, unicorn::quantizer().w8a, packed, scale, zero.mutable_data_ptr<uint8_t>());
  return {packed, scale, zero};
}

std::tuple<double, double> quantization_noise(const Tensor& weight, at::TensorList packed) {
  const Tensor w = rows_of(weight);
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  TORCH_CHECK(packed.size() == 2 || packed.size() == 3, "quantization_noise: expected a packed weight, got ",
              packed.size(), " tensors");
  const bool four_bit = packed.size() == 2 && packed[0].numel() == n16 * k32 * 256;
  const int64_t scales = four_bit ? n16 * k32 * kRows : n16 * kRows;
  TORCH_CHECK(packed[0].scalar_type() == at::kByte && packed[0].numel() == n16 * k32 * (four_bit ? 256 : 512) &&
                  packed[1].scalar_type() == (four_bit ? at::kHalf : at::kFloat) && packed[1].numel() == scales,
              "quantization_noise: the packed tensors do not belong to a weight of shape ", w.sizes());
  std::vector<Tensor> held;
  for (const Tensor& tensor : packed) held.push_back(tensor.contiguous());
  void* zero = nullptr;
  if (held.size() == 3) {
    TORCH_CHECK(held[2].scalar_type() == at::kByte && held[2].numel() == n16 * kRows,
                "quantization_noise: expected uint8 zero points of ", n16 * kRows, " rows, got ", held[2].sizes());
    zero = held[2].data_ptr();
  }
  const QuantizeArgs args = arguments(w, held[0].data_ptr(), held[1].data_ptr(), zero);
  const auto tiles = four_bit ? unicorn::quantizer().w4g32_noise : unicorn::quantizer().w8_noise;
  std::vector<unicorn::Noise> parts(static_cast<size_t>(n16));  // per tile: the sum does not depend on the threads
  at::parallel_for(0, n16, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[static_cast<size_t>(i)] = tiles(args, i, i + 1);
  });
  unicorn::Noise total;
  for (const unicorn::Noise& part : parts) total.signal += part.signal, total.noise += part.noise;
  return {total.signal, total.noise};
}

// "" asks for the best. Returns the name of the instruction set in use.
std::string quantize_isa(const std::string& name) {
  TORCH_CHECK_VALUE(unicorn::quantizer_set_isa(name.c_str()), "this CPU cannot run the quantizer for ", name);
  return unicorn::quantizer().isa;
}

}  // namespace

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("quantize_w4g32", &quantize_w4g32);
  m.impl("quantize_w8c", &quantize_w8c);
  m.impl("quantize_w8a", &quantize_w8a);
  m.impl("quantization_noise", &quantization_noise);
  m.impl("count_nonfinite", &count_nonfinite);
}

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) { m.impl("quantize_isa", &quantize_isa); }
