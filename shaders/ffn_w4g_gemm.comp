#version 450
// Many tokens times a w4g32 weight: 64 rows x 64 tokens per workgroup of 256 threads, 4 x 4 each, int32 sums.
//   GATE_UP: q = quantize(act(gate) * up), two groups of the product per workgroup
//   else:    y = a linear
// One group of 32 columns at a time goes through shared memory; the next one is loaded meanwhile.
// Tokens come in whole blocks of 64: what the last block has too much is computed and never read.
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"
#include "include/dot.glsl"
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

#include "include/gemm.glsl"

shared float row_scales[WEIGHTS * ROWS];
#ifdef GATE_UP
shared uint sizes[TOKENS * 16];
#endif

float half_of(uint word, uint i) {
  const vec2 pair = unpackHalf2x16(word);
  return (i & 1u) == 0u ? pair.x : pair.y;
}

struct Word {  // what a thread loads of a weight
  uint nibbles, scales;
};

Word load_word(uint weight, uint group, uint chunk, uint r) {
#ifdef GATE_UP
  if (weight == 1u) return Word(w1[(group * 4u + chunk) * 16u + r], s1[(group * 16u + r) >> 1]);
#endif
  return Word(w0[(group * 4u + chunk) * 16u + r], s0[(group * 16u + r) >> 1]);
}

void main() {
  const uint tid = gl_LocalInvocationIndex, tn = tid & 15u, tm = tid >> 4;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u, tile = min(n0 / 16u + (tid >> 6), tiles - 1u);
  const uint to = place((tid >> 6) * 16u + r);

  vec4 sum[WEIGHTS][4];
  Word word[WEIGHTS];
  [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
    [[unroll]] for (uint i = 0u; i < 4u; ++i) sum[w][i] = vec4(0.0);
    word[w] = load_word(w, tile * groups, chunk, r);
  }
  Column column = load_column(m0, tid, groups, 0u);

  for (uint g = 0u; g < groups; ++g) {
    [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
      const uint at = w * ROWS + to;
      rows[at * STRIDE + 2u * chunk] = centred(word[w].nibbles & 0x0F0F0F0Fu);
      rows[at * STRIDE + 2u * chunk + 1u] = centred((word[w].nibbles >> 4) & 0x0F0F0F0Fu);
      if (chunk == 0u) row_scales[at] = half_of(word[w].scales, r);
    }
    store_column(tid, column);
    barrier();

    if (g + 1u < groups) {
      [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) word[w] = load_word(w, tile * groups + g + 1u, chunk, r);
      column = load_column(m0, tid, groups, g + 1u);
    }

    ivec4 dots[WEIGHTS][4];
    products(tn, tm, dots);
    [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
      vec4 scales;
      [[unroll]] for (uint j = 0u; j < 4u; ++j) scales[j] = row_scales[w * ROWS + tn + 16u * j];
      [[unroll]] for (uint i = 0u; i < 4u; ++i) sum[w][i] += vec4(dots[w][i]) * column_scales[4u * tm + i] * scales;
    }
    barrier();
  }

  const uint row = n0 + 4u * tn;
#ifdef GATE_UP
  [[unroll]] for (uint i = 0u; i < 4u; ++i) {
    uint largest = 0u;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) {
      sum[0][i][j] = row + j < N ? activate(ACT, sum[0][i][j]) * sum[1][i][j] : 0.0;
      largest = max(largest, size_of(sum[0][i][j]));
    }
    sizes[(4u * tm + i) * 16u + tn] = largest;
  }
  barrier();
  const uint out_groups = (N + 31u) / 32u, group = row / 32u;
  if (group < out_groups) {
    [[unroll]] for (uint i = 0u; i < 4u; ++i) {
      uint largest = 0u;
      [[unroll]] for (uint j = 0u; j < 8u; ++j) largest = max(largest, sizes[(4u * tm + i) * 16u + (tn & 8u) + j]);
      const Scale s = scale_of(largest);
      const uint at = (m0 + 4u * tm + i) * out_groups + group;
      q[at * 8u + (tn & 7u)] = quantize4(sum[0][i], s.inverse);
      if ((tn & 7u) == 0u) q_scale[at] = s.scale;
    }
  }
#else
  if (row < tiles * 16u) {
    [[unroll]] for (uint i = 0u; i < 4u; ++i) {
      [[unroll]] for (uint j = 0u; j < 4u; ++j) y[(m0 + 4u * tm + i) * tiles * 16u + row + j] = sum[0][i][j];
    }
  }
#endif
}
