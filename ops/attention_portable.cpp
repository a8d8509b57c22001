// Attention for any CPU: vectors of four floats, written with the compiler's vector extension.
#include "attention_api.inl"

namespace {

constexpr int W = 4;            // floats per vector
constexpr int kMaxColumns = 2;  // vectors per panel of the prefill tiles

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

vf set1(float x) { return vf{x, x, x, x}; }
vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof(x)); }
vf fma(vf a, vf b, vf c) { return a * b + c; }
vf pick(vi take, vf x, vf y) { return (vf)((take & (vi)x) | (~take & (vi)y)); }
vf max(vf a, vf b) { return pick((vi)(a > b), a, b); }
vf select_gt(vf a, vf b, vf x, vf y) { return pick((vi)(a > b), x, y); }
unsigned bits_gt(vf a, vf b) {
  const vi m = (vi)(a > b);
  return unsigned(m[0] & 1) | unsigned(m[1] & 2) | unsigned(m[2] & 4) | unsigned(m[3] & 8);
}
// 2^n for a whole number n in [-126, 127].
vf pow2(vf n) {
  const vi k = {int32_t(n[0]), int32_t(n[1]), int32_t(n[2]), int32_t(n[3])};
  return (vf)((k + 127) << 23);
}
vf round(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction of |x| < 2^22
  return (x + magic) - magic;
}
float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
float top(vf x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  float x;
  if (rest >= 0x7c00) {  // infinity and NaN
    const uint32_t u = 0x7f800000u | (rest << 13);
    __builtin_memcpy(&x, &u, 4);
  } else if (rest < 0x400) {
    x = float(rest) * 5.9604644775390625e-8f;  // subnormal: 2^-24 each
  } else {
    const uint32_t u = (rest << 13) + (112u << 23);
    __builtin_memcpy(&x, &u, 4);
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  bits |= sign;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

vf load_bf16(const uint16_t* p) { return (vf)(vi{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16}); }
vf load_i8(const int8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
vf load_f16(const uint16_t* p) {
  return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}

// Sums of four vectors, to out[0..3].
void reduce4(vf a, vf b, vf c, vf d, float* out) { store(out, vf{sum(a), sum(b), sum(c), sum(d)}); }

void transpose(vf* r) {
  const vf a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = vf{a[i], b[i], c[i], d[i]};
}

}  // namespace

#define UNICORN_ATTENTION attention_run_portable
#include "attention_impl.inl"
