// Quantized activations times packed weights: 16 rows of the weight against up to kMaxTokens tokens at a time.
// Per group the 32 products add up in int32, exactly; the groups add up in fp32 in ascending order.

// How far ahead of the current group, and into which cache, weights are prefetched. Decode of w4g32 on one Zen 5 core
// reads 23-28 GB/s with 2048 bytes into L1, 31-35 with 4096, 27-38 with 8192 (a core reads at most 38). On two of them
// the FFN of the 1B runs at 0.97 of a plain read with 4096 as with 8192 where that reads 51 GB/s; in memory where it
// reads 79 (of longer latency: which one a process gets is the host's choice) at 0.83 and 0.87. Two Sapphire
// Rapids cores, of at most 34.7 GB/s: w4g32 29.3 with 2048 into L2, 30.6 with 3072, 30.2 with 1024 into L1 besides;
// w8a 30.9, and 32.2 with 1024 into L1 besides (L1 has 16 lines under way, L2 48). The choice is in dispatch.cpp. A
// distance of 0 prefetches what is there: a test instead costs 3 % with one token, 10 % with 8. Near ones are
// non-temporal: a weight is read once per step, and what the caches hold else (the KV cache, tensors, Python) stays
// there. Two Zen 5 cores read as fast that way (53 GB/s either way), and afterwards a line of a set of 384 KB costs
// 14-20 ns instead of 30-70: 3 to 5 % less per token of the 1B. (Non-temporal *from memory* halves the speed on
// Sapphire Rapids; there the far prefetch has brought the line into L2 before.)
INLINE void prefetch_group(const uint8_t* p, int64_t bytes) {
  const int64_t near = bytes == kW8GroupBytes ? prefetch.near8 : prefetch.near;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + prefetch.far + i, 0, 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + near + i, 0, 0);
}

// The activations of tokens [t, t + T) of a block, group by group.
struct Cursor {
  const int8_t* q;
  const float* scale;
  const int32_t* sum8;
  int64_t stride;

  INLINE void skip(int64_t groups) {
    q += groups * stride * kGroup;
    scale += groups * stride;
    sum8 += groups * stride;
  }
  INLINE void next() { skip(1); }
};

// Weights that stream by push activations out of L1, and their copies in L2 are the oldest ones there: without this,
// 8 tokens took 33 ns per group of cold w4g32, with it 31 (20 from L1). `groups` is how far ahead, or back.
template <int T>
INLINE void prefetch_activations(const Cursor& a, int64_t groups) {
  for (int64_t i = 0; i < T * kGroup; i += 64) __builtin_prefetch(a.q + groups * a.stride * kGroup + i);
  __builtin_prefetch(a.scale + groups * a.stride);
  __builtin_prefetch(a.sum8 + groups * a.stride);
}

// Tokens whose products are interleaved: a divisor of T, at most kInterleaved.
template <int T>
constexpr int together() {
  int best = 1;
  for (int t = 2; t <= kInterleaved && t <= T; ++t) best = T % t == 0 ? t : best;
  return best;
}

template <int T>
INLINE void add_group4(const uint8_t* p, const uint16_t* scales, const Cursor& a, vf* sum) {
  constexpr int U = together<T>();
  const Group4 w = load4(p);
  const vf scale = load_f16(scales);
#pragma GCC unroll 16
  for (int t = 0; t < T; t += U) {
    vi dot[U];
    dots4<U>(w, a.q + kGroup * t, a.sum8 + t, dot);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum[t + u] = fma(mul(to_float(dot[u]), set(a.scale[t + u])), scale, sum[t + u]);
  }
}

template <int T, bool kMiddle>
INLINE void add_group8(const Group8& w, vi zero_point, const Cursor& a, vf* sum) {
  constexpr int U = together<T>();
#pragma GCC unroll 16
  for (int t = 0; t < T; t += U) {
    vi dot[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) dot[u] = dot8_offset<kMiddle>(zero_point, a.sum8[t + u]);
    dots8<U>(w, a.q + kGroup * t, dot);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum[t + u] = fma(to_float(dot[u]), set(a.scale[t + u]), sum[t + u]);
  }
}

// 8-bit values of any origin, and a scale per group.
template <int T>
INLINE void add_scaled8(const Group8& w, const uint16_t* scales, const Cursor& a, vf* sum) {
  constexpr int U = together<T>();
  const vf scale = load_f16(scales);
#pragma GCC unroll 16
  for (int t = 0; t < T; t += U) {
    vi dot[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) dot[u] = dot8_offset<true>(middle_zero(), a.sum8[t + u]);
    dots8<U>(w, a.q + kGroup * t, dot);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum[t + u] = fma(mul(to_float(dot[u]), set(a.scale[t + u])), scale, sum[t + u]);
  }
}

