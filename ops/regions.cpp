// The fused ops: who does what in which order. Work is split over tiles of the weight or over tokens, never
// over K, so the bits do not depend on the number of threads nor on who gets to a piece first.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "threads.h"

namespace unicorn {

namespace {

int64_t tiles(int64_t n) { return (n + kRows - 1) / kRows; }

// Multiply-adds below which one thread is faster: a team starts and joins in about 5 us, a core does 1e11 per second.
constexpr int64_t kSerial = 500'000;

// Threads take no less than this of a weight at a time: some 4 us of reading for one core.
constexpr int64_t kPieceBytes = 64 << 10;

// Tiles go in pairs: with many tokens two are multiplied at a time (pieces of odd size cost 7 % of a prompt).
constexpr int64_t kPair = kGroup / kRows;

int64_t pairs(int64_t tiles) { return (tiles + kPair - 1) / kPair; }

Range tiles_of(Range pairs, int64_t tiles) {
  return {kPair * pairs.begin, kPair * pairs.end < tiles ? kPair * pairs.end : tiles};
}

Queue pair_queue(const Weight& w, int threads) {
  const int64_t groups = (w.k + kGroup - 1) / kGroup;
  return Queue(pairs(tiles(w.n)), kPieceBytes / (kPair * groups * group_bytes(w.scheme)), threads);
}

int64_t work_of(const Rows& x, const Weight& w) { return x.rows * w.n * w.k; }
int team_of(int threads, int64_t work) { return work < kSerial ? 1 : threads; }

// One token is quantized by every thread for itself (`mine`): cheaper than a barrier. More are shared out.
struct Input {
  Activations shared;
  int64_t copies;

  Input(Carver& carver, const Rows& x, int threads) : copies(x.rows == 1 ? threads : 1) {
    shared = carver.activations(copies * x.rows, x.width);
    shared.rows = x.rows;
  }
  Activations quantize(const Team& team, const Rows& x, const Norm& norm) const {
    Activations mine = shared;
    if (copies > 1) {
      mine.q += team.rank * shared.groups * kGroup;
      mine.scale += team.rank * shared.groups;
      mine.sum8 += team.rank * shared.groups;
      kernels().quantize(x, norm, mine, {0, 1});
      return mine;
    }
    kernels().quantize(x, norm, mine, team.share(x.rows));
    team.barrier();
    return mine;
  }
};

bool rounds_only(const Post& post) { return !post.norm.on && post.residual.data == nullptr; }

struct LinearBuffers {
  Input input;
  float* sum;  // null where the result needs no second pass

  LinearBuffers(Carver& carver, const Rows& x, int64_t n, bool direct, int threads)
      : input(carver, x, threads), sum(direct ? nullptr : carver.take<float>(x.rows * n)) {}
};

struct FfnBuffers {
  Input input;
  Activations product;
  float *sum, *gate, *threshold;  // gate and threshold where there is a cutoff

  FfnBuffers(Carver& carver, const FfnArgs& args, int threads)
      : input(carver, args.x, threads),
        product(carver.activations(args.x.rows, args.gate.n)),
        sum(rounds_only(args.post) ? nullptr : carver.take<float>(args.x.rows * args.down.n)),
        gate(args.cut ? carver.take<float>(args.x.rows * args.gate.n) : nullptr),
        threshold(args.cut ? carver.take<float>(args.x.rows) : nullptr) {}
};

struct QkvBuffers {
  Input input;
  float* part[3];

  QkvBuffers(Carver& carver, const QkvArgs& args, int threads) : input(carver, args.x, threads) {
    for (int i = 0; i < 3; ++i) part[i] = carver.take<float>(args.x.rows * args.part[i].w.n);
  }
};

// The `size` entries with the largest keys, the least of them first.
template <class Value>
class Largest {
 public:
  using Entry = std::pair<float, Value>;
  Largest(Entry* entries, int64_t size) : entries_(entries), size_(size) {}

  void add(float key, Value value) {
    if (count_ == size_) {
      if (!(key > entries_[0].first)) return;
      std::pop_heap(entries_, entries_ + count_--, &above);
    }
    entries_[count_++] = {key, value};
    std::push_heap(entries_, entries_ + count_, &above);
  }
  // Makes it full.
  void fill(float key) {
    while (count_ < size_) entries_[count_++] = {key, Value{}};
  }
  const Entry* begin() const { return entries_; }
  const Entry* end() const { return entries_ + count_; }

