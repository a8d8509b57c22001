// The kernels for AVX-512 with VNNI (int8 dot products). The flags of this file are in CMakeLists.txt.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: false alarms inside immintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../kernels.h"

#define UNICORN_AVX512

namespace unicorn {

namespace {

#include "../impl/all.inl"

}  // namespace

UNICORN_KERNELS(avx512vnni)

}  // namespace unicorn
#endif
