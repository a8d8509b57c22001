// Body of the weight quantizer, included once per instruction set with `kLanes` (floats per vector),
// `Lanes` (the vector types), `lesser` and `greater` defined. Lanes are rows of a tile (w4g32) or
// columns of a row (w8) and never meet, so every instruction set gives the bits of the plain-torch
// reference. Anonymous namespace: the linker must not merge the copies.
#include <cstring>
#include <utility>

#include "quantize.h"

// A fused multiply-add rounds once where the reference rounds twice.
#pragma GCC optimize("fp-contract=off")

#define INLINE inline __attribute__((always_inline))

namespace {

using unicorn::FloatType;
using unicorn::QuantizeArgs;
using unicorn::Scheme;

constexpr int kRows = 16;
constexpr int kGroup = 32;
constexpr int kFactors = 8;
constexpr float kFirstFactor = 6.25f, kFactorStep = 0.375f;  // schemes.py FACTORS
constexpr float kMinAmax = 0x1p-100f;                        // schemes.py MIN_AMAX
constexpr float kMaxScale = 65504.0f;
constexpr float kGridError = 0x1p-16f;  // schemes.py GRID_ERROR
constexpr uint32_t kMinGridScale = 5u;  // MIN_GRID_SCALE
constexpr float kMinSum = 0x1p-40f;     // kquants.py MIN_SUM
constexpr float kMagic = 0x1.8p23f;     // x + kMagic - kMagic = rint(x), half to even, for |x| < 2^22
constexpr int32_t kMagicBits = 0x4B400000;
constexpr int32_t kInfBits = 0x7F800000;

template <class V>
INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

INLINE VF splat(float x) { return VF{} + x; }
INLINE VF clamp(VF x, float low, float high) { return lesser(greater(x, splat(low)), splat(high)); }
INLINE VF round_even(VF x) { return (x + kMagic) - kMagic; }
INLINE VI to_int(VF x) { return (VI)(x + kMagic) - kMagicBits; }  // rounds like round_even
INLINE VI magnitude(VF x) { return (VI)x & 0x7FFFFFFF; }          // ordered like |x|; >= kInfBits: not finite

// fp16 bits in the low half of each lane.
INLINE VF half_to_float(VU h) {
  const VU bits = (h & 0x7FFFu) << 13;
  const VF scaled = (VF)bits * 0x1p112f;  // moves the exponent; subnormals come out exact
  const VU special = (VU)((h & 0x7C00u) == 0x7C00u);
  return (VF)((((VU)scaled & ~special) | ((bits | 0x7F800000u) & special)) | ((h & 0x8000u) << 16));
}

// |x| <= 65504, round half to even.
INLINE VU float_to_half(VF x) {
  const VU bits = (VU)x & 0x7FFFFFFFu, sign = ((VU)x >> 16) & 0x8000u;
  const VU normal = ((bits + 0xFFFu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  const VU small = (VU)((VF)bits + 0.5f) - 0x3F000000u;  // the ulp of 0.5 is the fp16 subnormal step
  const VU is_small = (VU)((VI)bits < 0x38800000);
  return ((small & is_small) | (normal & ~is_small)) | sign;
}

template <FloatType>
constexpr int kBytes = 2;
template <>
constexpr int kBytes<FloatType::f32> = 4;

// kLanes consecutive elements.
template <FloatType T>
INLINE VF load_row(const uint8_t* p) {
  if constexpr (T == FloatType::f32) {
    return load<VF>(p);
  } else {
    const VU raw = __builtin_convertvector(load<VH>(p), VU);
    if constexpr (T == FloatType::bf16) return (VF)(raw << 16);
    return half_to_float(raw);
  }
}

// Where the 32 elements of group g of each row lie: in the weight, or, for a partial group or a row
// past the end, zero-padded in `pad`.
struct GroupRows {
  const uint8_t* row[kRows];
  alignas(64) uint8_t pad[kRows][kGroup * 4];
};

template <FloatType T>
INLINE void find_group(const QuantizeArgs& a, int64_t i, int64_t g, GroupRows& out) {
  const int64_t left = a.k - g * kGroup, rows = a.n - i * kRows;
  const uint8_t* w = static_cast<const uint8_t*>(a.w) + i * kRows * a.row_bytes + g * kGroup * kBytes<T>;
  for (int r = 0; r < kRows; ++r) {
    out.row[r] = w + r * a.row_bytes;
    if (r < rows && left >= kGroup) continue;
    std::memset(out.pad[r], 0, sizeof out.pad[r]);
    if (r < rows) std::memcpy(out.pad[r], out.row[r], size_t(left) * kBytes<T>);
    out.row[r] = out.pad[r];
  }
}

// x[k] lane r = element k of row first + r.
template <FloatType T>
INLINE void load_transposed(const GroupRows& rows, int first, VF x[kGroup]) {
  constexpr int kWords = kGroup * kBytes<T> / 4;
  alignas(64) uint32_t words[kWords][kLanes];
  for (int r = 0; r < kLanes; ++r)
    for (int p = 0; p < kWords; ++p) std::memcpy(&words[p][r], rows.row[first + r] + 4 * p, 4);
  for (int p = 0; p < kWords; ++p) {
    const VU v = load<VU>(words[p]);
    if constexpr (T == FloatType::f32) {
      x[p] = (VF)v;
    } else if constexpr (T == FloatType::bf16) {
      x[2 * p] = (VF)(v << 16);
      x[2 * p + 1] = (VF)(v & 0xFFFF0000u);
    } else {
      x[2 * p] = half_to_float(v & 0xFFFFu);
      x[2 * p + 1] = half_to_float(v >> 16);
    }
  }
}

INLINE bool any_lane(VI mask) {
  int32_t any = 0;
  for (int r = 0; r < kLanes; ++r) any |= mask[r];
  return any != 0;
}

INLINE bool all_finite(VI top) {
  bool good = true;
  for (int r = 0; r < kLanes; ++r) good &= top[r] < kInfBits;
  return good;
}

// Columns of group g: 32, or fewer in the last one. Past them a codebook or a minimum may stand for anything.
INLINE int columns_of(const QuantizeArgs& a, int64_t g) {
  const int64_t left = a.k - g * kGroup;
  return int(left < kGroup ? left : kGroup);
}

// The importance of the columns of group g; ones where there is none.
template <bool kWeighted>
INLINE void column_weights(const QuantizeArgs& a, int64_t g, float h[kGroup]) {
  for (int k = 0; k < kGroup; ++k) h[k] = kWeighted ? 0.0f : 1.0f;
  if constexpr (kWeighted) std::memcpy(h, a.importance + g * kGroup, sizeof(float) * size_t(columns_of(a, g)));
}

template <bool kWeighted>
INLINE VF weigh(VF x, float weight) {
  return kWeighted ? x * weight : x;
}

// Keeps the better of the best scale so far and a / b, whose squared error is smaller the larger a * a / b.
INLINE void keep_better(VF a, VF b, float sign, VF& best, VF& scale) {
  const VF t = a / greater(b, splat(kMinSum));
  const VF score = a * t;
  const VI better = score > best;
  best = (VF)((better & (VI)score) | (~better & (VI)best));
  scale = (VF)((better & (VI)(t * sign)) | (~better & (VI)scale));
}

// Best least-squares scale of x, |x| <= 1: both signs, every factor. best: the squares that it explains.
template <bool kWeighted>
INLINE VF searched_scale(const VF x[kGroup], const float* h, VF& best) {
  VF scale = splat(0.0f);
  best = splat(-1.0f);
  for (int f = 0; f < kFactors; ++f) {
    const float factor = kFirstFactor + kFactorStep * float(f);
    VF a0 = splat(0), b0 = splat(0), a1 = splat(0), b1 = splat(0);
    for (int k = 0; k < kGroup; ++k) {
      const VF r = round_even(x[k] * factor);
      const VF q0 = clamp(r, -8.0f, 7.0f), q1 = clamp(r, -7.0f, 8.0f);
      const VF weighted = weigh<kWeighted>(x[k], h[k]);
      a0 = a0 + weighted * q0;
      b0 = b0 + weigh<kWeighted>(q0, h[k]) * q0;
      a1 = a1 + weighted * q1;
      b1 = b1 + weigh<kWeighted>(q1, h[k]) * q1;
    }
    keep_better(a0, b0, 1.0f, best, scale);
    keep_better(a1, b1, -1.0f, best, scale);  // stored are -q1 and -a1 / b1
  }
  return scale;
}

// schemes.py CODEBOOK, cut into 32 cells of 8: none has more than one threshold (the middle between two values).
// Cell j of x in [8 j - 128, 8 j - 120): values[below[j]], or the next one where x > threshold[j].
using unicorn::kCodebook;
constexpr int kCodes = unicorn::kCodebookSize, kCells = 32;
constexpr float kFirstCode = 100.0f, kCodeStep = 8.0f;  // schemes.py CODEBOOK_FACTORS
constexpr int kCodeFactors = 6;

struct Cells {
  alignas(64) float threshold[kCells] = {}, low[kCells] = {}, high[kCells] = {}, index[kCells] = {};

  constexpr Cells() {
    for (int j = 0, i = 0; j < kCells; ++j) {
      const float middle = i + 1 < kCodes ? float(kCodebook[i] + kCodebook[i + 1]) / 2 : __builtin_inff();
      const bool inside = middle < float(8 * (j + 1) - 128);
      threshold[j] = inside ? middle : __builtin_inff();
      low[j] = float(kCodebook[i]);
      high[j] = float(kCodebook[inside ? i + 1 : i]);
      index[j] = float(i);
      i += inside;
    }
  }
};
constexpr Cells kCellTable;

// The cell of x, any float: what rounds into the next cell meets no other threshold there.
INLINE VI cell_of(VF x) { return __builtin_convertvector((clamp(x, -128.0f, 127.0f) + 128.0f) * 0.125f, VI); }

// The nearest value of the codebook.
INLINE VF nearest_code(VF x) {
  const VI cell = cell_of(x), above = x > look_up(kCellTable.threshold, cell);
  return (VF)((above & (VI)look_up(kCellTable.high, cell)) | (~above & (VI)look_up(kCellTable.low, cell)));
}

// The index of that value.
INLINE VI nearest_index(VF x) {
  const VI cell = cell_of(x), above = x > look_up(kCellTable.threshold, cell);
  return __builtin_convertvector(look_up(kCellTable.index, cell), VI) - above;  // true is -1
}

template <bool kWeighted>
INLINE VF searched_code_scale(const VF x[kGroup], const float* h) {
  VF best = splat(-1.0f), scale = splat(0.0f);
  for (int f = 0; f < kCodeFactors; ++f) {
    for (int sign = 1; sign >= -1; sign -= 2) {
      const float factor = float(sign) * (kFirstCode + kCodeStep * float(f));
      VF a = splat(0), b = splat(0);
      for (int k = 0; k < kGroup; ++k) {
        const VF v = nearest_code(x[k] * factor);
        a = a + weigh<kWeighted>(x[k], h[k]) * v;
        b = b + weigh<kWeighted>(v, h[k]) * v;
      }
      keep_better(a, b, 1.0f, best, scale);
    }
  }
  return scale;
}

// What a 4-bit scheme stores for x, in 0..15.
template <bool kCode>
INLINE VI four_bits(VF x) {
  if constexpr (kCode) return nearest_index(x);
  return to_int(clamp(x, -8.0f, 7.0f)) + 8;
}

// The nearest bf16, as a float.
INLINE VF round_bf16(VF x) {
  const VU bits = (VU)x;
  return (VF)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// The lanes whose weights are nearly a grid (schemes.py GRID_ERROR): what `best` leaves of the squares of x.
template <bool kWeighted>
INLINE VI on_grid(const VF x[kGroup], const float* h, VF best) {
  VF squares = splat(0);
  for (int k = 0; k < kGroup; ++k) squares = squares + weigh<kWeighted>(x[k], h[k]) * x[k];
  return squares - best <= squares * kGridError;
}

// The scale, or its nearest neighbour (schemes.py NEIGHBOURS) whose grid rounds to exactly the bf16 weights, in the
// lanes `left`; out of line, since only checkpoints trained for this grid come here.
__attribute__((noinline)) VU scale_of_grid(const GroupRows& rows, int first, const VF q[kGroup], VU half, VI left) {
  VF x[kGroup];
  load_transposed<FloatType::bf16>(rows, first, x);
  left &= (VI)((half & 0x7FFFu) >= kMinGridScale);
  VU result = half;
  for (const int shift : {0, -1, 1, -2, 2, -3, 3, -4, 4}) {
    const VU candidate = half + uint32_t(shift);
    const VF s = half_to_float(candidate);
    VI exact = left;
    for (int k = 0; k < kGroup; ++k) exact &= round_bf16(s * q[k]) == x[k];
    result = ((VU)exact & candidate) | (~(VU)exact & result);
    left &= ~exact;
  }
  return result;
}

// Rows first .. first + kLanes - 1 of one tile. kCode: w4n32, else w4g32.
template <FloatType T, bool kCode, bool kWeighted>
INLINE bool w4_rows(const GroupRows& rows, int first, const float* h, uint8_t* tile, uint16_t* scales) {
  VF x[kGroup];
  load_transposed<T>(rows, first, x);
  VI top = magnitude(x[0]);
  for (int k = 1; k < kGroup; ++k) top = greater(top, magnitude(x[k]));
  const VF amax = greater((VF)top, splat(kMinAmax)), inverse = splat(1.0f) / amax;
  for (int k = 0; k < kGroup; ++k) x[k] = x[k] * inverse;

  VF best;
  const VF found = kCode ? searched_code_scale<kWeighted>(x, h) : searched_scale<kWeighted>(x, h, best);
  VU half = float_to_half(clamp(found * amax, -kMaxScale, kMaxScale));
  const VF s = half_to_float(half);
  const VI zero = s == splat(0.0f);
  const VF step = (VF)(~zero & (VI)(amax / s));
  if constexpr (T == FloatType::bf16 && !kCode) {
    if (const VI grid = on_grid<kWeighted>(x, h, best); any_lane(grid)) {
      VF q[kGroup];
      for (int k = 0; k < kGroup; ++k) q[k] = clamp(round_even(x[k] * step), -8.0f, 7.0f);
      half = scale_of_grid(rows, first, q, half, grid);
    }
  }
  store(scales + first, __builtin_convertvector(half, VH));
  for (int c = 0; c < 4; ++c) {
    VI word = VI{};
    for (int j = 0; j < 4; ++j) {
      const VI low = four_bits<kCode>(x[8 * c + j] * step), high = four_bits<kCode>(x[8 * c + 4 + j] * step);
      word |= (low | (high << 4)) << (8 * j);
    }
    store(tile + 64 * c + 4 * first, word);
  }
  return all_finite(top);
}

// w8g32: the scale is amax / 127 in fp16, the integers are rounded for that.
template <FloatType T>
INLINE bool w8g32_rows(const GroupRows& rows, int first, const float*, uint8_t* tile, uint16_t* scales) {
  VF x[kGroup];
  load_transposed<T>(rows, first, x);
  VI top = magnitude(x[0]);
  for (int k = 1; k < kGroup; ++k) top = greater(top, magnitude(x[k]));
  const VU half = float_to_half(lesser((VF)top / 127.0f, splat(kMaxScale)));
  const VF s = half_to_float(half);
  const VI zero = s == splat(0.0f);
  const VF inverse = (VF)(~zero & (VI)(splat(1.0f) / s));
  store(scales + first, __builtin_convertvector(half, VH));
  for (int c = 0; c < 8; ++c) {
    VI word = VI{};
    for (int j = 0; j < 4; ++j) {
      word |= (to_int(clamp(x[4 * c + j] * inverse, -127.0f, 127.0f)) + 128) << (8 * j);
    }
    store(tile + 64 * c + 4 * first, word);
  }
  return all_finite(top);
}

// Every group of tiles begin..end-1 by one of the functions above.
template <FloatType T, int64_t kTileBytes, bool kWeighted, class Pack>
INLINE bool grouped_tiles(const QuantizeArgs& a, int64_t begin, int64_t end, Pack pack) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup;
  bool good = true;
  GroupRows rows;
  float h[kGroup];
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < k32; ++g) {
      const int64_t t = i * k32 + g;
      find_group<T>(a, i, g, rows);
      column_weights<kWeighted>(a, g, h);
      uint16_t* scales = static_cast<uint16_t*>(a.scale) + t * kRows;
      for (int first = 0; first < kRows; first += kLanes)
        good &= pack(rows, first, h, a.packed + t * kTileBytes, scales);
    }
  return good;
}

struct RowRange {
  float low, high, amax;
  bool finite;
};

// Running minimum, maximum and largest magnitude of kLanes columns at a time.
struct LaneRange {
  VF low = VF{}, high = VF{};
  VI top = VI{};

  INLINE void add(VF x) { low = lesser(x, low), high = greater(x, high), top = greater(top, magnitude(x)); }
};

template <FloatType T>
INLINE RowRange row_range(const uint8_t* row, int64_t k) {
  constexpr int64_t kStep = 4 * kLanes;  // four independent chains: one add waits for its predecessor
  LaneRange lanes[4];
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep)
    for (int c = 0; c < 4; ++c) lanes[c].add(load_row<T>(row + (i + c * kLanes) * kBytes<T>));
  for (; i < k; i += kLanes) {
    alignas(64) uint8_t tail[64] = {};
    std::memcpy(tail, row + i * kBytes<T>, size_t(k - i < kLanes ? k - i : kLanes) * kBytes<T>);
    lanes[0].add(load_row<T>(tail));
  }
  RowRange out{0.0f, 0.0f, 0.0f, true};
  int32_t most = 0;
  for (const LaneRange& range : lanes)
    for (int l = 0; l < kLanes; ++l) {
      out.low = range.low[l] < out.low ? range.low[l] : out.low;
      out.high = range.high[l] > out.high ? range.high[l] : out.high;
      most = range.top[l] > most ? range.top[l] : most;
    }
  std::memcpy(&out.amax, &most, 4);
  out.finite = most < kInfBits;
  return out;
}

// One row of w8: byte = clamp(rint(x * inverse) + zero, lowest, 255).
struct RowScale {
  float scale, inverse, zero;
};

INLINE RowScale symmetric(const RowRange& range) {
  if (range.amax < kMinAmax) return {0.0f, 0.0f, 128.0f};
  return {range.amax / 127.0f, (1.0f / range.amax) * 127.0f, 128.0f};
}

INLINE RowScale asymmetric(const RowRange& range) {
  const float scale = range.high / 255.0f - range.low / 255.0f;
  if (scale < kMinAmax) return {0.0f, 0.0f, 128.0f};
  const float inverse = 1.0f / scale;
  const float zero = (-range.low * inverse + kMagic) - kMagic;
  return {scale, inverse, zero < 0.0f ? 0.0f : (zero > 255.0f ? 255.0f : zero)};
}

// The clamp comes before the rounding: its bounds are integers, and it keeps the magic rounding in range.
template <FloatType T, bool kAsymmetric>
INLINE void w8_group(const GroupRows& rows, const RowScale* scales, uint8_t* tile) {
  constexpr float kLowest = kAsymmetric ? 0.0f : 1.0f;
  for (int r = 0; r < kRows; ++r) {
    const RowScale& s = scales[r];
    for (int first = 0; first < kGroup; first += kLanes) {
      const VF x = load_row<T>(rows.row[r] + first * kBytes<T>);
      const VI q = to_int(clamp(x * s.inverse, kLowest - s.zero, 255.0f - s.zero)) + int32_t(s.zero);
      alignas(16) uint8_t bytes[kLanes];
      store(bytes, __builtin_convertvector(q, VB));
      for (int c = 0; c < kLanes / 4; ++c) std::memcpy(tile + (first / 4 + c) * 64 + 4 * r, bytes + 4 * c, 4);
    }
  }
}

template <FloatType T, bool kAsymmetric>
bool w8_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup;
  bool good = true;
  GroupRows rows;
  for (int64_t i = begin; i < end; ++i) {
    RowScale scales[kRows];
    for (int r = 0; r < kRows; ++r) {
      RowRange range{0.0f, 0.0f, 0.0f, true};  // rows past the end: all zero
      if (i * kRows + r < a.n)
        range = row_range<T>(static_cast<const uint8_t*>(a.w) + (i * kRows + r) * a.row_bytes, a.k);
      good &= range.finite;
      if (!range.finite) range = {0.0f, 0.0f, 0.0f, false};
      scales[r] = kAsymmetric ? asymmetric(range) : symmetric(range);
      static_cast<float*>(a.scale)[i * kRows + r] = scales[r].scale;
      if (kAsymmetric) a.zero[i * kRows + r] = uint8_t(scales[r].zero);
    }
    for (int64_t g = 0; g < k32; ++g) {
      find_group<T>(a, i, g, rows);
      w8_group<T, kAsymmetric>(rows, scales, a.packed + (i * k32 + g) * 512);
    }
  }
  return good;
}

