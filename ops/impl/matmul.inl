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
  constexpr bool kPerRow = S == Scheme::w8c || S == Scheme::w8a;
  const vf row_scale = kPerRow ? load(static_cast<const float*>(w.scale) + tile * kRows) : set(1.0f);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store(out + kRows * t, kPerRow ? mul(sum[t], row_scale) : sum[t]);
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

// Tokens whose activations stay in half of a 1 MiB L2 while all weights pass by.
INLINE int64_t chunk_tokens(const Activations& a) {
  const int64_t fit = (512 << 10) / (a.groups * kGroup) / kBlock * kBlock;
  return fit < kBlock ? kBlock : fit;
}

INLINE vf with_bias(const float* y, const Array& bias, int64_t row, int64_t n) {
  return bias.data == nullptr ? load(y) : add(load(y), load16(bias, row, n - row));
}

void linear(const LinearArgs& p, Range tiles) {
  alignas(64) float y[kBlock * kRows];
  const int64_t chunk = chunk_tokens(p.a);
  for (int64_t begin = 0; begin < p.a.rows; begin += chunk) {
    const int64_t end = begin + chunk < p.a.rows ? begin + chunk : p.a.rows;
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const int64_t row = tile * kRows;
      for (int64_t m = begin; m < end; m += kBlock) {
        const int64_t tokens = multiply(p.w, tile, p.a, m, y);
        for (int64_t t = 0; t < tokens; ++t) {
          store16(p.out, (m + t) * p.stride + row, with_bias(y + t * kRows, p.bias, row, p.w.n), p.w.n - row);
        }
      }
    }
  }
}

// act(gate) * up for 32 rows of both weights and one block of tokens: one group of the next activations.
void gate_block(const GateArgs& p, int64_t group, int64_t m) {
  alignas(64) float gate[kBlock * kRows], up[kBlock * kRows], product[kBlock * kGroup] = {};
  const int64_t tiles = (p.gate.n + kRows - 1) / kRows;
  int64_t tokens = 0;
  for (int64_t tile = 2 * group; tile < 2 * group + 2 && tile < tiles; ++tile) {
    const int64_t row = tile * kRows;
    tokens = multiply(p.gate, tile, p.a, m, gate);
    multiply(p.up, tile, p.a, m, up);
    for (int64_t t = 0; t < tokens; ++t) {
      const vf g = with_bias(gate + t * kRows, p.gate_bias, row, p.gate.n);
      const vf u = with_bias(up + t * kRows, p.up_bias, row, p.up.n);
      store(product + t * kGroup + row % kGroup, mul(activate(p.act, g), u));
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Token(p.out, m + t).quantize(group, load(product + t * kGroup), load(product + t * kGroup + kRows));
  }
}

void gate(const GateArgs& p, Range groups) {
  const int64_t chunk = chunk_tokens(p.a);
  for (int64_t begin = 0; begin < p.a.rows; begin += chunk) {
    const int64_t end = begin + chunk < p.a.rows ? begin + chunk : p.a.rows;
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      for (int64_t m = begin; m < end; m += kBlock) gate_block(p, group, m);
    }
  }
}