// The same with a minimum per group: value = scale * q + minimum.
template <int T>
INLINE void add_minimum8(const Group8& w, vf scale, vf minimum, const Cursor& a, vf* sum) {
  constexpr int U = together<T>();
#pragma GCC unroll 16
  for (int t = 0; t < T; t += U) {
    vi dot[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) dot[u] = dot8_offset<true>(middle_zero(), a.sum8[t + u]);
    dots8<U>(w, a.q + kGroup * t, dot);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const float total = static_cast<float>(a.sum8[t + u] / -8);
      sum[t + u] = fma(mul(to_float(dot[u]), set(a.scale[t + u])), scale, sum[t + u]);
      sum[t + u] = fma(set(total * a.scale[t + u]), minimum, sum[t + u]);
    }
  }
}

INLINE int32_t sum16(const int8_t* q) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += q[i];
  return sum;
}

// q6k: each half group has an int8 scale. 2 * 128 * (16 * 32 * 127) stays below 2^24: exact as a float too.
template <int T>
INLINE void add_halves8(const Group8& w, const uint8_t* scales, vf super, const Cursor& a, vf* sum) {
  const vi first = load_i8(scales), second = load_i8(scales + kRows);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const int8_t* q = a.q + kGroup * t;
    const vi low = dot8_part<0>(w, q, dot8_offset<true>(middle_zero(), -8 * sum16(q)));
    const vi high = dot8_part<4>(w, q, dot8_offset<true>(middle_zero(), -8 * sum16(q + 16)));
    const vi dot = add(mul(low, first), mul(high, second));
    sum[t] = fma(mul(to_float(dot), set(a.scale[t])), super, sum[t]);
  }
}

// Where the scales of a group are. `group` counts from the beginning of the tile.
template <Scheme S, int T>
INLINE void add_kquant(const Weight& w, int64_t tile, int64_t group, int64_t groups, const uint8_t* p, uint8_t* buffer,
                       const Codebook& identity, const Cursor& a, vf* sum) {
  const int64_t g = tile * groups + group;
  const auto* pairs = static_cast<const uint8_t*>(w.scale) + g * 2 * kRows;
  const int64_t supers = (groups + kSuper - 1) / kSuper, super = tile * supers + group / kSuper;
  if constexpr (S == Scheme::w4m32) {
    const vf scale = load_f16(static_cast<const uint16_t*>(w.scale) + g * kRows);
    add_minimum8<T>(look_up(p, identity, buffer), scale, load_f16(w.extra + g * kRows), a, sum);
  } else if constexpr (S == Scheme::q6k) {
    add_halves8<T>(load6(p, buffer), pairs, load_f16(w.extra + super * kRows), a, sum);
  } else {
    const uint16_t* d = w.extra + super * 2 * kRows;
    const vf scale = mul(to_float(load_u8(pairs)), load_f16(d));
    const vf minimum = neg(mul(to_float(load_u8(pairs + kRows)), load_f16(d + kRows)));
    const Group8 values = S == Scheme::q4k ? look_up(p, identity, buffer) : load5(p, buffer);
    add_minimum8<T>(values, scale, minimum, a, sum);
  }
}

