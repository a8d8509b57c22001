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

#include "../impl/all.inl"

}  // namespace

UNICORN_KERNELS(avx512amx)

}  // namespace unicorn
#endif
