// Rows of activations: reading and writing any float type, norms, quantization, activation functions.

// Elements [index, index + 16) of an array; zeros from `count` on.
INLINE vf load16(const Array& x, int64_t index, int64_t count) {
  const auto* halves = static_cast<const uint16_t*>(x.data) + index;
  const auto* floats = static_cast<const float*>(x.data) + index;
  alignas(64) float tail_floats[16];
  alignas(64) uint16_t tail_halves[16];
  if (__builtin_expect(count < 16, 0)) {
    for (int i = 0; i < 16; ++i) {
      tail_floats[i] = x.dtype == DType::f32 && i < count ? floats[i] : 0.0f;
      tail_halves[i] = x.dtype != DType::f32 && i < count ? halves[i] : 0;
    }
    halves = tail_halves;
    floats = tail_floats;
  }
  if (x.dtype == DType::f32) return load(floats);
  return x.dtype == DType::bf16 ? load_bf16(halves) : load_f16(halves);
}

INLINE void store16(const Out& out, int64_t index, vf x, int64_t count) {
  auto* halves = static_cast<uint16_t*>(out.data) + index;
  auto* floats = static_cast<float*>(out.data) + index;
  alignas(64) float tail_floats[16];
  alignas(64) uint16_t tail_halves[16];
  const bool tail = __builtin_expect(count < 16, 0);
  if (out.dtype == DType::f32) {
    store(tail ? tail_floats : floats, x);
    for (int i = 0; tail && i < count; ++i) floats[i] = tail_floats[i];
    return;
  }
  uint16_t* to = tail ? tail_halves : halves;
  if (out.dtype == DType::bf16) {
    store_bf16(to, x);
  } else {
    store_f16(to, x);
  }
  for (int i = 0; tail && i < count; ++i) halves[i] = tail_halves[i];
}

// 1 / sqrt(mean(x^2) + eps) over a row: 16 partial sums (k modulo 16), then a fixed tree.
float inverse_rms(const Array& x, int64_t begin, int64_t width, float eps) {
  vf sum = zero();
  for (int64_t k = 0; k < width; k += 16) {
    const vf v = load16(x, begin + k, width - k);
    sum = fma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(reduce_add(sum) / static_cast<float>(width) + eps);
}

void thresholds(const float* x, int64_t width, float cutoff, float* threshold, Range rows) {
  const float count = static_cast<float>(width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* values = x + row * width;
    vf sum = zero(), squares = zero();
    for (int64_t k = 0; k < width; k += 16) sum = add(sum, load(values + k));
    const float mean = reduce_add(sum) / count;
    for (int64_t k = 0; k < width; k += 16) {
      const vf distance = sub(load(values + k), set(mean));
      squares = fma(distance, distance, squares);
    }
    threshold[row] = mean + cutoff * __builtin_sqrtf(reduce_add(squares) / count);
  }
}

// One row under a norm, 16 elements at a time.
struct NormedRow {
  const Array& x;
  const Norm& norm;
  int64_t begin, width;
  float scale;

  INLINE NormedRow(const Array& x, const Norm& norm, int64_t begin, int64_t width)
      : x(x), norm(norm), begin(begin), width(width), scale(norm.on ? inverse_rms(x, begin, width, norm.eps) : 1.0f) {}
  INLINE vf at(int64_t k, int64_t count) const {
    vf v = load16(x, begin + k, count);
    if (!norm.on) return v;
    v = mul(v, set(scale));
    return norm.w.data == nullptr ? v : mul(v, add(load16(norm.w, k, count), set(norm.offset)));
  }
  INLINE vf at(int64_t k) const { return at(k, width - k); }
};

constexpr float kTiny = 1e-36f;  // below, 127 / amax would overflow: such a group counts as zero

// 32 floats -> int8, scale and -8 * sum. Not finite -> a scale that is not finite, so it shows in the result.
INLINE void quantize_group(vf x, vf y, int8_t* q, float* scale, int32_t* sum8) {
  float largest = amax(x, y);
  if (largest < kTiny) largest = 0;
  const vf inverse = set(largest > 0 ? 127.0f / largest : 0.0f), low = set(-127.0f), high = set(127.0f);
  x = min(max(mul(x, inverse), low), high);
  y = min(max(mul(y, inverse), low), high);
  *scale = largest / 127.0f;
  *sum8 = -8 * pack(x, y, q);
}

// Where token m of block-wise activations is.
struct Token {
  int8_t* q;
  float* scale;
  int32_t* sum8;
  int64_t stride;  // tokens in its block

  INLINE Token(const Activations& a, int64_t m) {
    const int64_t block = m / kBlock * kBlock, t = m - block;
    stride = a.rows - block < kBlock ? a.rows - block : kBlock;
    q = a.q + (block * a.groups + t) * kGroup;
    scale = a.scale + block * a.groups + t;
    sum8 = a.sum8 + block * a.groups + t;
  }
  INLINE void quantize(int64_t g, vf x, vf y) const {
    quantize_group(x, y, q + g * stride * kGroup, scale + g * stride, sum8 + g * stride);
  }
};

void quantize(const Rows& x, const Norm& norm, const Activations& a, Range rows) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const NormedRow row(x.x, norm, m * x.width, x.width);
    const Token token(a, m);
    for (int64_t g = 0; g < a.groups; ++g) token.quantize(g, row.at(kGroup * g), row.at(kGroup * g + 16));
  }
}

