// Which instruction set the kernels run with.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "quantize.h"

namespace unicorn {

bool attention_set_isa(const char* name);

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512vnni;
#endif

namespace {

struct Tables {
  const Kernels* table[4] = {};
  const char* name[4] = {};
  int count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512 && __builtin_cpu_supports("avx512vnni")) add(kernels_avx512vnni);
    if (avx2) add(kernels_avx2);
#endif
    add(kernels_portable);
  }
  void add(const Kernels& kernels) {
    table[count] = &kernels;
    name[count++] = kernels.name;
  }
};

const Tables& tables() {
  static const Tables tables;
  return tables;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> chosen{tables().table[0]};
  return chosen;
}

}  // namespace

#if defined(__x86_64__)
const Prefetch prefetch =
    (__builtin_cpu_init(), __builtin_cpu_is("intel")) ? Prefetch{0, 1024, 3072} : Prefetch{4096, 4096, 0};
#else
const Prefetch prefetch = {4096, 4096, 0};
#endif

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* const* isas() { return tables().name; }

bool set_isa(const char* name) {
  for (int i = 0; i < tables().count; ++i) {
    if (*name == '\0' || std::strcmp(name, tables().name[i]) == 0) {
      const char* found = tables().name[i];
      chosen() = tables().table[i];
      // The quantizer needs no dot products: its widest set is called avx512.
      return attention_set_isa(found) && quantizer_set_isa(std::strcmp(found, "avx512vnni") == 0 ? "avx512" : found);
    }
  }
  return false;
}

}  // namespace unicorn
