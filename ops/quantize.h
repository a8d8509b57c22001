// Weight quantizer: float rows in, packed tiles of the op contract out. No torch, no allocation, no threads.
// The byte diagrams are in unicorn_backend/ops.py, the arithmetic (to the bit) in
// unicorn_backend/quantize/schemes.py.
#pragma once

#include <cstdint>

namespace unicorn {

enum class FloatType { bf16, f16, f32 };

// One weight [n, k], rows `row_bytes` apart, elements dense. Tiles i are 16 rows; k32 = ceil(k / 32).
struct QuantizeArgs {
  const void* w;
  FloatType type;
  int64_t n, k, row_bytes;
  uint8_t* packed;  // w4g32 [N16, k32, 4, 16, 4], w8c and w8a [N16, k32, 8, 16, 4]
  void* scale;      // w4g32 fp16 [N16, k32, 16], w8c and w8a fp32 [N16, 16]
  uint8_t* zero;    // w8a [N16, 16]
};

// Sums of squares: of the weight, and of what packing changed.
struct Noise {
  double signal = 0.0, noise = 0.0;
};

// Of tiles begin..end-1 of a weight and its packed form. w8c: `zero` is null.
using NoiseTiles = Noise (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

// Quantize tiles begin..end-1. False if a NaN or Inf was met: the output is unspecified then.
using QuantizeTiles = bool (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

struct Quantizer {
  const char* isa;
  QuantizeTiles w4g32, w8c, w8a;
  NoiseTiles w4g32_noise, w8_noise;
  // How many of `count` dense elements are NaN or Inf.
  int64_t (*count_nonfinite)(const void* w, FloatType type, int64_t count);
};

// The functions for this CPU.
const Quantizer& quantizer();

// "avx512", "avx2" or "portable"; "" = the best. False, and no change, where the CPU lacks it.
bool quantizer_set_isa(const char* name);

}  // namespace unicorn
