// What positions alone decide, once per call of a model: masks and rotary tables. With torch's operators these are 20
// and 9 calls of 3 to 10 us each.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

namespace unicorn {

namespace {

using at::Tensor;

Tensor band_mask(int64_t queries, int64_t keys, int64_t lower, int64_t upper) {
  TORCH_CHECK(queries >= 0 && keys >= 0, "unicorn::band_mask: got ", queries, " queries and ", keys, " keys");
  Tensor mask = at::empty({1, 1, queries, keys}, at::kBool);
  bool* row = mask.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < queries; ++i, row += keys) {
    const int64_t first = std::clamp(i + lower, int64_t(0), keys), end = std::clamp(i + upper + 1, first, keys);
    std::fill(row, row + first, false);
    std::fill(row + first, row + end, true);
    std::fill(row + end, row + keys, false);
  }
  return mask;
}

// `table` times scale in `dtype`.
Tensor finished(const Tensor& table, double scale, at::ScalarType dtype) {
  return (scale == 1.0 ? table : table * scale).to(dtype);
}

std::tuple<Tensor, Tensor> rotary_tables(const Tensor& positions, const Tensor& inv_freq, double scale,
                                         at::ScalarType dtype) {
  TORCH_CHECK(positions.dim() == 2 && positions.scalar_type() == at::kLong && inv_freq.dim() == 1 &&
                  inv_freq.scalar_type() == at::kFloat && positions.device().is_cpu() && inv_freq.device().is_cpu(),
              "unicorn::rotary_tables: got positions ", positions.sizes(), " ", positions.scalar_type(),
              " and inv_freq ", inv_freq.sizes(), " ", inv_freq.scalar_type(),
              ", expected int64 [B, T] and float32 [D / 2] on the CPU");
  const Tensor at_positions = positions.contiguous(), frequencies = inv_freq.contiguous();
  const int64_t half = frequencies.size(0), count = at_positions.numel();
  // Both halves, as torch's vectorised sine may depend on where a number stands.
  Tensor angles = at::empty({at_positions.size(0), at_positions.size(1), 2 * half}, frequencies.options());
  const int64_t* position = at_positions.const_data_ptr<int64_t>();
  const float* frequency = frequencies.const_data_ptr<float>();
  float* angle = angles.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i, angle += 2 * half) {
    const float p = static_cast<float>(position[i]);
    for (int64_t j = 0; j < half; ++j) angle[j] = angle[half + j] = p * frequency[j];
  }
  return {finished(at::cos(angles), scale, dtype), finished(at::sin(angles), scale, dtype)};
}

}  // namespace

}  // namespace unicorn

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) { m.impl("band_mask", &unicorn::band_mask); }
TORCH_LIBRARY_IMPL(unicorn, CPU, m) { m.impl("rotary_tables", &unicorn::rotary_tables); }