// fp32 inside one group, fp64 above: 32 squares lose nothing that a decibel shows.
struct GroupNoise {
  VF signal = VF{}, noise = VF{};

  INLINE void add(VF x, VF value) {
    const VF error = x - value;
    signal = signal + x * x;
    noise = noise + error * error;
  }
  INLINE void flush(unicorn::Noise& total) const {
    for (int l = 0; l < kLanes; ++l) total.signal += double(signal[l]), total.noise += double(noise[l]);
  }
};

// Sums over one group of kLanes rows; `value(k)` is the packed value of column k, before the scale.
template <FloatType T, class Value>
INLINE void add_noise(const GroupRows& rows, int first, const uint16_t* scales, int columns, unicorn::Noise& total,
                      Value value) {
  VF x[kGroup];
  load_transposed<T>(rows, first, x);
  const VF s = half_to_float(__builtin_convertvector(load<VH>(scales + first), VU));
  GroupNoise sums;
  for (int k = 0; k < columns; ++k) sums.add(x[k], s * value(k));
  sums.flush(total);
}

template <Scheme K, FloatType T>
unicorn::Noise grouped_noise_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup;
  constexpr int64_t kTileBytes = K == Scheme::w8g32 ? 512 : 256;
  alignas(64) float table[kCells] = {};
  for (int i = 0; K == Scheme::w4n32 && i < kCodes; ++i) table[i] = float(a.codebook[i]);
  unicorn::Noise total;
  GroupRows rows;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < k32; ++g) {
      const int64_t t = i * k32 + g;
      find_group<T>(a, i, g, rows);
      for (int first = 0; first < kRows; first += kLanes) {
        const uint8_t* tile = a.packed + t * kTileBytes + 4 * first;
        const uint16_t* scales = static_cast<const uint16_t*>(a.scale) + t * kRows;
        add_noise<T>(rows, first, scales, columns_of(a, g), total, [&](int k) {
          if constexpr (K == Scheme::w8g32) {
            return __builtin_convertvector(((load<VI>(tile + 64 * (k / 4)) >> (8 * (k % 4))) & 255) - 128, VF);
          } else {
            const VI nibble = (load<VI>(tile + 64 * (k / 8)) >> (8 * (k % 4) + (k % 8 < 4 ? 0 : 4))) & 15;
            return K == Scheme::w4n32 ? look_up(table, nibble) : __builtin_convertvector(nibble - 8, VF);
          }
        });
      }
    }
  return total;
}

