// simd.h for AVX-512 with VNNI: the weights are the unsigned operand of vpdpbusd, activations are broadcast.

typedef __m512 vf;
typedef __m512i vi;
constexpr int kMaxTokens = 16;  // 16 sums, 8 registers of weights
constexpr int kInterleaved = 4;

INLINE vf set(float x) { return _mm512_set1_ps(x); }
INLINE vf zero() { return _mm512_setzero_ps(); }
INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf neg(vf x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
INLINE vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf below(vf x, vf a, vf b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
INLINE vi to_int(vf x) { return _mm512_cvtps_epi32(x); }
INLINE vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf pow2(vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(to_int(n), _mm512_set1_epi32(127)), 23));
}
INLINE vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_bf16(uint16_t* p, vf x) {
  const vi u = _mm512_castps_si512(x);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const vi up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const vi r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), up, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
INLINE void store_f16(uint16_t* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float reduce_add(vf x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
INLINE float amax(vf a, vf b) {
  const vi bits = _mm512_set1_epi32(0x7fffffff);
  const vi x = _mm512_and_si512(_mm512_castps_si512(a), bits), y = _mm512_and_si512(_mm512_castps_si512(b), bits);
  const uint32_t m = _mm512_reduce_max_epu32(_mm512_max_epu32(x, y));
  return __builtin_bit_cast(float, m);
}
INLINE int32_t pack(vf a, vf b, int8_t* q) {
  const vi x = to_int(a), y = to_int(b);
  _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8(x));
  _mm_storeu_si128((__m128i*)(q + 16), _mm512_cvtepi32_epi8(y));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(x, y));
}

