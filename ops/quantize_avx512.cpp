// Weight quantizer for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 16;
typedef float VF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VH __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VB __attribute__((vector_size(kLanes)));

inline VF lesser(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }  // b if unordered
inline VF greater(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VI greater(VI a, VI b) { return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
// table[index], index in 0..31
inline VF look_up(const float* table, VI index) {
  return (VF)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
}

}  // namespace

#include "quantize_impl.inl"

namespace unicorn {
extern const Quantizer quantizer_avx512;
const Quantizer quantizer_avx512 = table("avx512");
}  // namespace unicorn
#endif
