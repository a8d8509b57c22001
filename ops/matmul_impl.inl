// The projections, written once. The including translation unit provides, in an anonymous namespace:
//   V (16 floats), I (16 int32), Bytes (64 bytes) and
//   V fma(V, V, V); I round_even(V); V half_to_float(const uint16_t*); void float_to_half(V, uint16_t*);
//   Bytes load_bytes(const uint8_t*); Bytes low_nibbles(Bytes); Bytes high_nibbles(Bytes);
//   Bytes broadcast4(const int8_t*);
//   I dot_nibbles(I, Bytes w, Bytes a); I dot_bytes(I, Bytes w, Bytes a);
//   kByteBias: dot_bytes multiplies by (byte - kByteBias).
// Lanes never mix outside `sum16`, so any width of register gives the same bits.
#include "matmul_api.h"

namespace {

using namespace unicorn;

typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef int8_t S8 __attribute__((vector_size(16)));
typedef uint8_t U8 __attribute__((vector_size(16)));

constexpr int kLanes = 16;
constexpr int kBlock = 4;          // tokens per register block: 2 tiles x 4 tokens of int32 and of fp32 sums
constexpr float kTiny = 1e-35f;    // a group whose largest value is below is zero: 127 / amax must stay finite
constexpr int kNibbleZeroShift = 3;  // the nibble 8 stands for 0
constexpr int kByteZero = 128;       // the byte that stands for 0 in w8c

template <typename T>
inline T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(T));
  return v;
}

template <typename T>
inline void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof(T));
}

inline V set1(float x) { return V{} + x; }
inline I set1i(int32_t x) { return I{} + x; }
inline V select(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
inline V vmax(V a, V b) { return select(a > b, a, b); }
inline V vmin(V a, V b) { return select(a < b, a, b); }
inline V vabs(V a) { return (V)((I)a & 0x7fffffff); }

// Pairwise: lanes 8 apart, then 4, 2, 1.
inline float sum16(V v) {
  float x[kLanes];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}

inline float max16(V v) {
  float x[kLanes];
  store(x, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
}

// --- loads and stores of rows -------------------------------------------------------------------

inline V load16(const void* x, DType type, int64_t at) {
  if (type == DType::f32) return load<V>(static_cast<const float*>(x) + at);
  const uint16_t* p = static_cast<const uint16_t*>(x) + at;
  if (type == DType::f16) return half_to_float(p);
  return (V)(__builtin_convertvector(load<H>(p), U) << 16);
}

inline void store16(V v, DType type, void* out, int64_t at) {
  if (type == DType::f32) return store(static_cast<float*>(out) + at, v);
  uint16_t* p = static_cast<uint16_t*>(out) + at;
  if (type == DType::f16) return float_to_half(v, p);
  const U bits = (U)v;
  const U even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (U)((V)bits != (V)bits);
  store(p, __builtin_convertvector((nan & 0x7fc0u) | (~nan & even), H));
}

inline int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

void load_row(const void* x, DType type, int64_t k, float* out) {
  const int64_t whole = k / kLanes * kLanes, padded = (k + kGroup - 1) / kGroup * kGroup;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load16(x, type, i));
  if (whole == padded) return;
  for (int64_t i = whole; i < padded; i += kLanes) {
    alignas(64) char tail[64] = {};
    const int64_t left = k - i > 0 ? k - i : 0, size = bytes_of(type);
    __builtin_memcpy(tail, static_cast<const char*>(x) + i * size, size_t(left * size));
    store(out + i, load16(tail, type, 0));
  }
}

void store_row(const float* x, int64_t n, DType type, void* out) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store16(load<V>(x + i), type, out, i);
  if (whole == n) return;
  alignas(64) float last[kLanes] = {};
  __builtin_memcpy(last, x + whole, size_t(n - whole) * sizeof(float));
  alignas(64) char tail[64];
  store16(load<V>(last), type, tail, 0);
  const int64_t size = bytes_of(type);
  __builtin_memcpy(static_cast<char*>(out) + whole * size, tail, size_t((n - whole) * size));
}

// --- row work -----------------------------------------------------------------------------------