void norm(const Rows& x, const Post& post, const Out& out, Range rows) {
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t begin = m * x.width;
    const NormedRow row(x.x, post.norm, begin, x.width);
    for (int64_t k = 0; k < x.width; k += 16) {
      vf y = row.at(k);
      if (post.residual.data != nullptr) y = add(y, load16(post.residual, begin + k, x.width - k));
      store16(out, begin + k, y, x.width - k);
    }
  }
}

// e^x for x in [-87, 88], clamped to it; relative error below 2e-7 (Cephes expf).
INLINE vf exponential(vf x) {
  x = min(max(x, set(-87.0f)), set(88.0f));
  const vf n = round(mul(x, set(1.44269504f)));
  const vf r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  vf p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  return mul(add(fma(p, mul(r, r), r), set(1.0f)), pow2(n));
}

// e^(z^2) erfc(z) for z >= 0 with relative error below 1.3e-7 (Numerical Recipes, erfcc), times e^(-z^2).
INLINE vf erfc_positive(vf z) {
  const vf t = div(set(1.0f), fma(z, set(0.5f), set(1.0f)));
  vf p = set(0.17087277f);
  p = fma(p, t, set(-0.82215223f));
  p = fma(p, t, set(1.48851587f));
  p = fma(p, t, set(-1.13520398f));
  p = fma(p, t, set(0.27886807f));
  p = fma(p, t, set(-0.18628806f));
  p = fma(p, t, set(0.09678418f));
  p = fma(p, t, set(0.37409196f));
  p = fma(p, t, set(1.00002368f));
  p = fma(p, t, set(-1.26551223f));
  return mul(t, exponential(sub(p, mul(z, z))));
}

// Error against exact arithmetic, for any finite x: below 4e-7 * |x|, and below 3e-6 relative for x > -5
// (checked in tests/ops/test_activations.py). Arguments below -64, where the result is -1e-20 at most in size,
// are clamped so that nothing overflows; a NaN stays one.
INLINE vf activate(Act act, vf x) {
  if (act == Act::relu) return max(zero(), x);
  const vf one = set(1.0f);
  x = max(set(-64.0f), x);
  if (act == Act::silu) return div(x, add(one, exponential(neg(x))));
  if (act == Act::gelu_tanh) {  // 0.5 (1 + tanh u) = 1 / (1 + e^(-2u)) has no cancellation
    const vf u = mul(x, fma(mul(x, x), set(0.0713548162726f), set(1.59576912161f)));
    return div(x, add(one, exponential(neg(u))));
  }
  const vf size = below(x, neg(x), x);
  const vf tail = mul(mul(set(0.5f), x), erfc_positive(mul(size, set(0.70710678f))));
  return below(x, tail, sub(x, tail));
}

void activations(const float* x, int64_t n, Act act, float* out) {
  const Array array{x, DType::f32};
  for (int64_t i = 0; i < n; i += 16) store16({out, DType::f32}, i, activate(act, load16(array, i, n - i)), n - i);
}
