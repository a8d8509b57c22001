// simd.h for AVX2 with FMA and F16C: each vector is a pair of registers, rows 0-7 and rows 8-15.

struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
constexpr int kMaxTokens = 4;
constexpr int kInterleaved = 1;

INLINE __m256i set32(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vf set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf zero() { return set(0.0f); }
INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, vf x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE vf min(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf neg(vf x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
}
INLINE vf round(vf x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE vf below(vf x, vf p, vf q) {
  const __m256 z = _mm256_setzero_ps();
  return {_mm256_blendv_ps(q.a, p.a, _mm256_cmp_ps(x.a, z, _CMP_LT_OQ)),
          _mm256_blendv_ps(q.b, p.b, _mm256_cmp_ps(x.b, z, _CMP_LT_OQ))};
}
INLINE vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE __m256 pow2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set32(127)), 23));
}
INLINE vf pow2(vf n) { return {pow2(n.a), pow2(n.b)}; }
INLINE __m256 bf16_half(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE vf load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
INLINE vf load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE __m256i bf16_bits(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, set32(0x7fff)), odd), 16);
  return _mm256_blendv_epi8(up, set32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
INLINE void store_bf16(uint16_t* p, vf x) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b));  // in halves of 128 bits
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_f16(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float reduce_add(vf x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
INLINE float amax(vf x, vf y) {
  const __m256i bits = set32(0x7fffffff);
  const auto size = [&](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), bits); };
  const __m256i m = _mm256_max_epi32(_mm256_max_epi32(size(x.a), size(x.b)), _mm256_max_epi32(size(y.a), size(y.b)));
  const __m128i n = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  const __m128i o = _mm_max_epi32(n, _mm_shuffle_epi32(n, 0x4e));
  return __builtin_bit_cast(float, _mm_cvtsi128_si32(_mm_max_epi32(o, _mm_shuffle_epi32(o, 0xb1))));
}
INLINE int32_t pack(vf x, vf y, int8_t* q) {
  const vi p = to_int(x), r = to_int(y);
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(p.a, p.b), _mm256_packs_epi32(r.a, r.b));
  const __m256i bytes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256((__m256i*)q, bytes);
  const __m256i s = _mm256_add_epi32(_mm256_add_epi32(p.a, p.b), _mm256_add_epi32(r.a, r.b));
  const __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  const __m128i u = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(u, _mm_shuffle_epi32(u, 0xb1)));
}

// Groups stay in memory (L1): there are too few registers to hold one.
struct Group4 {
  const uint8_t* p;
};
struct Group8 {
  const uint8_t* p;
};
INLINE Group4 load4(const uint8_t* p) { return {p}; }
INLINE Group8 load8(const uint8_t* p) { return {p}; }
INLINE __m256i four(const int8_t* a) {
  int32_t x;
  __builtin_memcpy(&x, a, 4);
  return set32(x);
}
// Nibbles: 8 products of pairs stay below 8 * 2 * 15 * 127 = 30480, so the whole group adds up in int16.
INLINE __m256i dot4_half(const uint8_t* w, const int8_t* a, int32_t sum8) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(w + 64 * c));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_and_si256(v, low), four(a + 8 * c)));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(high, four(a + 8 * c + 4)));
  }
  return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), set32(sum8));
}
INLINE vi dot4(const Group4& g, const int8_t* a, int32_t sum8) {
  return {dot4_half(g.p, a, sum8), dot4_half(g.p + 32, a, sum8)};
}
// Bytes, as signed w = byte - 128: |w| * (a with the sign of w). A pair is at most 2 * 128 * 127 = 32512,
// exact in int16. Zero points are taken relative to 128 too.
template <int kFirst = 0, int kLast = 8>
INLINE __m256i dot8_half(const uint8_t* p, const int8_t* a, __m256i sum) {
#pragma GCC unroll 8
  for (int c = kFirst; c < kLast; ++c) {
    const __m256i byte = _mm256_loadu_si256((const __m256i*)(p + 64 * c));
    const __m256i w = _mm256_xor_si256(byte, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(a + 4 * c), w));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sum;
}
// Nibbles through a table of 16 values, as bytes of value + 128 in `buffer`.
struct Codebook {
  __m256i table;
};
INLINE Codebook load_codebook(const int8_t* c) {
  const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i*)c), _mm_set1_epi8(-128));
  return {_mm256_broadcastsi128_si256(bytes)};
}
INLINE Group8 look_up(const uint8_t* p, const Codebook& codebook, uint8_t* buffer) {
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // chunk i / 2, rows 0-7 or 8-15
    const __m256i v = _mm256_loadu_si256((const __m256i*)(p + 32 * i));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    uint8_t* to = buffer + 128 * (i / 2) + 32 * (i % 2);
    _mm256_store_si256((__m256i*)to, _mm256_shuffle_epi8(codebook.table, _mm256_and_si256(v, low)));
    _mm256_store_si256((__m256i*)(to + 64), _mm256_shuffle_epi8(codebook.table, high));
  }
  return {buffer};
}
INLINE vi load_zero(const uint8_t* z) {
  const __m256i middle = set32(128);
  return {_mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)z)), middle),
          _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(z + 8))), middle)};
}
INLINE vi middle_zero() { return {set32(0), set32(0)}; }
template <bool kMiddle>
INLINE vi dot8_offset(vi z, int32_t sum8) {
  if (kMiddle) return z;
  const __m256i s = set32(sum8);
  return {_mm256_srai_epi32(_mm256_mullo_epi32(z.a, s), 3), _mm256_srai_epi32(_mm256_mullo_epi32(z.b, s), 3)};
}
INLINE vi dot8(const Group8& g, const int8_t* a, vi offset) {
  return {dot8_half(g.p, a, offset.a), dot8_half(g.p + 32, a, offset.b)};
}
// Chunks kFirst .. kFirst + 3 only.
template <int kFirst>
INLINE vi dot8_part(const Group8& g, const int8_t* a, vi offset) {
  return {dot8_half<kFirst, kFirst + 4>(g.p, a, offset.a), dot8_half<kFirst, kFirst + 4>(g.p + 32, a, offset.b)};
}
INLINE vi load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
INLINE vi load_i8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
INLINE vi add(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE vi mul(vi x, vi y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }

INLINE int64_t peak_dots(int64_t steps, const uint8_t* weights, const int8_t* activations) {
  constexpr int kChains = 8;
  const __m256i w = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)weights), _mm256_set1_epi8(15));
  __m256i a = four(activations), sum[kChains];
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) sum[c] = _mm256_setzero_si256();
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      __asm__ volatile("" : "+x"(a));  // or the product would leave the loop
      sum[c] = _mm256_add_epi16(sum[c], _mm256_maddubs_epi16(w, a));
      __asm__ volatile("" : "+x"(sum[c]));
    }
  }
  return steps * kChains * 32;
}
