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
//   load5, load6       groups of the k-quants -> Group8 of value + 128; dot8_part: four of its chunks
//   load1              one bit per value, of chunk c at bit c -> the same
//   load5_and_1        2 * (value of load5) + value of load1 -> the same
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
// Groups of 5 and 6 bits as bytes of value + 128 in `buffer`: the high bits of chunk c are at bits c (or 2 c) of the
// last chunks.
INLINE Group8 load5(const uint8_t* p, uint8_t* buffer) {
  for (int c = 0; c < 8; ++c) {
    const uint8_t* low = p + 64 * (c / 2);
    for (int i = 0; i < 64; ++i) {
      const int nibble = c % 2 == 0 ? low[i] & 15 : low[i] >> 4;
      buffer[64 * c + i] = static_cast<uint8_t>(nibble | (p[256 + i] >> c & 1) << 4 | 128);
    }
  }
  return {buffer};
}
INLINE Group8 load1(const uint8_t* p, uint8_t* buffer) {
  for (int c = 0; c < 8; ++c) {
    for (int i = 0; i < 64; ++i) buffer[64 * c + i] = static_cast<uint8_t>((p[i] >> c & 1) | 128);
  }
  return {buffer};
}
INLINE Group8 load5_and_1(const uint8_t* p, const uint8_t* bits, uint8_t* buffer) {
  load5(p, buffer);
  for (int c = 0; c < 8; ++c) {
    for (int i = 0; i < 64; ++i) {
      uint8_t& value = buffer[64 * c + i];
      value = static_cast<uint8_t>(value << 1 | (bits[i] >> c & 1) | 128);
    }
  }
  return {buffer};
}
INLINE Group8 load6(const uint8_t* p, uint8_t* buffer) {
  for (int c = 0; c < 8; ++c) {
    const uint8_t *low = p + 64 * (c / 2), *high = p + 256 + 64 * (c / 4);
    for (int i = 0; i < 64; ++i) {
      const int nibble = c % 2 == 0 ? low[i] & 15 : low[i] >> 4;
      buffer[64 * c + i] = static_cast<uint8_t>((nibble | (high[i] >> 2 * (c % 4) & 3) << 4) + 96);
    }
  }
  return {buffer};
}
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
