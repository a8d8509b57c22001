// The schemes with two-level scales or minima: w4m32, q4k, q5k, q6k. Part of quantize_impl.inl; the meaning, to the
// bit, is unicorn_backend/quantize/kquants.py. x is a group of kLanes rows, each divided by its largest |w|.

constexpr int kSuper = 8;  // groups that share the fp16 scales: 256 columns
constexpr float kEnds[][2] = {{0.25f, 0.25f}, {0.5f, -0.25f}, {-0.25f, 0.25f}, {0.25f, 0.0f},
                              {-1.0f, 0.0f},  {0.0f, 0.0f},   {-1.0f, -1.0f},  {0.0f, 0.5f}};  // kquants.py ENDS
constexpr float kFirstQ6Factor = 27.0f;                                                        // Q6_FACTORS
constexpr int kQ6Factors = 6;
constexpr float kMinRange = 0x1p-20f, kMinSpread = 0x1p-12f;

struct Scaled {
  VF x[kGroup];
  VF amax, inverse;
  VI top;  // bits of the largest magnitude, to find what is not finite
};

struct Affine {
  VF scale, minimum;
};

INLINE VF pick(VI mask, VF a, VF b) { return (VF)((mask & (VI)a) | (~mask & (VI)b)); }
INLINE VF reciprocal(VF x) { return (VF)(~(VI)(x == splat(0.0f)) & (VI)(splat(1.0f) / x)); }

// Divides columns first..first + count - 1 by their largest magnitude.
INLINE VF normalise(VF* x, int count, VI& top, VF& inverse) {
  top = magnitude(x[0]);
  for (int k = 1; k < count; ++k) top = greater(top, magnitude(x[k]));
  const VF amax = greater((VF)top, splat(kMinAmax));
  inverse = splat(1.0f) / amax;
  for (int k = 0; k < count; ++k) x[k] = x[k] * inverse;
  return amax;
}

// The nearest of the levels 0..top.
INLINE VF level(VF x, VF minimum, VF inverse, float top) {
  return round_even(clamp((x - minimum) * inverse, 0.0f, top));
}

template <int kTop, bool kWeighted>
INLINE Affine affine(const VF x[kGroup], const float* h) {
  VF low = splat(0), high = splat(0), total = splat(0);
  float count = 0;
  for (int k = 0; k < kGroup; ++k) {
    low = lesser(x[k], low);
    high = greater(x[k], high);
    total = total + weigh<kWeighted>(x[k], h[k]);
    count = count + h[k];
  }
  count = count < kMinSum ? kMinSum : count;
  const VF inverse = splat(1.0f) / greater(high - low, splat(kMinRange));
  VF best = splat(-1.0f);
  Affine found{splat(0), splat(0)};
  for (const auto& ends : kEnds) {
    const VF levels = inverse * (float(kTop) + ends[0] + ends[1]);
    const VF offset = (-low * levels) - ends[0];
    VF n1 = splat(0), n2 = splat(0), nx = splat(0);
    for (int k = 0; k < kGroup; ++k) {
      const VF q = round_even(clamp(x[k] * levels + offset, 0.0f, float(kTop)));
      const VF weighted = weigh<kWeighted>(q, h[k]);
      n1 = n1 + weighted;
      n2 = n2 + weighted * q;
      nx = nx + weighted * x[k];
    }
    const VF square = count * n2, spread = square - n1 * n1;
    VF a = (VF)((spread > square * kMinSpread) & (VI)((count * nx - total * n1) / spread));
    VF b = (total - a * n1) / count;
    a = greater(pick(b > splat(0.0f), nx / greater(n2, splat(kMinSum)), a), splat(0.0f));
    b = lesser(b, splat(0.0f));
    const VF score = 2.0f * (a * nx + b * total) - ((a * a * n2 + 2.0f * a * b * n1) + count * b * b);
    const VI better = score > best;
    best = pick(better, score, best);
    found = {pick(better, a, found.scale), pick(better, b, found.minimum)};
  }
  return found;
}

