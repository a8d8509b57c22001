// The kernels for any CPU. The flags of this file are in CMakeLists.txt.
#include "../kernels.h"

namespace unicorn {

namespace {

#include "../impl/all.inl"

}  // namespace

UNICORN_KERNELS(portable)

}  // namespace unicorn
