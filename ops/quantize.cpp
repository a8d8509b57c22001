// Weight quantizer: choice of the instruction set.
#include "quantize.h"

#include <cstring>

namespace unicorn {

extern const Quantizer quantizer_portable, quantizer_avx2, quantizer_avx512;

namespace {

const Quantizer* best(const char* name) {
  const bool any = !*name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && (any || !std::strcmp(name, "avx512"))) return &quantizer_avx512;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (avx2 && (any || !std::strcmp(name, "avx2"))) return &quantizer_avx2;
#endif
  return any || !std::strcmp(name, "portable") ? &quantizer_portable : nullptr;
}

const Quantizer*& chosen() {
  static const Quantizer* quantizer = best("");
  return quantizer;
}

}  // namespace

const Quantizer& quantizer() { return *chosen(); }

bool quantizer_set_isa(const char* name) {
  const Quantizer* found = best(name);
  if (found) chosen() = found;
  return found != nullptr;
}

}  // namespace unicorn