// Nibbles (low 4 bits of q[k], columns 8c + j and 8c + 4 + j in one byte) and, above them, the bits from 4 on.
template <int kBits>
INLINE void store_levels(const VI q[kGroup], int first, uint8_t* tile) {
  for (int c = 0; c < 4; ++c) {
    VI word = VI{};
    for (int j = 0; j < 4; ++j) word |= ((q[8 * c + j] & 15) | ((q[8 * c + 4 + j] & 15) << 4)) << (8 * j);
    store(tile + 64 * c + 4 * first, word);
  }
  constexpr int kHigh = kBits - 4, kPer = kHigh ? 8 / kHigh : 0;  // bits of a column, chunks of four columns per byte
  for (int b = 0; b < kHigh; ++b) {
    VI word = VI{};
    for (int i = 0; i < kPer; ++i)
      for (int j = 0; j < 4; ++j) word |= (q[4 * (kPer * b + i) + j] >> 4) << (8 * j + kHigh * i);
    store(tile + 64 * (4 + b) + 4 * first, word);
  }
}

template <FloatType T, bool kWeighted>
INLINE bool w4m32_rows(const GroupRows& rows, int first, const float* h, uint8_t* tile, uint16_t* s, uint16_t* m) {
  VF x[kGroup], inverse;
  VI top;
  load_transposed<T>(rows, first, x);
  const VF amax = normalise(x, kGroup, top, inverse);
  const Affine found = affine<15, kWeighted>(x, h);
  const VU scale = float_to_half(lesser(found.scale * amax, splat(kMaxScale)));
  const VU minimum = float_to_half(greater(found.minimum * amax, splat(-kMaxScale)) + 0.0f);
  store(s + first, __builtin_convertvector(scale, VH));
  store(m + first, __builtin_convertvector(minimum, VH));
  const VF low = half_to_float(minimum) * inverse, step = reciprocal(half_to_float(scale) * inverse);
  VI q[kGroup];
  for (int k = 0; k < kGroup; ++k) q[k] = __builtin_convertvector(level(x[k], low, step, 15.0f), VI);
  store_levels<4>(q, first, tile);
  return all_finite(top);
}

// Of the integers around the wanted scale and minimum, in units of d and dmin, the pair with the smallest error.
template <int kTop, bool kWeighted>
INLINE Affine best_neighbours(const VF x[kGroup], const float* h, Affine wanted, VF d, VF dmin, VF inverse) {
  const auto below = [](VF v) {
    return __builtin_convertvector(__builtin_convertvector(clamp(v, 0.0f, 63.0f), VI), VF);
  };
  const VF s0 = below(wanted.scale), m0 = below(wanted.minimum);
  VF best = splat(__builtin_inff());
  Affine chosen{s0, m0};
  for (int up = 0; up < 4; ++up) {
    const VF s = lesser(s0 + float(up & 1), splat(63.0f)), m = lesser(m0 + float(up >> 1), splat(63.0f));
    const VF step = (s * d) * inverse, low = (m * dmin) * inverse, reciprocal_step = reciprocal(step);
    VF error = splat(0);
    for (int k = 0; k < kGroup; ++k) {
      const VF difference = (level(x[k], -low, reciprocal_step, float(kTop)) * step - low) - x[k];
      error = error + weigh<kWeighted>(difference, h[k]) * difference;
    }
    const VI better = error < best;
    best = pick(better, error, best);
    chosen = {pick(better, s, chosen.scale), pick(better, m, chosen.minimum)};
  }
  return chosen;
}

INLINE VU half_of(VF largest, float levels) { return float_to_half(lesser(largest / levels + 0.0f, splat(kMaxScale))); }

// Where the output of super block b of tile i lies, for rows `first` on.
struct SuperPlace {
  int first, groups;  // groups: fewer in the last super block
  uint8_t *tiles, *pairs;
  uint16_t* supers;
  const float* h;  // of its 256 columns
};

