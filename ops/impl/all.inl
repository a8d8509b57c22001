// All kernels of one instruction set, in an order in which each file finds what it uses.
#include "../simd.h"
// in this order
#include "rows.inl"
// uses rows.inl
#include "matmul.inl"
// uses matmul.inl
#include "amx.inl"
// uses amx.inl
#include "gemm.inl"
// uses rows.inl and matmul.inl
#include "screen.inl"
// uses rows.inl
#include "lookup.inl"
// uses matmul.inl
#include "probe.inl"

#define UNICORN_KERNELS(isa)                                                                         \
  extern const Kernels kernels_##isa;                                                                \
  const Kernels kernels_##isa = {#isa,   quantize, linear,    gate,        thresholds, open_gate,    \
                                 norm,   rotary,   embedding, activations, split,      begin_screen, \
                                 screen, refine,   score,     leave_out,   read,       dots};
