// The table of each instruction set; one translation unit each.
#pragma once

#include "matmul.h"

namespace unicorn {

const Matmul* matmul_portable();
#if defined(__x86_64__)
const Matmul* matmul_avx2();
const Matmul* matmul_avx512vnni();
#endif

}  // namespace unicorn
