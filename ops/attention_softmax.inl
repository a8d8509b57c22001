// Vector functions, loads, masks and the softmax of one row over one block of keys.

namespace {

constexpr float kInf = __builtin_inff();
constexpr float kDead = -1e30f;  // beside a larger mask value, one of these or less has weight exp(-huge) = 0

// e^x for x <= 0, NaN for NaN. r = x - n ln 2 in two steps is exact to 2^-24 |r|; the polynomial (the
// least-squares fit of Cephes' expf) is within 2^-23.5 of e^r on |r| <= ln 2 / 2, its evaluation adds
// 2^-24: relative error below 2 ulp = 2.4e-7. Below -87, where 2^n would leave the normal range, 0.
vf exp_neg(vf x) {
  const vf z = max(set1(-88.0f), x);  // x where it is NaN
  const vf n = round(z * set1(1.44269504088896341f));
  vf r = fma(n, set1(-0.693359375f), z);
  r = fma(n, set1(2.12194440e-4f), r);
  vf y = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  y = fma(y, r, set1(8.3334519073e-3f));
  y = fma(y, r, set1(4.1665795894e-2f));
  y = fma(y, r, set1(1.6666665459e-1f));
  y = fma(y, r, set1(5.0000001201e-1f));
  y = fma(y, r * r, r + set1(1.0f));
  return select_gt(set1(-87.0f), x, set1(0.0f), y * pow2(n));
}

// tanh: an odd polynomial (Cephes) near 0, where 1 - e^-2z cancels; relative error below 3 ulp.
vf tanh(vf x) {
  const vf zero = set1(0.0f), one = set1(1.0f);
  const vf z = select_gt(zero, x, zero - x, x);
  const vf t = exp_neg(z * set1(-2.0f));
  vf large = (one - t) / (one + t);
  large = select_gt(zero, x, zero - large, large);
  const vf s = x * x;
  vf y = fma(set1(-5.70498872745e-3f), s, set1(2.06390887954e-2f));
  y = fma(y, s, set1(-5.37397155531e-2f));
  y = fma(y, s, set1(1.33314422036e-1f));
  y = fma(y, s, set1(-3.33332819422e-1f));
  y = fma(y * s, x, x);
  return select_gt(set1(0.625f), z, y, large);
}

float exp_neg(float x) {
  float y[W];
  store(y, exp_neg(set1(x)));
  return y[0];
}

template <DType T>
struct Element {
  typedef uint16_t type;
};
template <>
struct Element<DType::f32> {
  typedef float type;
};

template <>
struct Element<DType::i8> {
  typedef int8_t type;
};

template <DType T>
const typename Element<T>::type* row_of(const void* base, int64_t offset) {
  return static_cast<const typename Element<T>::type*>(base) + offset;
}

template <DType T>
vf load_as(const typename Element<T>::type* p) {
  if constexpr (T == DType::f32) {
    return load(p);
  } else if constexpr (T == DType::bf16) {
    return load_bf16(p);
  } else if constexpr (T == DType::f16) {
    return load_f16(p);
  } else {
    return load_i8(p);
  }
}

// What the n elements of a row of K or V are multiplied by.
template <DType T>
float scale_of(const typename Element<T>::type* row, int64_t n) {
  float scale = 1.0f;
  if constexpr (T == DType::i8) __builtin_memcpy(&scale, row + n, sizeof(scale));
  return scale;
}

// The first n < W elements, then zeros.
template <DType T>
vf load_part(const typename Element<T>::type* p, int64_t n) {
  typename Element<T>::type x[W] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  return load_as<T>(x);
}

template <DType T>
vf load_upto(const typename Element<T>::type* p, int64_t n) {
  return n >= W ? load_as<T>(p) : load_part<T>(p, n);
}

const char* mask_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t t) {
  const int64_t size = a.mask_kind == MaskKind::boolean ? 1 : a.mask_kind == MaskKind::f32 ? 4 : 2;
  const int64_t* s = a.mask_stride;
  return static_cast<const char*>(a.mask) + size * (b * s[0] + h * s[1] + t * s[2]);
}

