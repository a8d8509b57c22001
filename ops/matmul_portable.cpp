// Projections in plain C++ for any CPU: the same bits, slowly.
#include <cmath>
#include <cstdint>

namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
struct Bytes {
  uint8_t b[64];
};

constexpr int kByteBias = 0;

inline V fma(V a, V b, V c) {
  V r;
  for (int i = 0; i < 16; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
inline I round_even(V x) {
  I r;
  for (int i = 0; i < 16; ++i) r[i] = int32_t(__builtin_rintf(x[i]));
  return r;
}
inline float half_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float v;
  if (exponent == 31) {
    v = mantissa ? __builtin_nanf("") : __builtin_inff();
  } else {
    v = exponent ? __builtin_ldexpf(float(mantissa + 1024), exponent - 25) : __builtin_ldexpf(float(mantissa), -24);
  }
  return h & 0x8000 ? -v : v;
}
inline V half_to_float(const uint16_t* p) {
  V r;
  for (int i = 0; i < 16; ++i) r[i] = half_value(p[i]);
  return r;
}
// Round to nearest even; NaN keeps its sign and becomes quiet.
inline uint16_t half_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float a = __builtin_fabsf(x);
  if (x != x) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x1ff));
  if (a >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (a < 6.103515625e-05f) return uint16_t(sign | int(__builtin_rintf(__builtin_ldexpf(a, 24))));
  uint32_t u;
  __builtin_memcpy(&u, &a, 4);
  u += 0xfff + (u >> 13 & 1);
  return uint16_t(sign | ((u >> 13) - (112u << 10)));
}
inline void float_to_half(V x, uint16_t* p) {
  for (int i = 0; i < 16; ++i) p[i] = half_bits(x[i]);
}
inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  __builtin_memcpy(r.b, p, 64);
  return r;
}
inline Bytes low_nibbles(Bytes w) {
  for (uint8_t& b : w.b) b &= 15;
  return w;
}
inline Bytes high_nibbles(Bytes w) {
  for (uint8_t& b : w.b) b = uint8_t(b >> 4);
  return w;
}
inline Bytes broadcast4(const int8_t* p) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.b[i] = uint8_t(p[i % 4]);
  return r;
}
inline I dot_bytes(I sum, Bytes w, Bytes a) {
  for (int i = 0; i < 64; ++i) sum[i / 4] += int32_t(w.b[i]) * int32_t(int8_t(a.b[i]));
  return sum;
}
inline I dot_nibbles(I sum, Bytes w, Bytes a) { return dot_bytes(sum, w, a); }

}  // namespace

#include "matmul_impl.inl"

namespace unicorn {
const Matmul* matmul_portable() {
  static const Matmul table = {"portable",   load_row,   store_row, norm_row, quantize_groups, matmul_pair,
                               gate_up_pair, rotate_row, embed_row, activate, read,            dot_peak};
  return &table;
}
}  // namespace unicorn
