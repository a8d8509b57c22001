// Groups of 32 values on AMX: 16 tokens times 16 rows in one instruction. The int32 sums leave through memory, where
// the scales meet them as they do elsewhere, so the bits are those of every other instruction set. Two blocks of tokens
// times two tiles of weights, four groups at a time: 950 GOPS on one Granite Rapids core; one block and one tile 790,
// where waiting for the tile's stores is most of the loss; vpdpbusd 380. The stores take half of the time in any order
// tried.
#ifdef UNICORN_AMX

constexpr int64_t kGroupsAtOnce = 4;  // their sums take 16 KB

// What LDTILECFG reads: rows and bytes per row of the eight tile registers.
struct alignas(64) TileShapes {
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tile registers of this thread. Libraries that use AMX too (oneDNN inside torch) find their shapes again.
class TileRegisters {
 public:
  TileRegisters() = default;
  ~TileRegisters() {
    if (now_[0] != 0) _tile_loadconfig(&before_);
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Sums 0 to 3, activations 4 and 5 of blocks of so many tokens, weights 6 and 7.
  void shape(int64_t first, int64_t second) {
    if (first == now_[0] && second == now_[1]) return;
    if (now_[0] == 0) _tile_storeconfig(&before_);
    now_[0] = first, now_[1] = second;
    TileShapes shapes;
    shapes.palette = 1;
    for (int i = 0; i < 4; ++i) shapes.rows[i] = now_[i / 2], shapes.bytes[i] = kRows * 4;
    for (int i = 0; i < 2; ++i) shapes.rows[4 + i] = now_[i], shapes.bytes[4 + i] = kGroup;
    for (int i = 0; i < 2; ++i) shapes.rows[6 + i] = kGroup / 4, shapes.bytes[6 + i] = kRows * 4;
    if (second == 0) shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = 1;  // unused, and 0 is not allowed
    _tile_loadconfig(&shapes);
  }

 private:
  TileShapes before_;
  int64_t now_[2] = {0, 0};
};

// Compilers do not know that tile instructions read and write memory.
INLINE void memory_changes() { __asm__ volatile("" ::: "memory"); }

// int32 sums: [block][tile of weights][group][token][row]. Were a group's sums 4 KB from the next one's, loads would
// wait for stores that only look like theirs.
typedef int32_t GroupSums[kBlock * kRows];
typedef GroupSums Sums[2][2][kGroupsAtOnce];

template <bool kTwo>
INLINE void group_products(const int8_t* a, const int8_t* b, const uint8_t* w0, const uint8_t* w1, int64_t i,
                           Sums& to) {
  _tile_loadd(4, a, kGroup);
  _tile_loadd(6, w0, kRows * 4);
  _tile_zero(0);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(7, w1, kRows * 4);
  _tile_zero(1);
  _tile_dpbssd(1, 4, 7);
  if (kTwo) {
    _tile_loadd(5, b, kGroup);
    _tile_zero(2);
    _tile_dpbssd(2, 5, 6);
    _tile_zero(3);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, to[0][0][i], kRows * 4);
  _tile_stored(1, to[0][1][i], kRows * 4);
  if (kTwo) {
    _tile_stored(2, to[1][0][i], kRows * 4);
    _tile_stored(3, to[1][1][i], kRows * 4);
  }
}

// to [tokens][2][16] += the sums of some groups with their scales; `a` and w_scale are those of the first group.
// Whole blocks stay in registers: stores between the loads would look like stores of what is loaded (4 KB apart).
template <bool kScaled>
INLINE void add_sums(const GroupSums* sums, const Cursor& a, const float* w_scale, int64_t groups, float* to) {
  if (a.stride != kBlock) {
    for (int64_t i = 0; i < groups; ++i) {
      for (int64_t t = 0; t < a.stride; ++t) {
        const vf y = to_float(_mm512_load_si512(sums[i] + kRows * t)), a_scale = set(a.scale[i * a.stride + t]);
        const vf sum = load(to + 2 * kRows * t);
        store(to + 2 * kRows * t,
              kScaled ? fma(mul(y, a_scale), load(w_scale + i * kRows), sum) : fma(y, a_scale, sum));
      }
    }
    return;
  }
  vf sum[kBlock];
#pragma GCC unroll 16
  for (int t = 0; t < kBlock; ++t) sum[t] = load(to + 2 * kRows * t);
  for (int64_t i = 0; i < groups; ++i) {
    const vf scale = kScaled ? load(w_scale + i * kRows) : zero();
    const float* a_scale = a.scale + i * kBlock;
#pragma GCC unroll 16
    for (int t = 0; t < kBlock; ++t) {
      const vf y = to_float(_mm512_load_si512(sums[i] + kRows * t));
      sum[t] = kScaled ? fma(mul(y, set(a_scale[t])), scale, sum[t]) : fma(y, set(a_scale[t]), sum[t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kBlock; ++t) store(to + 2 * kRows * t, sum[t]);
}

// out [tokens][2][16] += some groups of two tiles times two blocks of tokens, or one. The weights' bytes are signed.
template <bool kScaled, bool kTwo>
void tile_products(const uint8_t* const* w, const float* const* w_scale, Cursor a, Cursor b, int64_t groups,
                   float* out) {
  alignas(64) Sums sums;
  const uint8_t *w0 = w[0], *w1 = w[1];
  for (int64_t g = 0, n; g < groups; g += n) {
    n = groups - g < kGroupsAtOnce ? groups - g : kGroupsAtOnce;
    memory_changes();
    for (int64_t i = 0; i < n; ++i) {
      group_products<kTwo>(a.q + i * a.stride * kGroup, b.q + i * b.stride * kGroup, w0, w1, i, sums);
      w0 += kW8GroupBytes;
      w1 += kW8GroupBytes;
    }
    memory_changes();
    for (int r = 0; r < 2; ++r) {
      const float* scale = w_scale[r] + g * kRows;
      add_sums<kScaled>(sums[0][r], a, scale, n, out + r * kRows);
      if (kTwo) add_sums<kScaled>(sums[1][r], b, scale, n, out + a.stride * 2 * kRows + r * kRows);
    }
    a.skip(n);
    b.skip(n);
  }
}

#endif
