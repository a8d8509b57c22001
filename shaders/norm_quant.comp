#version 450
// RMS norm and quantization of activations: one workgroup per token.
// x [M][K] -> q [M][K32][8] words of four int8, scale [M][K32]
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 0) const uint WG = 256;
layout(constant_id = 1) const uint K = 2560;
layout(constant_id = 2) const uint TYPE = 1;
layout(constant_id = 3) const uint NORM = 1;  // 0: x as it is
layout(constant_id = 4) const float EPS = 1e-6;

layout(std430, binding = 0) readonly buffer X { uint x[]; };
layout(std430, binding = 1) readonly buffer S { float norm_scale[]; };  // [K], weight + offset
layout(std430, binding = 6) writeonly buffer Q { uint q[]; };
layout(std430, binding = 7) writeonly buffer QS { float q_scale[]; };

shared float sums[WG];
shared uint sizes[WG];

float element(uint token, uint k) {
  if (k >= K) return 0.0;
  const uint i = token * K + k;
  return read_as(TYPE, x[word_of(TYPE, i)], i);
}

float inverse_rms(uint token, uint tid) {
  float sum = 0.0;
  for (uint k = tid; k < K; k += WG) {
    const float v = element(token, k);
    sum = fma(v, v, sum);
  }
  sums[tid] = sum;
  for (uint half_ = WG / 2u; half_ > 0u; half_ >>= 1) {
    barrier();
    if (tid < half_) sums[tid] += sums[tid + half_];
  }
  barrier();
  return 1.0 / sqrt(sums[0] / float(K) + EPS);
}

void main() {
  const uint tid = gl_LocalInvocationIndex, token = gl_WorkGroupID.x;
  const uint groups = (K + 31u) / 32u;
  const float rms = NORM != 0u ? inverse_rms(token, tid) : 1.0;
  for (uint base = 0u; base < groups * 8u; base += WG) {  // a thread has one word, eight of them a group
    const uint word = base + tid, k = 4u * word;
    vec4 v;
    [[unroll]] for (uint j = 0u; j < 4u; ++j) {
      v[j] = element(token, k + j);
      if (NORM != 0u) v[j] = k + j < K ? v[j] * rms * norm_scale[k + j] : 0.0;
    }
    sizes[tid] = max(max(size_of(v.x), size_of(v.y)), max(size_of(v.z), size_of(v.w)));
    barrier();
    uint largest = 0u;
    [[unroll]] for (uint j = 0u; j < 8u; ++j) largest = max(largest, sizes[(tid & ~7u) + j]);
    barrier();
    if (word < groups * 8u) {
      const Scale s = scale_of(largest);
      q[token * groups * 8u + word] = quantize4(v, s.inverse);
      if ((word & 7u) == 0u) q_scale[token * groups + word / 8u] = s.scale;
    }
  }
}
