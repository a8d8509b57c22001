// Which rows of an 8-bit weight can have one of the largest scores, told without reading all of its bits.
//
// A byte is 8 h + l, and l is within 3.5 of 3.5: a row's score is at most what its h and the mean of l give, plus
// (Cauchy-Schwarz) norm of what l is off by * norm of the activations. Where that does not decide, l is 4 b + m, and
// one more bit halves the bound. Rows that are left get their score from all bits, as ever.

// The planes of some tiles of a weight.
void split(const Weight& w, const Planes& planes, Range tiles) {
  constexpr float kUp = 1.0f + 0x1p-20f;  // more than the roundings here take off
  const int64_t groups = (w.k + kGroup - 1) / kGroup;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    uint32_t after5[64] = {}, after6[64] = {};  // of row i / 4: sums of squares of 2 l - 7 and of 2 m - 3
    for (int64_t g = tile * groups; g < (tile + 1) * groups; ++g) {
      const uint8_t* bytes = w.q + g * kW8GroupBytes;
      uint8_t *five = planes.five + g * kFiveBytes, *sixth = planes.sixth + g * kSixthBytes;
      uint8_t high[64] = {}, bits[64] = {};
      for (int c = 0; c < 8; ++c) {
        for (int i = 0; i < 64; ++i) {
          const int byte = bytes[64 * c + i], l = 2 * (byte & 7) - 7, m = 2 * (byte & 3) - 3, nibble = byte >> 3 & 15;
          uint8_t& to = five[64 * (c / 2) + i];
          to = static_cast<uint8_t>(c % 2 == 0 ? nibble : to | nibble << 4);
          high[i] = static_cast<uint8_t>(high[i] | (byte >> 7) << c);
          bits[i] = static_cast<uint8_t>(bits[i] | (byte >> 2 & 1) << c);
          after5[i] += static_cast<uint32_t>(l * l);
          after6[i] += static_cast<uint32_t>(m * m);
        }
      }
      __builtin_memcpy(five + 256, high, 64);
      __builtin_memcpy(sixth, bits, 64);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      uint32_t five = 0, six = 0;
      for (int64_t i = 4 * r; i < 4 * r + 4; ++i) five += after5[i], six += after6[i];
      const float half = 0.5f * static_cast<const float*>(w.scale)[tile * kRows + r] * kUp;
      planes.error[(2 * tile) * kRows + r] = half * __builtin_sqrtf(static_cast<float>(five));
      planes.error[(2 * tile + 1) * kRows + r] = half * __builtin_sqrtf(static_cast<float>(six));
    }
  }
}

// What the bounds of all rows have in common: the sum and the norm of the activations, and what roundings can make of
// a row's score over its scale. That score adds `groups` products, each of at most 255 times the activations' absolute
// values; the bound the same, times 31 * 8 and 252, and a few more operations.
void begin_screen(ScreenArgs& p) {
  float total = 0;
  double squares = 0, absolute = 0;
  for (int64_t g = 0; g < p.a.groups; ++g) {
    int64_t sum = 0, square = 0;
    for (int64_t k = 0; k < kGroup; ++k) {
      const int64_t q = p.a.q[g * kGroup + k];
      sum += q < 0 ? -q : q;
      square += q * q;
    }
    const double scale = p.a.scale[g];
    total = __builtin_fmaf(static_cast<float>(p.a.sum8[g] / -8), p.a.scale[g], total);
    squares += scale * scale * static_cast<double>(square);
    absolute += scale * static_cast<double>(sum);
  }
  p.total = total;
  p.norm = static_cast<float>(__builtin_sqrt(squares) * (1.0 + 0x1p-20));
  p.slack = static_cast<float>(absolute * static_cast<double>(p.a.groups + 8) * 1024.0 * 0x1p-24);
}

INLINE float largest(vf x) {
  alignas(64) float lanes[16];
  store(lanes, x);
  float most = lanes[0];
  for (int i = 1; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

INLINE vf scales_of(const Weight& w, int64_t tile) { return load(static_cast<const float*>(w.scale) + tile * kRows); }

// Bounds from five or six bits, and the largest of each tile.
template <bool kSix>
void bounds(const ScreenArgs& p, Range tiles) {
  const int64_t groups = p.a.groups;
  alignas(64) uint8_t buffer[kW8GroupBytes];  // of instruction sets with too few registers for a group
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const uint8_t* five = p.planes.five + tile * groups * kFiveBytes;
    const uint8_t* sixth = p.planes.sixth + tile * groups * kSixthBytes;
    Cursor a{p.a.q, p.a.scale, p.a.sum8, 1};
    vf sum = zero();
    for (int64_t g = 0; g < groups; ++g, a.next(), five += kFiveBytes, sixth += kSixthBytes) {
      prefetch_group(five, kFiveBytes);
      if (kSix) prefetch_group(sixth, kSixthBytes);
      const Group8 values = kSix ? load5_and_1(five, sixth, buffer) : load5(five, buffer);
      add_group8<1, true>(values, middle_zero(), a, &sum);
    }
    const vf zero_point = p.w.scheme == Scheme::w8a ? to_float(load_u8(p.w.zero + tile * kRows)) : set(128.0f);
    const vf rest = fma(sub(set(kSix ? 1.5f : 3.5f), zero_point), set(p.total), set(p.slack));
    const vf margin = mul(load(p.planes.error + (2 * tile + kSix) * kRows), set(p.norm));
    const vf bound = fma(scales_of(p.w, tile), fma(set(kSix ? 4.0f : 8.0f), sum, rest), margin);
    store(p.bound + tile * kRows, bound);
    p.most[tile] = largest(bound);
  }
}

void screen(const ScreenArgs& p, bool six, Range tiles) { six ? bounds<true>(p, tiles) : bounds<false>(p, tiles); }

// The largest bound of a tile with one bit more than five.
float refine(const ScreenArgs& p, int64_t tile) {
  const int64_t groups = p.a.groups;
  const uint8_t* sixth = p.planes.sixth + tile * groups * kSixthBytes;
  alignas(64) uint8_t buffer[kW8GroupBytes];
  Cursor a{p.a.q, p.a.scale, p.a.sum8, 1};
  vf sum = zero();
  for (int64_t g = 0; g < groups; ++g, a.next(), sixth += kSixthBytes) {
    add_group8<1, true>(load1(sixth, buffer), middle_zero(), a, &sum);
  }
  const float* error = p.planes.error + 2 * tile * kRows;
  const vf less = mul(sub(load(error), load(error + kRows)), set(p.norm));
  const vf more = fma(set(4.0f), sum, set(-2.0f * p.total));
  return largest(sub(fma(scales_of(p.w, tile), more, load(p.bound + tile * kRows)), less));
}

// Scores [16] of a tile from all bits: to `out` as well, rounded.
void score(const ScreenArgs& p, int64_t tile, float* scores) {
  multiply(p.w, tile, p.a, 0, scores);
  store16(p.out, tile * kRows, load(scores), p.w.n - tile * kRows);
}

void leave_out(const ScreenArgs& p, int64_t tile) {
  store16(p.out, tile * kRows, set(-__builtin_inff()), p.w.n - tile * kRows);
}
