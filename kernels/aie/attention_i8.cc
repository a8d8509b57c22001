// Flash attention of one block of query rows with one block of keys, in integers only, so that every
// implementation agrees bit for bit. The mathematics of one row, S = keys of the block:
//
//   t[s] = clamp(srs(q . k[s] * mult, shift), +-2^27), "masked" outside first <= s < last   logits, log2 units, Q8
//   m'   = max(m, max t)                      a = exp2(m - m') in Q14
//   p[s] = srs(255 exp2(t[s] - m'), 15)       uint8
//   l'   = (l a + 2^13 >> 14) + sum p         O' = srs(O a, 14) + p v                       int32
//
// srs shifts right, rounds half to even, saturates. exp2 is a cubic on the fraction and a shift by the whole
// part (|error| < 0.0003), without a table. Nothing in a row depends on the rows beside it, and a block
// of which a row sees nothing leaves its m, l and O as they were. O / l is the result in units of v's scale,
// and (m, l, O) of several ranges of keys can be merged (split-KV).
//
// Blocks in memory, R = UNICORN_MMUL_ROWS, sizes in elements:
//   query  int8 q [ROWS/R][D/8][R][8], int16 mult [ROWS], int32 first [ROWS], int32 last [ROWS], int32 {shift, -, ..8}
//   keys   int8 k [KEYS/8][D/8][8 d][8 s], int8 v [KEYS/8][D/8][8 s][8 d], int32 {base, finer, -, ..16}
//   state  int32 m [ROWS], int32 l [ROWS], int32 O [ROWS/R][D/8][R][8]
// first and last count keys of the whole cache, base is the block's first one; `finer` is added to shift: the
// keys of this block were quantized with a step 2^finer smaller.
#include <aie_api/aie.hpp>

#include "arch.h"

#if !defined(UNICORN_ROWS) || !defined(UNICORN_KEYS) || !defined(UNICORN_HEAD_DIM)
#error "compile with -DUNICORN_ROWS= -DUNICORN_KEYS= -DUNICORN_HEAD_DIM="
#endif