 private:
  static bool above(const Entry& a, const Entry& b) { return a.first > b.first; }
  Entry* entries_;
  int64_t size_, count_ = 0;
};

struct ScreenBuffers {
  Input input;
  float *bound, *most;
  Largest<int64_t>::Entry* tiles;  // [threads, best]
  Largest<char>::Entry* scores;    // the same
  float* copy;                     // [threads, threads * best]
  int64_t* left;                   // [N16]

  ScreenBuffers(Carver& carver, const Rows& x, int64_t n, int64_t best, int threads)
      : input(carver, x, threads),
        bound(carver.take<float>(kRows * unicorn::tiles(n))),
        most(carver.take<float>(unicorn::tiles(n))),
        tiles(carver.take<Largest<int64_t>::Entry>(threads * best)),
        scores(carver.take<Largest<char>::Entry>(threads * best)),
        copy(carver.take<float>(threads * threads * best)),
        left(carver.take<int64_t>(unicorn::tiles(n))) {}
};

constexpr float kMostNorm = 1e15f;  // beyond, bounds may overflow (scales are below that, see screening.py)
constexpr float kDone = -std::numeric_limits<float>::infinity();  // of a tile whose scores are there

// Memory that is read soon, into L2.
void fetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

float kth_largest(const Largest<char>::Entry* entries, int64_t count, int64_t k, float* copy) {
  for (int64_t i = 0; i < count; ++i) copy[i] = entries[i].first;
  std::nth_element(copy, copy + (k - 1), copy + count, std::greater<float>());
  return copy[k - 1];
}

template <class Buffers, class... Args>
Buffers carve(Workspace& workspace, const Args&... args) {
  Carver count(nullptr);
  Buffers(count, args...);
  Carver carver(workspace.reserve(count.used()));
  return Buffers(carver, args...);
}

}  // namespace

void run_linear(const Rows& x, const Norm& norm, const Weight& w, Array bias, const Post& post, Out out,
                Workspace& workspace, int threads) {
  threads = team_of(threads, work_of(x, w));
  const bool direct = rounds_only(post);
  const auto buffers = carve<LinearBuffers>(workspace, x, w.n, direct, threads);
  const Out target = direct ? out : Out{buffers.sum, DType::f32};
  Queue queue = pair_queue(w, threads);
  parallel(threads, [&](const Team& team) {
    const Activations a = buffers.input.quantize(team, x, norm);
    queue.drain(team, [&](Range p) { kernels().linear({w, bias, a, target, w.n}, tiles_of(p, tiles(w.n))); });
    if (direct) return;
    team.barrier();
    kernels().norm({{buffers.sum, DType::f32}, x.rows, w.n}, post, out, team.share(x.rows));
  });
}

void run_split(const Weight& w, const Planes& planes, int threads) {
  parallel(threads, [&](const Team& team) { kernels().split(w, planes, team.share(tiles(w.n))); });
}

Screened run_screened(const Rows& x, const Weight& w, const Planes& planes, Out out, int64_t best, bool six,
                      Workspace& workspace, int threads) {
  const auto buffers = carve<ScreenBuffers>(workspace, x, w.n, best, threads);
  const int64_t count = tiles(w.n), groups = (w.k + kGroup - 1) / kGroup;
  Queue queue(count, kPieceBytes / (groups * kFiveBytes), threads);
  std::atomic<int64_t> read{count * groups * (kFiveBytes + (six ? kSixthBytes : 0))}, open{0};
  parallel(threads, [&](const Team& team) {
    ScreenArgs args{w, planes, buffers.input.quantize(team, x, {}), out, buffers.bound, buffers.most};
    kernels().begin_screen(args);
    if (!(args.norm <= kMostNorm)) {  // NaN too; the same for every thread
      read = 0;
      return;
    }
    queue.drain(team, [&](Range some) { kernels().screen(args, six, some); });
    team.barrier();
    // The tiles with the largest bounds, and the largest scores there: no more than `best` rows are above the last.
    const Range mine = team.share(count);
    Largest<int64_t> likely(buffers.tiles + team.rank * best, best);
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) likely.add(buffers.most[tile], tile);
    Largest<char> scores(buffers.scores + team.rank * best, best);
    int64_t scored = 0;
    alignas(64) float lanes[kRows];
    for (const auto& [bound, tile] : likely) {
      kernels().score(args, tile, lanes);
      ++scored;
      for (int64_t r = 0; r < kRows && tile * kRows + r < w.n; ++r) scores.add(lanes[r], 0);
      buffers.most[tile] = kDone;
    }
    scores.fill(-std::numeric_limits<float>::infinity());
    team.barrier();
    float least = kth_largest(buffers.scores, best * team.size, best, buffers.copy + team.rank * best * team.size);
    if (out.dtype == DType::f16) least = std::min(least, 65504.0f);  // beyond, scores are equal
    // Rounding to 16 bits and dividing by a temperature can make scores equal that are less apart than this.
    const float limit = least - std::abs(least) * 0x1p-7f - 0x1p-23f;
    int64_t* left = buffers.left + mine.begin;  // the tiles that may have such a row
    int64_t count_left = 0;
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
      if (buffers.most[tile] >= limit) {
        left[count_left++] = tile;
      } else if (buffers.most[tile] != kDone) {
        kernels().leave_out(args, tile);
      }
    }
    if (!six) {
      const int64_t refined = std::exchange(count_left, 0);
      for (int64_t i = 0; i < refined; ++i) {
        constexpr int64_t kAhead = 2;
        if (i + kAhead < refined) fetch(planes.sixth + left[i + kAhead] * groups * kSixthBytes, groups * kSixthBytes);
        const int64_t tile = left[i];
        if (kernels().refine(args, tile) >= limit) {
          left[count_left++] = tile;
        } else {
          kernels().leave_out(args, tile);
        }
      }
      open += refined;
      read += groups * refined * kSixthBytes;
    }
    for (int64_t i = 0; i < count_left; ++i) kernels().score(args, left[i], lanes);
    read += groups * (scored + count_left) * kW8GroupBytes;
  });
  return {read, open};
}

