// Choice of the instruction set for the projections: once, from cpuid, unless a test forces one.
#include "matmul.h"

#include "matmul_api.h"

namespace unicorn {
namespace {

bool equal(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

const Matmul* best(const char* name) {
  const bool any = !name || !*name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && (any || equal(name, "avx512vnni"))) return matmul_avx512vnni();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && (any || equal(name, "avx2"))) return matmul_avx2();
#endif
  return any || equal(name, "portable") ? matmul_portable() : nullptr;
}

const Matmul*& chosen() {
  static const Matmul* table = best(nullptr);
  return table;
}

}  // namespace

const Matmul& matmul_table() { return *chosen(); }

bool matmul_set_isa(const char* name) {
  const Matmul* table = best(name);
  if (table) chosen() = table;
  return table != nullptr;
}

}  // namespace unicorn