template <DType T>
void float_bias(const void* row, int64_t stride, int64_t s0, int64_t n, float* bias) {
  const auto* p = row_of<T>(row, s0 * stride);
  for (int64_t i = 0; i < n; i += W) {
    if (stride == 1) {
      store(bias + i, load_upto<T>(p + i, n - i));
      continue;
    }
    typename Element<T>::type x[W] = {};
    for (int64_t j = 0; j < W && i + j < n; ++j) x[j] = p[(i + j) * stride];
    store(bias + i, load_as<T>(x));
  }
}

// Keys [lo, hi) of a block can have weight; `plain`: all of them do and nothing is added to them.
struct Span {
  int32_t lo, hi;
  bool plain;
};

// What the mask adds to keys s0 .. s0 + n of a row; -inf where it is not above `floor`.
Span mask_bias(const AttentionArgs& a, const char* row, int64_t s0, int64_t n, float floor, float* bias) {
  const int64_t stride = a.mask_stride[3];
  if (a.mask_kind == MaskKind::boolean) {
    const auto* p = reinterpret_cast<const uint8_t*>(row) + s0 * stride;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) bias[i] = p[i] ? 0.0f : -kInf;
    } else {
      for (int64_t i = 0; i < n; ++i) bias[i] = p[i * stride] ? 0.0f : -kInf;
    }
  } else if (a.mask_kind == MaskKind::f32) {
    float_bias<DType::f32>(row, stride, s0, n, bias);
  } else if (a.mask_kind == MaskKind::bf16) {
    float_bias<DType::bf16>(row, stride, s0, n, bias);
  } else {
    float_bias<DType::f16>(row, stride, s0, n, bias);
  }
  for (int64_t i = n; i % W; ++i) bias[i] = -kInf;
  Span span{int32_t(n), 0, true};
  for (int32_t i = 0; i < n; i += W) {
    const vf x = load(bias + i);
    store(bias + i, select_gt(x, set1(floor), x, set1(-kInf)));
    const unsigned live = bits_gt(x, set1(floor));
    if (!live) continue;
    const int32_t first = i + __builtin_ctz(live), last = i + 32 - __builtin_clz(live);
    span.lo = span.lo < first ? span.lo : first;
    span.hi = last;
  }
  if (span.hi == 0) span.lo = 0;
  for (int32_t i = span.lo; i < span.hi; ++i) span.plain = span.plain && bias[i] == 0.0f;
  return span;
}

// One row of queries.
struct Row {
  int64_t h, t;
  const char* mask;  // or null
  int64_t limit;     // keys below it, by the causal flag
  float floor;       // mask values up to here mean "no weight"
};

// finfo.min in a float mask means -inf, except in a row that has nothing else.
float mask_floor(const AttentionArgs& a, const char* row, int64_t limit) {
  if (a.mask_kind == MaskKind::none || a.mask_kind == MaskKind::boolean) return -kInf;
  float bias[kKeyBlock];
  for (int64_t s = 0; s < limit; s += kKeyBlock) {
    const int64_t n = limit - s < kKeyBlock ? limit - s : kKeyBlock;
    if (mask_bias(a, row, s, n, kDead, bias).hi) return kDead;
  }
  return -kInf;
}

Row make_row(const AttentionArgs& a, const Plan& p, int64_t b, int64_t hk, int64_t r) {
  Row row{hk * p.group + r % p.group, r / p.group, nullptr, a.S, -kInf};
  if (a.causal) row.limit = row.t + a.S - a.T + 1;
  if (row.limit < 0) row.limit = 0;
  if (a.mask_kind != MaskKind::none) {
    row.mask = mask_row(a, b, row.h, row.t);
    row.floor = mask_floor(a, row.mask, row.limit);
  }
  return row;
}

