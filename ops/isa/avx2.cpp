// The kernels for AVX2 with FMA and F16C. The flags of this file are in CMakeLists.txt.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../kernels.h"

#define UNICORN_AVX2

namespace unicorn {

namespace {

#include "../impl/all.inl"

}  // namespace

UNICORN_KERNELS(avx2)

}  // namespace unicorn
#endif