struct Group4 {
  vi v[8];
};
struct Group8 {
  vi v[8];
};
INLINE Group4 load4(const uint8_t* p) {
  const vi low = _mm512_set1_epi8(15);
  Group4 g;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const vi w = _mm512_loadu_si512(p + 64 * c);
    g.v[2 * c] = _mm512_and_si512(w, low);
    g.v[2 * c + 1] = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
  }
  return g;
}
INLINE Group8 load8(const uint8_t* p) {
  Group8 g;
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) g.v[c] = _mm512_loadu_si512(p + 64 * c);
  return g;
}
// Nibbles through a table of 16 values, as bytes of value + 128.
struct Codebook {
  vi table;
};
INLINE Codebook load_codebook(const int8_t* c) {
  const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i*)c), _mm_set1_epi8(-128));
  return {_mm512_broadcast_i32x4(bytes)};
}
INLINE Group8 look_up(const uint8_t* p, const Codebook& codebook, uint8_t*) {
  const Group4 nibbles = load4(p);
  Group8 g;
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) g.v[c] = _mm512_shuffle_epi8(codebook.table, nibbles.v[c]);
  return g;
}
// Groups of 5 and 6 bits as bytes of value + 128: the high bits of chunk c are at bits c (or 2 c) of the last chunks.
INLINE Group8 load5(const uint8_t* p, uint8_t*) {
  Group8 g;
  const Group4 low = load4(p);
  const vi high = _mm512_loadu_si512(p + 256), bit = _mm512_set1_epi8(16), zero_point = _mm512_set1_epi8(-128);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const vi moved = c < 4 ? _mm512_slli_epi16(high, c < 4 ? 4 - c : 0) : _mm512_srli_epi16(high, c < 4 ? 0 : c - 4);
    g.v[c] = _mm512_or_si512(_mm512_or_si512(low.v[c], zero_point), _mm512_and_si512(moved, bit));
  }
  return g;
}
INLINE Group8 load6(const uint8_t* p, uint8_t*) {
  Group8 g;
  const Group4 low = load4(p);
  const vi bits = _mm512_set1_epi8(48), zero_point = _mm512_set1_epi8(128 - 32);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const vi high = _mm512_loadu_si512(p + 256 + 64 * (c / 4));
    const int at = 2 * (c % 4);
    const vi moved =
        at < 4 ? _mm512_slli_epi16(high, at < 4 ? 4 - at : 0) : _mm512_srli_epi16(high, at < 4 ? 0 : at - 4);
    g.v[c] = _mm512_add_epi8(_mm512_or_si512(low.v[c], _mm512_and_si512(moved, bits)), zero_point);
  }
  return g;
}
INLINE Group8 load1(const uint8_t* p, uint8_t*) {
  Group8 g;
  const vi all = _mm512_loadu_si512(p), bit = _mm512_set1_epi8(1), zero_point = _mm512_set1_epi8(-128);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) g.v[c] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(all, c), bit), zero_point);
  return g;
}
INLINE Group8 load5_and_1(const uint8_t* p, const uint8_t* bits, uint8_t*) {
  Group8 g;
  const vi all = _mm512_loadu_si512(bits), bit = _mm512_set1_epi8(1), zero_point = _mm512_set1_epi8(-128);
  const vi low = _mm512_set1_epi8(15 << 1), fifth = _mm512_set1_epi8(32), high = _mm512_loadu_si512(p + 256);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const vi nibbles = _mm512_loadu_si512(p + 64 * (c / 2));
    const vi four = c % 2 == 0 ? _mm512_slli_epi16(nibbles, 1) : _mm512_srli_epi16(nibbles, 3);
    const vi up = c < 5 ? _mm512_slli_epi16(high, c < 5 ? 5 - c : 0) : _mm512_srli_epi16(high, c < 5 ? 0 : c - 5);
    const vi two = _mm512_or_si512(_mm512_and_si512(up, fifth), _mm512_and_si512(_mm512_srli_epi16(all, c), bit));
    g.v[c] = _mm512_or_si512(_mm512_or_si512(_mm512_and_si512(four, low), zero_point), two);
  }
  return g;
}
INLINE vi load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vi load_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
// Chunks kFirst .. kFirst + 3 only.
template <int kFirst>
INLINE vi dot8_part(const Group8& g, const int8_t* a, vi sum) {
#pragma GCC unroll 4
  for (int c = kFirst; c < kFirst + 4; ++c) {
    int32_t four;
    __builtin_memcpy(&four, a + 4 * c, 4);
    sum = _mm512_dpbusd_epi32(sum, g.v[c], _mm512_set1_epi32(four));
  }
  return sum;
}
// sum[t] += w times the 32 activations of token t. The tokens take turns: chains of eight dependent vpdpbusd one after
// another fill the scheduler (97 entries on Golden Cove) with instructions that wait; GEMM then ran at 42 % of peak.
// For the same reason a single token has two chains.
template <int T>
INLINE void dots(const vi* w, const int8_t* a, vi* sum) {
  constexpr int kChains = T == 1 ? 2 : T;
  vi chain[kChains];
#pragma GCC unroll 4
  for (int t = 0; t < kChains; ++t) chain[t] = t < T ? sum[t] : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      int32_t four;
      __builtin_memcpy(&four, a + kGroup * t + 4 * c, 4);
      vi& to = chain[T == 1 ? c % 2 : t];
      to = _mm512_dpbusd_epi32(to, w[c], _mm512_set1_epi32(four));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sum[t] = T == 1 ? _mm512_add_epi32(chain[0], chain[1]) : chain[t];
}
// sum[2 t + r] += w[r] times the activations of token t, for two tiles. The empty asm keeps the broadcast in a
// register.
template <int T>
INLINE void dots_two(const uint8_t* w0, const uint8_t* w1, const int8_t* a, vi* sum) {
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const vi x0 = _mm512_loadu_si512(w0 + 64 * c), x1 = _mm512_loadu_si512(w1 + 64 * c);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      int32_t four;
      __builtin_memcpy(&four, a + kGroup * t + 4 * c, 4);
      vi both = _mm512_set1_epi32(four);
      __asm__("" : "+v"(both));
      sum[2 * t] = _mm512_dpbusd_epi32(sum[2 * t], x0, both);
      sum[2 * t + 1] = _mm512_dpbusd_epi32(sum[2 * t + 1], x1, both);
    }
  }
}
INLINE vi broadcast(int32_t x) { return _mm512_set1_epi32(x); }
INLINE void store_group(uint8_t* to, const vi* v, int less) {
  const vi zero_point = _mm512_set1_epi8(static_cast<char>(less));
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) _mm512_storeu_si512(to + 64 * c, _mm512_sub_epi8(v[c], zero_point));
}
template <int T>
INLINE void dots4(const Group4& g, const int8_t* a, const int32_t* sum8, vi* sum) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sum[t] = _mm512_set1_epi32(sum8[t]);
  dots<T>(g.v, a, sum);
}
// Zero points are at most 255 and sum8 fits int16, so one vpmaddwd multiplies them.
INLINE vi load_zero(const uint8_t* z) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)z)); }
INLINE vi middle_zero() { return _mm512_set1_epi32(128); }
template <bool kMiddle>
INLINE vi dot8_offset(vi z, int32_t sum8) {
  if (kMiddle) return _mm512_slli_epi32(_mm512_set1_epi32(sum8), 4);
  return _mm512_srai_epi32(_mm512_madd_epi16(z, _mm512_set1_epi32(sum8)), 3);
}
template <int T>
INLINE void dots8(const Group8& g, const int8_t* a, vi* sum) {
  dots<T>(g.v, a, sum);
}

INLINE int64_t peak_dots(int64_t steps, const uint8_t* weights, const int8_t* activations) {
  constexpr int kChains = 12;  // two per cycle with a latency of four, and some to spare
  const vi w = _mm512_loadu_si512(weights);
  int32_t four;
  __builtin_memcpy(&four, activations, 4);
  const vi a = _mm512_set1_epi32(four);
  vi sum[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sum[c] = w;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm512_dpbusd_epi32(sum[c], w, a);
      __asm__ volatile("" : "+v"(sum[c]));
    }
  }
  return steps * kChains * 64;
}
