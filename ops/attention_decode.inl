// Few queries: K and V are read once, by tasks of one K/V head and one block of keys; then the blocks are merged.
// What takes AttentionArgs here, but for run_decode, gets those of one sequence.
// Every block holds softmax-weighted sums with its own maximum, so the result does not depend on who computes it.

namespace {

constexpr int kDecodeRows = 4;     // per tile
constexpr int64_t kSubBlock = 32;  // keys that stay in L1 while the rows pass over them

template <DType T>
constexpr int64_t kLine = 64 / int64_t(sizeof(typename Element<T>::type));

// x[R] = q[R] k for one key: K is read strictly in order. Four keys at a time would load q a quarter as often,
// but the hardware prefetcher follows four interleaved rows at little more than half the speed. A row is summed in the
// same order whatever R is, or several tokens in one call would not get the bits of one after another.
template <DType T, int R>
void decode_scores_tile(const typename Element<T>::type* k, const typename Element<T>::type* v, int64_t n,
                        const float* q, int64_t ldq, float* x, int64_t ldx) {
  constexpr int step = Dot<T>::step, parts = 2;  // two sums per row hide some of the latency of the addition
  const float scale = scale_of<T>(k, n);
  vf c[parts][4];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = set1(0.0f);
  int64_t d = 0;
  for (; d + parts * step <= n; d += parts * step, q += parts * W) {
#pragma GCC unroll 8
    for (int j = 0; j < parts; ++j) {
      if (step >= kLine<T> || (d + j * step) % kLine<T> == 0) __builtin_prefetch(v + d + j * step, 0, 3);
      const vf y = Dot<T>::load(k + d + j * step);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) c[j][i] = Dot<T>::add(c[j][i], load(q + i * ldq + j * W), y);
    }
  }
  for (; d < n; d += step, q += W) {
    const vf y = n - d >= step ? Dot<T>::load(k + d) : Dot<T>::part(k + d, n - d);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) c[0][i] = Dot<T>::add(c[0][i], load(q + i * ldq), y);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) c[0][i] = fma(c[1][i], set1(1.0f), c[0][i]);
  float sums[4];
  reduce4(c[0][0], c[0][1], c[0][2], c[0][3], sums);
  for (int i = 0; i < R; ++i) x[i * ldx] = T == DType::i8 ? sums[i] * scale : sums[i];
}

