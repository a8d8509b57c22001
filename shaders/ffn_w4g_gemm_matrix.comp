#version 450
// ffn_w4g_gemm.comp with cooperative matrices: many tokens times a w4g32 weight, int8 x int8 -> int32.
//   GATE_UP: q = quantize(act(gate) * up), two groups of the product per workgroup
//   else:    y = a linear
// Tokens come in whole blocks of 64: what the last block has too much is computed and never read.
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"
#include "include/w4g32.glsl"

layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 1) const uint K = 2560;
layout(constant_id = 2) const uint N = 10240;
layout(constant_id = 4) const uint ACT = 0;

layout(std430, binding = 0) readonly buffer W0 { uint w0[]; };
layout(std430, binding = 1) readonly buffer S0 { uint s0[]; };        // two scales a word
layout(std430, binding = 4) readonly buffer A { uint a[]; };          // [M][K32][8]
layout(std430, binding = 5) readonly buffer AS { float a_scale[]; };  // [M][K32]
#ifdef GATE_UP
layout(std430, binding = 2) readonly buffer W1 { uint w1[]; };
layout(std430, binding = 3) readonly buffer S1 { uint s1[]; };
layout(std430, binding = 6) writeonly buffer Q { uint q[]; };          // [M][N32][8]
layout(std430, binding = 7) writeonly buffer QS { float q_scale[]; };  // [M][N32]
const uint WEIGHTS = 2;
#else
layout(std430, binding = 6) writeonly buffer Y { float y[]; };  // [M][N16 * 16]
const uint WEIGHTS = 1;
#endif

#include "include/matrix.glsl"

shared float row_scales[WEIGHTS * ROWS];

struct Word {  // what a thread loads of a weight
  uint nibbles, scales;
};

Word load_word(uint weight, uint group, uint chunk, uint r) {
#ifdef GATE_UP
  if (weight == 1u) return Word(w1[(group * 4u + chunk) * 16u + r], s1[(group * 16u + r) >> 1]);
#endif
  return Word(w0[(group * 4u + chunk) * 16u + r], s0[(group * 16u + r) >> 1]);
}

void store_word(uint weight, uint row, uint chunk, Word word) {
  const uint at = (weight * ROWS + row) * STRIDE + 2u * chunk;
  rows[at] = uint(centred(word.nibbles & 0x0F0F0F0Fu));
  rows[at + 1u] = uint(centred((word.nibbles >> 4) & 0x0F0F0F0Fu));
  const vec2 pair = unpackHalf2x16(word.scales);
  if (chunk == 0u) row_scales[weight * ROWS + row] = (row & 1u) == 0u ? pair.x : pair.y;
}

void main() {
  const uint tid = gl_LocalInvocationIndex;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u, own = (tid >> 6) * 16u + r;
  const uint tile = min(n0 / 16u + (tid >> 6), tiles - 1u);

  SUMS sum[WEIGHTS][2];
  Word word[WEIGHTS];
  [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
    [[unroll]] for (uint i = 0u; i < 2u; ++i) sum[w][i] = SUMS(0.0);
    word[w] = load_word(w, tile * groups, chunk, r);
  }
  Column column = load_column(m0, tid, groups, 0u);

  for (uint g = 0u; g < groups; ++g) {
    [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) store_word(w, own, chunk, word[w]);
    store_column(tid, column);
    barrier();

    if (g + 1u < groups) {
      [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) word[w] = load_word(w, tile * groups + g + 1u, chunk, r);
      column = load_column(m0, tid, groups, g + 1u);
    }

    DOTS dots[WEIGHTS][2];
    products(dots);
    [[unroll]] for (uint i = 0u; i < 2u; ++i) {
      SUMS of_tokens, of_rows;
      LOAD_OF_TOKENS(of_tokens, column_scales, i);
      [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
        LOAD_OF_ROWS(of_rows, row_scales, w);
        sum[w][i] += SUMS(dots[w][i]) * of_tokens * of_rows;
      }
    }
    barrier();
  }

#ifdef GATE_UP
  [[unroll]] for (uint i = 0u; i < 2u; ++i) {
    for (int e = 0; e < sum[0][i].length(); ++e) sum[0][i][e] = activate(ACT, sum[0][i][e]) * sum[1][i][e];
    store_results(sum[0][i], i);
  }
  barrier();
  if (tid >= 2u * TOKENS) return;
  // A thread quantizes one group of one token.
  const uint out_groups = (N + 31u) / 32u, group = n0 / 32u + (tid & 1u), token = tid >> 1;
  if (group >= out_groups) return;
  const uint from = token * RESULTS + 32u * (tid & 1u), at = (m0 + token) * out_groups + group;
  vec4 v[8];
  uint largest = 0u;
  [[unroll]] for (uint j = 0u; j < 32u; ++j) {
    const float value = results[from + j];
    v[j / 4u][j & 3u] = group * 32u + j < N ? value : 0.0;
    largest = max(largest, size_of(v[j / 4u][j & 3u]));
  }
  const Scale s = scale_of(largest);
  [[unroll]] for (uint j = 0u; j < 8u; ++j) q[at * 8u + j] = quantize4(v[j], s.inverse);
  q_scale[at] = s.scale;
#else
  const uint row = n0 + first_row();
  if (row >= tiles * 16u) return;
  [[unroll]] for (uint i = 0u; i < 2u; ++i) {
    coopMatStore(sum[0][i], y, (m0 + first_token() + i * MT) * tiles * 16u + row, tiles * 16u, BY_ROW);
  }
#endif
}
