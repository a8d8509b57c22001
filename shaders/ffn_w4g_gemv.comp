#version 450
// M <= 8 tokens times a w4g32 weight, every weight byte read once. Two shaders from one source:
//   GATE_UP: q = quantize(act(gate) * up); a workgroup has 32 rows (two tiles) of both, one group of the product
//   else:    y = a linear; a workgroup has 16 rows (one tile)
// A thread has 4 rows (one uvec4 of weights) x one chunk of 8 columns of every G-th group:
//   lane bits 0-1: row quad, 2-3: chunk, above: group, on top: tile. 32 lanes read 512 bytes in a row.
#extension GL_GOOGLE_include_directive : require
#include "include/gemv.glsl"
#include "include/numbers.glsl"
#include "include/dot.glsl"
#include "include/w4g32.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint K = 2560;   // columns
layout(constant_id = 2) const uint N = 10240;  // rows
layout(constant_id = 3) const uint M = 1;      // tokens
layout(constant_id = 4) const uint ACT = 0;

#ifdef GATE_UP
const uint TILES = 2;
#else
const uint TILES = 1;
#endif

layout(std430, binding = 0) readonly buffer W0 { uvec4 w0[]; };
layout(std430, binding = 1) readonly buffer S0 { uvec2 s0[]; };
layout(std430, binding = 4) readonly buffer A { ivec2 a[]; };         // [M][K32][4]
layout(std430, binding = 5) readonly buffer AS { float a_scale[]; };  // [M][K32]
#ifdef GATE_UP
layout(std430, binding = 2) readonly buffer W1 { uvec4 w1[]; };
layout(std430, binding = 3) readonly buffer S1 { uvec2 s1[]; };
layout(std430, binding = 6) writeonly buffer Q { uint q[]; };           // [M][N32][8]
layout(std430, binding = 7) writeonly buffer QS { float q_scale[]; };   // [M][N32]
shared vec4 part1[WG];
shared float product[32 * M];
#else
layout(std430, binding = 6) writeonly buffer Y { float y[]; };  // [M][N16 * 16]
#endif
shared vec4 part0[WG];

// Four rows times eight columns of one token.
vec4 times(uvec4 w, uvec2 scales, ivec2 x, int x8, float x_scale) {
  ivec4 sum;
  [[unroll]] for (int i = 0; i < 4; ++i) sum[i] = dot4(low(w[i]), x.x) + dot4(high(w[i]), x.y) - x8;
  return vec4(sum) * x_scale * vec4(unpackHalf2x16(scales.x), unpackHalf2x16(scales.y));
}

void main() {
  const uint tid = thread(), lanes = WG / TILES, tile = tid / lanes, lane = tid % lanes;
  const uint quad = lane & 3u, chunk = (lane >> 2) & 3u;
  const uint groups = (K + 31u) / 32u, tiles = (N + 15u) / 16u;
  const uint row_tile = gl_WorkGroupID.x * TILES + tile, at = min(row_tile, tiles - 1u) * groups;

  vec4 sum0[M];
  [[unroll]] for (uint m = 0u; m < M; ++m) sum0[m] = vec4(0.0);
#ifdef GATE_UP
  vec4 sum1[M];
  [[unroll]] for (uint m = 0u; m < M; ++m) sum1[m] = vec4(0.0);
#endif
  for (uint g = lane >> 4; g < groups; g += lanes / 16u) {
    const uvec4 v0 = w0[((at + g) * 4u + chunk) * 4u + quad];
    const uvec2 t0 = s0[(at + g) * 4u + quad];
#ifdef GATE_UP
    const uvec4 v1 = w1[((at + g) * 4u + chunk) * 4u + quad];
    const uvec2 t1 = s1[(at + g) * 4u + quad];
#endif
    [[unroll]] for (uint m = 0u; m < M; ++m) {
      const ivec2 x = a[(m * groups + g) * 4u + chunk];
      const int x8 = dot4(0x08080808, x.x) + dot4(0x08080808, x.y);
      const float x_scale = a_scale[m * groups + g];
      sum0[m] += times(v0, t0, x, x8, x_scale);
#ifdef GATE_UP
      sum1[m] += times(v1, t1, x, x8, x_scale);
#endif
    }
  }

  [[unroll]] for (uint m = 0u; m < M; ++m) {
    part0[tid] = add_up(sum0[m]);
#ifdef GATE_UP
    part1[tid] = add_up(sum1[m]);
#endif
    barrier();
    if (tid < 16u * TILES) {  // one row each
      const uint first = tid / 16u * lanes + ((tid >> 2) & 3u), component = tid & 3u;
      float total0 = 0.0, total1 = 0.0;
      for (uint i = 0u; i < lanes; i += STEP) {
        total0 += part0[first + i][component];
#ifdef GATE_UP
        total1 += part1[first + i][component];
#endif
      }
      const uint row = gl_WorkGroupID.x * 16u * TILES + tid;
#ifdef GATE_UP
      product[m * 32u + tid] = row < N ? activate(ACT, total0) * total1 : 0.0;
#else
      if (row < tiles * 16u) y[m * tiles * 16u + row] = total0;
#endif
    }
    barrier();
  }

#ifdef GATE_UP
  for (uint i = tid; i < 8u * M; i += WG) {  // four values of one token each
    const uint m = i >> 3, first = m * 32u;
    uint largest = 0u;
    for (uint j = 0u; j < 32u; ++j) largest = max(largest, size_of(product[first + j]));
    const Scale s = scale_of(largest);
    const uint j = first + 4u * (i & 7u), out_groups = (N + 31u) / 32u, word = m * out_groups + gl_WorkGroupID.x;
    q[word * 8u + (i & 7u)] = quantize4(vec4(product[j], product[j + 1u], product[j + 2u], product[j + 3u]), s.inverse);
    if ((i & 7u) == 0u) q_scale[word] = s.scale;
  }
#endif
}