// o[R][d ..] += x[R][lo..hi) v[lo..hi)[d ..], C vectors wide. V came in with the scores; meanwhile the keys of the
// next task do: 5 to 7 % less time from 512 keys on with 51 GB/s on two Zen 5 cores, 20 % with 79.
template <DType T, int R, int C>
void decode_values_tile(const AttentionArgs& a, const void* v, const void* next, int64_t lo, int64_t hi, int64_t d,
                        const float* x, int64_t ldx, float* o, int64_t ldo) {
  vf c[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) c[i][j] = load(o + i * ldo + j * W);
  for (int64_t s = lo; s < hi; ++s) {
    const auto* p = row_of<T>(v, s * a.v_stride[2] + d);
    const auto* ahead = row_of<T>(next, s * a.k_stride[2] + d);
#pragma GCC unroll 8
    for (int j = 0; j < C * W; j += kLine<T>) __builtin_prefetch(ahead + j, 0, 2);
    vf y[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) y[j] = C > 1 || a.Dv - d >= W ? load_as<T>(p + j * W) : load_part<T>(p, a.Dv - d);
    const float scale = scale_of<T>(p - d, a.Dv);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const float weight = x[i * ldx + s];
      const vf w = set1(T == DType::i8 ? weight * scale : weight);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) c[i][j] = fma(w, y[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(o + i * ldo + j * W, c[i][j]);
}

// One task: q [rows][ldq] against keys [lo, hi) of a block that starts at k and v. next: the keys of the task to come.
template <DType T>
struct DecodeBlock {
  const AttentionArgs& a;
  const void *k, *v, *next;
  int64_t rows, lo, hi;
  const float* q;
  int64_t ldq;
  float* x;
  int64_t ldx;
  float* o;
  int64_t ldo;

  template <int R>
  void scores_rows(int64_t r, int64_t from, int64_t to) const {
    for (int64_t s = from; s < to; ++s)
      decode_scores_tile<T, R>(row_of<T>(k, s * a.k_stride[2]), row_of<T>(v, s * a.v_stride[2]), a.D, q + r * ldq, ldq,
                               x + r * ldx + s, ldx);
  }

  void scores() const {
    for (int64_t s = lo; s < hi; s += kSubBlock) {
      const int64_t to = s + kSubBlock < hi ? s + kSubBlock : hi;
      int64_t r = 0;
      for (; r + kDecodeRows <= rows; r += kDecodeRows) scores_rows<kDecodeRows>(r, s, to);
      if (rows - r >= 2) scores_rows<2>(r, s, to), r += 2;
      if (rows - r >= 1) scores_rows<1>(r, s, to);
    }
  }

  template <int R>
  void values_rows(int64_t r, int64_t from, int64_t to) const {
    const float* w = x + r * ldx;
    float* out = o + r * ldo;
    int64_t d = 0;
    for (; d + 4 * W <= a.Dv; d += 4 * W) decode_values_tile<T, R, 4>(a, v, next, from, to, d, w, ldx, out + d, ldo);
    for (; d < a.Dv; d += W) decode_values_tile<T, R, 1>(a, v, next, from, to, d, w, ldx, out + d, ldo);
  }

  void values() const {
    for (int64_t i = 0; i < rows * ldo; i += W) store(o + i, set1(0.0f));
    for (int64_t s = lo; s < hi; s += kSubBlock) {
      const int64_t to = s + kSubBlock < hi ? s + kSubBlock : hi;
      int64_t r = 0;
      for (; r + kDecodeRows <= rows; r += kDecodeRows) values_rows<kDecodeRows>(r, s, to);
      if (rows - r >= 2) values_rows<2>(r, s, to), r += 2;
      if (rows - r >= 1) values_rows<1>(r, s, to);
    }
  }
};

// Partial result of a row over a block: maximum, sum of weights, unused .., then [dv] weighted sums.
float* partial(const AttentionArgs& a, const Plan& p, int64_t task, int64_t row) {
  return static_cast<float*>(a.workspace) + (task * p.rows + row) * kAlign;
}

float* partial_sums(const AttentionArgs& a, const Plan& p, int64_t task, int64_t row) {
  const int64_t heads = a.Hkv * p.blocks * p.rows * kAlign;
  return static_cast<float*>(a.workspace) + heads + (task * p.rows + row) * p.dv;
}

struct Keys {
  int64_t first, end;
};

// The keys that query t of sequence b sees, as far as causality and a boolean mask tell.
Keys visible_keys(const AttentionArgs& a, int64_t b, int64_t t) {
  const int64_t last = a.causal ? a.S - a.T + t + 1 : a.S;
  if (a.mask_kind != MaskKind::boolean) return {0, last};
  Keys keys{last, 0};
  for (int64_t h = 0; h < (a.mask_stride[1] ? a.H : 1); ++h) {
    const char* row = mask_row(a, b, h, t);
    int64_t s = 0, end = last;
    if (a.mask_stride[3] == 1) {
      const void* visible = __builtin_memchr(row, 1, keys.first);
      s = visible ? static_cast<const char*>(visible) - row : keys.first;
    } else {
      while (s < keys.first && !row[s * a.mask_stride[3]]) ++s;
    }
    while (end > keys.end && !row[(end - 1) * a.mask_stride[3]]) --end;
    keys = {s, end};
  }
  return keys;
}

// Keys at the start that every query of sequence b does not see.
int64_t hidden_keys(const AttentionArgs& a, int64_t b) {
  if (a.mask_kind != MaskKind::boolean) return 0;
  int64_t hidden = a.S;
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t first = visible_keys(a, b, t).first;
    hidden = first < hidden ? first : hidden;
  }
  return hidden;
}

// True if some query's blocks of keys would not be those that it has in a call of its own: a full sliding window starts
// at another key for each token. Then the tokens go one by one, so that several in a call get the same bits; their keys
// come from the caches.
bool tokens_differ(const AttentionArgs& a) {
  for (int64_t b = 0; b < a.B && a.T > 1; ++b) {
    const int64_t hidden = hidden_keys(a, b), block = decode_block(a.S - hidden);
    for (int64_t t = 0; t < a.T; ++t) {
      const Keys keys = visible_keys(a, b, t);
      if (keys.first != hidden || decode_block(keys.end - keys.first) != block) return true;
    }
  }
  return false;
}

// Sequence b of a batch by itself, from its first visible key: what pads a shorter sequence on the left changes neither
// its blocks of keys nor the order of its sums.
template <DType T>
AttentionArgs sequence(const AttentionArgs& a, const Plan& p, int64_t b) {
  constexpr DType Q = T == DType::i8 ? DType::f32 : T;
  const int64_t skip = hidden_keys(a, b);
  AttentionArgs one = a;
  one.B = 1;
  one.S = a.S - skip;
  one.q = row_of<Q>(a.q, b * a.q_stride[0]);
  one.k = row_of<T>(a.k, b * a.k_stride[0] + skip * a.k_stride[2]);
  one.v = row_of<T>(a.v, b * a.v_stride[0] + skip * a.v_stride[2]);
  if (a.mask_kind != MaskKind::none) one.mask = mask_row(a, b, 0, 0);
  if (skip) one.mask = static_cast<const char*>(one.mask) + skip * a.mask_stride[3];
  one.out = a.out + b * a.T * a.H * a.Dv;
  one.workspace = static_cast<float*>(a.workspace) + b * (p.shared / a.B);
  return one;
}

// Query t of one sequence by itself.
template <DType T>
AttentionArgs token(const AttentionArgs& a, int64_t t) {
  constexpr DType Q = T == DType::i8 ? DType::f32 : T;
  AttentionArgs one = a;
  one.S = visible_keys(a, 0, t).end;
  one.T = 1;
  one.q = row_of<Q>(a.q, t * a.q_stride[2]);
  if (a.mask_kind != MaskKind::none) one.mask = mask_row(a, 0, 0, t);
  one.out = a.out + t * a.H * a.Dv;
  return one;
}

template <DType T>
const void* keys_of(const AttentionArgs& a, const Plan& p, int64_t task) {
  return row_of<T>(a.k, task / p.blocks * a.k_stride[1] + task % p.blocks * p.block * a.k_stride[2]);
}

template <DType T>
void decode_task(const AttentionArgs& a, const Plan& p, int64_t task, int64_t next, float* scratch) {
  const int64_t blk = task % p.blocks, hk = task / p.blocks;
  const int64_t s0 = blk * p.block, n = a.S - s0 < p.block ? a.S - s0 : p.block;
  const int64_t ldq = lanes<T>(a.D);
  float* q = scratch;
  float* x = q + p.rows * p.dq;
  float* bias = x + p.rows * p.block;
  Row row[kDecodeMax];
  Span span[kDecodeMax];
  int64_t lo = n, hi = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    row[r] = make_row(a, p, 0, hk, r);
    span[r] = row_span(a, row[r], s0, n, bias);
    if (span[r].lo < span[r].hi && span[r].lo < lo) lo = span[r].lo;
    if (span[r].hi > hi) hi = span[r].hi;
    pack_query<T>(a.q, row[r].h * a.q_stride[1] + row[r].t * a.q_stride[2], a.D, q + r * ldq);
  }
  const void *k = keys_of<T>(a, p, task), *ahead = keys_of<T>(a, p, next);
  const void* v = row_of<T>(a.v, hk * a.v_stride[1] + s0 * a.v_stride[2]);
  const DecodeBlock<T> block{a, k, v, ahead, p.rows, lo, hi, q, ldq, x, p.block, partial_sums(a, p, task, 0), p.dv};
  if (lo < hi) block.scores();
  for (int64_t r = 0; r < p.rows; ++r) {
    if (!span[r].plain) row_span(a, row[r], s0, n, bias);
    float* head = partial(a, p, task, r);
    head[0] = logits(a, span[r], bias, x + r * p.block);
    head[1] = weights(span[r], n, finite(head[0]), x + r * p.block);
  }
  if (lo < hi) block.values();
}