void run_ffn(const FfnArgs& args, Workspace& workspace, int threads) {
  threads = team_of(threads, 3 * work_of(args.x, args.gate));
  const bool direct = rounds_only(args.post);
  const auto buffers = carve<FfnBuffers>(workspace, args, threads);
  const Out target = direct ? args.out : Out{buffers.sum, DType::f32};
  const int64_t n = args.down.n;
  Queue gate_queue = pair_queue(args.gate, threads), up_queue = pair_queue(args.up, threads),
        down_queue = pair_queue(args.down, threads);
  parallel(threads, [&](const Team& team) {
    const Activations a = buffers.input.quantize(team, args.x, args.norm);
    if (args.cut) {
      const LinearArgs gate{args.gate, args.gate_bias, a, {buffers.gate, DType::f32}, args.gate.n};
      gate_queue.drain(team, [&](Range p) { kernels().linear(gate, tiles_of(p, tiles(args.gate.n))); });
      team.barrier();
      kernels().thresholds(buffers.gate, args.gate.n, args.cutoff, buffers.threshold, team.share(args.x.rows));
      team.barrier();
      const OpenGateArgs open{buffers.gate, buffers.threshold, args.up, args.up_bias, args.act, a, buffers.product};
      up_queue.drain(team, [&](Range groups) { kernels().open_gate(open, groups); });
    } else {
      const GateArgs gate{args.gate, args.up, args.gate_bias, args.up_bias, args.act, a, buffers.product};
      gate_queue.drain(team, [&](Range groups) { kernels().gate(gate, groups); });
    }
    team.barrier();
    const LinearArgs down{args.down, args.down_bias, buffers.product, target, n};
    down_queue.drain(team, [&](Range p) { kernels().linear(down, tiles_of(p, tiles(n))); });
    if (direct) return;
    team.barrier();
    kernels().norm({{buffers.sum, DType::f32}, args.x.rows, n}, args.post, args.out, team.share(args.x.rows));
  });
}

