#version 450
// ffn_w4g_gemm.comp with cooperative matrices: many tokens times a w4g32 weight, int8 x int8 -> int32.
//   GATE_UP: q = quantize(act(gate) * up), two groups of the product per workgroup and token
//   else:    y = a linear
// Tokens come in whole blocks: what the last block has too much is computed and never read.
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

const uint WORDS = WEIGHTS * ROWS * 4 / THREADS;  // of a group's weights, that a thread loads
shared float row_scales[2 * WEIGHTS * ROWS];

struct Word {
  uint nibbles, scales;
};

// What word i of a thread belongs to.
uint weight_of(uint i) { return i / (ROWS / 64u); }
uint row_of(uint tid, uint i) { return (tid >> 6) * 16u + (tid & 15u) + i % (ROWS / 64u) * 64u; }

Word load_word(uint weight, uint group, uint chunk, uint r) {
#ifdef GATE_UP
  if (weight == 1u) return Word(w1[(group * 4u + chunk) * 16u + r], s1[(group * 16u + r) >> 1]);
#endif
  return Word(w0[(group * 4u + chunk) * 16u + r], s0[(group * 16u + r) >> 1]);
}

void store_word(uint stage, uint weight, uint row, uint chunk, Word word) {
  const uint at = weight * ROWS + row, to = stage + at * STRIDE + 2u * chunk;
  pool[to] = uint(centred(word.nibbles & 0x0F0F0F0Fu));
  pool[to + 1u] = uint(centred((word.nibbles >> 4) & 0x0F0F0F0Fu));
  const vec2 pair = unpackHalf2x16(word.scales);
  if (chunk == 0u) row_scales[stage / STAGE * WEIGHTS * ROWS + at] = (row & 1u) == 0u ? pair.x : pair.y;
}

void main() {
  const uint tid = gl_LocalInvocationIndex;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u;

  SUMS sum[TM][WN];
  [[unroll]] for (uint i = 0u; i < TM; ++i) {
    [[unroll]] for (uint n = 0u; n < WN; ++n) sum[i][n] = SUMS(0.0);
  }
  Word word[WORDS];
  uint from[WORDS];  // first group of the row's tile
  [[unroll]] for (uint i = 0u; i < WORDS; ++i) {
    from[i] = min((n0 + row_of(tid, i)) / 16u, tiles - 1u) * groups;
    word[i] = load_word(weight_of(i), from[i], chunk, r);
  }
  Column column = load_column(m0, tid, groups, 0u);

  uint stage = 0u;
  for (uint g = 0u; g < groups; ++g) {
    [[unroll]] for (uint i = 0u; i < WORDS; ++i) store_word(stage, weight_of(i), row_of(tid, i), chunk, word[i]);
    store_column(stage, tid, column);
    barrier();  // the group is there, and nobody reads the one before the last any more

    if (g + 1u < groups) {
      [[unroll]] for (uint i = 0u; i < WORDS; ++i) word[i] = load_word(weight_of(i), from[i] + g + 1u, chunk, r);
      column = load_column(m0, tid, groups, g + 1u);
    }

    SUMS of_rows[WN];
    [[unroll]] for (uint n = 0u; n < WN; ++n) {
      const uint row = n / TN * ROWS + first_row(n % TN);
      coopMatLoad(of_rows[n], row_scales, stage / STAGE * WEIGHTS * ROWS + row, 0u, BY_ROW);
    }
    [[unroll]] for (uint slice = 0u; slice < TM; slice += 2u) {
      DOTS dots[2][WN];
      products(stage, slice, dots);
      [[unroll]] for (uint i = 0u; i < 2u; ++i) {
        SUMS of_tokens;
        LOAD_OF_TOKENS(of_tokens, column_scales, stage, slice + i);
        [[unroll]] for (uint n = 0u; n < WN; ++n) {
          sum[slice + i][n] += SUMS(dots[i][n]) * of_tokens * of_rows[n];
        }
      }
    }
    stage = STAGE - stage;
  }

#ifdef GATE_UP
  const uint out_groups = (N + 31u) / 32u, group = n0 / 32u + (tid & 1u), own = tid >> 1;
  [[unroll]] for (uint i = 0u; i < TM; ++i) {
    for (int e = 0; e < sum[i][0].length(); ++e) sum[i][0][e] = activate(ACT, sum[i][0][e]) * sum[i][1][e];
    barrier();
    store_results(sum[i][0], 0u);
    barrier();
    if (own >= SLICE || group >= out_groups) continue;
    // A thread quantizes one group of one token.
    const uint first = own * RESULTS + 32u * (tid & 1u), at = (m0 + i * SLICE + own) * out_groups + group;
    vec4 v[8];
    uint largest = 0u;
    [[unroll]] for (uint j = 0u; j < 32u; ++j) {
      v[j / 4u][j & 3u] = group * 32u + j < N ? result(first + j) : 0.0;
      largest = max(largest, size_of(v[j / 4u][j & 3u]));
    }
    const Scale s = scale_of(largest);
    [[unroll]] for (uint j = 0u; j < 8u; ++j) q[at * 8u + j] = quantize4(v[j], s.inverse);
    q_scale[at] = s.scale;
  }
#else
  [[unroll]] for (uint n = 0u; n < WN; ++n) {
    const uint row = n0 + first_row(n);
    if (row >= tiles * 16u) continue;
    [[unroll]] for (uint i = 0u; i < TM; ++i) {
      coopMatStore(sum[i][n], y, (m0 + i * SLICE + first_token()) * tiles * 16u + row, tiles * 16u, BY_ROW);
    }
  }
#endif
}
