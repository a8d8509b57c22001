// The kernels for any CPU. The flags of this file are in CMakeLists.txt.
#include "../kernels.h"

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

extern const Kernels kernels_portable;
const Kernels kernels_portable = {"portable", quantize, linear, gate, norm, rotary, embedding, activations, read, dots};

}  // namespace unicorn
