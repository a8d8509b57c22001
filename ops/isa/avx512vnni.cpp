// The kernels for AVX-512 with VNNI (int8 dot products). The flags of this file are in CMakeLists.txt.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../kernels.h"

#define UNICORN_AVX512

namespace unicorn {

namespace {

#include "../simd.h"
// in this order
#include "../impl/rows.inl"
// uses rows.inl
#include "../impl/matmul.inl"
// uses matmul.inl
#include "../impl/gemm.inl"
// uses rows.inl
#include "../impl/lookup.inl"
// uses matmul.inl
#include "../impl/probe.inl"

}  // namespace

extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = {"avx512vnni", quantize,  linear,      gate, norm,
                                    rotary,       embedding, activations, read, dots};

}  // namespace unicorn
#endif
