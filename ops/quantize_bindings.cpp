// torch shell of the weight quantizer: shapes, allocation, threads, errors.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
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

QuantizeArgs arguments(const Tensor& w, const std::vector<Tensor>& packed) {
  QuantizeArgs args{w.const_data_ptr(),
                    float_type(w),
                    w.size(0),
                    w.size(1),
                    w.stride(0) * static_cast<int64_t>(w.element_size()),
                    packed[0].mutable_data_ptr<uint8_t>(),
                    packed[1].mutable_data_ptr(),
                    nullptr,
                    nullptr};
  if (packed.size() == 3 && packed[2].scalar_type() == at::kChar) args.codebook = packed[2].const_data_ptr<int8_t>();
  if (packed.size() == 3 && packed[2].scalar_type() == at::kByte) args.zero = packed[2].mutable_data_ptr<uint8_t>();
  return args;
}

Tensor rows_of(const Tensor& w) {
  TORCH_CHECK(w.dim() == 2, "quantize: expected a matrix, got ", w.sizes());
  return w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
}

// `packed`: uninitialised, of the shapes of the contract.
void run(const Tensor& w, unicorn::QuantizeTiles tiles, const std::vector<Tensor>& packed) {
  const QuantizeArgs args = arguments(w, packed);
  std::atomic<bool> good{true};
  at::parallel_for(0, ceil_div(w.size(0), kRows), 1, [&](int64_t begin, int64_t end) {
    if (!tiles(args, begin, end)) good = false;
  });
  TORCH_CHECK_VALUE(good, "quantize: ", count_nonfinite(w), " of ", w.numel(), " elements are NaN or Inf");
}

// 4 or 8 bits, and an fp16 scale per group or an fp32 one per row.
std::vector<Tensor> empty(const Tensor& w, int64_t bits, bool grouped) {
  TORCH_CHECK(w.dim() == 2, "quantize: expected a matrix, got ", w.sizes());
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  return {at::empty({n16, k32, bits, kRows, 4}, at::kByte),
          grouped ? at::empty({n16, k32, kRows}, at::kHalf) : at::empty({n16, kRows}, at::kFloat)};
}

std::tuple<Tensor, Tensor> quantize_w4g32(const Tensor& w) {
  const auto packed = empty(w, 4, true);
  run(rows_of(w), unicorn::quantizer().w4g32, packed);
  return {packed[0], packed[1]};
}

std::tuple<Tensor, Tensor, Tensor> quantize_w4n32(const Tensor& w) {
  const auto packed = empty(w, 4, true);
  run(rows_of(w), unicorn::quantizer().w4n32, packed);
  Tensor codebook = at::empty({unicorn::kCodebookSize}, at::kChar);
  std::copy_n(unicorn::kCodebook, unicorn::kCodebookSize, codebook.mutable_data_ptr<int8_t>());
  return {packed[0], packed[1], codebook};
}

std::tuple<Tensor, Tensor> quantize_w8c(const Tensor& w) {
  const auto packed = empty(w, 8, false);
  run(rows_of(w), unicorn::quantizer().w8c, packed);
  return {packed[0], packed[1]};
}

std::tuple<Tensor, Tensor, Tensor> quantize_w8a(const Tensor& w) {
  auto packed = empty(w, 8, false);
  packed.push_back(at::empty(packed[1].sizes(), at::kByte));
  run(rows_of(w), unicorn::quantizer().w8a, packed);
  return {packed[0], packed[1], packed[2]};
}

std::tuple<Tensor, Tensor> quantize_w8g32(const Tensor& w) {
  const auto packed = empty(w, 8, true);
  run(rows_of(w), unicorn::quantizer().w8g32, packed);
  return {packed[0], packed[1]};
}

// The noise of a packed weight; which scheme it is follows from its tensors, as in unicorn_backend/layouts.py.
unicorn::NoiseTiles noise_of(const std::vector<Tensor>& packed, int64_t n16, int64_t k32) {
  const bool four = packed[0].numel() == n16 * k32 * 256, grouped = packed[1].scalar_type() == at::kHalf;
  const bool codebook = packed.size() == 3 && packed[2].scalar_type() == at::kChar;
  const bool zero = packed.size() == 3 && packed[2].scalar_type() == at::kByte;
  const bool sizes =
      (four || packed[0].numel() == n16 * k32 * 512) && packed[1].numel() == n16 * (grouped ? k32 : 1) * kRows &&
      (!codebook || packed[2].numel() == unicorn::kCodebookSize) && (!zero || packed[2].numel() == n16 * kRows);
  const bool known = packed[0].scalar_type() == at::kByte && (grouped || packed[1].scalar_type() == at::kFloat) &&
                     (packed.size() == 2 || codebook || zero) && (four ? grouped && !zero : !codebook) &&
                     !(grouped && zero);
  TORCH_CHECK(sizes && known, "quantization_noise: the packed tensors do not belong to a weight of ", n16, " x ", k32,
              " tiles");
  const unicorn::Quantizer& q = unicorn::quantizer();
  if (four) return codebook ? q.w4n32_noise : q.w4g32_noise;
  return grouped ? q.w8g32_noise : q.w8_noise;
}

std::tuple<double, double> quantization_noise(const Tensor& weight, at::TensorList packed) {
  const Tensor w = rows_of(weight);
  const int64_t n16 = ceil_div(w.size(0), kRows), k32 = ceil_div(w.size(1), kGroup);
  TORCH_CHECK(packed.size() == 2 || packed.size() == 3, "quantization_noise: expected a packed weight, got ",
              packed.size(), " tensors");
  std::vector<Tensor> held;
  for (const Tensor& tensor : packed) held.push_back(tensor.contiguous());
  const auto tiles = noise_of(held, n16, k32);
  const QuantizeArgs args = arguments(w, held);
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
  m.impl("quantize_w4n32", &quantize_w4n32);
  m.impl("quantize_w8g32", &quantize_w8g32);
  m.impl("quantize_w8c", &quantize_w8c);
  m.impl("quantize_w8a", &quantize_w8a);
  m.impl("quantization_noise", &quantization_noise);
  m.impl("count_nonfinite", &count_nonfinite);
}

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) { m.impl("quantize_isa", &quantize_isa); }
