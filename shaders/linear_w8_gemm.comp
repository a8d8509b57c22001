#version 450
// Many tokens times a w8c or w8a weight: 64 rows x 64 tokens per workgroup of 256 threads, int32 sums.
// Tokens come in whole blocks of 64: what the last block has too much is computed and never read.
// A weight that is larger than a buffer may be comes in pieces: N rows from row FIRST on, of TOTAL.
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"
#include "include/dot.glsl"
#include "include/w8.glsl"

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 1) const uint K = 2560;
layout(constant_id = 2) const uint N = 2048;
layout(constant_id = 4) const uint TYPE = 1;
layout(constant_id = 5) const uint ZERO = 0;  // 1: w8a
layout(constant_id = 6) const uint BIAS = 0;
layout(constant_id = 7) const uint FIRST = 0;
layout(constant_id = 8) const uint TOTAL = 2048;

layout(std430, binding = 0) readonly buffer W { uint w0[]; };
layout(std430, binding = 1) readonly buffer S { float w_scale[]; };
layout(std430, binding = 2) readonly buffer Z { uint z[]; };          // four zero points a word
layout(std430, binding = 3) readonly buffer B { float bias[]; };      // [TOTAL]
layout(std430, binding = 4) readonly buffer A { uint a[]; };          // [M][K32][8]
layout(std430, binding = 5) readonly buffer AS { float a_scale[]; };  // [M][K32]
layout(std430, binding = 6) writeonly buffer Y { uint y[]; };         // [M][TOTAL]

const uint WEIGHTS = 1;
#include "include/gemm.glsl"
#include "include/w8_result.glsl"

void main() {
  const uint tid = gl_LocalInvocationIndex, tn = tid & 15u, tm = tid >> 4;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  // what this thread loads of the weight: two words, four chunks apart
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u, tile = min(n0 / 16u + (tid >> 6), tiles - 1u);
  const uint to = place((tid >> 6) * 16u + r), from = tile * groups * 128u + chunk * 16u + r;
  const uint row = n0 + 4u * tn, last = tiles * 16u - 4u;

  ivec4 offset = ivec4(0);
  if (ZERO != 0u) {
    const uint zeros = z[min(row, last) / 4u];
    [[unroll]] for (int i = 0; i < 4; ++i) offset[i] = missing(zeros, i);
  }
  vec4 sum[4];
  [[unroll]] for (uint i = 0u; i < 4u; ++i) sum[i] = vec4(0.0);
  uvec2 word = uvec2(w0[from], w0[from + 64u]);
  Column column = load_column(m0, tid, groups, 0u);

  for (uint g = 0u; g < groups; ++g) {
    rows[to * STRIDE + chunk] = signed_bytes_of(word.x);
    rows[to * STRIDE + chunk + 4u] = signed_bytes_of(word.y);
    store_column(tid, column);
    barrier();

    if (g + 1u < groups) {
      const uint next = from + (g + 1u) * 128u;
      word = uvec2(w0[next], w0[next + 64u]);
      column = load_column(m0, tid, groups, g + 1u);
    }

    ivec4 dots[WEIGHTS][4];
    products(tn, tm, dots);
    if (ZERO != 0u) {
      [[unroll]] for (uint i = 0u; i < 4u; ++i) {
        int total = 0;
        [[unroll]] for (uint k = 0u; k < 8u; ++k) total += dot4(ONES, columns[(4u * tm + i) * STRIDE + k]);
        dots[0][i] += offset * total;
      }
    }
    [[unroll]] for (uint i = 0u; i < 4u; ++i) sum[i] += vec4(dots[0][i]) * column_scales[4u * tm + i];
    barrier();
  }

  if (row > last) return;
  const Finish f = finish_of(row);
  [[unroll]] for (uint i = 0u; i < 4u; ++i) write_rows(m0 + 4u * tm + i, row, sum[i], f);
}
