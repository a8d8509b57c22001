// The next token from its scores [B, V]: that of torch.argmax, and the one that transformers' top-k, top-p, softmax and
// torch.multinomial draw with the same random numbers, in less time.
//
// Why: with a vocabulary of 262k, sampling takes 15 ms per token on two Zen 2 cores: 1 in TopKLogitsWarper, 6.5 in the
// sort of TopPLogitsWarper, 0.4 in softmax, and 7 in torch.multinomial, for an exponential variate per token of the
// vocabulary. After top-k some 50 tokens are left to look at, and of a Mersenne Twister only their words.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/TransformationHelper.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

namespace unicorn {

namespace {

using at::Tensor;

constexpr float kNever = -std::numeric_limits<float>::infinity();  // a score with probability 0
constexpr int64_t kBlock = 64;                                     // scores that are looked at together

// One of these per instruction set, chosen when the library is loaded: the loops are what the compiler vectorises.
#if defined(__x86_64__)
#define EVERY_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_ISA
#endif

// The first of `blocks` blocks from `block` on in which a score is above `least`, or NaN.
EVERY_ISA int64_t next_above(const float* x, int64_t block, int64_t blocks, float least) {
  for (; block < blocks; ++block) {
    int found = 0;
    for (int64_t i = 0; i < kBlock; ++i) found |= !(x[block * kBlock + i] <= least);
    if (found) break;
  }
  return block;
}

// Gives take(begin, end) the blocks with a score above `least`, which it may raise, or NaN, and the rest of the row.
// False as soon as it returns that.
template <class Take>
bool take_above(const float* x, int64_t n, const float& least, const Take& take) {
  const int64_t blocks = n / kBlock;
  for (int64_t b = next_above(x, 0, blocks, least); b < blocks; b = next_above(x, b + 1, blocks, least)) {
    if (!take(b * kBlock, (b + 1) * kBlock)) return false;
  }
  return take(blocks * kBlock, n);
}

// Integers in the order of their floats; -0 is 0, and NaN is anything.
inline int32_t key_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x), sign = bits >> 31;
  return (bits ^ (sign & 0x7fffffff)) - sign;
}

EVERY_ISA int32_t largest_key(const float* x, int64_t n) {
  int32_t most = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) most = std::max(most, key_of(x[i]));
  return most;
}

EVERY_ISA bool any_nan(const float* x, int64_t n) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) found |= x[i] != x[i];
  return found != 0;
}

void check(const char* op, const Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.scalar_type() == at::kFloat && t.device().is_cpu() && t.size(1) > 0, "unicorn::", op,
              ": got ", t.sizes(), " ", t.scalar_type(), " on ", t.device(), ", expected float32 [B, V] on the CPU");
}

// ---- torch.argmax ----

Tensor argmax(const Tensor& scores) {
  check("argmax", scores);
  const Tensor dense = scores.contiguous();
  const int64_t n = dense.size(1);
  constexpr int64_t kPart = 4096;  // of a row, read twice while it is in the nearest cache
  Tensor result = at::empty({dense.size(0)}, dense.options().dtype(at::kLong));
  for (int64_t row = 0; row < dense.size(0); ++row) {
    const float* x = dense.const_data_ptr<float>() + row * n;
    int32_t most = std::numeric_limits<int32_t>::min();
    int64_t token = 0;
    for (int64_t begin = 0; begin < n; begin += kPart) {
      const int64_t count = std::min(kPart, n - begin);
      if (any_nan(x + begin, count)) return at::argmax(dense, -1);
      const int32_t key = largest_key(x + begin, count);
      if (key > most) most = key, token = begin;
    }
    while (key_of(x[token]) != most) ++token;
    result.mutable_data_ptr<int64_t>()[row] = token;
  }
  return result;
}

// ---- which tokens are left ----

