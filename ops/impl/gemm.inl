// Two tiles times many tokens. Below, each activation that is broadcast serves two products: on Golden Cove vpdpbusd
// runs at 80 % of its peak with the broadcast as an operand, at 90 % with one broadcast for two, at 60 % with the
// weights as the operand. Weights of 4 bits are unpacked once for all tokens. The FFN of Gemma 3 1B and 4B for 512
// tokens is 2 to 5 % faster than tile by tile (best of 6 in ABBA order, two Sapphire Rapids cores), w8c 12 %; the bits
// are the same. Only for instruction sets with 32 registers.

struct Tile {
  const Weight& w;
  int64_t index;
};

#ifdef UNICORN_AVX512

constexpr int64_t kDepth = 32;  // groups unpacked at a time: two tiles take 36 KB
// Twelve dot products and twelve sums leave registers for the weights; with 8 tokens the sums go to the stack and back.
constexpr int kPairTokens = 6;

// Some groups of a tile, 8 bits per value.
struct Unpacked {
  const uint8_t* q;  // the weight's own bytes where it has 8 bits, and they are not wanted signed
  alignas(64) uint8_t bytes[kDepth * kW8GroupBytes];
  alignas(64) float scale[kDepth * kRows];

  template <Scheme S, bool kSigned>
  void fill(const Tile& t, int64_t groups, Range part) {
    const int64_t first = t.index * groups + part.begin, count = part.end - part.begin;
    constexpr bool own = !kSigned && S != Scheme::w4g32 && S != Scheme::w4n32;
    q = own ? t.w.q + first * group_bytes(S) : bytes;
    const Codebook codebook = S == Scheme::w4n32 ? load_codebook(t.w.codebook) : Codebook{};
    const auto* scales = static_cast<const uint16_t*>(t.w.scale);
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* p = t.w.q + (first + g) * group_bytes(S);
      uint8_t* to = bytes + g * kW8GroupBytes;
      if (!own) {  // the next part, for when all tokens have passed over this one: 1 % of the FFN on Zen 5
        for (int64_t i = 0; i < group_bytes(S); i += 64) __builtin_prefetch(p + count * group_bytes(S) + i, 0, 2);
        if (scaled(S)) __builtin_prefetch(scales + (first + g + count) * kRows, 0, 2);
      }
      if (S == Scheme::w4g32) store_group(to, load4(p).v, kSigned ? 8 : 0);
      if (S == Scheme::w4n32) store_group(to, look_up(p, codebook, to).v, kSigned ? 128 : 0);
      if (S != Scheme::w4g32 && S != Scheme::w4n32 && kSigned) store_group(to, load8(p).v, 128);
      if (scaled(S)) store(scale + g * kRows, load_f16(scales + (first + g) * kRows));
    }
  }
};

// out [T][2][16] += some groups of two tiles times T tokens.
template <Scheme S, int T>
void two_times(const Unpacked* w, const vi* zero_point, Cursor a, int64_t groups, float* out) {
  vf sum[2 * T];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * T; ++i) sum[i] = load(out + kRows * i);
  for (int64_t g = 0; g < groups; ++g, a.next()) {
    // Behind the last group it is what another tile or nobody reads: no harm. Zen 5 is 1 % faster without.
    if (prefetch.far != 0) prefetch_activations<T>(a, 6);
    vi dot[2 * T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        dot[2 * t + r] = S == Scheme::w4g32 ? broadcast(a.sum8[t])
                         : S == Scheme::w8a ? dot8_offset<false>(zero_point[r], a.sum8[t])
                                            : dot8_offset<true>(zero_point[r], a.sum8[t]);
      }
    }
    dots_two<T>(w[0].q + g * kW8GroupBytes, w[1].q + g * kW8GroupBytes, a.q, dot);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const vf a_scale = set(a.scale[t]);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        vf& to = sum[2 * t + r];
        const vf y = to_float(dot[2 * t + r]);
        to = scaled(S) ? fma(mul(y, a_scale), load(w[r].scale + g * kRows), to) : fma(y, a_scale, to);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * T; ++i) store(out + kRows * i, sum[i]);
}

// A token and those after it in its block, from a group on.
INLINE Cursor cursor_at(const Token& t, int64_t group) {
  const int64_t skip = group * t.stride;
  return {t.q + skip * kGroup, t.scale + skip, t.sum8 + skip, t.stride};
}

