// Vectors of 16 floats (vf) or 16 int32 (vi), and the integer dot products of a weight group, for one
// instruction set. Included once per ISA file, inside an anonymous namespace: nothing here is shared between
// them. Every operation is exact or rounds once to nearest even, so all instruction sets agree bit for bit.
//
//   vf   set zero load store load_bf16 load_f16 store_bf16 store_f16 add sub mul div fma min max neg round
//        below (x < 0 ? a : b)  pow2 (2^n)  to_int  to_float
//   reduce_add(vf)     the 16 lanes in one fixed tree
//   amax(vf, vf)       the largest |lane|; a NaN counts as largest
//   pack(vf, vf, q)    32 integers in [-127, 127] -> int8; returns their sum
//   Group4, Group8     a group of 16 rows x 32 k in registers; dots4 / dots8: with 32 signed activations of
//                      each of T tokens, T up to kInterleaved
//   look_up            nibbles through a Codebook -> Group8
//   dot8_offset        the per-row part of a zero point, from what load_zero gave
#pragma GCC diagnostic ignored "-Wunused-function"
#define INLINE inline __attribute__((always_inline))

#if defined(UNICORN_AVX512)
#include "impl/simd_avx512.inl"
#elif defined(UNICORN_AVX2)
#include "impl/simd_avx2.inl"
#else
#include "impl/simd_portable.inl"
#endif

#ifndef UNICORN_AVX512  // one token at a time
template <int T>
INLINE void dots4(const Group4& g, const int8_t* a, const int32_t* sum8, vi* sum) {
  static_assert(T == 1);
  *sum = dot4(g, a, *sum8);
}
template <int T>
INLINE void dots8(const Group8& g, const int8_t* a, vi* sum) {
  static_assert(T == 1);
  *sum = dot8(g, a, *sum);
}
#endif