// The k-th largest, or none where there is a NaN.
std::optional<float> kth_largest(const float* x, int64_t n, int64_t k) {
  std::vector<float> best;  // all that are above `least`, and k of those at or above it
  best.reserve(2 * k + kBlock);
  float least = kNever;
  const auto keep_k = [&] {
    std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<float>());
    best.resize(k);
    least = best[k - 1];
  };
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (std::isnan(x[i])) return false;
      if (x[i] > least) best.push_back(x[i]);
    }
    if (static_cast<int64_t>(best.size()) >= 2 * k) keep_k();
    return true;
  };
  if (!take_above(x, n, least, take)) return {};
  if (static_cast<int64_t>(best.size()) < k) return kNever;  // the others are -inf
  keep_k();
  return least;
}

// A token that top-k leaves.
struct Candidate {
  int64_t token;
  float score;
  double weight;  // its probability times something that all share
  bool sure;      // false: whether top-p keeps it hangs on rounding, or on the order that a sort gives to equal scores
};

constexpr size_t kMostCandidates = 4096;
constexpr double kMargin = 1e-4;  // far more than torch's float softmax and sums are off by

// The tokens that top-k leaves, in order; none where these are many, or a score is NaN or infinite.
std::optional<std::vector<Candidate>> top_k(const float* x, int64_t n, int64_t k) {
  const auto least = k > 0 ? kth_largest(x, n, std::min(k, n)) : kNever;
  if (!least) return {};
  std::vector<Candidate> found;
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] == kNever || x[i] < *least) continue;
      if (!std::isfinite(x[i])) return false;
      found.push_back({i, x[i], 0.0, true});
    }
    return found.size() <= kMostCandidates;
  };
  const float below = std::nextafter(*least, kNever);
  if (!take_above(x, n, below, take) || found.empty()) return {};
  return found;
}

// Takes out what top-p removes for sure, and marks what it may remove. transformers adds probabilities from the least
// on, and removes while the sum is at most 1 - top_p, but never the last `keep`.
void top_p(std::vector<Candidate>& tokens, double top_p, int64_t keep) {
  std::vector<Candidate*> order;  // from the least
  for (Candidate& token : tokens) order.push_back(&token);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->score < b->score; });
  double total = 0.0;
  for (const Candidate& token : tokens) total += token.weight;
  const int64_t count = static_cast<int64_t>(order.size());
  const double limit = (1.0 - top_p) * total, error = kMargin * total;
  double below = 0.0;
  for (int64_t first = 0, last = 0; first < count; first = last) {  // equal scores: [first, last)
    while (last < count && order[last]->score == order[first]->score) ++last;
    const double weight = order[first]->weight, all = below + static_cast<double>(last - first) * weight;
    const bool stay = below + weight > limit + error || count - first <= keep;
    const bool go = all < limit - error && count - last >= keep;
    for (int64_t i = first; i < last; ++i) {
      order[i]->sure = stay;
      if (go) order[i]->weight = 0.0;
    }
    below = all;
  }
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [](const Candidate& t) { return t.weight == 0.0; }),
               tokens.end());
}

// ---- which of them is drawn ----

// The words of torch's generator, a Mersenne Twister; those between two that are asked for cost next to nothing.
class Words {
 public:
  explicit Words(const at::mt19937& engine) : data_(engine.data()), left_(data_.left_ - 1) {}

  // Two words as one, after `skipped` words that nobody reads.
  uint64_t next(int64_t skipped) {
    skip(skipped);
    const uint64_t high = word();
    return high << 32 | word();
  }

  void skip(int64_t count) {
    while (count > left_) {
      count -= left_;
      twist(data_.state_.data());
      data_.next_ = 0;
      left_ = at::MERSENNE_STATE_N;
    }
    left_ -= static_cast<int>(count);
    data_.next_ += static_cast<uint32_t>(count);
  }

  at::mt19937 engine() const {
    at::mt19937_data_pod data = data_;
    data.left_ = left_ + 1;
    at::mt19937 engine;
    engine.set_data(data);
    return engine;
  }

 private:
  uint32_t word() {
    skip(1);
    uint32_t y = data_.state_[data_.next_ - 1];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return y ^ (y >> 18);
  }