template <FloatType T>
unicorn::Noise w8_noise_tiles(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const int64_t k32 = (a.k + kGroup - 1) / kGroup;
  unicorn::Noise total;
  GroupRows rows;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < k32; ++g) {
      find_group<T>(a, i, g, rows);
      for (int first = 0; first < kRows; first += kLanes) {
        const uint8_t* tile = a.packed + (i * k32 + g) * 512 + 4 * first;
        const VF s = load<VF>(static_cast<const float*>(a.scale) + i * kRows + first);
        VF zero = splat(128.0f);
        if (a.zero) zero = __builtin_convertvector(load<VB>(a.zero + i * kRows + first), VF);
        VF x[kGroup];
        load_transposed<T>(rows, first, x);
        GroupNoise sums;
        // Padding has bytes of value zero, as the weight has zeros there.
        for (int k = 0; k < kGroup; ++k) {
          const VI byte = (load<VI>(tile + 64 * (k / 4)) >> (8 * (k % 4))) & 255;
          sums.add(x[k], (__builtin_convertvector(byte, VF) - zero) * s);
        }
        sums.flush(total);
      }
    }
  return total;
}

template <FloatType T>
int64_t count_nonfinite_of(const uint8_t* w, int64_t count) {
  constexpr int64_t kBlock = 4096;  // elements between two looks at the maximum
  int64_t bad = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    const uint8_t* p = w + start * kBytes<T>;
    if (row_range<T>(p, size).finite) continue;
    for (int64_t i = 0; i < size; ++i) bad += !row_range<T>(p + i * kBytes<T>, 1).finite;
  }
  return bad;
}

