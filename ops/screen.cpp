#include "screen.h"

namespace unicorn {

namespace {

constexpr int64_t kMostBest = 256;
constexpr float kGain = 0.85f;  // of the head's bytes, on average; above, screening is no gain
constexpr float kOpen = 0.25f;  // of the tiles; with more to refine, six bits at once are faster
constexpr int64_t kPause = 63;  // calls until less is tried again

int64_t tiles(int64_t n) { return (n + kRows - 1) / kRows; }

}  // namespace

Screen::Screen(const std::vector<Tensor>& w)
    : tiles_(w.at(0).size(0)),
      groups_(w[0].size(1)),
      bytes_(tiles_ * (groups_ * (kFiveBytes + kSixthBytes) + 2 * kRows * static_cast<int64_t>(sizeof(float)))),
      pages_(bytes_) {
  Arguments arguments("Screen");
  const Weight weight = arguments.weight(w, tiles_ * kRows, groups_ * kGroup, "w");
  TORCH_CHECK(weight.scheme == Scheme::w8c || weight.scheme == Scheme::w8a,
              "unicorn::Screen: the weight has not 8 bits");
  planes_.five = reinterpret_cast<uint8_t*>(pages_.data());
  planes_.sixth = planes_.five + tiles_ * groups_ * kFiveBytes;
  planes_.error = reinterpret_cast<float*>(planes_.sixth + tiles_ * groups_ * kSixthBytes);
  run_split(weight, planes_, threads());
}

ScreenedLinear::ScreenedLinear(TensorList w, int64_t n, c10::intrusive_ptr<Screen> screen)
    : arguments_("linear"), screen_(std::move(screen)) {
  w_ = arguments_.weight(w, n, screen_->groups_ * kGroup, "w");
  TORCH_CHECK(tiles(n) == screen_->tiles_, "unicorn::Screen: made for ", screen_->tiles_, " tiles, got ", tiles(n));
}

std::optional<Tensor> ScreenedLinear::operator()(const Tensor& x, int64_t best) const {
  Arguments kept("linear");
  const Rows rows = kept.rows(x);
  if (rows.rows != 1 || (rows.width + kGroup - 1) / kGroup != screen_->groups_ || best > kMostBest) return {};
  const int64_t count = screen_->tiles_, all = count * screen_->groups_ * kW8GroupBytes;
  ++screen_->calls_;
  screen_->read_ += all;
  if (screen_->whole_ > 0) {
    --screen_->whole_;
    return {};
  }
  const bool six = screen_->six_ > 0;
  Tensor y = result_.take(with_last(x, w_.n), x.options(), 1);
  const auto [read, open] = run_screened(rows, w_, screen_->planes_, out_of(y), best, six, workspace(), threads());
  if (read == 0) return {};
  screen_->read_ += read - all;
  if (six) {
    --screen_->six_;
  } else {
    const float mean = 0.875f * screen_->open_ + 0.125f * static_cast<float>(open) / static_cast<float>(count);
    screen_->open_ = mean;
    if (mean > kOpen) screen_->six_ = kPause;
    if (mean > kOpen) return y;  // what six bits read is not known yet
  }
  const float share = 0.75f * screen_->share_ + 0.25f * static_cast<float>(read) / static_cast<float>(all);
  screen_->share_ = share;
  if (share > kGain) screen_->whole_ = kPause;
  return y;
}

}  // namespace unicorn