  // The next 624 words: mt19937_engine::next_state.
  EVERY_ISA static void twist(uint32_t* p) {
    constexpr int n = at::MERSENNE_STATE_N, m = at::MERSENNE_STATE_M;
    for (int i = 0; i < n - m; ++i) p[i] = p[i + m] ^ mixed(p[i], p[i + 1]);
    for (int i = n - m; i < n - 1; ++i) p[i] = p[i + m - n] ^ mixed(p[i], p[i + 1]);
    p[n - 1] = p[m - 1] ^ mixed(p[n - 1], p[0]);
  }

  static uint32_t mixed(uint32_t u, uint32_t v) {
    return ((u & at::UMASK) | (v & at::LMASK)) >> 1 ^ (-(v & 1) & at::MATRIX_A);
  }

  at::mt19937_data_pod data_;
  int left_;  // words of the state that were not read
};

// torch.multinomial draws an exponential variate q for every token of the vocabulary, in order, and takes the largest
// weight / q. This is that race, for those that are in it.
class Race {
 public:
  Race(Words& words, int64_t tokens) : words_(words), tokens_(tokens) {}

  // In the order of the tokens.
  void enter(int64_t token, double weight, bool sure) {
    const uint64_t bits = words_.next(2 * token - read_);
    read_ = 2 * token + 2;
    const double uniform = at::transformation::uniform_real<double>(bits, 0.0, 1.0);
    if (weight < second_ * uniform) return;  // q is at least `uniform`: no need of a logarithm
    const double ratio = weight / at::transformation::exponential<double>(uniform, 1.0);
    if (ratio > first_) {
      second_ = first_;
      first_ = ratio, winner_ = token, sure_ = sure;
    } else if (ratio > second_) {
      second_ = ratio;
    }
  }

  // Takes the words of the rest. The winner, or -1 where rounding may decide.
  int64_t end() {
    words_.skip(2 * tokens_ - read_);
    return sure_ && first_ > second_ * (1.0 + kMargin) ? winner_ : -1;
  }

 private:
  Words& words_;
  int64_t tokens_, read_ = 0, winner_ = -1;
  double first_ = 0.0, second_ = 0.0;
  bool sure_ = false;
};

int64_t draw(const float* x, int64_t n, int64_t k, double p, int64_t keep, Words& words) {
  Race race(words, n);
  if (auto tokens = top_k(x, n, k)) {
    float most = kNever;
    for (const Candidate& token : *tokens) most = std::max(most, token.score);
    for (Candidate& token : *tokens) token.weight = std::exp(static_cast<double>(token.score) - most);
    if (p < 1.0) top_p(*tokens, p, keep);
    for (const Candidate& token : *tokens) race.enter(token.token, token.weight, token.sure);
    return race.end();
  }
  if (k > 0 || p < 1.0) return -1;
  const Tensor weights = at::softmax(at::from_blob(const_cast<float*>(x), {n}), -1);
  const float* weight = weights.const_data_ptr<float>();
  if (!std::isfinite(*weight)) return -1;
  for (int64_t i = 0; i < n; ++i) {
    if (weight[i] > 0.0f) race.enter(i, weight[i], true);
  }
  return race.end();
}

Tensor sample(const Tensor& scores, int64_t k, double p, int64_t keep, std::optional<at::Generator> generator) {
  check("sample", scores);
  TORCH_CHECK(k >= 0 && p >= 0.0 && p <= 1.0 && keep > 0, "unicorn::sample: got top_k ", k, ", top_p ", p, ", keep ",
              keep, ", expected at least 0 (no limit), 0 to 1 (no limit), at least 1");
  const Tensor dense = scores.contiguous();
  const int64_t rows = dense.size(0), n = dense.size(1);
  Tensor result = at::empty({rows, 1}, dense.options().dtype(at::kLong));
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  Words words(source->engine());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = draw(dense.const_data_ptr<float>() + row * n, n, k, p, keep, words);
    if (token < 0) return at::empty({0, 1}, result.options());
    result.mutable_data_ptr<int64_t>()[row] = token;
  }
  source->set_engine(words.engine());
  return result;
}

}  // namespace

}  // namespace unicorn

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("argmax", &unicorn::argmax);
  m.impl("sample", &unicorn::sample);
}
