#version 450
// The end of the q/k/v projections: q/k norm, rotary embedding, one rounding. One workgroup per head and token.
// y [M][HEADS + 2 KV][D] fp32 -> out, the same in TYPE
#extension GL_GOOGLE_include_directive : require
#include "include/numbers.glsl"

layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 0) const uint WG = 128;
layout(constant_id = 1) const uint D = 256;
layout(constant_id = 2) const uint TYPE = 1;
layout(constant_id = 3) const uint NORM = 1;  // of q and k
layout(constant_id = 4) const float EPS = 1e-6;
layout(constant_id = 5) const uint HEADS = 8;
layout(constant_id = 6) const uint KV = 4;
layout(constant_id = 7) const uint TURNED = 256;  // elements of a head of q and k that are rotated; 0: none
layout(constant_id = 8) const uint ANGLE_TYPE = 1;
layout(constant_id = 9) const uint INTERLEAVED = 0;
layout(constant_id = 10) const uint V_NORM = 0;

layout(std430, binding = 0) readonly buffer Y { float y[]; };
layout(std430, binding = 1) readonly buffer S { float norm_scale[]; };  // [2][D]: weight + offset of q and of k
layout(std430, binding = 2) readonly buffer C { uint cosine[]; };       // [M][TURNED]
layout(std430, binding = 3) readonly buffer I { uint sine[]; };         // [M][TURNED]
layout(std430, binding = 6) writeonly buffer O { uint result[]; };

shared float sums[WG];
shared float values[D];

float finished(uint token, uint n, bool turns) {
  const float v = values[n];
  if (!turns || n >= TURNED) return v;
  const uint i = token * TURNED + n, half_ = TURNED / 2u;
  const bool first = INTERLEAVED != 0u ? (n & 1u) == 0u : n < half_;
  const uint step = INTERLEAVED != 0u ? 1u : half_;
  const float other = first ? -values[n + step] : values[n - step];
  const float c = read_as(ANGLE_TYPE, cosine[word_of(ANGLE_TYPE, i)], i);
  const float s = read_as(ANGLE_TYPE, sine[word_of(ANGLE_TYPE, i)], i);
  return v * c + other * s;
}

void main() {
  const uint tid = gl_LocalInvocationIndex, head = gl_WorkGroupID.x, token = gl_WorkGroupID.y;
  const uint begin = (token * (HEADS + 2u * KV) + head) * D;
  const bool is_value = head >= HEADS + KV;
  float sum = 0.0;
  for (uint n = tid; n < D; n += WG) {
    const float v = y[begin + n];
    sum = fma(v, v, sum);
    values[n] = v;
  }
  if (NORM != 0u && (V_NORM != 0u || !is_value)) {
    sums[tid] = sum;
    for (uint half_ = WG / 2u; half_ > 0u; half_ >>= 1) {
      barrier();
      if (tid < half_) sums[tid] += sums[tid + half_];
    }
    barrier();
    const float rms = 1.0 / sqrt(sums[0] / float(D) + EPS);
    const uint scales = head < HEADS ? 0u : D;
    for (uint n = tid; n < D; n += WG) values[n] = values[n] * rms * (is_value ? 1.0 : norm_scale[scales + n]);
  }
  barrier();
  if (TYPE == F32) {
    for (uint n = tid; n < D; n += WG) result[begin + n] = floatBitsToUint(finished(token, n, !is_value));
  } else {  // D is even: a word belongs to one head
    for (uint w = tid; w < D / 2u; w += WG) {
      const vec2 pair = vec2(finished(token, 2u * w, !is_value), finished(token, 2u * w + 1u, !is_value));
      result[begin / 2u + w] = write_pair(TYPE, pair);
    }
  }
}
