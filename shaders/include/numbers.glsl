// Float types as they lie in memory, activation functions, and the int8 quantization of the op contract.
// Written with 32-bit integers only: no driver needs 8- or 16-bit storage.
#extension GL_EXT_control_flow_attributes : require

const uint F32 = 0u, BF16 = 1u, F16 = 2u;  // TYPE

// Element i of an array whose word i (F32) or i / 2 is `word`.
float read_as(uint type, uint word, uint i) {
  if (type == F32) return uintBitsToFloat(word);
  if (type == F16) {
    const vec2 pair = unpackHalf2x16(word);
    return (i & 1u) == 0u ? pair.x : pair.y;
  }
  return uintBitsToFloat((i & 1u) == 0u ? word << 16 : word & 0xFFFF0000u);
}

uint word_of(uint type, uint i) { return type == F32 ? i : i >> 1; }

// Round to nearest even, as the CPU does: packHalf2x16 may truncate.
uint to_half(float x) {
  const uint bits = floatBitsToUint(x), size = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  if (size > 0x7F800000u) return sign | 0x7E00u;
  if (size >= 0x47800000u) return sign | 0x7C00u;
  if (size < 0x38800000u) {  // 0.5 has the unit in the last place of a subnormal half
    return sign | (floatBitsToUint(uintBitsToFloat(size) + 0.5) - 0x3F000000u);
  }
  return sign | ((size + 0xFFFu + ((size >> 13) & 1u) - 0x38000000u) >> 13);
}

uint to_bfloat(float x) {
  const uint bits = floatBitsToUint(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

// Two halves of one word.
uint write_pair(uint type, vec2 x) {
  return type == BF16 ? to_bfloat(x.x) | (to_bfloat(x.y) << 16) : to_half(x.x) | (to_half(x.y) << 16);
}

// Size of x as an integer that orders like it, with every NaN above infinity: a maximum that loses no NaN.
uint size_of(float x) { return floatBitsToUint(x) & 0x7FFFFFFFu; }

const float TINY = 1e-36;  // below, 127 / amax would overflow: such a group counts as zero

// The upper half of a float's digits: the rest is exact, and so are products of halves.
float upper(float x) { return uintBitsToFloat(floatBitsToUint(x) & 0xFFFFF000u); }

// a / b as IEEE rounds it, as on the CPU: a driver's division may be 2.5 units off, and a tie between two int8 values
// (frequent in 16-bit activations without a norm) would then be rounded the other way. What is missing of a is computed
// without a fused multiply-add, which not every driver has.
float quotient(float a, float b) {
  const float q = a / b, q1 = upper(q), b1 = upper(b), q2 = q - q1, b2 = b - b1;
  precise const float rest = (((a - q1 * b1) - q1 * b2) - q2 * b1) - q2 * b2;
  precise const float result = q + rest / b;
  return result;
}

struct Scale {
  float inverse, scale;
};

// Of a group whose largest size_of is `largest`.
Scale scale_of(uint largest) {
  const float amax = uintBitsToFloat(largest);
  if (largest < floatBitsToUint(TINY)) return Scale(0.0, 0.0);
  return Scale(quotient(127.0, amax), quotient(amax, 127.0));
}

// Four values -> four signed bytes, round half to even.
uint quantize4(vec4 x, float inverse) {
  const ivec4 q = ivec4(roundEven(clamp(x * inverse, -127.0, 127.0)));
  return uint(q.x & 255) | (uint(q.y & 255) << 8) | (uint(q.z & 255) << 16) | (uint(q.w & 255) << 24);
}

const uint GELU_TANH = 0u, GELU = 1u, SILU = 2u, RELU = 3u;  // ACT

// Cephes expf, as on the CPU: relative error below 2e-7, where a driver's exp may be off by 3 + 2 |x| units.
float exponential(float x) {
  x = clamp(x, -87.0, 88.0);
  const float n = roundEven(x * 1.44269504);
  const float r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x));
  float p = 1.9875691500e-4;
  p = fma(p, r, 1.3981999507e-3);
  p = fma(p, r, 8.3334519073e-3);
  p = fma(p, r, 4.1665795894e-2);
  p = fma(p, r, 1.6666665459e-1);
  p = fma(p, r, 5.0000001201e-1);
  return (fma(p, r * r, r) + 1.0) * uintBitsToFloat(uint(int(n) + 127) << 23);
}

float erfc_positive(float z) {
  const float t = 1.0 / fma(z, 0.5, 1.0);
  float p = 0.17087277;
  p = fma(p, t, -0.82215223);
  p = fma(p, t, 1.48851587);
  p = fma(p, t, -1.13520398);
  p = fma(p, t, 0.27886807);
  p = fma(p, t, -0.18628806);
  p = fma(p, t, 0.09678418);
  p = fma(p, t, 0.37409196);
  p = fma(p, t, 1.00002368);
  p = fma(p, t, -1.26551223);
  return t * exponential(p - z * z);
}

float activate(uint act, float x) {
  if (size_of(x) > 0x7F800000u) return x;
  if (act == RELU) return max(x, 0.0);
  x = max(x, -64.0);
  if (act == SILU) return x / (1.0 + exponential(-x));
  if (act == GELU_TANH) {
    const float u = x * fma(x * x, 0.0713548162726, 1.59576912161);
    return x / (1.0 + exponential(-u));
  }
  const float tail = 0.5 * x * erfc_positive(abs(x) * 0.70710678);
  return x < 0.0 ? tail : x - tail;
}
