// The two ops that move values into another shape: rotary embedding of heads, rows of an embedding.

void rotary_head(const RotaryArgs& p, int64_t item) {
  const int64_t token = item / p.heads, head = item % p.heads, b = token / p.T, t = token % p.T;
  const int64_t d = p.head_dim, half = d / 2;
  const Array row_data{p.x, DType::f32};
  const NormedRow row(row_data, p.norm, token * p.stride + head * d, d);
  const int64_t to = ((b * p.heads + head) * p.T + t) * d;
  if (p.cos.data == nullptr) {
    for (int64_t j = 0; j < d; j += 16) store16(p.out, to + j, row.at(j), d - j);
    return;
  }
  const int64_t angle = (p.shared_cos ? t : token) * d;
  for (int64_t j = 0; j < half; j += 16) {
    const int64_t left = half - j;
    const vf x = row.at(j, left), y = row.at(j + half, left);
    const vf first = fma(x, load16(p.cos, angle + j, left), neg(mul(y, load16(p.sin, angle + j, left))));
    const vf second = fma(y, load16(p.cos, angle + half + j, left), mul(x, load16(p.sin, angle + half + j, left)));
    store16(p.out, to + j, first, left);
    store16(p.out, to + half + j, second, left);
  }
}

void rotary(const RotaryArgs& p, Range items) {
  for (int64_t item = items.begin; item < items.end; ++item) rotary_head(p, item);
}

// The 32 values of one group of one row, as (stored - zero point) and the scale.
INLINE float unpack_group(const Weight& w, int64_t tile, int64_t r, int64_t group, int64_t groups, float* values) {
  const int64_t g = tile * groups + group;
  const uint8_t* p = w.q + g * group_bytes(w.scheme) + 4 * r;
  if (w.scheme == Scheme::w4g32 || w.scheme == Scheme::w4n32) {
    for (int k = 0; k < kGroup; ++k) {
      const int byte = p[64 * (k / 8) + k % 4], nibble = k % 8 < 4 ? byte & 15 : byte >> 4;
      values[k] = static_cast<float>(w.codebook == nullptr ? nibble - 8 : w.codebook[nibble]);
    }
  } else {
    const int zero_point = w.scheme == Scheme::w8a ? w.zero[tile * kRows + r] : 128;
    for (int k = 0; k < kGroup; ++k) values[k] = static_cast<float>(p[64 * (k / 4) + k % 4] - zero_point);
  }
  if (w.scheme == Scheme::w8c || w.scheme == Scheme::w8a) return static_cast<const float*>(w.scale)[tile * kRows + r];
  alignas(64) float scales[16];
  store(scales, load_f16(static_cast<const uint16_t*>(w.scale) + g * kRows));
  return scales[r];
}

void embedding(const EmbeddingArgs& p, Range ids) {
  const int64_t k = p.w.k, groups = (k + kGroup - 1) / kGroup;
  alignas(64) float values[kGroup];
  for (int64_t i = ids.begin; i < ids.end; ++i) {
    const int64_t tile = p.ids[i] / kRows, r = p.ids[i] % kRows;
    for (int64_t g = 0; g < groups; ++g) {
      const vf scale = set(unpack_group(p.w, tile, r, g, groups, values));
      const int64_t at = i * k + g * kGroup, left = k - g * kGroup;
      store16(p.out, at, mul(load(values), scale), left);
      if (left > 16) store16(p.out, at + 16, mul(load(values + 16), scale), left - 16);
    }
  }
}