#include "quantize_kquants.inl"

constexpr FloatType kBf16 = FloatType::bf16, kF16 = FloatType::f16, kF32 = FloatType::f32;

template <Scheme S, FloatType T, bool kWeighted>
INLINE bool tiles_of(const QuantizeArgs& a, int64_t begin, int64_t end) {
  if constexpr (S == Scheme::w4g32)
    return grouped_tiles<T, 256, kWeighted>(a, begin, end, w4_rows<T, false, kWeighted>);
  if constexpr (S == Scheme::w4n32) return grouped_tiles<T, 256, kWeighted>(a, begin, end, w4_rows<T, true, kWeighted>);
  if constexpr (S == Scheme::w4m32) return w4m32_tiles<T, kWeighted>(a, begin, end);
  if constexpr (S == Scheme::q4k) return super_tiles<T, 4, kWeighted>(a, begin, end);
  if constexpr (S == Scheme::q5k) return super_tiles<T, 5, kWeighted>(a, begin, end);
  if constexpr (S == Scheme::q6k) return super_tiles<T, 6, kWeighted>(a, begin, end);
  if constexpr (S == Scheme::w8c) return w8_tiles<T, false>(a, begin, end);
  if constexpr (S == Scheme::w8a) return w8_tiles<T, true>(a, begin, end);
  if constexpr (S == Scheme::w8g32) return grouped_tiles<T, 512, false>(a, begin, end, w8g32_rows<T>);
}

