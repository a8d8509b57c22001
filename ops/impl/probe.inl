// The two ceilings of benchmarks/kernels.py: reading memory, and multiplying, with this instruction set.

uint64_t read(const uint64_t* data, int64_t words) {
  const float* p = reinterpret_cast<const float*>(data);
  const int64_t distance = prefetch_ahead / 4;
  vf a = zero(), b = zero(), c = zero(), d = zero();
  for (int64_t i = 0; i + 64 <= 2 * words; i += 64) {
    __builtin_prefetch(p + i + distance);
    __builtin_prefetch(p + i + distance + 16);
    __builtin_prefetch(p + i + distance + 32);
    __builtin_prefetch(p + i + distance + 48);
    a = max(a, load(p + i));
    b = max(b, load(p + i + 16));
    c = max(c, load(p + i + 32));
    d = max(d, load(p + i + 48));
  }
  return static_cast<uint64_t>(reduce_add(add(add(a, b), add(c, d))));
}

// Int8 dot products on registers only: `steps` times kChains independent ones. Returns the multiply-adds done.
int64_t dots(int64_t steps) {
  alignas(64) uint8_t weights[kW8GroupBytes];
  alignas(64) int8_t a[kGroup];
  for (int64_t i = 0; i < kW8GroupBytes; ++i) weights[i] = static_cast<uint8_t>(i * 7);
  for (int64_t i = 0; i < kGroup; ++i) a[i] = static_cast<int8_t>(i);
  return peak_dots(steps, weights, a);
}
