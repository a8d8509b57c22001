// The two ceilings of benchmarks/kernels.py: reading memory, and multiplying, with this instruction set.

// Loads alone, with what is prefetched the same as weights are, or at two distances into two levels: which of the two
// is faster depends on the CPU, and the ceiling is the faster one.
uint64_t read(const uint64_t* data, int64_t words, bool two_levels) {
  const uint8_t* p = reinterpret_cast<const uint8_t*>(data);
  vf sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i + 256 <= 8 * words; i += 256) {
    if (two_levels) {
      for (int64_t j = 0; j < 256; j += 64) __builtin_prefetch(p + i + 512 + j);
      for (int64_t j = 0; j < 256; j += 64) __builtin_prefetch(p + i + 3072 + j, 0, 2);
    } else {
      prefetch_group(p + i, 256);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = max(sum[j], load(reinterpret_cast<const float*>(p + i + 64 * j)));
  }
  return static_cast<uint64_t>(reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
}

// Int8 dot products on registers only: `steps` times kChains independent ones. Returns the multiply-adds done.
int64_t dots(int64_t steps) {
  alignas(64) uint8_t weights[kW8GroupBytes];
  alignas(64) int8_t a[kGroup];
  for (int64_t i = 0; i < kW8GroupBytes; ++i) weights[i] = static_cast<uint8_t>(i * 7);
  for (int64_t i = 0; i < kGroup; ++i) a[i] = static_cast<int8_t>(i);
  return peak_dots(steps, weights, a);
}
