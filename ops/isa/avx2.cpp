// The kernels for AVX2 with FMA and F16C. The flags of this file are in CMakeLists.txt.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../kernels.h"

#define UNICORN_AVX2

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

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = {"avx2", quantize, linear, gate, norm, rotary, embedding, activations, read, dots};

}  // namespace unicorn
#endif