void run_experts(const ExpertsArgs& args, Workspace& workspace, int threads) {
  threads = team_of(threads, args.x.rows * args.n * args.x.width);
  Carver count(nullptr);
  count.activations(args.x.rows, args.x.width);
  Carver carver(workspace.reserve(count.used()));
  const Activations all = carver.activations(args.x.rows, args.x.width);
  const auto part = [&](int64_t i) {
    const int64_t row = args.first[i];
    const int64_t at = row * all.groups;
    return Activations{all.q + at * kGroup, all.scale + at, all.sum8 + at, args.first[i + 1] - row, all.groups};
  };
  const auto element = [](DType type) -> int64_t { return type == DType::f32 ? 4 : 2; };
  const int64_t each = args.n / kRows;  // tiles
  Queue queue(args.hits * each, kPieceBytes / (all.groups * group_bytes(args.w.scheme)), threads);
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(args.x.rows);
    for (int64_t i = 0; i < args.hits; ++i) {
      const int64_t first = args.first[i], last = args.first[i + 1];
      const Range rows{(mine.begin > first ? mine.begin : first) - first, (mine.end < last ? mine.end : last) - first};
      const int64_t at = first * args.x.width * element(args.x.x.dtype);
      const Array x{static_cast<const char*>(args.x.x.data) + at, args.x.x.dtype};
      if (rows.begin < rows.end) kernels().quantize({x, last - first, args.x.width}, {}, part(i), rows);
    }
    team.barrier();
    queue.drain(team, [&](Range items) {
      for (int64_t i = items.begin / each; i * each < items.end; ++i) {
        const int64_t begin = items.begin > i * each ? items.begin - i * each : 0;
        const int64_t end = items.end < (i + 1) * each ? items.end - i * each : each;
        const int64_t tile = args.hit[i] * each;  // the first of this expert; its column 0 goes to column 0 of out
        const int64_t at = (args.first[i] * args.n - tile * kRows) * element(args.out.dtype);
        const Out out{reinterpret_cast<void*>(reinterpret_cast<intptr_t>(args.out.data) + at), args.out.dtype};
        kernels().linear({args.w, args.bias, part(i), out, args.n}, {tile + begin, tile + end});
      }
    });
  });
}

void run_qkv(const QkvArgs& args, Workspace& workspace, int threads) {
  threads = team_of(threads, work_of(args.x, args.part[0].w) + 2 * work_of(args.x, args.part[1].w));
  const auto buffers = carve<QkvBuffers>(workspace, args, threads);
  int64_t first[4] = {0};  // the tiles of q, k and v one after another
  for (int i = 0; i < 3; ++i) first[i + 1] = first[i] + tiles(args.part[i].w.n);
  Queue queue(pairs(first[3]), 4, threads);
  parallel(threads, [&](const Team& team) {
    const Activations a = buffers.input.quantize(team, args.x, args.norm);
    queue.drain(team, [&](Range some) {
      const Range tiles = tiles_of(some, first[3]);
      for (int i = 0; i < 3; ++i) {
        const Projection& p = args.part[i];
        const int64_t begin = tiles.begin > first[i] ? tiles.begin : first[i];
        const int64_t end = tiles.end < first[i + 1] ? tiles.end : first[i + 1];
        if (begin >= end) continue;
        kernels().linear({p.w, p.bias, a, {buffers.part[i], DType::f32}, p.w.n}, {begin - first[i], end - first[i]});
      }
    });
    team.barrier();
    for (int i = 0; i < 3; ++i) {
      const Projection& p = args.part[i];
      const RotaryArgs rotary{p.norm,
                              buffers.part[i],
                              p.w.n,
                              args.B,
                              args.T,
                              p.heads,
                              args.head_dim,
                              p.rotate ? args.cos : Array{},
                              p.rotate ? args.sin : Array{},
                              args.rotary_dim,
                              args.interleaved,
                              args.shared_cos,
                              p.out};
      kernels().rotary(rotary, team.share(args.B * args.T * p.heads));
    }
  });
}

void run_rotary(const RotaryArgs& args, int threads) {
  parallel(threads, [&](const Team& team) { kernels().rotary(args, team.share(args.B * args.T * args.heads)); });
}

void run_norm(const Rows& x, const Post& post, Out out, int threads) {
  parallel(x.rows == 1 ? 1 : threads, [&](const Team& team) { kernels().norm(x, post, out, team.share(x.rows)); });
}

void run_embedding(const EmbeddingArgs& args, int threads) {
  parallel(args.count == 1 ? 1 : threads, [&](const Team& team) { kernels().embedding(args, team.share(args.count)); });
}

uint64_t run_read(const uint64_t* data, int64_t words, bool two_levels, int threads) {
  uint64_t total = 0;
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(words / 32);
    const uint64_t part = kernels().read(data + 32 * mine.begin, 32 * (mine.end - mine.begin), two_levels);
    __atomic_fetch_add(&total, part, __ATOMIC_RELAXED);
  });
  return total;
}

int64_t run_dots(int64_t steps, int threads) {
  int64_t total = 0;
  parallel(threads, [&](const Team&) { __atomic_fetch_add(&total, kernels().dots(steps), __ATOMIC_RELAXED); });
  return total;
}

}  // namespace unicorn
