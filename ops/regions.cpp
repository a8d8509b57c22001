#include "regions.h"

#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace unicorn {

Arena::~Arena() {
  for (Block& block : blocks_) std::free(block.data);
}

void* Arena::bytes(size_t count) {
  constexpr size_t kAlign = 64, kSmallest = size_t(1) << 20;
  count = (count + kAlign - 1) / kAlign * kAlign;
  for (; block_ < kBlocks; ++block_, used_ = 0) {
    Block& block = blocks_[block_];
    if (!block.data) {
      block.size = count > kSmallest ? count : kSmallest;
      block.data = static_cast<char*>(std::aligned_alloc(kAlign, block.size));
      if (!block.data) throw std::bad_alloc();
    }
    if (used_ + count <= block.size) {
      used_ += count;
      return block.data + used_ - count;
    }
  }
  throw std::bad_alloc();
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t k) { return ceil_div(k, kGroup) * kGroup; }
int64_t pairs(const Weight& w) { return ceil_div(w.n16, 2); }
size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

const void* at(Floats f, int64_t index) { return static_cast<const char*>(f.data) + size_t(index) * size_of(f.type); }
void* at(void* data, DType type, int64_t index) { return static_cast<char*>(data) + size_t(index) * size_of(type); }

struct Range {
  int64_t begin, end;
};

// Part `rank` of `of` of [0, count), contiguous.
Range share(int64_t count, int rank, int of) { return {count * rank / of, count * (rank + 1) / of}; }

// fp32 copy, zero padded to whole groups, with `offset` added; null stays null.
const float* widen(Floats f, int64_t n, float offset, Arena& arena) {
  if (!f.data) return nullptr;
  float* out = arena.take<float>(padded(n));
  matmul_table().load_row(f.data, f.type, n, out);
  if (offset != 0)
    for (int64_t i = 0; i < n; ++i) out[i] += offset;
  return out;
}

// A norm with its weight widened once per call.
struct ReadyNorm {
  bool on;
  float eps;
  const float* weight;
  ReadyNorm(const Norm& norm, int64_t k, Arena& arena)
      : on(norm.on), eps(norm.eps), weight(norm.on ? widen(norm.weight, k, norm.offset, arena) : nullptr) {}
  void apply(float* x, int64_t k) const {
    if (on) matmul_table().norm_row(x, k, eps, weight);
  }
};

Rows take_rows(int64_t tokens, int64_t k, Arena& arena) {
  const int64_t k32 = ceil_div(k, kGroup);
  return {arena.take<int8_t>(tokens * k32 * kGroup), arena.take<float>(tokens * k32), arena.take<int32_t>(tokens * k32),
          k32};
}

// The quantized input of a projection. A single token is quantized by every thread for itself, which is
// cheaper than a barrier (2560 values: 1 us); several are shared out.
class Input {
 public:
  Input(Floats x, int64_t tokens, int64_t k, const Norm& norm, Arena& arena, int threads)
      : x_(x), tokens_(tokens), k_(k), copies_(tokens == 1 ? threads : 1), norm_(norm, k, arena),
        rows_(take_rows(tokens * copies_, k, arena)), row_(arena.take<float>(padded(k) * threads)) {}

  // All of the team call this; the rows are complete on return.
  Rows quantize(int rank, int team) const {
    Rows rows = rows_;
    if (copies_ > 1) {
      rows.q += rank * rows.k32 * kGroup, rows.scale += rank * rows.k32, rows.nsum += rank * rows.k32;
      token(rows, 0, rank);
      return rows;
    }
    const Range mine = share(tokens_, rank, team);
    for (int64_t t = mine.begin; t < mine.end; ++t) token(rows, t, rank);
#pragma omp barrier
    return rows;
  }

 private:
  void token(const Rows& rows, int64_t t, int rank) const {
    const Matmul& m = matmul_table();
    float* row = row_ + padded(k_) * rank;
    m.load_row(at(x_, t * k_), x_.type, k_, row);
    norm_.apply(row, k_);
    m.quantize_groups(row, 0, rows.k32, rows, t);
  }

  Floats x_;
  int64_t tokens_, k_, copies_;
  ReadyNorm norm_;
  Rows rows_;
  float* row_;
};

// Tokens whose int8 activations fit in half of a 1 MB L2, so that a weight tile is read once per that many.
int64_t token_block(const Rows& rows) {
  constexpr int64_t kBytes = 512 << 10, kLeast = 16;
  const int64_t fit = kBytes / (rows.k32 * kGroup) / 4 * 4;
  return fit > kLeast ? fit : kLeast;
}

