// Quantized activations times packed weights: 16 rows of the weight against up to kMaxTokens tokens at a time.
// Per group the 32 products add up in int32, exactly; the groups add up in fp32 in ascending order.

// How far ahead of the current group, and into which cache, weights are prefetched. Decode of w4g32 on one Zen 5 core
// reads 23-28 GB/s with 2048 bytes into L1, 31-35 with 4096, 27-38 with 8192 (a core reads at most 38). Two Sapphire
// Rapids cores read 28.6 GB/s with 1024 into L1, 29.3 with 2048, 30.6 with 3072 into L2, 29.9 with 512 into L1 and
// 3072 into L2 (at most 31.3 in that run): L1 has 16 lines under way, L2 48. The choice is in dispatch.cpp.
INLINE void prefetch_group(const uint8_t* p, int64_t bytes) {
  p += prefetch.ahead;
  if (prefetch.to_l1) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
  } else {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
}

// The activations of tokens [t, t + T) of a block, group by group.
struct Cursor {
  const int8_t* q;
  const float* scale;
  const int32_t* sum8;
  int64_t stride;

  INLINE void next() {
    q += stride * kGroup;
    scale += stride;
    sum8 += stride;
  }
};

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
INLINE void add_group8(const uint8_t* p, vi zero_point, const Cursor& a, vf* sum) {
  constexpr int U = together<T>();
  const Group8 w = load8(p);
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

// out [T][16] = one tile times T tokens.
template <Scheme S, int T>
void tile_times(const Weight& w, int64_t tile, Cursor a, int64_t groups, float* out) {
  const uint8_t* p = w.q + tile * groups * group_bytes(S);
  const auto* scales = static_cast<const uint16_t*>(w.scale) + tile * groups * kRows;
  const vi zero_point = S == Scheme::w8a ? load_zero(w.zero + tile * kRows) : middle_zero();
  const Codebook codebook = S == Scheme::w4n32 ? load_codebook(w.codebook) : Codebook{};
  alignas(64) uint8_t buffer[kW8GroupBytes];  // of instruction sets with too few registers for a group
  vf sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = zero();
  for (int64_t g = 0; g < groups; ++g, a.next()) {
    prefetch_group(p, group_bytes(S));
    if (S == Scheme::w4g32) {
      add_group4<T>(p, scales, a, sum);
      scales += kRows;
    } else if (S == Scheme::w4n32) {
      add_scaled8<T>(look_up(p, codebook, buffer), scales, a, sum);
      scales += kRows;
    } else if (S == Scheme::w8g32) {
      add_scaled8<T>(load8(p), scales, a, sum);
      scales += kRows;
    } else {
      add_group8<T, S == Scheme::w8c>(p, zero_point, a, sum);
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

// out [tokens of the block][16] = one tile times one block of tokens. Returns how many tokens.
int64_t multiply(const Weight& w, int64_t tile, const Activations& a, int64_t first, float* out) {
  const Token block(a, first);
  int64_t t = 0;
  while (t < block.stride) {
    const int64_t left = block.stride - t;
    const int tokens = static_cast<int>(left >= kMaxTokens ? kMaxTokens : left > 8 ? 8 : left);
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
        tile_times<Scheme::w4n32>(tokens, w, tile, cursor, a.groups, to);
        break;
      case Scheme::w8g32:
        tile_times<Scheme::w8g32>(tokens, w, tile, cursor, a.groups, to);
        break;
    }
    t += tokens;
  }
  return block.stride;
}
