#version 450
// Many tokens times a w4g32 weight: 64 rows x 64 tokens per workgroup of 256 threads, 4 x 4 each, int32 sums.
//   GATE_UP: q = quantize(act(gate) * up), two groups of the product per workgroup
//   else:    y = a linear
// One group of 32 columns at a time goes through shared memory; the next one is loaded meanwhile.
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

const uint ROWS = 64, TOKENS = 64, STRIDE = 9;  // words between rows of a group: eight, and one against bank conflicts

// Row r lies at place(r): thread t of 16 reads 16 places apart and so has rows 4 t .. 4 t + 3.
shared int rows[WEIGHTS * ROWS * STRIDE];
shared float row_scales[WEIGHTS * ROWS];
shared int columns[TOKENS * STRIDE];
shared float column_scales[TOKENS];
#ifdef GATE_UP
shared uint sizes[TOKENS * 16];
#endif

uint place(uint row) { return (row >> 2) + 16u * (row & 3u); }

// nibble -> nibble - 8, in four bytes at once
int centred(uint nibbles) { return int(((nibbles | 0x80808080u) - 0x08080808u) ^ 0x80808080u); }

float half_of(uint word, uint i) {
  const vec2 pair = unpackHalf2x16(word);
  return (i & 1u) == 0u ? pair.x : pair.y;
}

void main() {
  const uint tid = gl_LocalInvocationIndex, tn = tid & 15u, tm = tid >> 4;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint n0 = gl_WorkGroupID.x * ROWS, m0 = gl_WorkGroupID.y * TOKENS;
  // what this thread loads: one word of each weight, two of the activations
  const uint r = tid & 15u, chunk = (tid >> 4) & 3u, tile = min(n0 / 16u + (tid >> 6), tiles - 1u);
  const uint to = place((tid >> 6) * 16u + r);

  vec4 sum0[4];
  [[unroll]] for (uint i = 0u; i < 4u; ++i) sum0[i] = vec4(0.0);
#ifdef GATE_UP
  vec4 sum1[4];
  [[unroll]] for (uint i = 0u; i < 4u; ++i) sum1[i] = vec4(0.0);
#endif

  uint word0 = w0[(tile * groups * 4u + chunk) * 16u + r], scale0 = s0[(tile * groups * 16u + r) >> 1];
#ifdef GATE_UP
  uint word1 = w1[(tile * groups * 4u + chunk) * 16u + r], scale1 = s1[(tile * groups * 16u + r) >> 1];
#endif
  const uint m_load = m0 + (tid >> 3), m_next = m_load + 32u;
  uint x0 = a[m_load * groups * 8u + (tid & 7u)], x1 = a[m_next * groups * 8u + (tid & 7u)];
  float x_scale = a_scale[(m0 + (tid & 63u)) * groups];

  for (uint g = 0u; g < groups; ++g) {
    rows[to * STRIDE + 2u * chunk] = centred(word0 & 0x0F0F0F0Fu);
    rows[to * STRIDE + 2u * chunk + 1u] = centred((word0 >> 4) & 0x0F0F0F0Fu);
    if (chunk == 0u) row_scales[to] = half_of(scale0, r);
#ifdef GATE_UP
    rows[(ROWS + to) * STRIDE + 2u * chunk] = centred(word1 & 0x0F0F0F0Fu);
    rows[(ROWS + to) * STRIDE + 2u * chunk + 1u] = centred((word1 >> 4) & 0x0F0F0F0Fu);
    if (chunk == 0u) row_scales[ROWS + to] = half_of(scale1, r);
#endif
    columns[(tid >> 3) * STRIDE + (tid & 7u)] = int(x0);
    columns[((tid >> 3) + 32u) * STRIDE + (tid & 7u)] = int(x1);
    if (tid < TOKENS) column_scales[tid] = x_scale;
    barrier();

    if (g + 1u < groups) {
      const uint next = tile * groups + g + 1u;
      word0 = w0[(next * 4u + chunk) * 16u + r];
      scale0 = s0[(next * 16u + r) >> 1];
#ifdef GATE_UP
      word1 = w1[(next * 4u + chunk) * 16u + r];
      scale1 = s1[(next * 16u + r) >> 1];
#endif
      x0 = a[(m_load * groups + g + 1u) * 8u + (tid & 7u)];
      x1 = a[(m_next * groups + g + 1u) * 8u + (tid & 7u)];
      x_scale = a_scale[(m0 + (tid & 63u)) * groups + g + 1u];
    }

    ivec4 dot0[4];
    [[unroll]] for (uint i = 0u; i < 4u; ++i) dot0[i] = ivec4(0);
#ifdef GATE_UP
    ivec4 dot1[4];
    [[unroll]] for (uint i = 0u; i < 4u; ++i) dot1[i] = ivec4(0);
#endif
    [[unroll]] for (uint k = 0u; k < 8u; ++k) {
      ivec4 x;
      [[unroll]] for (uint i = 0u; i < 4u; ++i) x[i] = columns[(4u * tm + i) * STRIDE + k];
      [[unroll]] for (uint j = 0u; j < 4u; ++j) {
        const int v0 = rows[(tn + 16u * j) * STRIDE + k];
        [[unroll]] for (uint i = 0u; i < 4u; ++i) dot0[i][j] += dot4(v0, x[i]);
#ifdef GATE_UP
        const int v1 = rows[(ROWS + tn + 16u * j) * STRIDE + k];
        [[unroll]] for (uint i = 0u; i < 4u; ++i) dot1[i][j] += dot4(v1, x[i]);
#endif
      }
    }
    vec4 scales0;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) scales0[j] = row_scales[tn + 16u * j];
    [[unroll]] for (uint i = 0u; i < 4u; ++i) sum0[i] += vec4(dot0[i]) * column_scales[4u * tm + i] * scales0;
#ifdef GATE_UP
    vec4 scales1;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) scales1[j] = row_scales[ROWS + tn + 16u * j];
    [[unroll]] for (uint i = 0u; i < 4u; ++i) sum1[i] += vec4(dot1[i]) * column_scales[4u * tm + i] * scales1;
#endif
    barrier();
  }

  const uint row = n0 + 4u * tn;
#ifdef GATE_UP
  [[unroll]] for (uint i = 0u; i < 4u; ++i) {
    uint largest = 0u;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) {
      sum0[i][j] = row + j < N ? activate(ACT, sum0[i][j]) * sum1[i][j] : 0.0;
      largest = max(largest, size_of(sum0[i][j]));
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
      q[at * 8u + (tn & 7u)] = quantize4(sum0[i], s.inverse);
      if ((tn & 7u) == 0u) q_scale[at] = s.scale;
    }
  }
#else
  if (row < tiles * 16u) {
    [[unroll]] for (uint i = 0u; i < 4u; ++i) {
      [[unroll]] for (uint j = 0u; j < 4u; ++j) y[(m0 + 4u * tm + i) * tiles * 16u + row + j] = sum0[i][j];
    }
  }
#endif
}