// The tokens of a part of the groups, some at a time.
template <Scheme S>
void add_products(const Unpacked* w, const vi* zero_point, const Activations& a, Range part, Range tokens, float* out) {
  for (int64_t m = tokens.begin; m < tokens.end;) {
    const Token token(a, m);
    const int64_t left = token.stride - m % kBlock;
    const Cursor cursor = cursor_at(token, part.begin);
    float* to = out + (m - tokens.begin) * 2 * kRows;
    const int64_t n = part.end - part.begin;
    if (left >= kPairTokens) {
      two_times<S, kPairTokens>(w, zero_point, cursor, n, to);
      m += kPairTokens;
    } else if (left >= 4) {
      two_times<S, 4>(w, zero_point, cursor, n, to);
      m += 4;
    } else {
      two_times<S, 1>(w, zero_point, cursor, n, to);
      m += 1;
    }
  }
}

#ifdef UNICORN_AMX

template <Scheme S>
constexpr bool on_tiles = S != Scheme::w8a;  // value - zero point takes nine bits

template <Scheme S>
void add_on_tiles(TileRegisters& tiles, const Unpacked* w, const Activations& a, Range part, Range tokens, float* out) {
  const uint8_t* q[2] = {w[0].q, w[1].q};
  const float* scales[2] = {w[0].scale, w[1].scale};
  for (int64_t m = tokens.begin; m < tokens.end;) {
    const Cursor one = cursor_at(Token(a, m), part.begin);
    float* to = out + (m - tokens.begin) * 2 * kRows;
    m += one.stride;
    if (m < tokens.end) {
      const Cursor other = cursor_at(Token(a, m), part.begin);
      tiles.shape(one.stride, other.stride);
      tile_products<scaled(S), true>(q, scales, one, other, part.end - part.begin, to);
      m += other.stride;
    } else {
      tiles.shape(one.stride, 0);
      tile_products<scaled(S), false>(q, scales, one, one, part.end - part.begin, to);
    }
  }
}

#else

template <Scheme S>
constexpr bool on_tiles = false;

struct TileRegisters {};

template <Scheme S>
void add_on_tiles(TileRegisters&, const Unpacked*, const Activations&, Range, Range, float*) {}

#endif

template <Scheme S>
void multiply_two(const Tile* tiles, const Activations& a, Range tokens, float* out) {
  Unpacked w[2];
  vi zero_point[2];
  TileRegisters registers;
  for (int r = 0; r < 2; ++r) {
    zero_point[r] = S == Scheme::w8a ? load_zero(tiles[r].w.zero + tiles[r].index * kRows) : middle_zero();
  }
  const int64_t count = (tokens.end - tokens.begin) * 2;
  for (int64_t i = 0; i < count; ++i) store(out + kRows * i, zero());
  const int64_t parts = (a.groups + kDepth - 1) / kDepth;  // of about the same size: 36 groups as 32 and 4 cost 1 %
  for (int64_t i = 0; i < parts; ++i) {
    const Range part{a.groups * i / parts, a.groups * (i + 1) / parts};
    for (int r = 0; r < 2; ++r) w[r].fill<S, on_tiles<S>>(tiles[r], a.groups, part);
    if (on_tiles<S>) {
      add_on_tiles<S>(registers, w, a, part, tokens, out);
    } else {
      add_products<S>(w, zero_point, a, part, tokens, out);
    }
  }
  if (scaled(S)) return;
  for (int64_t i = 0; i < count; ++i) {
    const Tile& tile = tiles[i % 2];
    const vf row_scale = load(static_cast<const float*>(tile.w.scale) + tile.index * kRows);
    store(out + kRows * i, mul(load(out + kRows * i), row_scale));
  }
}

// out [tokens][2][16] = two tiles times `tokens`, which begin with a block. False if that is not for this kernel.
bool multiply_two(const Tile& one, const Tile& other, const Activations& a, Range tokens, float* out) {
  if (tokens.end - tokens.begin <= kBlock || one.w.scheme != other.w.scheme) return false;
  const Tile tiles[2] = {one, other};
  switch (one.w.scheme) {
    case Scheme::w4g32:
      multiply_two<Scheme::w4g32>(tiles, a, tokens, out);
      break;
    case Scheme::w8c:
      multiply_two<Scheme::w8c>(tiles, a, tokens, out);
      break;
    case Scheme::w8a:
      multiply_two<Scheme::w8a>(tiles, a, tokens, out);
      break;
    case Scheme::w4n32:
      multiply_two<Scheme::w4n32>(tiles, a, tokens, out);
      break;
    case Scheme::w8g32:
      multiply_two<Scheme::w8g32>(tiles, a, tokens, out);
      break;
    default:
      return false;
  }
  return true;
}

