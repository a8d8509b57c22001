// Many queries: tasks of up to kRowBlock rows that share a K/V head walk over blocks of kKeyBlock keys.
// K (transposed) and V are packed per block into L2; a tile is 6 rows by up to 64 keys or columns of V.
// Panels of keys that no row of a tile may see are neither multiplied nor exponentiated.

namespace {

constexpr int kTile = int(kTileRows);
constexpr int64_t kWide = int64_t(kMaxColumns) * W;  // floats per panel row

// x[6][C W] = q[6][n lanes] k[n][C W], k packed in panel rows of kWide lanes.
template <DType T, int C>
void scores_tile(const float* q, int64_t ldq, const float* k, int64_t n, float* x) {
  vf c[kTile][C];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) c[i][j] = set1(0.0f);
  for (int64_t d = 0; d < n; ++d, k += kWide) {
    vf y[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) y[j] = load(k + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const vf w = set1(q[i * ldq + d]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) c[i][j] = Dot<T>::add(c[i][j], w, y[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(x + i * kKeyBlock + j * W, c[i][j]);
}

// o[6][C W] = keep[6] o + x[6][lo..hi) v[lo..hi)[C W]
template <int C>
void values_tile(const float* x, const float* v, int64_t lo, int64_t hi, const float* keep, float* o, int64_t ldo) {
  vf c[kTile][C];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) c[i][j] = load(o + i * ldo + j * W) * set1(keep[i]);
  v += lo * kWide;
  for (int64_t s = lo; s < hi; ++s, v += kWide) {
    vf y[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) y[j] = load(v + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const vf w = set1(x[i * kKeyBlock + s]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) c[i][j] = fma(w, y[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(o + i * ldo + j * W, c[i][j]);
}

// Keys s .. s + W of a block, transposed: lane d of key s + i goes to out[d * kWide + i].
template <DType T>
void pack_keys(const AttentionArgs& a, const void* k, int64_t s, int64_t n, float* out) {
  constexpr int step = Dot<T>::step;
  for (int64_t d = 0; d < a.D; d += step) {
    vf r[W];
    for (int i = 0; i < W; ++i) {
      const auto* p = row_of<T>(k, (s + i < n ? s + i : n - 1) * a.k_stride[2] + d);
      r[i] = a.D - d >= step ? Dot<T>::load(p) : Dot<T>::part(p, a.D - d);
      if (T == DType::i8) r[i] = r[i] * set1(scale_of<T>(p - d, a.D));
    }
    transpose(r);
    for (int i = 0; i < W; ++i, out += kWide) store(out, r[i]);
  }
}

// Keys [lo, hi) of V in panels of kWide columns.
template <DType T>
void pack_values(const AttentionArgs& a, const void* v, int64_t lo, int64_t hi, float* out) {
  for (int64_t s = lo; s < hi; ++s) {
    const auto* p = row_of<T>(v, s * a.v_stride[2]);
    const vf scale = set1(scale_of<T>(p, a.Dv));
    for (int64_t d = 0; d < a.Dv; d += W) {
      const vf y = load_upto<T>(p + d, a.Dv - d);
      store(out + (d / kWide * kKeyBlock + s) * kWide + d % kWide, T == DType::i8 ? y * scale : y);
    }
  }
}

// The buffers of one thread and the rows of its task; every buffer starts on a cache line.
struct Prefill {
  const AttentionArgs& a;
  const Plan& p;
  int64_t rows, tiles, ldq;
  float *q, *o, *x, *k, *v, *bias, *most, *total, *keep;
  Row row[kRowBlock];
  Span span[kRowBlock];
  Span tile[kRowBlock / kTileRows];
  int64_t lo, hi;  // union of the spans

  Prefill(const AttentionArgs& args, const Plan& plan, int64_t count, int64_t lanes, float* scratch)
      : a(args), p(plan), rows(count), tiles(ceil_div(count, kTileRows)), ldq(lanes) {
    const int64_t state = round_up(p.rows, kAlign);
    q = scratch;
    o = q + p.rows * p.dq;
    x = o + p.rows * p.dv;
    k = x + p.rows * kKeyBlock;
    v = k + kKeyBlock * p.dq;
    bias = v + kKeyBlock * p.dv;
    most = bias + kKeyBlock;
    total = most + state;
    keep = total + state;
  }

  void find_spans(int64_t s0, int64_t n) {
    lo = n, hi = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      tile[i] = Span{int32_t(n), 0, true};
      for (int64_t r = i * kTile; r < rows && r < (i + 1) * kTile; ++r) {
        const bool same = r && row[r].mask && row[r].mask == row[r - 1].mask && row[r].limit == row[r - 1].limit;
        span[r] = same ? span[r - 1] : row_span(a, row[r], s0, n, bias);
        if (span[r].lo >= span[r].hi) continue;
        if (span[r].lo < tile[i].lo) tile[i].lo = span[r].lo;
        if (span[r].hi > tile[i].hi) tile[i].hi = span[r].hi;
      }
      if (tile[i].lo < lo) lo = tile[i].lo;
      if (tile[i].hi > hi) hi = tile[i].hi;
    }
  }

  template <DType T, int C>
  void scores_panel(int64_t s) const {
    for (int64_t i = 0; i < tiles; ++i) {
      if (tile[i].hi <= s || tile[i].lo >= s + C * W) continue;
      scores_tile<T, C>(q + i * kTile * ldq, ldq, k + s * ldq, ldq, x + i * kTile * kKeyBlock + s);
    }
  }

  template <DType T>
  void scores(const void* keys, int64_t n) const {
    for (int64_t s = lo / kWide * kWide; s < hi; s += kWide) {
      const int64_t c = ceil_div((hi < n ? hi : n) - s, W);
      for (int64_t j = 0; j < c && j < kMaxColumns; ++j) pack_keys<T>(a, keys, s + j * W, n, k + s * ldq + j * W);
      if (c >= kMaxColumns) {
        scores_panel<T, kMaxColumns>(s);
      } else if (c == 3) {
        scores_panel < T, kMaxColumns<3 ? 1 : 3>(s);
      } else if (c == 2) {
        scores_panel<T, 2>(s);
      } else {
        scores_panel<T, 1>(s);
      }
    }
  }

  void softmax(int64_t s0, int64_t n) const {
    for (int64_t r = 0; r < rows; ++r) {
      keep[r] = 1.0f;
      if (tile[r / kTile].lo >= tile[r / kTile].hi) continue;
      float* w = x + r * kKeyBlock;
      if (!span[r].plain) row_span(a, row[r], s0, n, bias);
      const float m = logits(a, span[r], bias, w);
      const float now = most[r] > m ? most[r] : m;
      keep[r] = exp_neg(most[r] - finite(now));
      total[r] = total[r] * keep[r] + weights(span[r], n, finite(now), w);
      most[r] = now;
    }
  }

  template <int C>
  void values_panel(int64_t d) const {
    for (int64_t i = 0; i < tiles; ++i) {
      if (tile[i].lo >= tile[i].hi) continue;
      const int64_t r = i * kTile;
      values_tile<C>(x + r * kKeyBlock, v + d * kKeyBlock, tile[i].lo, tile[i].hi, keep + r, o + r * p.dv + d, p.dv);
    }
  }

  void values() const {
    for (int64_t d = 0; d < a.Dv; d += kWide) {
      const int64_t c = ceil_div(a.Dv - d, W);
      if (c >= kMaxColumns) {
        values_panel<kMaxColumns>(d);
      } else if (c == 3) {
        values_panel < kMaxColumns<3 ? 1 : 3>(d);
      } else if (c == 2) {
        values_panel<2>(d);
      } else {
        values_panel<1>(d);
      }
    }
  }

  void finish(int64_t b) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
      float* out = a.out + ((b * a.T + row[r].t) * a.H + row[r].h) * a.Dv;
      for (int64_t d = 0; d < a.Dv; ++d) out[d] = o[r * p.dv + d] * inverse;
    }
  }
};

template <DType T>
void prefill_task(const AttentionArgs& a, const Plan& p, int64_t b, int64_t hk, int64_t r0, float* scratch) {
  const int64_t rows = p.rows_total - r0 < p.rows ? p.rows_total - r0 : p.rows;
  Prefill task(a, p, rows, lanes<T>(a.D), scratch);
  int64_t limit = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    task.most[r] = -kInf;
    task.total[r] = task.keep[r] = 0.0f;
    for (int64_t d = 0; d < p.dv; d += W) store(task.o + r * p.dv + d, set1(0.0f));
    if (r >= rows) continue;
    const Row row = task.row[r] = make_row(a, p, b, hk, r0 + r);
    if (row.limit > limit) limit = row.limit;
    pack_query<T>(a.q, b * a.q_stride[0] + row.h * a.q_stride[1] + row.t * a.q_stride[2], a.D, task.q + r * task.ldq);
  }
  for (int64_t i = rows * task.ldq; i < task.tiles * kTile * task.ldq; i += W) store(task.q + i, set1(0.0f));
  for (int64_t s = rows * kKeyBlock; s < task.tiles * kTile * kKeyBlock; s += W) store(task.x + s, set1(0.0f));
  for (int64_t s0 = 0; s0 < limit; s0 += kKeyBlock) {
    const int64_t n = limit - s0 < kKeyBlock ? limit - s0 : kKeyBlock;
    task.find_spans(s0, n);
    if (task.lo >= task.hi) continue;
    task.scores<T>(row_of<T>(a.k, b * a.k_stride[0] + hk * a.k_stride[1] + s0 * a.k_stride[2]), n);
    task.softmax(s0, n);
    pack_values<T>(a, row_of<T>(a.v, b * a.v_stride[0] + hk * a.v_stride[1] + s0 * a.v_stride[2]), task.lo, task.hi,
                   task.v);
    task.values();
  }
  task.finish(b);
}

template <DType T>
void run_prefill(const AttentionArgs& a, const Plan& p) {
  const int64_t chunks = ceil_div(p.rows_total, p.rows), tasks = a.B * a.Hkv * chunks;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int id = 0;
#ifdef _OPENMP
    id = omp_get_thread_num();
#endif
    // The last chunks, with the most keys under the causal flag, first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = tasks - 1; i >= 0; --i) {
      const int64_t heads = a.B * a.Hkv, head = i % heads;
      prefill_task<T>(a, p, head / a.Hkv, head % a.Hkv, i / heads * p.rows,
                      static_cast<float*>(a.workspace) + id * p.scratch);
    }
  }
}

}  // namespace