template <Scheme S, FloatType T>
bool weighted_or_not(const QuantizeArgs& a, int64_t begin, int64_t end) {
  constexpr bool kSearched = S != Scheme::w8c && S != Scheme::w8a && S != Scheme::w8g32;
  if constexpr (kSearched) {
    if (a.importance) return tiles_of<S, T, true>(a, begin, end);
  }
  return tiles_of<S, T, false>(a, begin, end);
}

template <Scheme S>
bool quantize(const QuantizeArgs& a, int64_t begin, int64_t end) {
  if (a.type == kBf16) return weighted_or_not<S, kBf16>(a, begin, end);
  return a.type == kF16 ? weighted_or_not<S, kF16>(a, begin, end) : weighted_or_not<S, kF32>(a, begin, end);
}

template <Scheme S, FloatType T>
unicorn::Noise noise_of(const QuantizeArgs& a, int64_t begin, int64_t end) {
  if constexpr (S == Scheme::w8c || S == Scheme::w8a) return w8_noise_tiles<T>(a, begin, end);
  if constexpr (S == Scheme::w4m32) return kquant_noise_tiles<T, 0>(a, begin, end);
  if constexpr (S == Scheme::q4k) return kquant_noise_tiles<T, 4>(a, begin, end);
  if constexpr (S == Scheme::q5k) return kquant_noise_tiles<T, 5>(a, begin, end);
  if constexpr (S == Scheme::q6k) return kquant_noise_tiles<T, 6>(a, begin, end);
  if constexpr (S == Scheme::w4g32 || S == Scheme::w4n32 || S == Scheme::w8g32)
    return grouped_noise_tiles<S, T>(a, begin, end);
}

template <Scheme S>
unicorn::Noise noise(const QuantizeArgs& a, int64_t begin, int64_t end) {
  if (a.type == kBf16) return noise_of<S, kBf16>(a, begin, end);
  return a.type == kF16 ? noise_of<S, kF16>(a, begin, end) : noise_of<S, kF32>(a, begin, end);
}

int64_t count_nonfinite(const void* data, FloatType type, int64_t count) {
  const uint8_t* w = static_cast<const uint8_t*>(data);
  if (type == kBf16) return count_nonfinite_of<kBf16>(w, count);
  return type == kF16 ? count_nonfinite_of<kF16>(w, count) : count_nonfinite_of<kF32>(w, count);
}

template <int... S>
constexpr unicorn::Quantizer table_of(const char* isa, std::integer_sequence<int, S...>) {
  return {isa, {quantize<Scheme(S)>...}, {noise<Scheme(S)>...}, count_nonfinite};
}
constexpr unicorn::Quantizer table(const char* isa) {
  return table_of(isa, std::make_integer_sequence<int, unicorn::kSchemes>{});
}

}  // namespace