template <FloatType T, int kBits, bool kWeighted>
INLINE bool affine_super(const GroupRows rows[kSuper], const SuperPlace& at) {
  constexpr int kTop = (1 << kBits) - 1;
  VF x[kSuper][kGroup], inverse[kSuper];
  Affine fitted[kSuper];
  VF largest = splat(0), lowest = splat(0);
  VI any = VI{};
  for (int g = 0; g < at.groups; ++g) {
    VI top;
    load_transposed<T>(rows[g], at.first, x[g]);
    const VF amax = normalise(x[g], kGroup, top, inverse[g]);
    any = greater(any, top);
    const Affine found = affine<kTop, kWeighted>(x[g], at.h + g * kGroup);
    fitted[g] = {found.scale * amax, -found.minimum * amax};
    largest = greater(fitted[g].scale, largest);
    lowest = greater(fitted[g].minimum, lowest);
  }
  const VU half = half_of(largest, 63.0f), half_min = half_of(lowest, 63.0f);
  store(at.supers + at.first, __builtin_convertvector(half, VH));
  store(at.supers + kRows + at.first, __builtin_convertvector(half_min, VH));
  const VF d = half_to_float(half), dmin = half_to_float(half_min), over = reciprocal(d), over_min = reciprocal(dmin);
  for (int g = 0; g < at.groups; ++g) {
    const Affine wanted{fitted[g].scale * over, fitted[g].minimum * over_min};
    const Affine pair = best_neighbours<kTop, kWeighted>(x[g], at.h + g * kGroup, wanted, d, dmin, inverse[g]);
    const VF low = -((pair.minimum * dmin) * inverse[g]), step = reciprocal((pair.scale * d) * inverse[g]);
    VI q[kGroup];
    for (int k = 0; k < kGroup; ++k) q[k] = __builtin_convertvector(level(x[g][k], low, step, float(kTop)), VI);
    store_levels<kBits>(q, at.first, at.tiles + g * kBits * 64);
    uint8_t* pairs = at.pairs + g * 2 * kRows + at.first;
    store(pairs, __builtin_convertvector(__builtin_convertvector(pair.scale, VI), VB));
    store(pairs + kRows, __builtin_convertvector(__builtin_convertvector(pair.minimum, VI), VB));
  }
  return all_finite(any);
}

template <bool kWeighted>
INLINE VF q6_scale(const VF x[kGroup / 2], const float* h) {
  VF best = splat(-1.0f), scale = splat(0.0f);
  for (int f = 0; f < kQ6Factors; ++f)
    for (int sign = 1; sign >= -1; sign -= 2) {
      const float factor = float(sign) * (kFirstQ6Factor + float(f));
      VF a = splat(0), b = splat(0);
      for (int k = 0; k < kGroup / 2; ++k) {
        const VF q = round_even(clamp(x[k] * factor, -32.0f, 31.0f));
        a = a + weigh<kWeighted>(x[k], h[k]) * q;
        b = b + weigh<kWeighted>(q, h[k]) * q;
      }
      keep_better(a, b, 1.0f, best, scale);
    }
  return scale;
}

template <FloatType T, bool kWeighted>
INLINE bool q6k_super(const GroupRows rows[kSuper], const SuperPlace& at) {
  constexpr int kHalf = kGroup / 2;
  VF x[kSuper][kGroup], inverse[2 * kSuper], scale[2 * kSuper];
  VF largest = splat(0);
  VI any = VI{};
  for (int g = 0; g < at.groups; ++g) {
    load_transposed<T>(rows[g], at.first, x[g]);
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * g + half;
      VI top;
      const VF amax = normalise(x[g] + half * kHalf, kHalf, top, inverse[i]);
      any = greater(any, top);
      scale[i] = q6_scale<kWeighted>(x[g] + half * kHalf, at.h + i * kHalf) * amax;
      largest = greater((VF)magnitude(scale[i]), largest);
    }
  }
  const VU super = half_of(largest, 127.0f);
  store(at.supers + at.first, __builtin_convertvector(super, VH));
  const VF d = half_to_float(super), over = reciprocal(d);
  for (int g = 0; g < at.groups; ++g) {
    VI q[kGroup];
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * g + half;
      const VF s = round_even(clamp(scale[i] * over, -127.0f, 127.0f)), step = reciprocal((d * s) * inverse[i]);
      for (int k = half * kHalf; k < (half + 1) * kHalf; ++k)
        q[k] = __builtin_convertvector(round_even(clamp(x[g][k] * step, -32.0f, 31.0f)), VI) + 32;
      store(at.pairs + (2 * g + half) * kRows + at.first,
            __builtin_convertvector(__builtin_convertvector(s, VI) & 255, VB));
    }
    store_levels<6>(q, at.first, at.tiles + g * 6 * 64);
  }
  return all_finite(any);
}