template <typename Body>
void for_blocks(Range pair_range, int64_t tokens, int64_t block, const Body& body) {
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t count = tokens - first < block ? tokens - first : block;
    for (int64_t pair = pair_range.begin; pair < pair_range.end; ++pair) body(pair, first, count);
  }
}

// The end of a block: straight from the tile where nothing needs the whole row, else by way of fp32 rows.
class Output {
 public:
  Output(const Finish& finish, int64_t tokens, int64_t n, Arena& arena, int threads)
      : finish_(finish), tokens_(tokens), n_(n), stride_(padded(n)), bias_(widen(finish.bias, n, 0, arena)),
        norm_(finish.norm, n, arena), sums_(norm_.on ? arena.take<float>(tokens * stride_) : nullptr),
        scratch_(arena.take<float>((stride_ + kPairRows * kStrip) * threads)) {}

  // All of the team call this with the same quantized rows.
  void project(const Weight& w, const Rows& rows, int rank, int team) const {
    float* strip = scratch_ + (stride_ + kPairRows * kStrip) * rank;
    const Range mine = share(pairs(w), rank, team);
    for_blocks(mine, tokens_, token_block(rows), [&](int64_t pair, int64_t first, int64_t count) {
      if (sums_) {
        matmul_table().matmul_pair(w, pair, rows, first, count, sums_ + first * stride_ + pair * kPairRows, stride_);
        return;
      }
      for (int64_t t = 0; t < count; t += kStrip) {
        const int64_t part = count - t < kStrip ? count - t : kStrip;
        matmul_table().matmul_pair(w, pair, rows, first + t, part, strip, kPairRows);
        for (int64_t i = 0; i < part; ++i) finish(strip + i * kPairRows, first + t + i, pair * kPairRows, kPairRows, strip + kPairRows * kStrip);
      }
    });
    if (!sums_) return;
#pragma omp barrier
    const Range rows_mine = share(tokens_, rank, team);
    for (int64_t t = rows_mine.begin; t < rows_mine.end; ++t) finish(sums_ + t * stride_, t, 0, n_, strip);
  }

 private:
  static constexpr int64_t kStrip = 64;  // tokens of one tile pair between the product and the store: 8 KB

  // Columns from..from + width of token t; `row` holds them in fp32.
  void finish(float* row, int64_t t, int64_t from, int64_t width, float* other) const {
    const Matmul& m = matmul_table();
    const int64_t count = n_ - from < width ? n_ - from : width;
    if (bias_)
      for (int64_t i = 0; i < count; ++i) row[i] += bias_[from + i];
    if (norm_.on) {
      std::memset(row + n_, 0, size_t(stride_ - n_) * sizeof(float));
      norm_.apply(row, n_);
    }
    if (finish_.residual.data) {
      m.load_row(at(finish_.residual, t * n_ + from), finish_.residual.type, count, other);
      for (int64_t i = 0; i < count; ++i) row[i] += other[i];
    }
    m.store_row(row, count, finish_.type, at(finish_.out, finish_.type, t * n_ + from));
  }

  const Finish& finish_;
  int64_t tokens_, n_, stride_;
  const float* bias_;
  ReadyNorm norm_;
  float* sums_;
  float* scratch_;
};

}  // namespace

void linear(const LinearArgs& args, Arena& arena, int threads) {
  const Input input(args.x, args.tokens, args.k, args.norm, arena, threads);
  const Output output(args.finish, args.tokens, args.w.n, arena, threads);
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num(), team = omp_get_num_threads();
    output.project(args.w, input.quantize(rank, team), rank, team);
  }
}

void ffn(const FfnArgs& args, Arena& arena, int threads) {
  const Input input(args.x, args.tokens, args.k, args.norm, arena, threads);
  const Output output(args.finish, args.tokens, args.down.n, arena, threads);
  const Rows product = take_rows(args.tokens, args.gate.n, arena);
  const float* gate_bias = widen(args.gate_bias, args.gate.n, 0, arena);
  const float* up_bias = widen(args.up_bias, args.up.n, 0, arena);
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num(), team = omp_get_num_threads();
    const Rows rows = input.quantize(rank, team);
    for_blocks(share(pairs(args.gate), rank, team), args.tokens, token_block(rows),
               [&](int64_t pair, int64_t first, int64_t count) {
                 matmul_table().gate_up_pair(args.gate, args.up, gate_bias, up_bias, args.act, pair, rows, first,
                                             count, product);
               });
#pragma omp barrier
    output.project(args.down, product, rank, team);
  }
}

