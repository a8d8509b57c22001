// Attention for AVX-512 without bf16 instructions.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "attention_api.inl"
#include "attention_avx512_vec.inl"
#define UNICORN_ATTENTION attention_run_avx512
#include "attention_impl.inl"
#endif
