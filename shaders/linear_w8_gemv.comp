#version 450
// M <= 8 tokens times a w8c or w8a weight, every weight byte read once: one tile of 16 rows per workgroup.
// A thread has 4 rows (one uvec4 of weights) x one chunk of 4 columns of every G-th group:
//   lane bits 0-1: row quad, 2-4: chunk, above: group. 32 lanes read 512 bytes in a row: a group.
// A weight that is larger than a buffer may be comes in pieces: N rows from row FIRST on, of TOTAL.
#extension GL_GOOGLE_include_directive : require
#include "include/gemv.glsl"
#include "include/numbers.glsl"
#include "include/dot.glsl"
#include "include/w8.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint K = 2560;  // columns
layout(constant_id = 2) const uint N = 2048;  // rows
layout(constant_id = 3) const uint M = 1;     // tokens
layout(constant_id = 4) const uint TYPE = 1;
layout(constant_id = 5) const uint ZERO = 0;  // 1: w8a
layout(constant_id = 6) const uint BIAS = 0;
layout(constant_id = 7) const uint FIRST = 0;
layout(constant_id = 8) const uint TOTAL = 2048;

layout(std430, binding = 0) readonly buffer W { uvec4 w[]; };
layout(std430, binding = 1) readonly buffer S { float w_scale[]; };
layout(std430, binding = 2) readonly buffer Z { uint z[]; };     // four zero points a word
layout(std430, binding = 3) readonly buffer B { float bias[]; };  // [TOTAL]
layout(std430, binding = 4) readonly buffer A { int a[]; };       // [M][K32][8]
layout(std430, binding = 5) readonly buffer AS { float a_scale[]; };  // [M][K32]
layout(std430, binding = 6) writeonly buffer Y { uint y[]; };         // [M][TOTAL]

shared vec4 part[WG];
shared float finished[16 * M];

void main() {
  const uint tid = thread(), quad = tid & 3u, chunk = (tid >> 2) & 7u;
  const uint groups = (K + 31u) / 32u, tile = gl_WorkGroupID.x;
  ivec4 offset = ivec4(0);
  if (ZERO != 0u) {
    const uint zeros = z[tile * 4u + quad];
    [[unroll]] for (int i = 0; i < 4; ++i) offset[i] = missing(zeros, i);
  }

  vec4 sum[M];
  [[unroll]] for (uint m = 0u; m < M; ++m) sum[m] = vec4(0.0);
  for (uint g = tid >> 5; g < groups; g += WG / 32u) {
    const uvec4 v = w[((tile * groups + g) * 8u + chunk) * 4u + quad];
    [[unroll]] for (uint m = 0u; m < M; ++m) {
      const int x = a[(m * groups + g) * 8u + chunk];
      const int total = ZERO != 0u ? dot4(ONES, x) : 0;
      ivec4 dots;
      [[unroll]] for (int i = 0; i < 4; ++i) dots[i] = dot4(signed_bytes_of(v[i]), x) + offset[i] * total;
      sum[m] += vec4(dots) * a_scale[m * groups + g];
    }
  }

  [[unroll]] for (uint m = 0u; m < M; ++m) {
    part[tid] = add_up(sum[m]);
    barrier();
    if (tid < 16u) {  // one row each
      float total = 0.0;
      for (uint i = 0u; i < WG; i += STEP) total += part[i + (tid >> 2)][tid & 3u];
      const uint row = tile * 16u + tid;
      total *= w_scale[row];
      if (BIAS != 0u && row < N) total += bias[FIRST + row];
      finished[m * 16u + tid] = total;
    }
    barrier();
  }

  if (TYPE == F32) {
    for (uint i = tid; i < 16u * M; i += WG) {
      const uint row = tile * 16u + (i & 15u);
      if (row < N) y[(i >> 4) * TOTAL + FIRST + row] = floatBitsToUint(finished[i]);
    }
  } else {  // FIRST, N and TOTAL are even: a word belongs to one token
    for (uint i = tid; i < 8u * M; i += WG) {
      const uint row = tile * 16u + 2u * (i & 7u);
      const vec2 pair = vec2(finished[2u * i], finished[2u * i + 1u]);
      if (row < N) y[((i >> 3) * TOTAL + FIRST + row) / 2u] = write_pair(TYPE, pair);
    }
  }
}
