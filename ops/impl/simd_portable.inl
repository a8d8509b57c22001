// simd.h for any CPU: plain loops over 16 lanes, which compilers turn into what vectors there are.

struct vf {
  float v[16];
};
struct vi {
  int32_t v[16];
};
constexpr int kMaxTokens = 4;
constexpr int kInterleaved = 1;

#define LANES for (int i = 0; i < 16; ++i)

INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
INLINE float float_of(uint32_t x) { return __builtin_bit_cast(float, x); }
INLINE vf set(float x) {
  vf r;
  LANES r.v[i] = x;
  return r;
}
INLINE vf zero() { return set(0.0f); }
INLINE vf load(const float* p) {
  vf r;
  LANES r.v[i] = p[i];
  return r;
}
INLINE void store(float* p, vf x) { LANES p[i] = x.v[i]; }
INLINE vf add(vf a, vf b) {
  LANES a.v[i] += b.v[i];
  return a;
}
INLINE vf sub(vf a, vf b) {
  LANES a.v[i] -= b.v[i];
  return a;
}
INLINE vf mul(vf a, vf b) {
  LANES a.v[i] *= b.v[i];
  return a;
}
INLINE vf div(vf a, vf b) {
  LANES a.v[i] /= b.v[i];
  return a;
}
INLINE vf fma(vf a, vf b, vf c) {
  LANES a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
INLINE vf min(vf a, vf b) {  // the second operand where one is NaN, as in SSE
  LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf max(vf a, vf b) {
  LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
INLINE vf neg(vf x) {
  LANES x.v[i] = -x.v[i];
  return x;
}
INLINE vf round(vf x) {
  LANES x.v[i] = __builtin_rintf(x.v[i]);
  return x;
}
INLINE vf below(vf x, vf a, vf b) {
  LANES x.v[i] = x.v[i] < 0 ? a.v[i] : b.v[i];
  return x;
}
INLINE vi to_int(vf x) {
  vi r;
  LANES r.v[i] = static_cast<int32_t>(__builtin_rintf(x.v[i]));
  return r;
}
INLINE vf to_float(vi x) {
  vf r;
  LANES r.v[i] = static_cast<float>(x.v[i]);
  return r;
}
INLINE vf pow2(vf n) {
  LANES n.v[i] = float_of(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
  return n;
}
INLINE float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, body = h & 0x7fffu;
  if (body >= 0x7c00) return float_of(sign | 0x7f800000 | (body & 0x3ff) << 13 | (body > 0x7c00 ? 0x400000 : 0));
  const float scaled = float_of(body << 13) * 0x1p112f;  // exponent bias 15 -> 127, subnormals included
  return float_of(bits_of(scaled) | sign);
}
INLINE uint16_t to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, u = bits_of(x) & 0x7fffffffu;
  uint32_t r;
  if (u > 0x7f800000) {
    r = 0x7e00 | (u >> 13 & 0x3ff);
  } else if (u >= 0x477ff000) {  // rounds to 65536 or more
    r = 0x7c00;
  } else if (u < 0x38800000) {  // below 2^-14: adding 2^-1 lines the bits of a subnormal up
    r = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
  } else {
    r = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | r);
}
INLINE vf load_bf16(const uint16_t* p) {
  vf r;
  LANES r.v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return r;
}
INLINE vf load_f16(const uint16_t* p) {
  vf r;
  LANES r.v[i] = from_half(p[i]);
  return r;
}
INLINE void store_bf16(uint16_t* p, vf x) {
  LANES {
    const uint32_t u = bits_of(x.v[i]);
    p[i] = static_cast<uint16_t>(x.v[i] != x.v[i] ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
}
INLINE void store_f16(uint16_t* p, vf x) { LANES p[i] = to_half(x.v[i]); }
INLINE float reduce_add(vf x) {
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) x.v[i] += x.v[i + step];
  }
  return x.v[0];
}
INLINE float amax(vf a, vf b) {
  uint32_t m = 0;
  LANES {
    const uint32_t x = bits_of(a.v[i]) & 0x7fffffffu, y = bits_of(b.v[i]) & 0x7fffffffu;
    m = x > m ? x : m;
    m = y > m ? y : m;
  }
  return float_of(m);
}
INLINE int32_t pack(vf a, vf b, int8_t* q) {
  const vi x = to_int(a), y = to_int(b);
  int32_t sum = 0;
  LANES {
    q[i] = static_cast<int8_t>(x.v[i]);
    q[16 + i] = static_cast<int8_t>(y.v[i]);
    sum += x.v[i] + y.v[i];
  }
  return sum;
}

struct Group4 {
  const uint8_t* p;
};
struct Group8 {
  const uint8_t* p;
};
INLINE Group4 load4(const uint8_t* p) { return {p}; }
INLINE Group8 load8(const uint8_t* p) { return {p}; }
INLINE vi dot4(const Group4& g, const int8_t* a, int32_t sum8) {
  vi sum;
  LANES sum.v[i] = sum8;
  for (int c = 0; c < 4; ++c) {
    LANES {
      for (int j = 0; j < 4; ++j) {
        const int32_t byte = g.p[64 * c + 4 * i + j];
        sum.v[i] += (byte & 15) * a[8 * c + j] + (byte >> 4) * a[8 * c + 4 + j];
      }
    }
  }
  return sum;
}
struct Codebook {
  uint8_t table[16];
};
INLINE Codebook load_codebook(const int8_t* c) {
  Codebook book;
  LANES book.table[i] = static_cast<uint8_t>(c[i] + 128);
  return book;
}
INLINE Group8 look_up(const uint8_t* p, const Codebook& codebook, uint8_t* buffer) {
  for (int i = 0; i < 256; ++i) {
    uint8_t* to = buffer + 128 * (i / 64) + i % 64;
    to[0] = codebook.table[p[i] & 15];
    to[64] = codebook.table[p[i] >> 4];
  }
  return {buffer};
}
INLINE vi load_zero(const uint8_t* z) {
  vi r;
  LANES r.v[i] = z[i];
  return r;
}
INLINE vi middle_zero() {
  vi r;
  LANES r.v[i] = 128;
  return r;
}
template <bool kMiddle>
INLINE vi dot8_offset(vi z, int32_t sum8) {
  LANES z.v[i] = z.v[i] * sum8 / 8;  // exact: sum8 is a multiple of 8
  return z;
}
INLINE vi dot8(const Group8& g, const int8_t* a, vi sum) {
  for (int c = 0; c < 8; ++c) {
    LANES {
      for (int j = 0; j < 4; ++j) sum.v[i] += g.p[64 * c + 4 * i + j] * a[4 * c + j];
    }
  }
  return sum;
}
// Chunks kFirst .. kFirst + 3 only.
template <int kFirst>
INLINE vi dot8_part(const Group8& g, const int8_t* a, vi sum) {
  for (int c = kFirst; c < kFirst + 4; ++c) {
    LANES {
      for (int j = 0; j < 4; ++j) sum.v[i] += g.p[64 * c + 4 * i + j] * a[4 * c + j];
    }
  }
  return sum;
}
INLINE vi load_u8(const uint8_t* p) {
  vi r;
  LANES r.v[i] = p[i];
  return r;
}
INLINE vi load_i8(const uint8_t* p) {
  vi r;
  LANES r.v[i] = static_cast<int8_t>(p[i]);
  return r;
}
INLINE vi add(vi a, vi b) {
  LANES a.v[i] += b.v[i];
  return a;
}
INLINE vi mul(vi a, vi b) {
  LANES a.v[i] *= b.v[i];
  return a;
}
#undef LANES

INLINE int64_t peak_dots(int64_t steps, const uint8_t* weights, const int8_t* activations) {
  const Group8 w = load8(weights);
  vi sum = middle_zero();
  for (int64_t i = 0; i < steps; ++i) {
    sum = dot8(w, activations, sum);
    __asm__ volatile("" ::"r"(&sum) : "memory");
  }
  return steps * 16 * 32;
}
