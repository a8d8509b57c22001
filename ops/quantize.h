// Weight quantizer: float rows in, packed tiles of the op contract out. No torch, no allocation, no threads.
// The byte diagrams are in unicorn_backend/ops.py, the arithmetic (to the bit) in
// unicorn_backend/quantize/schemes.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace unicorn {

// The values of w4n32: those of GGUF's IQ4_NL (schemes.py CODEBOOK).
constexpr int kCodebookSize = 16;
constexpr int8_t kCodebook[kCodebookSize] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

enum class FloatType { bf16, f16, f32 };

// One weight [n, k], rows `row_bytes` apart, elements dense. Tiles i are 16 rows; k32 = ceil(k / 32).
struct QuantizeArgs {
  const void* w;
  FloatType type;
  int64_t n, k, row_bytes;
  uint8_t* packed;          // [N16, k32, bits, 16, 4]
  void* scale;              // w8c and w8a fp32 [N16, 16], q?k bytes [N16, k32, 2, 16], else fp16 [N16, k32, 16]
  uint8_t* zero;            // w8a [N16, 16]
  const int8_t* codebook;   // w4n32 [16]
  uint16_t* half;           // w4m32 [N16, k32, 16]; q4k and q5k [N16, k256, 2, 16]; q6k [N16, k256, 1, 16]
  const float* importance;  // [k] or null: weights of the columns' squared errors
};

constexpr int kSchemes = 9;

// Sums of squares: of the weight, and of what packing changed.
struct Noise {
  double signal = 0.0, noise = 0.0;
};

// Of tiles begin..end-1 of a weight and its packed form.
using NoiseTiles = Noise (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

// Quantize tiles begin..end-1. False if a NaN or Inf was met: the output is unspecified then.
using QuantizeTiles = bool (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

struct Quantizer {
  const char* isa;
  QuantizeTiles quantize[kSchemes];
  NoiseTiles noise[kSchemes];
  // How many of `count` dense elements are NaN or Inf.
  int64_t (*count_nonfinite)(const void* w, FloatType type, int64_t count);
};

// The functions for this CPU.
const Quantizer& quantizer();

// "avx512", "avx2" or "portable"; "" = the best. False, and no change, where the CPU lacks it.
bool quantizer_set_isa(const char* name);

}  // namespace unicorn
