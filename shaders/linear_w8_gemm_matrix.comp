#version 450
// linear_w8_gemm.comp with cooperative matrices: many tokens times a w8c or w8a weight, int8 x int8 -> int32.
// Tokens come in whole blocks: what the last block has too much is computed and never read.
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

const uint WORDS = ROWS * 8 / THREADS;  // of a group's weights, that a thread loads
shared float offsets[ROWS];        // what is missing of a row's zero point
shared float totals[2 * TOKENS];  // of a token's activations in a group

uint row_of(uint tid, uint i) { return (tid >> 6) * 16u + (tid & 15u) + i / 2u * 64u; }
uint chunk_of(uint tid, uint i) { return ((tid >> 4) & 3u) + 4u * (i & 1u); }

void main() {
  const uint tid = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;  // a token's threads are in one subgroup
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;

  if (ZERO != 0u && tid < ROWS) {
    const uint row = min(n0 + tid, tiles * 16u - 1u);
    offsets[tid] = float(missing(z[row / 4u], row & 3u));
  }
  SUMS sum[TM][WN];
  [[unroll]] for (uint i = 0u; i < TM; ++i) {
    [[unroll]] for (uint n = 0u; n < WN; ++n) sum[i][n] = SUMS(0.0);
  }
  uint word[WORDS], from[WORDS];
  [[unroll]] for (uint i = 0u; i < WORDS; ++i) {
    from[i] = min((n0 + row_of(tid, i)) / 16u, tiles - 1u) * groups * 128u + chunk_of(tid, i) * 16u + (tid & 15u);
    word[i] = w0[from[i]];
  }
  Column column = load_column(m0, tid, groups, 0u);

  uint stage = 0u;
  for (uint g = 0u; g < groups; ++g) {
    [[unroll]] for (uint i = 0u; i < WORDS; ++i) {
      pool[stage + row_of(tid, i) * STRIDE + chunk_of(tid, i)] = uint(signed_bytes_of(word[i]));
    }
    store_column(stage, tid, column);
    if (ZERO != 0u) {
      int total = 0;
      [[unroll]] for (uint i = 0u; i < COLUMN_WORDS; ++i) total += dot4(ONES, int(column.x[i]));
      [[unroll]] for (uint mask = 1u; mask < 8u / COLUMN_WORDS; mask <<= 1) total += subgroupShuffleXor(total, mask);
      totals[stage / STAGE * TOKENS + tid * COLUMN_WORDS / 8u] = float(total);
    }
    barrier();  // the group is there, and nobody reads the one before the last any more

    if (g + 1u < groups) {
      [[unroll]] for (uint i = 0u; i < WORDS; ++i) word[i] = w0[from[i] + (g + 1u) * 128u];
      column = load_column(m0, tid, groups, g + 1u);
    }

    [[unroll]] for (uint slice = 0u; slice < TM; slice += 2u) {
      DOTS dots[2][WN];
      products(stage, slice, dots);
      [[unroll]] for (uint i = 0u; i < 2u; ++i) {
        SUMS of_tokens, total;
        LOAD_OF_TOKENS(of_tokens, column_scales, stage, slice + i);
        if (ZERO != 0u) LOAD_OF_TOKENS(total, totals, stage, slice + i);
        [[unroll]] for (uint n = 0u; n < WN; ++n) {
          SUMS exact = SUMS(dots[i][n]);
          if (ZERO != 0u) {  // integers below 2^24 all of them
            SUMS offset;
            coopMatLoad(offset, offsets, first_row(n), 0u, BY_ROW);
            exact += offset * total;
          }
          sum[slice + i][n] += exact * of_tokens;
        }
      }
    }
    stage = STAGE - stage;
  }

  const uint quads = ROWS / 4u, quad = 4u * (tid % quads), row = n0 + quad;
  Finish f;
  if (row < tiles * 16u) f = finish_of(row);
  [[unroll]] for (uint i = 0u; i < TM; ++i) {
    barrier();
    [[unroll]] for (uint n = 0u; n < WN; ++n) store_results(sum[i][n], n);
    barrier();
    if (row >= tiles * 16u) continue;
    for (uint token = tid / quads; token < SLICE; token += THREADS / quads) {
      vec4 own;
      [[unroll]] for (uint j = 0u; j < 4u; ++j) own[j] = result(token * RESULTS + quad + j);
      write_rows(m0 + i * SLICE + token, row, own, f);
    }
  }
}
