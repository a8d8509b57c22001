// Projections for AVX2 with FMA and F16C (Zen 1 to 3, Haswell and later).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include <cstdint>

namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
struct Bytes {
  __m256i lo, hi;  // rows 0..7 and 8..15 of a tile
};

// vpmaddubsw saturates at 2 x 255 x 127, so bytes are made signed and multiplied as |w| times a with w's sign.
constexpr int kByteBias = 128;

struct Halves {
  __m256 lo, hi;
};
inline Halves split(V v) {
  Halves h;
  __builtin_memcpy(&h, &v, 64);
  return h;
}
template <typename T>
inline T join(__m256 lo, __m256 hi) {
  const Halves h = {lo, hi};
  T v;
  __builtin_memcpy(&v, &h, 64);
  return v;
}

inline V fma(V a, V b, V c) {
  const Halves x = split(a), y = split(b), z = split(c);
  return join<V>(_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi));
}
inline __m256 round8(__m256 x) {
  const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_castsi256_ps(_mm256_cvttps_epi32(whole));
}
inline I round_even(V x) {
  const Halves h = split(x);
  return join<I>(round8(h.lo), round8(h.hi));
}
inline V half_to_float(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return join<V>(_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1)));
}
inline void float_to_half(V x, uint16_t* p) {
  const Halves h = split(x);
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(h.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(h.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Bytes load_bytes(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Bytes low_nibbles(Bytes w) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)};
}
inline Bytes high_nibbles(Bytes w) {
  return low_nibbles({_mm256_srli_epi16(w.lo, 4), _mm256_srli_epi16(w.hi, 4)});
}
inline Bytes broadcast4(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
inline __m256i dot8(__m256i unsigned_bytes, __m256i signed_bytes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), _mm256_set1_epi16(1));
}
inline I add(I sum, __m256i lo, __m256i hi) {
  return sum + join<I>(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi));
}
inline I dot_nibbles(I sum, Bytes w, Bytes a) { return add(sum, dot8(w.lo, a.lo), dot8(w.hi, a.hi)); }
inline __m256i dot8_signed(__m256i w, __m256i a) {
  const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
  return dot8(_mm256_abs_epi8(s), _mm256_sign_epi8(a, s));  // 2 x 128 x 127 < 32768: exact
}
inline I dot_bytes(I sum, Bytes w, Bytes a) { return add(sum, dot8_signed(w.lo, a.lo), dot8_signed(w.hi, a.hi)); }

}  // namespace

#include "matmul_impl.inl"

namespace unicorn {
const Matmul* matmul_avx2() {
  static const Matmul table = {"avx2",       load_row,   store_row, norm_row, quantize_groups, matmul_pair,
                               gate_up_pair, rotate_row, embed_row, activate, read,            dot_peak};
  return &table;
}
}  // namespace unicorn
#endif