#else

bool multiply_two(const Tile&, const Tile&, const Activations&, Range, float*) { return false; }

#endif

// Tokens at a time: their activations pass once per two tiles, all weights once per chunk. With AVX-512 it pays to take
// many, whose weights are unpacked once, and to read activations from L3; without, half of a 1 MiB L2 is better.
constexpr int64_t kMostTokens = 512;
#if defined(UNICORN_AMX)
constexpr int64_t kActivationBytes = 1 << 20;
#elif defined(UNICORN_AVX512)
constexpr int64_t kActivationBytes = 4 << 20;
#else
constexpr int64_t kActivationBytes = 512 << 10;
#endif
// Chunks of about the same size: 528 tokens as 512 and 16 would unpack all weights for the 16.
INLINE int64_t chunk_tokens(const Activations& a) {
  const int64_t fit = kActivationBytes / (a.groups * kGroup);
  const int64_t most = fit < kBlock ? kBlock : fit > kMostTokens ? kMostTokens : fit / kBlock * kBlock;
  const int64_t chunks = a.rows > most ? (a.rows + most - 1) / most : 1;
  const int64_t each = (a.rows + chunks * kBlock - 1) / (chunks * kBlock) * kBlock;
  return each < kBlock ? kBlock : each;
}

INLINE vf with_bias(const float* y, const Array& bias, int64_t row, int64_t n) {
  return bias.data == nullptr ? load(y) : add(load(y), load16(bias, row, n - row));
}

// out [tokens][16] = one tile times `tokens`, block by block.
INLINE void multiply(const Tile& tile, const Activations& a, Range tokens, float* out) {
  for (int64_t m = tokens.begin; m < tokens.end;)
    m += multiply(tile.w, tile.index, a, m, out + (m - tokens.begin) * kRows);
}

// 64 bytes to memory without the cache: `to` is aligned. A store that misses L2 while weights stream by costs as much
// as reading four or five lines; 8 tokens times 4-bit weights ran at 20.6 GB/s with plain stores, 23.5 with these, 24.5
// with none (two Sapphire Rapids cores).
INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
  }
#else
  __builtin_memcpy(to, from, 64);
#endif
}

INLINE void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Elements [index, index + 32), of which `count` exist; past the caches where `past` and whole lines are filled.
INLINE void store32(const Out& out, int64_t index, vf x, vf y, int64_t count, bool past) {
  const int64_t size = out.dtype == DType::f32 ? 4 : 2;
  auto* to = static_cast<uint8_t*>(out.data) + index * size;
  if (!past || count < 2 * kRows || reinterpret_cast<uintptr_t>(to) % 64 != 0) {
    store16(out, index, x, count);
    if (count > kRows) store16(out, index + kRows, y, count - kRows);
    return;
  }
  alignas(64) uint8_t lines[128];
  const Out local{lines, out.dtype};
  store16(local, 0, x, kRows);
  store16(local, kRows, y, kRows);
  stream_line(to, lines);
  if (size == 4) stream_line(to + 64, lines + 64);
}

void linear(const LinearArgs& p, Range tiles) {
  alignas(64) float y[kMostTokens * 2 * kRows];
  const int64_t chunk = chunk_tokens(p.a);
  const bool past = p.a.rows <= kBlock;
  for (int64_t begin = 0; begin < p.a.rows; begin += chunk) {
    const Range tokens{begin, begin + chunk < p.a.rows ? begin + chunk : p.a.rows};
    const int64_t count = tokens.end - tokens.begin;
    for (int64_t tile = tiles.begin, done; tile < tiles.end; tile += done) {
      done = tile % 2 == 0 && tile + 1 < tiles.end ? 2 : 1;
      int64_t step = 2 * kRows, other = kRows;  // from token to token, and from tile to tile
      if (done == 1 || !multiply_two({p.w, tile}, {p.w, tile + 1}, p.a, tokens, y)) {
        step = kRows;
        other = count * kRows;
        multiply({p.w, tile}, p.a, tokens, y);
        if (done == 2) multiply({p.w, tile + 1}, p.a, tokens, y + other);
      }
      const int64_t row = tile * kRows;
      for (int64_t t = 0; t < count; ++t) {
        const float* from = y + t * step;
        const int64_t index = (begin + t) * p.stride + row;
        const vf first = with_bias(from, p.bias, row, p.w.n);
        if (done == 1) {
          store16(p.out, index, first, p.w.n - row);
        } else {
          store32(p.out, index, first, with_bias(from + other, p.bias, row + kRows, p.w.n), p.w.n - row, past);
        }
      }
    }
  }
  if (past) stream_end();
}