void norm_row(float* x, int64_t k, float eps, const float* weight) {
  const int64_t padded = (k + kGroup - 1) / kGroup * kGroup;
  V total{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const V v = load<V>(x + i);
    total = fma(v, v, total);
  }
  const V inverse = set1(1.0f / __builtin_sqrtf(sum16(total) / float(k) + eps));
  for (int64_t i = 0; i < padded; i += kLanes) {
    V v = load<V>(x + i) * inverse;
    if (weight) v = v * load<V>(weight + i);
    store(x + i, v);
  }
}

inline void quantize_group(const float* x, const Rows& rows, int64_t token, int64_t g) {
  const V a = load<V>(x), b = load<V>(x + kLanes);
  const float amax = max16(vmax(vabs(a), vabs(b)));
  const bool zero = amax < kTiny;
  const V inverse = set1(zero ? 0.0f : 127.0f / amax);
  const I qa = round_even(a * inverse), qb = round_even(b * inverse);
  int8_t* q = rows.q + (token * rows.k32 + g) * kGroup;
  store(q, __builtin_convertvector(qa, S8));
  store(q + kLanes, __builtin_convertvector(qb, S8));
  int32_t lanes[kLanes], sum = 0;
  store(lanes, qa + qb);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  rows.scale[token * rows.k32 + g] = zero ? 0.0f : amax / 127.0f;
  rows.nsum[token * rows.k32 + g] = -sum;
}

void quantize_groups(const float* x, int64_t begin, int64_t end, const Rows& rows, int64_t token) {
  for (int64_t g = begin; g < end; ++g) quantize_group(x + g * kGroup, rows, token, g);
}