void qkv(const QkvArgs& args, Arena& arena, int threads) {
  const int64_t tokens = args.B * args.T, d = args.head_dim, wide = padded(d);
  const Input input(args.x, tokens, args.k, args.norm, arena, threads);
  const ReadyNorm norms[3] = {{args.head_norm[0], d, arena}, {args.head_norm[1], d, arena}, {args.head_norm[2], d, arena}};
  float* sums[3];
  const float* bias[3];
  int64_t stride[3], first_pair[4] = {0}, heads = 0;
  for (int i = 0; i < 3; ++i) {
    stride[i] = padded(args.w[i].n);
    sums[i] = arena.take<float>(tokens * stride[i]);
    bias[i] = widen(args.bias[i], args.w[i].n, 0, arena);
    first_pair[i + 1] = first_pair[i] + pairs(args.w[i]);
    heads += args.heads[i];
  }
  float* scratch = arena.take<float>(3 * wide * threads);
#pragma omp parallel num_threads(threads)
  {
    const Matmul& m = matmul_table();
    const int rank = omp_get_thread_num(), team = omp_get_num_threads();
    const Rows rows = input.quantize(rank, team);
    const Range mine = share(first_pair[3], rank, team);
    for (int i = 0; i < 3; ++i) {
      const int64_t begin = mine.begin > first_pair[i] ? mine.begin : first_pair[i];
      const int64_t end = mine.end < first_pair[i + 1] ? mine.end : first_pair[i + 1];
      for_blocks({begin - first_pair[i], end - first_pair[i]}, tokens, token_block(rows),
                 [&](int64_t pair, int64_t first, int64_t count) {
                   m.matmul_pair(args.w[i], pair, rows, first, count, sums[i] + first * stride[i] + pair * kPairRows,
                                 stride[i]);
                 });
    }
#pragma omp barrier
    float *row = scratch + 3 * wide * rank, *cos = row + wide, *sin = cos + wide;
    const Range work = share(tokens * heads, rank, team);
    int64_t loaded = -1;
    for (int64_t at_work = work.begin; at_work < work.end; ++at_work) {
      const int64_t token = at_work / heads, b = token / args.T, t = token % args.T;
      int64_t head = at_work % heads;
      int i = 0;
      while (head >= args.heads[i]) head -= args.heads[i++];
      float* y = sums[i] + token * stride[i] + head * d;
      if (bias[i])
        for (int64_t j = 0; j < d; ++j) y[j] += bias[i][head * d + j];
      m.load_row(y, DType::f32, d, row);
      if (i < 2) norms[i].apply(row, d);
      if (i < 2 && args.cos.data) {
        if (loaded != token) {
          const int64_t table = ((args.cos_shared ? 0 : b) * args.T + t) * d;
          m.load_row(at(args.cos, table), args.cos.type, d, cos);
          m.load_row(at(args.sin, table), args.sin.type, d, sin);
          loaded = token;
        }
        m.rotate_row(row, cos, sin, d);
      }
      m.store_row(row, d, args.x.type, at(args.out[i], args.x.type, ((b * args.heads[i] + head) * args.T + t) * d));
    }
  }
}

void rms_norm(Floats x, int64_t tokens, int64_t k, const Norm& norm, void* out, Arena& arena, int threads) {
  const ReadyNorm ready(norm, k, arena);
  const int used = tokens < 8 ? 1 : threads;
  float* scratch = arena.take<float>(padded(k) * used);
#pragma omp parallel num_threads(used) if (used > 1)
  {
    const Matmul& m = matmul_table();
    const int rank = omp_get_thread_num();
    float* row = scratch + padded(k) * rank;
    const Range mine = share(tokens, rank, omp_get_num_threads());
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      m.load_row(at(x, t * k), x.type, k, row);
      ready.apply(row, k);
      m.store_row(row, k, x.type, at(out, x.type, t * k));
    }
  }
}

void embedding(const int64_t* ids, int64_t count, const Weight& table, int64_t k, DType type, void* out, Arena& arena,
               int threads) {
  const int used = count < 8 ? 1 : threads;
  float* scratch = arena.take<float>(padded(k) * used);
#pragma omp parallel num_threads(used) if (used > 1)
  {
    const int rank = omp_get_thread_num();
    float* row = scratch + padded(k) * rank;
    const Range mine = share(count, rank, omp_get_num_threads());
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      matmul_table().embed_row(table, ids[t], row);
      matmul_table().store_row(row, k, type, at(out, type, t * k));
    }
  }
}

}  // namespace unicorn
