// The kernels for AVX-512 with VNNI, and AMX for many tokens. The flags of this file are in CMakeLists.txt.
#if defined(UNICORN_HAS_AMX)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../kernels.h"

#define UNICORN_AVX512
#define UNICORN_AMX

namespace unicorn {

namespace {

#include "../simd.h"
// in this order
#include "../impl/rows.inl"
// uses rows.inl
#include "../impl/matmul.inl"
// uses matmul.inl
#include "../impl/amx.inl"
// uses amx.inl
#include "../impl/gemm.inl"
// uses rows.inl
#include "../impl/lookup.inl"
// uses matmul.inl
#include "../impl/probe.inl"

}  // namespace

extern const Kernels kernels_avx512amx;
const Kernels kernels_avx512amx = {"avx512amx", quantize,  linear,      gate, norm,
                                   rotary,      embedding, activations, read, dots};

}  // namespace unicorn
#endif
