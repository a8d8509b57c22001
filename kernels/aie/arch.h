// What the kernels need to know about a generation, by capability; the kernels test nothing else.
// AIE2 is XDNA 1 (Phoenix, Hawk Point), AIE2P is XDNA 2 (Strix and newer).
#pragma once

#if __AIE_ARCH__ == 20
// Native int8 product: 4x8 by 8x8, one accumulator register of 32 lanes.
#define UNICORN_MMUL_ROWS 4
#elif __AIE_ARCH__ == 21
// Native int8 product: 8x8 by 8x8, one accumulator register of 64 lanes.
#define UNICORN_MMUL_ROWS 8
#else
#error "one of AIE2 (__AIE_ARCH__ 20) and AIE2P (21) is needed"
#endif

// The power-up state rounds down and wraps; every entry point sets what its arithmetic is defined with.
#define UNICORN_SET_ARITHMETIC()                        \
  ::aie::set_rounding(::aie::rounding_mode::conv_even); \
  ::aie::set_saturation(::aie::saturation_mode::saturate)

// Data of one core that does not fit its stack of 1 KiB. In the host model every thread is a core.
#ifdef UNICORN_HOST_MODEL
#define UNICORN_CORE_MEMORY thread_local
#else
#define UNICORN_CORE_MEMORY
#endif
