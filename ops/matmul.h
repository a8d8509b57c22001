// Quantized projections: activations to int8, packed weights times int8, and the row work around them.
// Raw pointers only: no torch, no allocation, no threads. The layouts and the exact order of every
// sum are in unicorn_backend/ops.py; each function gives the same bits on every instruction set.
#pragma once

#include <cstdint>

#include "attention.h"  // DType

namespace unicorn {

constexpr int64_t kTileRows = 16;  // rows of a packed tile = int32 lanes of a zmm register
constexpr int64_t kGroup = 32;     // k per group: one activation scale, and one w4g32 scale
constexpr int64_t kPairRows = 32;  // rows handled at once: two tiles, which is one group of the next projection

enum class Scheme : int { w4g32, w8c, w8a };

enum class Activation : int { gelu_tanh, gelu, silu, relu };

// Packed weight [n, k] in tiles: n16 = ceil(n / 16), k32 = ceil(k / 32).
struct Weight {
  Scheme scheme;
  const uint8_t* w;     // w4g32 [n16, k32, 4, 16, 4], w8c and w8a [n16, k32, 8, 16, 4]
  const void* scale;    // w4g32 fp16 [n16, k32, 16], w8c and w8a fp32 [n16, 16]
  const uint8_t* zero;  // w8a [n16, 16]
  int64_t n, n16, k32;
};

// Quantized activations of `tokens` rows (a8g32).
struct Rows {
  int8_t* q;      // [tokens, k32 * 32], zero beyond k
  float* scale;   // [tokens, k32]
  int32_t* nsum;  // [tokens, k32], minus the sum of a group's q
  int64_t k32;
};

// The functions of one instruction set.
struct Matmul {
  const char* isa;
  // x [k] of `type` -> out fp32, zero padded to a multiple of 32.
  void (*load_row)(const void* x, DType type, int64_t k, float* out);
  void (*store_row)(const float* x, int64_t n, DType type, void* out);
  // In place: x * rsqrt(mean(x^2) + eps) * weight; weight [k padded] or null.
  void (*norm_row)(float* x, int64_t k, float eps, const float* weight);
  // Groups begin..end-1 of x (fp32, padded) into row `token` of `rows`.
  void (*quantize_groups)(const float* x, int64_t begin, int64_t end, const Rows& rows, int64_t token);
  // out[t * stride + r] = row 32 * pair + r of w times token first + t, for 0 <= t < count, 0 <= r < 32.
  void (*matmul_pair)(const Weight& w, int64_t pair, const Rows& x, int64_t first, int64_t count, float* out,
                      int64_t stride);
  // act(gate) * up for one pair of rows and `count` tokens, quantized as group `pair` of `out`. biases or null.
  void (*gate_up_pair)(const Weight& gate, const Weight& up, const float* gate_bias, const float* up_bias,
                       Activation act, int64_t pair, const Rows& x, int64_t first, int64_t count, const Rows& out);
  // y = x * cos + rotate_half(x) * sin over [d]; in place on x.
  void (*rotate_row)(float* x, const float* cos, const float* sin, int64_t d);
  // Row `id` of an embedding table -> out fp32 [k padded].
  void (*embed_row)(const Weight& table, int64_t id, float* out);
  // out[i] = act(x[i]), for tests of the polynomials.
  void (*activate)(const float* x, int64_t n, Activation act, float* out);
  // Sum over `bytes` (a multiple of 512) as uint64 lanes: a pure read, for the bandwidth probe.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  // `steps` x 8 independent int8 dot products of full width; returns multiply-adds done.
  int64_t (*dot_peak)(int64_t steps, int32_t* sink);
};

// The table for this CPU, or the one that was forced.
const Matmul& matmul_table();
// "avx512vnni", "avx2" or "portable"; "" = the best. False, and no change, where the CPU lacks it.
bool matmul_set_isa(const char* name);

}  // namespace unicorn