// Every super block of tiles begin..end-1.
template <FloatType T, int kBits, bool kWeighted>
INLINE bool super_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup, k256 = (k32 + kSuper - 1) / kSuper;
  constexpr int kSupers = kBits == 6 ? 1 : 2;
  bool good = true;
  GroupRows rows[kSuper];
  float h[kSuper * kGroup];
  for (int64_t i = begin; i < end; ++i)
    for (int64_t b = 0; b < k256; ++b) {
      const int64_t t = i * k32 + b * kSuper;
      SuperPlace at{0,
                    int(k32 - b * kSuper < kSuper ? k32 - b * kSuper : kSuper),
                    a.packed + t * kBits * 64,
                    static_cast<uint8_t*>(a.scale) + t * 2 * kRows,
                    a.half + (i * k256 + b) * kSupers * kRows,
                    h};
      for (int g = 0; g < at.groups; ++g) {
        find_group<T>(a, i, b * kSuper + g, rows[g]);
        column_weights<kWeighted>(a, b * kSuper + g, h + g * kGroup);
      }
      for (; at.first < kRows; at.first += kLanes) {
        if constexpr (kBits == 6) {
          good &= q6k_super<T, kWeighted>(rows, at);
        } else {
          good &= affine_super<T, kBits, kWeighted>(rows, at);
        }
      }
    }
  return good;
}

template <FloatType T, bool kWeighted>
INLINE bool w4m32_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  uint16_t* minima = a.half;
  return grouped_tiles<T, 256, kWeighted>(
      a, begin, end, [&](const GroupRows& rows, int first, const float* h, uint8_t* tile, uint16_t* scales) {
        const auto t = scales - static_cast<uint16_t*>(a.scale);
        return w4m32_rows<T, kWeighted>(rows, first, h, tile, scales, minima + t);
      });
}

// Sums over one group of kLanes rows of a k-quant or of w4m32 (kBits 0: four bits, and a minimum of its own).
template <FloatType T, int kBits>
INLINE void kquant_noise(const QuantizeArgs& a, const GroupRows& rows, int64_t i, int64_t g, int first,
                         unicorn::Noise& total) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup, t = i * k32 + g;
  const int64_t super = i * ((k32 + kSuper - 1) / kSuper) + g / kSuper;
  const auto half = [&](const uint16_t* p) { return half_to_float(__builtin_convertvector(load<VH>(p + first), VU)); };
  const auto byte = [&](int part) {
    const uint8_t* p = static_cast<const uint8_t*>(a.scale) + (t * 2 + part) * kRows + first;
    const VI v = __builtin_convertvector(load<VB>(p), VI);
    return __builtin_convertvector(kBits == 6 ? (v ^ 128) - 128 : v, VF);
  };
  VF step[2], minimum = splat(0);
  if constexpr (kBits == 0) {
    step[0] = step[1] = half(static_cast<const uint16_t*>(a.scale) + t * kRows);
    minimum = half(a.half + t * kRows);
  } else if constexpr (kBits == 6) {
    const VF d = half(a.half + super * kRows);
    step[0] = d * byte(0), step[1] = d * byte(1);
  } else {
    step[0] = step[1] = half(a.half + super * 2 * kRows) * byte(0);
    minimum = -(half(a.half + (super * 2 + 1) * kRows) * byte(1));
  }
  constexpr int kStored = kBits ? kBits : 4, kHigh = kStored - 4, kPer = kHigh ? 8 / kHigh : 1;
  const uint8_t* tile = a.packed + t * kStored * 64 + 4 * first;
  VF x[kGroup];
  load_transposed<T>(rows, first, x);
  GroupNoise sums;
  for (int k = 0, columns = columns_of(a, g); k < columns; ++k) {
    VI q = (load<VI>(tile + 64 * (k / 8)) >> (8 * (k % 4) + (k % 8 < 4 ? 0 : 4))) & 15;
    if constexpr (kHigh > 0) {
      const int c = k / 4;
      const VI word = load<VI>(tile + 64 * (4 + c / kPer)) >> (8 * (k % 4) + kHigh * (c % kPer));
      q |= (word & ((1 << kHigh) - 1)) << 4;
    }
    if constexpr (kBits == 6) q -= 32;
    sums.add(x[k], __builtin_convertvector(q, VF) * step[k / (kGroup / 2)] + minimum);
  }
  sums.flush(total);
}

template <FloatType T, int kBits>
unicorn::Noise kquant_noise_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup;
  unicorn::Noise total;
  GroupRows rows;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < k32; ++g) {
      find_group<T>(a, i, g, rows);
      for (int first = 0; first < kRows; first += kLanes) kquant_noise<T, kBits>(a, rows, i, g, first, total);
    }
  return total;
}