void merge_row(const AttentionArgs& a, const Plan& p, int64_t head, int64_t r) {
  const int64_t h = head * p.group + r % p.group, t = r / p.group;
  float* out = a.out + (t * a.H + h) * a.Dv;
  float most = -kInf, total = 0.0f;
  for (int64_t i = 0; i < p.blocks; ++i) {
    const float m = partial(a, p, head * p.blocks + i, r)[0];
    most = most > m ? most : m;
  }
  for (int64_t d = 0; d < a.Dv; ++d) out[d] = 0.0f;
  for (int64_t i = 0; i < p.blocks; ++i) {
    const float* part = partial(a, p, head * p.blocks + i, r);
    if (part[0] == -kInf && part[1] == 0.0f) continue;  // all masked: nothing was written
    const float w = exp_neg(part[0] - finite(most));
    const float* o = partial_sums(a, p, head * p.blocks + i, r);
    total += w * part[1];
    for (int64_t d = 0; d < a.Dv; ++d) out[d] += w * o[d];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < a.Dv; ++d) out[d] *= inverse;
}

template <DType T>
void run_decode(const AttentionArgs& a, const Plan& p) {
  if (tokens_differ(a)) {
    for (int64_t i = 0; i < a.B * a.T; ++i) {
      AttentionArgs one = token<T>(sequence<T>(a, p, i / a.T), i % a.T);
      one.workspace = a.workspace;
      run_decode<T>(one, make_plan(one));
    }
    return;
  }
  const int64_t tasks = a.Hkv * p.most_blocks, rows = a.Hkv * p.rows;  // per sequence
  const int64_t threads = a.threads > 0 ? a.threads : 1;
  const int64_t run = ceil_div(a.B * tasks + 1, 2 * threads);  // tasks that a thread takes at a time
  float* base = static_cast<float*>(a.workspace) + p.shared;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    int id = 0;
#ifdef _OPENMP
    id = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic, run)
    for (int64_t i = 0; i < a.B * tasks; ++i) {
      const AttentionArgs one = sequence<T>(a, p, i / tasks);
      const Plan plan = make_plan(one);
      const int64_t task = i % tasks, all = a.Hkv * plan.blocks;
      const int64_t next = task + 1 + ((task + 1) % run == 0 ? run * (threads - 1) : 0);  // if threads take turns
      if (task < all) decode_task<T>(one, plan, task, next < all ? next : task, base + id * p.scratch);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.B * rows; ++i) {
      const AttentionArgs one = sequence<T>(a, p, i / rows);
      merge_row(one, make_plan(one), i % rows / p.rows, i % p.rows);
    }
  }
}

}  // namespace
