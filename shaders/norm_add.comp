#version 450
// The end of a region: RMS norm, residual, one rounding. One workgroup per token.
// y [M][stride] fp32, residual [M][N] -> out [M][N]
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 0) const uint WG = 256;
layout(constant_id = 1) const uint N = 2560;
layout(constant_id = 2) const uint TYPE = 1;
layout(constant_id = 3) const uint NORM = 1;
layout(constant_id = 4) const float EPS = 1e-6;
layout(constant_id = 5) const uint RESIDUAL = 1;

layout(std430, binding = 0) readonly buffer Y { float y[]; };
layout(std430, binding = 1) readonly buffer S { float norm_scale[]; };  // [N], weight + offset
layout(std430, binding = 2) readonly buffer R { uint residual[]; };
layout(std430, binding = 6) writeonly buffer O { uint result[]; };

shared float sums[WG];

float finished(uint token, uint n, float rms) {
  const uint stride = (N + 15u) / 16u * 16u, i = token * N + n;
  float v = y[token * stride + n];
  if (NORM != 0u) v = v * rms * norm_scale[n];
  return RESIDUAL != 0u ? v + read_as(TYPE, residual[word_of(TYPE, i)], i) : v;
}

void main() {
  const uint tid = gl_LocalInvocationIndex, token = gl_WorkGroupID.x;
  const uint stride = (N + 15u) / 16u * 16u;
  float rms = 1.0;
  if (NORM != 0u) {
    float sum = 0.0;
    for (uint n = tid; n < N; n += WG) {
      const float v = y[token * stride + n];
      sum = fma(v, v, sum);
    }
    sums[tid] = sum;
    for (uint half_ = WG / 2u; half_ > 0u; half_ >>= 1) {
      barrier();
      if (tid < half_) sums[tid] += sums[tid + half_];
    }
    barrier();
    rms = 1.0 / sqrt(sums[0] / float(N) + EPS);
  }
  if (TYPE == F32) {
    for (uint n = tid; n < N; n += WG) result[token * N + n] = floatBitsToUint(finished(token, n, rms));
  } else {  // N is even: a word belongs to one token
    for (uint w = tid; w < N / 2u; w += WG) {
      const vec2 pair = vec2(finished(token, 2u * w, rms), finished(token, 2u * w + 1u, rms));
      result[token * (N / 2u) + w] = write_pair(TYPE, pair);
    }
  }
}
