// The attention kernel on the vectors of one instruction set; see attention_decode.inl and attention_prefill.inl.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention_softmax.inl"
// These two use what it defines.
#include "attention_decode.inl"
#include "attention_prefill.inl"

namespace {

template <DType T>
void run_as(const AttentionArgs& a, const Plan& p) {
  if (p.decode) {
    run_decode<T>(a, p);
  } else {
    run_prefill<T>(a, p);
  }
}

}  // namespace

void unicorn::UNICORN_ATTENTION(const AttentionArgs& a) {
  const Plan p = make_plan(a);
  if (a.dtype == DType::f32) {
    run_as<DType::f32>(a, p);
  } else if (a.dtype == DType::bf16) {
    run_as<DType::bf16>(a, p);
  } else if (a.dtype == DType::f16) {
    run_as<DType::f16>(a, p);
  } else {
    run_as<DType::i8>(a, p);
  }
}