namespace {

constexpr unsigned R = UNICORN_MMUL_ROWS, kRows = UNICORN_ROWS, kKeys = UNICORN_KEYS, kDim = UNICORN_HEAD_DIM;
static_assert(kRows % 16 == 0 && kKeys % 16 == 0 && kDim % 16 == 0, "blocks start on 64 bytes");

constexpr unsigned kLanes = 32;               // int32 lanes of the widest vector: 4 rows of 8 columns
constexpr unsigned kSlices = R * 8 / kLanes;  // vectors per product
constexpr int32 kMasked = -(1 << 28);         // below every clamped logit
constexpr int32 kLimit = 1 << 27;
constexpr int32 kFar = 4095;  // 2^-(4095 / 256) rounds to 0 in Q15

using Scores = aie::mmul<R, 8, 8, int8, int8, acc32>;
using Values = aie::mmul<R, 8, 8, uint8, int8, acc32>;
using Wide = aie::vector<int32, kLanes>;
using Half = aie::vector<int16, kLanes>;

alignas(64) UNICORN_CORE_MEMORY int32 scores[kSlices][kKeys / 8][kLanes];
alignas(64) UNICORN_CORE_MEMORY uint8 weights[kKeys / 8][R * 8];

struct Query {
  const int8* q;
  const int16* mult;
  const int32 *first, *last;
  int32 shift;
};

Query query_of(const int8* block) {
  const int8* end = block + kRows * kDim;
  const auto* mult = reinterpret_cast<const int16*>(end);
  const auto* first = reinterpret_cast<const int32*>(end + 2 * kRows);
  return {block, mult, first, first + kRows, first[2 * kRows]};
}

// c + f x in Q15, f in Q8.
Half horner(int16 c, const Half& f, const Half& x) {
  aie::accum<acc32, kLanes> a;
  a.from_vector(aie::broadcast<int16, kLanes>(c), 8);
  return aie::mac(a, f, x).to_vector<int16>(8);
}

// 2^-(t / 256) in Q15 for 0 <= t <= 4095: a cubic (least squares) on the fraction, a shift by the whole part t >> 8.
Half exp2_neg(const Half& t) {
  const Half f = aie::bit_and(t, aie::broadcast<int16, kLanes>(255));
  const Half n = aie::downshift(t, 8);
  Half p = horner(7607, f, aie::broadcast<int16, kLanes>(-1325));
  p = horner(32767, f, horner(-22670, f, p));
  for (int bit = 1; bit <= 8; bit *= 2) {
    const Half on = aie::bit_and(n, aie::broadcast<int16, kLanes>(int16(bit)));
    p = aie::select(p, aie::downshift(p, unsigned(bit)), aie::lt(aie::zeros<int16, kLanes>(), on));
  }
  return p;
}

Half narrow(const Wide& x) {
  aie::accum<acc32, kLanes> a;
  a.from_vector(x, 0);
  return a.to_vector<int16>(0);
}

int32 clamp(int32 x, int32 lo, int32 hi) { return x < lo ? lo : x > hi ? hi : x; }

// Four rows, each repeated over the eight columns of a product.
struct Slice {
  alignas(64) int16 mult[kLanes];
  alignas(64) int16 lo[kLanes];
  alignas(64) int16 hi[kLanes];
};

Slice slice_of(const Query& q, unsigned row, int32 base) {
  Slice s;
  for (unsigned i = 0; i < 4; ++i) {
    const int16 lo = int16(clamp(q.first[row + i], base, base + kKeys) - base);  // first - base may not fit an int32
    const int16 hi = int16(clamp(q.last[row + i], base, base + kKeys) - base);
    for (unsigned c = 0; c < 8; ++c) {
      s.mult[i * 8 + c] = q.mult[row + i];
      s.lo[i * 8 + c] = lo;
      s.hi[i * 8 + c] = hi;
    }
  }
  return s;
}

// Logits of R rows into `scores`, and their maximum per lane of each slice.
void score_rows(const int8* q, const int8* k, const Slice* slice, unsigned shift, Wide* most) {
  alignas(64) static const int16 column8[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7,
                                                    0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
  const Half column0 = aie::load_v<kLanes>(column8);
  const Wide masked = aie::broadcast<int32, kLanes>(kMasked);
  for (unsigned s = 0; s < kSlices; ++s) most[s] = masked;
  for (unsigned j = 0; j < kKeys / 8; ++j) {
    Scores c(aie::zeros<int32, R * 8>());
    for (unsigned d = 0; d < kDim / 8; ++d) {
      c.mac(aie::load_v<R * 8>(q + d * R * 8), aie::load_v<64>(k + (j * (kDim / 8) + d) * 64));
    }
    const auto sums = c.to_vector<int32>();
    const Half column = aie::add(column0, aie::broadcast<int16, kLanes>(int16(j * 8)));
    for (unsigned s = 0; s < kSlices; ++s) {
      const Half mult = aie::load_v<kLanes>(slice[s].mult);
      Wide t = aie::mul<acc64>(sums.extract<kLanes>(s), mult).to_vector<int32>(shift);
      t = aie::max(aie::min(t, aie::broadcast<int32, kLanes>(kLimit)), aie::broadcast<int32, kLanes>(-kLimit));
      t = aie::select(t, masked, aie::lt(column, aie::load_v<kLanes>(slice[s].lo)));
      t = aie::select(t, masked, aie::ge(column, aie::load_v<kLanes>(slice[s].hi)));
      aie::store_v(scores[s][j], t);
      most[s] = aie::max(most[s], t);
    }
  }
}

// Weights of four rows from their logits; updates m and l, gives the factor of O, true if it is 1 in every row.
bool weigh_rows(unsigned s, const Wide& most, int32* m, int32* l, Half& factor) {
  alignas(64) int32 shown[kLanes];
  alignas(64) int16 moved[kLanes];
  bool same = true;
  for (unsigned i = 0; i < 4; ++i) {
    const int32 before = m[i], block = aie::reduce_max(most.extract<8>(i));
    const int32 now = block > before ? block : before;
    const int16 step = int16(clamp(now - before, 0, kFar));
    same = same && step == 0;
    m[i] = now;
    for (unsigned c = 0; c < 8; ++c) {
      shown[i * 8 + c] = now > -kLimit ? now : -kLimit;  // a row without any key yet: every weight is 2^-far = 0
      moved[i * 8 + c] = step;
    }
  }
  // Q15 to Q14, rounded up: 2^0 becomes exactly 1, so that nothing is lost where the maximum stayed.
  const Half power = exp2_neg(aie::load_v<kLanes>(moved));
  factor = aie::sub(power, aie::downshift(power, 1));
  const Wide top = aie::load_v<kLanes>(shown);
  aie::accum<acc32, kLanes> total;
  total.from_vector(aie::zeros<int32, kLanes>(), 0);
  for (unsigned j = 0; j < kKeys / 8; ++j) {
    const Wide below = aie::min(aie::sub(top, aie::load_v<kLanes>(scores[s][j])), aie::broadcast<int32, kLanes>(kFar));
    const auto p = aie::mul<acc32>(exp2_neg(narrow(below)), aie::broadcast<int16, kLanes>(255));
    aie::store_v(weights[j] + s * kLanes, p.to_vector<uint8>(15));
    total = aie::mac(total, p.to_vector<int16>(15), aie::broadcast<int16, kLanes>(1));
  }
  const Wide sums = total.to_vector<int32>(0);
  for (unsigned i = 0; i < 4; ++i) {
    const int64_t kept = int64_t(l[i]) * factor[i * 8];
    l[i] = int32((kept + (1 << 13)) >> 14) + aie::reduce_add(sums.extract<8>(i));
  }
  return same;
}

// O = O factor + p v of R rows.
void add_values(const int8* v, const Half* factor, bool same, int32* o) {
  for (unsigned d = 0; d < kDim / 8; ++d, o += R * 8) {
    auto sums = aie::load_v<R * 8>(o);
    if (!same) {
      for (unsigned s = 0; s < kSlices; ++s) {
        const Wide kept = aie::mul<acc64>(sums.extract<kLanes>(s), factor[s]).to_vector<int32>(14);
        sums.insert(s, kept);
      }
    }
    Values c(sums);
    for (unsigned j = 0; j < kKeys / 8; ++j) {
      c.mac(aie::load_v<R * 8>(weights[j]), aie::load_v<64>(v + (j * (kDim / 8) + d) * 64));
    }
    aie::store_v(o, c.to_vector<int32>());
  }
}

}  // namespace

extern "C" void unicorn_attention_i8_init(int32* __restrict state) {
  for (unsigned i = 0; i < kRows; ++i) {
    state[i] = kMasked;
    state[kRows + i] = 0;
  }
  for (unsigned i = 0; i < kRows * kDim; i += 16) aie::store_v(state + 2 * kRows + i, aie::zeros<int32, 16>());
}

extern "C" void unicorn_attention_i8(const int8* __restrict query, const int8* __restrict keys,
                                     int32* __restrict state) {
  UNICORN_SET_ARITHMETIC();
  const Query q = query_of(query);
  const int8* v = keys + kKeys * kDim;
  const auto* header = reinterpret_cast<const int32*>(v + kKeys * kDim);
  const int32 base = header[0];
  const unsigned shift = unsigned(q.shift + header[1]);
  for (unsigned row = 0; row < kRows; row += R) {
    bool seen = false;
    for (unsigned i = row; i < row + R; ++i) {
      seen = seen || (q.first[i] < base + int32(kKeys) && q.last[i] > base && q.first[i] < q.last[i]);
    }
    if (!seen) continue;
    Slice slice[kSlices];
    Wide most[kSlices];
    Half factor[kSlices];
    for (unsigned s = 0; s < kSlices; ++s) slice[s] = slice_of(q, row + 4 * s, base);
    score_rows(q.q + row * kDim, keys, slice, shift, most);
    bool same = true;
    for (unsigned s = 0; s < kSlices; ++s) {
      const bool one = weigh_rows(s, most[s], state + row + 4 * s, state + kRows + row + 4 * s, factor[s]);
      same = same && one;
    }
    add_values(v, factor, same, state + 2 * kRows + row * kDim);
  }
}
