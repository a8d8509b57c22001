// Projections for AVX-512 with VNNI (Zen 4, Zen 5; Ice Lake and later).
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#include <immintrin.h>

#include <cstdint>

namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef __m512i Bytes;

constexpr int kByteBias = 0;  // vpdpbusd takes the whole unsigned byte

inline V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline I round_even(V x) {
  return (I)_mm512_cvt_roundps_epi32((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline V half_to_float(const uint16_t* p) {
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void float_to_half(V x, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
inline Bytes broadcast4(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline I dot_nibbles(I sum, Bytes w, Bytes a) { return (I)_mm512_dpbusd_epi32((__m512i)sum, w, a); }
inline I dot_bytes(I sum, Bytes w, Bytes a) { return (I)_mm512_dpbusd_epi32((__m512i)sum, w, a); }

}  // namespace

#include "matmul_impl.inl"

namespace unicorn {
const Matmul* matmul_avx512vnni() {
  static const Matmul table = {"avx512vnni", load_row,     store_row,    norm_row,  quantize_groups, matmul_pair,
                               gate_up_pair, rotate_row, embed_row, activate,  read,            dot_peak};
  return &table;
}
}  // namespace unicorn
#endif
