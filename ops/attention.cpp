// Attention: workspace size and choice of the instruction set.
#include "attention.h"

#include "attention_api.inl"

namespace unicorn {

extern "C++" bool attention_set_isa(const char* name);

namespace {

using Run = void (*)(const AttentionArgs&);

bool equal(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

Run best(const char* name) {
  const bool any = !name || !*name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool full = any || equal(name, "avx512vnni");
  if (wide && full && __builtin_cpu_supports("avx512bf16")) return attention_run_avx512bf16;
  if (wide && (full || equal(name, "avx512"))) return attention_run_avx512;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && (any || equal(name, "avx2"))) return attention_run_avx2;
#endif
  return any || equal(name, "portable") ? attention_run_portable : nullptr;
}

Run& chosen() {
  static Run run = best(nullptr);
  return run;
}

}  // namespace

// "avx512vnni" (bf16 dot products too where the CPU has them), "avx512", "avx2" or "portable";
// null or "" = the best. False, and no change, where the CPU lacks it. Not during a call.
bool attention_set_isa(const char* name) {
  const Run run = best(name);
  if (run) chosen() = run;
  return run != nullptr;
}

size_t attention_workspace_bytes(const AttentionArgs& args) {
  const Plan p = make_plan(args);
  return size_t(p.shared + p.scratch * (args.threads > 0 ? args.threads : 1)) * sizeof(float);
}

void attention(const AttentionArgs& args) { chosen()(args); }

}  // namespace unicorn
