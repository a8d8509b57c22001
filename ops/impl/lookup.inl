// The two ops that move values into another shape: rotary embedding of heads, rows of an embedding.

// Element 2i of the result is -x[2i + 1], element 2i + 1 is x[2i].
INLINE vf swap_neighbours(vf x) {
  alignas(64) float in[16], out[16];
  store(in, x);
  for (int i = 0; i < 16; i += 2) {
    out[i] = -in[i + 1];
    out[i + 1] = in[i];
  }
  return load(out);
}

void rotary_head(const RotaryArgs& p, int64_t item) {
  const int64_t token = item / p.heads, head = item % p.heads, b = token / p.T, t = token % p.T;
  const int64_t d = p.head_dim, turned = p.cos.data == nullptr ? 0 : p.rotary_dim, half = turned / 2;
  const Array row_data{p.x, DType::f32};
  const NormedRow row(row_data, p.norm, token * p.stride + head * d, d);
  const int64_t to = ((b * p.heads + head) * p.T + t) * d;
  for (int64_t j = turned; j < d; j += 16) store16(p.out, to + j, row.at(j), d - j);
  const int64_t angle = (p.shared_cos ? t : token) * turned;
  if (p.interleaved) {
    for (int64_t j = 0; j < turned; j += 16) {
      const int64_t left = turned - j;
      const vf x = row.at(j, left);
      const vf other = mul(swap_neighbours(x), load16(p.sin, angle + j, left));
      store16(p.out, to + j, fma(x, load16(p.cos, angle + j, left), other), left);
    }
    return;
  }
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

// value = integer * scale + minimum for the 32 columns of one group of one row.
struct GroupValues {
  alignas(64) float integers[kGroup];
  float scale, minimum = 0;
};

INLINE float lane(const uint16_t* halves, int64_t r) {
  alignas(64) float floats[16];
  store(floats, load_f16(halves));
  return floats[r];
}

// Column k of a group, as it is stored.
INLINE int stored_bits(const uint8_t* p, Scheme scheme, int k) {
  const int c = k / 4, j = k % 4;
  const bool eight = group_bytes(scheme) == kW8GroupBytes;
  if (eight) return p[64 * c + j];
  const int byte = p[64 * (c / 2) + j], nibble = c % 2 == 0 ? byte & 15 : byte >> 4;
  if (scheme == Scheme::q5k) return nibble | (p[256 + j] >> c & 1) << 4;
  if (scheme == Scheme::q6k) return nibble | (p[256 + 64 * (c / 4) + j] >> 2 * (c % 4) & 3) << 4;
  return nibble;
}

INLINE void unpack_group(const Weight& w, int64_t tile, int64_t r, int64_t group, int64_t groups, GroupValues& out) {
  const int64_t g = tile * groups + group;
  const int64_t super = tile * ((groups + kSuper - 1) / kSuper) + group / kSuper;
  const uint8_t* p = w.q + g * group_bytes(w.scheme) + 4 * r;
  const auto* halves = static_cast<const uint16_t*>(w.scale) + g * kRows;
  const auto* pairs = static_cast<const uint8_t*>(w.scale) + g * 2 * kRows + r;
  const uint16_t* d = w.extra + super * 2 * kRows;
  int zero_point = 0, factor[2] = {1, 1};
  switch (w.scheme) {
    case Scheme::w8c:
    case Scheme::w8a:
      zero_point = w.scheme == Scheme::w8a ? w.zero[tile * kRows + r] : 128;
      out.scale = static_cast<const float*>(w.scale)[tile * kRows + r];
      break;
    case Scheme::w4g32:
    case Scheme::w4n32:
    case Scheme::w4m32:
    case Scheme::w8g32:
      zero_point = w.scheme == Scheme::w4g32 ? 8 : w.scheme == Scheme::w8g32 ? 128 : 0;
      out.scale = lane(halves, r);
      if (w.scheme == Scheme::w4m32) out.minimum = lane(w.extra + g * kRows, r);
      break;
    case Scheme::q4k:
    case Scheme::q5k:
      out.scale = lane(d, r) * static_cast<float>(pairs[0]);
      out.minimum = -(lane(d + kRows, r) * static_cast<float>(pairs[kRows]));
      break;
    case Scheme::q6k:
      zero_point = 32;
      factor[0] = static_cast<int8_t>(pairs[0]);
      factor[1] = static_cast<int8_t>(pairs[kRows]);
      out.scale = lane(w.extra + super * kRows, r);
      break;
  }
  for (int k = 0; k < kGroup; ++k) {
    const int bits = stored_bits(p, w.scheme, k);
    const int value = w.codebook != nullptr ? w.codebook[bits] : (bits - zero_point) * factor[k / 16];
    out.integers[k] = static_cast<float>(value);
  }
}

void embedding(const EmbeddingArgs& p, Range ids) {
  const int64_t k = p.w.k, groups = (k + kGroup - 1) / kGroup;
  for (int64_t i = ids.begin; i < ids.end; ++i) {
    const int64_t tile = p.ids[i] / kRows, r = p.ids[i] % kRows;
    for (int64_t g = 0; g < groups; ++g) {
      GroupValues values;
      unpack_group(p.w, tile, r, g, groups, values);
      const vf scale = set(values.scale), minimum = set(values.minimum);
      const int64_t at = i * k + g * kGroup, left = k - g * kGroup;
      store16(p.out, at, add(mul(load(values.integers), scale), minimum), left);
      if (left > 16) store16(p.out, at + 16, add(mul(load(values.integers + 16), scale), minimum), left - 16);
    }
  }
}
