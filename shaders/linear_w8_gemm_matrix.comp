#version 450
// linear_w8_gemm.comp with cooperative matrices: many tokens times a w8c or w8a weight, int8 x int8 -> int32.
// Tokens come in whole blocks of 64: what the last block has too much is computed and never read.
// A weight that is larger than a buffer may be comes in pieces: N rows from row FIRST on, of TOTAL.
#define DOT8
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_shuffle : require
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
#include "include/matrix.glsl"
#include "include/w8_result.glsl"

shared float offsets[ROWS];    // what is missing of a row's zero point
shared float totals[TOKENS];  // of a token's activations in this group

void main() {
  const uint tid = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;  // 4 i .. 4 i + 3 are in one subgroup
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  // what this thread loads of the weight: two words, four chunks apart
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u, tile = min(n0 / 16u + (tid >> 6), tiles - 1u);
  const uint to = ((tid >> 6) * 16u + r) * STRIDE + chunk, from = tile * groups * 128u + chunk * 16u + r;

  if (ZERO != 0u && tid < ROWS) {
    const uint row = min(n0 + tid, tiles * 16u - 1u);
    offsets[tid] = float(missing(z[row / 4u], row & 3u));
  }
  SUMS sum[2];
  [[unroll]] for (uint i = 0u; i < 2u; ++i) sum[i] = SUMS(0.0);
  uvec2 word = uvec2(w0[from], w0[from + 64u]);
  Column column = load_column(m0, tid, groups, 0u);

  for (uint g = 0u; g < groups; ++g) {
    rows[to] = uint(signed_bytes_of(word.x));
    rows[to + 4u] = uint(signed_bytes_of(word.y));
    store_column(tid, column);
    if (ZERO != 0u) {
      int total = dot4(ONES, int(column.x[0])) + dot4(ONES, int(column.x[1]));
      total += subgroupShuffleXor(total, 1u);
      total += subgroupShuffleXor(total, 2u);
      totals[tid >> 2] = float(total);
    }
    barrier();

    if (g + 1u < groups) {
      const uint next = from + (g + 1u) * 128u;
      word = uvec2(w0[next], w0[next + 64u]);
      column = load_column(m0, tid, groups, g + 1u);
    }

    DOTS dots[WEIGHTS][2];
    products(dots);
    [[unroll]] for (uint i = 0u; i < 2u; ++i) {
      SUMS exact = SUMS(dots[0][i]), of_tokens;
      if (ZERO != 0u) {  // integers below 2^24 all of them
        SUMS offset, total;
        LOAD_OF_ROWS(offset, offsets, 0u);
        LOAD_OF_TOKENS(total, totals, i);
        exact += offset * total;
      }
      LOAD_OF_TOKENS(of_tokens, column_scales, i);
      sum[i] += exact * of_tokens;
    }
    barrier();
  }

  [[unroll]] for (uint i = 0u; i < 2u; ++i) store_results(sum[i], i);
  barrier();
  const uint quad = 4u * (tid & 15u), row = n0 + quad;
  if (row >= tiles * 16u) return;
  const Finish f = finish_of(row);
  for (uint token = tid >> 4; token < TOKENS; token += THREADS / 16u) {
    vec4 own;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) own[j] = results[token * RESULTS + quad + j];
    write_rows(m0 + token, row, own, f);
  }
}
