// Weight quantizer for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 8;
typedef float VF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VH __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VB __attribute__((vector_size(kLanes)));

inline VF lesser(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }  // b if unordered
inline VF greater(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VI greater(VI a, VI b) { return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
// table[index], index in 0..31
inline VF look_up(const float* table, VI index) { return (VF)_mm256_i32gather_ps(table, (__m256i)index, 4); }

}  // namespace

#include "quantize_impl.inl"

namespace unicorn {
extern const Quantizer quantizer_avx2;
const Quantizer quantizer_avx2 = table("avx2");
}  // namespace unicorn
#endif