Span row_span(const AttentionArgs& a, const Row& row, int64_t s0, int64_t n, float* bias) {
  const int64_t m = row.limit - s0 < n ? row.limit - s0 : n;
  if (m <= 0) return Span{0, 0, true};
  return row.mask ? mask_bias(a, row.mask, s0, m, row.floor, bias) : Span{0, int32_t(m), true};
}

// Scores to logits: scale, softcap and mask. Keys outside the span get -inf. Returns the maximum.
float logits(const AttentionArgs& a, const Span& span, const float* bias, float* x) {
  const vf scale = set1(a.scale), cap = set1(a.softcap), inverse = set1(a.softcap ? 1.0f / a.softcap : 0.0f);
  const vf ninf = set1(-kInf);
  vf most = ninf;
  float order[W];
  for (int i = 0; i < W; ++i) order[i] = float(i);
  for (int32_t i = span.lo / W * W; i < span.hi; i += W) {
    vf y = load(x + i) * scale;
    if (a.softcap) y = tanh(y * inverse) * cap;
    if (!span.plain) {
      const vf m = load(bias + i);
      y = select_gt(m, ninf, y + m, ninf);
    }
    if (i < span.lo || i + W > span.hi) {
      const vf k = load(order) + set1(float(i));
      y = select_gt(set1(float(span.hi)), k, y, ninf);
      y = select_gt(set1(float(span.lo)), k, ninf, y);
    }
    store(x + i, y);
    most = max(most, y);
  }
  return top(most);
}

// Logits to weights e^(x - most), zeros outside the span up to key n. Returns their sum.
float weights(const Span& span, int64_t n, float most, float* x) {
  const vf shift = set1(most);
  vf total = set1(0.0f);
  int32_t i = 0;
  for (; i < span.lo / W * W; i += W) store(x + i, set1(0.0f));
  for (; i < span.hi; i += W) {
    const vf y = exp_neg(load(x + i) - shift);
    store(x + i, y);
    total = total + y;
  }
  for (; i < n; i += W) store(x + i, set1(0.0f));
  return sum(total);
}

// What is subtracted in a row whose maximum so far is m: e^-inf stays 0 where every key is masked.
float finite(float m) { return m == -kInf ? 0.0f : m; }

template <DType T>
void pack_row(const void* base, int64_t offset, int64_t d, int64_t padded, float* out) {
  const auto* p = row_of<T>(base, offset);
  for (int64_t i = 0; i < padded; i += W) store(out + i, i < d ? load_upto<T>(p + i, d - i) : set1(0.0f));
}

// The dot product of q and k in lanes of 32 bits: one fp32, or with bf16 dot products two bf16.
template <DType T>
struct Dot {
  static constexpr int step = W;  // elements per vector
  static vf load(const typename Element<T>::type* p) { return load_as<T>(p); }
  static vf part(const typename Element<T>::type* p, int64_t n) { return load_part<T>(p, n); }
  static vf add(vf c, vf a, vf b) { return fma(a, b, c); }
};

#ifdef UNICORN_BF16_DOT
template <>
struct Dot<DType::bf16> {
  static constexpr int step = 2 * W;
  static vf load(const uint16_t* p) { return ::load(reinterpret_cast<const float*>(p)); }
  static vf part(const uint16_t* p, int64_t n) {
    uint16_t x[step] = {};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return load(x);
  }
  static vf add(vf c, vf a, vf b) { return bf16_dot(c, a, b); }
};
#endif

// 32-bit lanes of a row of d elements, in whole vectors.
template <DType T>
int64_t lanes(int64_t d) {
  return ceil_div(d, Dot<T>::step) * W;
}

template <DType K>
void pack_query(const void* base, int64_t offset, int64_t d, float* out) {
  constexpr DType T = K == DType::i8 ? DType::f32 : K;
  const auto* p = row_of<T>(base, offset);
  constexpr int step = Dot<T>::step;
  for (int64_t i = 0; i < d; i += step, out += W)
    store(out, d - i >= step ? Dot<T>::load(p + i) : Dot<T>::part(p + i, d - i));
}

}  // namespace
