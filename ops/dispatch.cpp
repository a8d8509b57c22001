// Which instruction set the kernels run with.
#include <unistd.h>

#include <atomic>
#include <cstring>

#if defined(UNICORN_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include "kernels.h"
#include "quantize.h"

namespace unicorn {

bool attention_set_isa(const char* name);

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512vnni;
#endif
#if defined(UNICORN_HAS_AMX)
extern const Kernels kernels_avx512amx;
#endif

namespace {

#if defined(UNICORN_HAS_AMX)
// Whether the CPU has int8 tiles and the kernel lets this process use them.
bool has_amx() {
  constexpr unsigned kTiles = 3u << 24;             // of CPUID 7, EDX: AMX-TILE, AMX-INT8
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

struct Tables {
  const Kernels* table[5] = {};
  const char* name[5] = {};
  int count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx2 && avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(UNICORN_HAS_AMX)
    if (vnni && has_amx()) add(kernels_avx512amx);
#endif
    if (vnni) add(kernels_avx512vnni);
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

namespace {

// See impl/matmul.inl.
Prefetch prefetch_of_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return {0, 1024, 3072};
#endif
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  if (sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10) return {8192, 8192, 0};  // Zen 5
#endif
  return {4096, 4096, 0};
}

}  // namespace

const Prefetch prefetch = prefetch_of_this_cpu();

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* const* isas() { return tables().name; }

bool set_isa(const char* name) {
  for (int i = 0; i < tables().count; ++i) {
    if (*name == '\0' || std::strcmp(name, tables().name[i]) == 0) {
      const char* found = tables().name[i];
      chosen() = tables().table[i];
      // The quantizer needs no dot products, attention none of bytes: their widest sets have these names.
      const bool wide = std::strncmp(found, "avx512", 6) == 0;
      return attention_set_isa(wide ? "avx512vnni" : found) && quantizer_set_isa(wide ? "avx512" : found);
    }
  }
  return false;
}

}  // namespace unicorn