// act(gate) * up for 32 rows of both weights and some tokens: one group of the next activations.
void gate_group(const GateArgs& p, int64_t group, Range tokens) {
  alignas(64) float y[kMostTokens * 2 * kRows], product[kMostTokens * kGroup];
  const int64_t tiles = (p.gate.n + kRows - 1) / kRows, count = tokens.end - tokens.begin;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t tile = 2 * group + half, row = tile * kRows;
    if (tile >= tiles) {
      for (int64_t t = 0; t < count; ++t) store(product + t * kGroup + kRows, zero());
      continue;
    }
    const float* up = y + kRows;
    int64_t step = 2 * kRows;
    if (!multiply_two({p.gate, tile}, {p.up, tile}, p.a, tokens, y)) {
      up = y + count * kRows;
      step = kRows;
      multiply({p.gate, tile}, p.a, tokens, y);
      multiply({p.up, tile}, p.a, tokens, y + count * kRows);
    }
    for (int64_t t = 0; t < count; ++t) {
      const vf g = with_bias(y + t * step, p.gate_bias, row, p.gate.n);
      const vf u = with_bias(up + t * step, p.up_bias, row, p.up.n);
      store(product + t * kGroup + half * kRows, mul(activate(p.act, g), u));
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const float* from = product + t * kGroup;
    Token(p.out, tokens.begin + t).quantize(group, load(from), load(from + kRows));
  }
}

void open_gate_group(const OpenGateArgs& p, int64_t group, Range tokens) {
  alignas(64) float y[kMostTokens * 2 * kRows], product[kMostTokens * kGroup];
  const int64_t n = p.up.n, tiles = (n + kRows - 1) / kRows, count = tokens.end - tokens.begin;
  bool open[2] = {false, false};
  for (int64_t t = 0; t < count; ++t) {
    const float* gate = p.gate + (tokens.begin + t) * n;
    const vf threshold = set(p.threshold[tokens.begin + t]);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t tile = 2 * group + half;
      const vf above = tile < tiles ? max(zero(), sub(load(gate + tile * kRows), threshold)) : zero();
      store(product + t * kGroup + half * kRows, above);
      open[half] |= amax(above, above) != 0;
    }
  }
  int64_t step = 2 * kRows, other = kRows;
  if (!(open[0] && open[1] && multiply_two({p.up, 2 * group}, {p.up, 2 * group + 1}, p.a, tokens, y))) {
    step = kRows;
    other = count * kRows;
    for (int64_t half = 0; half < 2; ++half) {
      if (open[half]) multiply({p.up, 2 * group + half}, p.a, tokens, y + half * other);
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    if (!open[half]) continue;
    const int64_t row = (2 * group + half) * kRows;
    for (int64_t t = 0; t < count; ++t) {
      float* to = product + t * kGroup + half * kRows;
      store(to, mul(activate(p.act, load(to)), with_bias(y + half * other + t * step, p.up_bias, row, n)));
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const float* from = product + t * kGroup;
    Token(p.out, tokens.begin + t).quantize(group, load(from), load(from + kRows));
  }
}

template <class Args>
void by_chunks(const Args& p, Range groups, void (*one)(const Args&, int64_t, Range)) {
  const int64_t chunk = chunk_tokens(p.a);
  for (int64_t begin = 0; begin < p.a.rows; begin += chunk) {
    const Range tokens{begin, begin + chunk < p.a.rows ? begin + chunk : p.a.rows};
    for (int64_t group = groups.begin; group < groups.end; ++group) one(p, group, tokens);
  }
}

void open_gate(const OpenGateArgs& p, Range groups) { by_chunks(p, groups, &open_gate_group); }

void gate(const GateArgs& p, Range groups) { by_chunks(p, groups, &gate_group); }