void rotate_row(float* x, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

void embed_row(const Weight& table, int64_t id, float* out) {
  const int64_t tile = id / kTileRows, r = id % kTileRows;
  const float scale = static_cast<const float*>(table.scale)[id];
  const float zero = table.zero ? float(table.zero[id]) : float(kByteZero);
  const uint8_t* w = table.w + tile * table.k32 * 512 + r * 4;
  for (int64_t c = 0; c < table.k32 * 8; ++c)
    for (int j = 0; j < 4; ++j) out[4 * c + j] = (float(w[c * 64 + j]) - zero) * scale;
}

// --- activations --------------------------------------------------------------------------------

// e^x for x clamped to [-87, 88]: 2^n * p(r), |r| <= ln2 / 2, degree 6; relative error below 2^-22.
inline V vexp(V x) {
  x = vmin(vmax(x, set1(-87.0f)), set1(88.0f));
  const I n = round_even(x * set1(1.44269504088896341f));
  const V f = __builtin_convertvector(n, V);
  V r = fma(f, set1(-0.693359375f), x);
  r = fma(f, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return p * (V)((n + 127) << 23);
}

// a * (1 - 1 / (e^2v + 1)) with v = sqrt(2 / pi) (a + 0.044715 a^3): no overflow for any a.
inline V gelu_tanh(V a) {
  const V v2 = a * fma(a * a, set1(2 * 0.7978845608f * 0.044715f), set1(2 * 0.7978845608f));
  return a * (1.0f - 1.0f / (vexp(v2) + 1.0f));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline V gelu(V a) {
  const V x = vabs(a) * 0.70710678118f;
  const V t = 1.0f / fma(x, set1(0.3275911f), set1(1.0f));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const V tail = p * t * vexp(-x * x);  // 1 - erf(x)
  return a * select(a > V{}, 1.0f - 0.5f * tail, 0.5f * tail);
}

inline V silu(V a) { return a / (1.0f + vexp(-a)); }

inline V apply(Activation act, V a) {
  switch (act) {
    case Activation::gelu_tanh: return gelu_tanh(a);
    case Activation::gelu: return gelu(a);
    case Activation::silu: return silu(a);
    default: return select(a > V{}, a, V{});
  }
}

void activate(const float* x, int64_t n, Activation act, float* out) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(out + i, apply(act, load<V>(x + i)));
}

// --- packed weights times quantized activations ---------------------------------------------------

// What one block of tokens reads.
struct Tokens {
  const int8_t* q;
  const float* scale;
  const int32_t* nsum;
  int64_t q_step, step;  // between tokens
};

inline Tokens tokens_at(const Rows& x, int64_t first) {
  return {x.q + first * x.k32 * kGroup, x.scale + first * x.k32, x.nsum + first * x.k32, x.k32 * kGroup, x.k32};
}

// Two tiles of w4g32 (w, w + tile bytes) times B tokens.
template <int B>
inline void pair_w4(const uint8_t* w0, const uint8_t* w1, const uint16_t* s0, const uint16_t* s1, int64_t k32,
                    const Tokens& x, V (&acc)[2][B]) {
  for (int64_t g = 0; g < k32; ++g, w0 += 256, w1 += 256, s0 += kLanes, s1 += kLanes) {
    I sum[2][B];
#pragma GCC unroll 8
    for (int m = 0; m < B; ++m) sum[0][m] = sum[1][m] = set1i(x.nsum[m * x.step + g] << kNibbleZeroShift);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Bytes a = load_bytes(w0 + 64 * c), b = load_bytes(w1 + 64 * c);
      const Bytes al = low_nibbles(a), ah = high_nibbles(a), bl = low_nibbles(b), bh = high_nibbles(b);
#pragma GCC unroll 8
      for (int m = 0; m < B; ++m) {
        const int8_t* q = x.q + m * x.q_step + g * kGroup + 8 * c;
        const Bytes lo = broadcast4(q), hi = broadcast4(q + 4);
        sum[0][m] = dot_nibbles(dot_nibbles(sum[0][m], al, lo), ah, hi);
        sum[1][m] = dot_nibbles(dot_nibbles(sum[1][m], bl, lo), bh, hi);
      }
    }
    const V f0 = half_to_float(s0), f1 = half_to_float(s1);
#pragma GCC unroll 8
    for (int m = 0; m < B; ++m) {
      const V scale = set1(x.scale[m * x.step + g]);
      acc[0][m] = fma(__builtin_convertvector(sum[0][m], V) * scale, f0, acc[0][m]);
      acc[1][m] = fma(__builtin_convertvector(sum[1][m], V) * scale, f1, acc[1][m]);
    }
  }
}

// Two tiles of w8c or w8a times B tokens; z0, z1: zero points minus kByteBias, per row.
template <int B>
inline void pair_w8(const uint8_t* w0, const uint8_t* w1, I z0, I z1, int64_t k32, const Tokens& x, V (&acc)[2][B]) {
  for (int64_t g = 0; g < k32; ++g, w0 += 512, w1 += 512) {
    I sum[2][B];
#pragma GCC unroll 8
    for (int m = 0; m < B; ++m) {
      const I nsum = set1i(x.nsum[m * x.step + g]);
      sum[0][m] = nsum * z0;
      sum[1][m] = nsum * z1;
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const Bytes a = load_bytes(w0 + 64 * c), b = load_bytes(w1 + 64 * c);
#pragma GCC unroll 8
      for (int m = 0; m < B; ++m) {
        const Bytes q = broadcast4(x.q + m * x.q_step + g * kGroup + 4 * c);
        sum[0][m] = dot_bytes(sum[0][m], a, q);
        sum[1][m] = dot_bytes(sum[1][m], b, q);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < B; ++m) {
      const V scale = set1(x.scale[m * x.step + g]);
      acc[0][m] = fma(__builtin_convertvector(sum[0][m], V), scale, acc[0][m]);
      acc[1][m] = fma(__builtin_convertvector(sum[1][m], V), scale, acc[1][m]);
    }
  }
}

inline I zero_points(const Weight& w, int64_t tile) {
  if (!w.zero) return set1i(kByteZero - kByteBias);
  return __builtin_convertvector(load<U8>(w.zero + tile * kTileRows), I) - kByteBias;
}

// acc = 32 rows of `w` times B tokens. An odd last tile is computed twice and zeroed once.
template <int B>
inline void pair_block(const Weight& w, int64_t pair, const Tokens& x, V (&acc)[2][B]) {
  const int64_t t0 = 2 * pair, t1 = t0 + 1 < w.n16 ? t0 + 1 : t0;
#pragma GCC unroll 8
  for (int m = 0; m < B; ++m) acc[0][m] = acc[1][m] = V{};
  if (w.scheme == Scheme::w4g32) {
    const uint16_t* s = static_cast<const uint16_t*>(w.scale);
    const int64_t tile = w.k32 * 256, row = w.k32 * kLanes;
    pair_w4<B>(w.w + t0 * tile, w.w + t1 * tile, s + t0 * row, s + t1 * row, w.k32, x, acc);
  } else {
    const int64_t tile = w.k32 * 512;
    pair_w8<B>(w.w + t0 * tile, w.w + t1 * tile, zero_points(w, t0), zero_points(w, t1), w.k32, x, acc);
    const float* s = static_cast<const float*>(w.scale);
    const V f0 = load<V>(s + t0 * kTileRows), f1 = load<V>(s + t1 * kTileRows);
#pragma GCC unroll 8
    for (int m = 0; m < B; ++m) acc[0][m] *= f0, acc[1][m] *= f1;
  }
  if (t1 != t0) return;
#pragma GCC unroll 8
  for (int m = 0; m < B; ++m) acc[1][m] = V{};
}

template <int B>
void matmul_block(const Weight& w, int64_t pair, const Rows& x, int64_t first, float* out, int64_t stride) {
  V acc[2][B];
  pair_block<B>(w, pair, tokens_at(x, first), acc);
#pragma GCC unroll 8
  for (int m = 0; m < B; ++m) store(out + m * stride, acc[0][m]), store(out + m * stride + kLanes, acc[1][m]);
}

void matmul_pair(const Weight& w, int64_t pair, const Rows& x, int64_t first, int64_t count, float* out,
                 int64_t stride) {
  int64_t t = 0;
  for (; t + kBlock <= count; t += kBlock) matmul_block<kBlock>(w, pair, x, first + t, out + t * stride, stride);
  out += t * stride;
  switch (count - t) {
    case 3: return matmul_block<3>(w, pair, x, first + t, out, stride);
    case 2: return matmul_block<2>(w, pair, x, first + t, out, stride);
    case 1: return matmul_block<1>(w, pair, x, first + t, out, stride);
    default: return;
  }
}

template <int B>
void gate_up_block(const Weight& gate, const Weight& up, const float* gate_bias, const float* up_bias, Activation act,
                   int64_t pair, const Rows& x, int64_t first, const Rows& out) {
  V g[2][B], u[2][B];
  const Tokens tokens = tokens_at(x, first);
  pair_block<B>(gate, pair, tokens, g);
  pair_block<B>(up, pair, tokens, u);
  for (int m = 0; m < B; ++m) {
    alignas(64) float h[kPairRows];
    for (int t = 0; t < 2; ++t) {
      const int64_t at = pair * kPairRows + t * kLanes;
      const V a = gate_bias ? g[t][m] + load<V>(gate_bias + at) : g[t][m];
      const V b = up_bias ? u[t][m] + load<V>(up_bias + at) : u[t][m];
      store(h + t * kLanes, apply(act, a) * b);
    }
    quantize_group(h, out, first + m, pair);
  }
}

void gate_up_pair(const Weight& gate, const Weight& up, const float* gate_bias, const float* up_bias, Activation act,
                  int64_t pair, const Rows& x, int64_t first, int64_t count, const Rows& out) {
  int64_t t = first;
  const int64_t end = first + count;
  for (; t + kBlock <= end; t += kBlock)
    gate_up_block<kBlock>(gate, up, gate_bias, up_bias, act, pair, x, t, out);
  switch (end - t) {
    case 3: return gate_up_block<3>(gate, up, gate_bias, up_bias, act, pair, x, t, out);
    case 2: return gate_up_block<2>(gate, up, gate_bias, up_bias, act, pair, x, t, out);
    case 1: return gate_up_block<1>(gate, up, gate_bias, up_bias, act, pair, x, t, out);
    default: return;
  }
}

// --- ceilings, for benchmarks ---------------------------------------------------------------------

typedef uint64_t U64 __attribute__((vector_size(64)));

uint64_t read(const uint8_t* data, int64_t bytes) {
  U64 sum[8] = {};
  for (int64_t i = 0; i + 512 <= bytes; i += 512)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] ^= load<U64>(data + i + 64 * j);
  const U64 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
  uint64_t lanes[8], folded = 0;
  store(lanes, all);
  for (uint64_t lane : lanes) folded ^= lane;
  return folded;
}

int64_t dot_peak(int64_t steps, int32_t* sink) {
  alignas(64) uint8_t w[64];
  alignas(64) int8_t a[64];
  for (int i = 0; i < 64; ++i) w[i] = uint8_t(i), a[i] = int8_t(i - 32);
  const Bytes x = load_bytes(w), y = broadcast4(a);
  I sum[8] = {};
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      sum[j] = dot_nibbles(sum[j], x, y);
      __asm__ volatile("" : "+m"(sink[0]));
    }
  }
  I all = sum[0];
  for (int j = 1; j < 8; ++j) all += sum[j];
  store(sink, all);
  return steps * 8 * 64;
}

}  // namespace
