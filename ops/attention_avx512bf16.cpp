// Attention for AVX-512 with bf16 dot products: q k^T of bf16 inputs takes half the instructions.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "attention_api.inl"
#include "attention_avx512_vec.inl"

namespace {

// c + sum over the two bf16 of each lane. The products are exact and each addition rounds to
// nearest, as in an fp32 sum; only subnormal inputs count as zero, which is below 2^-126 |q|.
#define UNICORN_BF16_DOT
vf bf16_dot(vf c, vf a, vf b) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

}  // namespace

#define UNICORN_ATTENTION attention_run_avx512bf16
#include "attention_impl.inl"
#endif