alignas(16) constexpr int8_t kIdentity[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <Scheme S>
constexpr bool kIsKquant = S == Scheme::w4m32 || S == Scheme::q4k || S == Scheme::q5k || S == Scheme::q6k;

// out [T][16] = one tile times T tokens.
template <Scheme S, int T>
void tile_times(const Weight& w, int64_t tile, Cursor a, int64_t groups, float* out) {
  const uint8_t* p = w.q + tile * groups * group_bytes(S);
  const auto* scales = static_cast<const uint16_t*>(w.scale) + tile * groups * kRows;
  const vi zero_point = S == Scheme::w8a ? load_zero(w.zero + tile * kRows) : middle_zero();
  const Codebook codebook = load_codebook(S == Scheme::w4n32 ? w.codebook : kIdentity);
  alignas(64) uint8_t buffer[kW8GroupBytes];  // of instruction sets with too few registers for a group
  vf sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = zero();
  for (int64_t g = 0; g < groups; ++g, a.next()) {
    prefetch_group(p, group_bytes(S));
    if (scaled(S)) __builtin_prefetch(scales + 16 * kRows, 0, 0);  // a tenth of the bytes
    if (T > 2) prefetch_activations<T>(a, g + 8 < groups ? 8 : 8 - groups);
    if constexpr (kIsKquant<S>) {
      add_kquant<S, T>(w, tile, g, groups, p, buffer, codebook, a, sum);
    } else if (S == Scheme::w4g32) {
      add_group4<T>(p, scales, a, sum);
      scales += kRows;
    } else if (S == Scheme::w4n32) {
      add_scaled8<T>(look_up(p, codebook, buffer), scales, a, sum);
      scales += kRows;
    } else if (S == Scheme::w8g32) {
      add_scaled8<T>(load8(p), scales, a, sum);
      scales += kRows;
    } else {
      add_group8<T, S == Scheme::w8c>(load8(p), zero_point, a, sum);
    }
    p += group_bytes(S);
  }
  const vf row_scale = scaled(S) ? set(1.0f) : load(static_cast<const float*>(w.scale) + tile * kRows);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(out + kRows * t, scaled(S) ? sum[t] : mul(sum[t], row_scale));
}

// The kernel for T tokens; only the sizes that fit the registers exist.
template <Scheme S>
INLINE void tile_times(int tokens, const Weight& w, int64_t tile, const Cursor& a, int64_t groups, float* out) {
  switch (tokens) {
    case 1:
      return tile_times<S, 1>(w, tile, a, groups, out);
    case 2:
      return tile_times<S, 2>(w, tile, a, groups, out);
    case 3:
      return tile_times<S, 3>(w, tile, a, groups, out);
    case 4:
      return tile_times<S, 4>(w, tile, a, groups, out);
    case 5:
      return tile_times < S, kMaxTokens<5 ? 4 : 5>(w, tile, a, groups, out);
    case 6:
      return tile_times < S, kMaxTokens<6 ? 4 : 6>(w, tile, a, groups, out);
    case 7:
      return tile_times < S, kMaxTokens<7 ? 4 : 7>(w, tile, a, groups, out);
    case 8:
      return tile_times < S, kMaxTokens<8 ? 4 : 8>(w, tile, a, groups, out);
    default:
      return tile_times<S, kMaxTokens>(w, tile, a, groups, out);
  }
}

// Schemes that files bring along: 1 or 4 tokens at a time, or as many as fit where the recipes use them. With every
// size for every scheme this would take several times as long to compile.
template <Scheme S, bool kWide>
INLINE void few_times(int tokens, const Weight& w, int64_t tile, const Cursor& a, int64_t groups, float* out) {
  if (kWide && tokens == kMaxTokens) return tile_times<S, kWide ? kMaxTokens : 4>(w, tile, a, groups, out);
  if (tokens == 4) return tile_times<S, 4>(w, tile, a, groups, out);
  return tile_times<S, 1>(w, tile, a, groups, out);
}

// How many of the next tokens one call takes.
INLINE int tokens_of(Scheme scheme, int64_t left) {
  const bool any = scheme == Scheme::w4g32 || scheme == Scheme::w8c || scheme == Scheme::w8a;
  const bool wide = scheme == Scheme::w4n32 || scheme == Scheme::w8g32;
  if ((any || wide) && left >= kMaxTokens) return kMaxTokens;
  if (any) return static_cast<int>(left > 8 ? 8 : left);
  return left >= 4 ? 4 : 1;
}

// out [tokens of the block][16] = one tile times one block of tokens. Returns how many tokens.
int64_t multiply(const Weight& w, int64_t tile, const Activations& a, int64_t first, float* out) {
  const Token block(a, first);
  int64_t t = 0;
  while (t < block.stride) {
    const int tokens = tokens_of(w.scheme, block.stride - t);
    const Cursor cursor{block.q + t * kGroup, block.scale + t, block.sum8 + t, block.stride};
    float* to = out + t * kRows;
    switch (w.scheme) {
      case Scheme::w4g32:
        tile_times<Scheme::w4g32>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w8c:
        tile_times<Scheme::w8c>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w8a:
        tile_times<Scheme::w8a>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w4n32:
        few_times<Scheme::w4n32, true>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w8g32:
        few_times<Scheme::w8g32, true>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w4m32:
        few_times<Scheme::w4m32, false>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::q4k:
        few_times<Scheme::q4k, false>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::q5k:
        few_times<Scheme::q5k, false>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::q6k:
        few_times<Scheme::q6k, false>(tokens, w, tile, cursor, a.groups, to);
        break;
    }
    t += tokens;
  }
  return block.stride;
}
