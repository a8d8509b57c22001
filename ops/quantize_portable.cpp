// Weight quantizer for any CPU: vectors of four floats, written with the compiler's vector extension.
#include <cstdint>

namespace {

constexpr int kLanes = 4;
typedef float VF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VH __attribute__((vector_size(2 * kLanes)));
typedef uint8_t VB __attribute__((vector_size(kLanes)));

inline VF select(VI mask, VF a, VF b) { return (VF)((mask & (VI)a) | (~mask & (VI)b)); }
inline VF lesser(VF a, VF b) { return select(a < b, a, b); }
inline VF greater(VF a, VF b) { return select(a > b, a, b); }
inline VI greater(VI a, VI b) {
  const VI mask = a > b;
  return (mask & a) | (~mask & b);
}
// table[index], index in 0..31
inline VF look_up(const float* table, VI index) {
  VF r;
  for (int i = 0; i < kLanes; ++i) r[i] = table[index[i]];
  return r;
}

}  // namespace

#include "quantize_impl.inl"

namespace unicorn {
extern const Quantizer quantizer_portable;
const Quantizer quantizer_portable = table("portable");
}  // namespace unicorn
