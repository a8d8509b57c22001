#include "prepared.h"

#include "cache.h"
#include "torch_regions.h"

namespace unicorn {

namespace {

using c10::IValue;
using Values = std::vector<IValue>;

OptionalTensor tensor(const IValue& value) { return value.isNone() ? OptionalTensor{} : value.toTensor(); }

OptionalFloat number(const IValue& value) { return value.isNone() ? OptionalFloat{} : value.toDouble(); }

bool packed(const IValue& weight) { return weight.toListRef().size() > 1; }

// A region and what calls it with the arguments that change.
template <class Region, class Call>
class PreparedRegion final : public Prepared {
 public:
  PreparedRegion(Region region, Call call) : region_(std::move(region)), call_(call) {}
  void run(const IValue* const* changing, IValue* results) const override { call_(region_, changing, results); }

 private:
  Region region_;
  Call call_;
};

template <class Region, class Call>
std::unique_ptr<Prepared> prepared(Region region, Call call) {
  return std::make_unique<PreparedRegion<Region, Call>>(std::move(region), call);
}

std::unique_ptr<Prepared> prepare_linear(const Values& a) {  // x, w, bias, n
  if (!packed(a[1])) return nullptr;
  return prepared(LinearRegion(a[0].toTensor().size(-1), a[1].toTensorVector(), tensor(a[2]), a[3].toInt()),
                  [](const LinearRegion& region, const IValue* const* changing, IValue* results) {
                    results[0] = region(changing[0]->toTensor());
                  });
}

// x, norm_w, norm_eps, norm_offset, wq, wk, wv, bias, q_norm_w, k_norm_w, qk_norm_eps, qk_norm_offset, cos, sin, heads,
// kv_heads, head_dim, interleaved, v_norm
std::unique_ptr<Prepared> prepare_qkv(const Values& a) {
  if (!packed(a[4]) || !packed(a[5]) || !packed(a[6])) return nullptr;
  return prepared(QkvRegion(a[0].toTensor().size(-1), tensor(a[1]), number(a[2]), a[3].toDouble(),
                            a[4].toTensorVector(), a[5].toTensorVector(), a[6].toTensorVector(), a[7].toTensorVector(),
                            tensor(a[8]), tensor(a[9]), number(a[10]), a[11].toDouble(), a[14].toInt(), a[15].toInt(),
                            a[16].toInt(), a[17].toBool(), a[18].toBool()),
                  [](const QkvRegion& region, const IValue* const* changing, IValue* results) {
                    std::tie(results[0], results[1], results[2]) =
                        region(changing[0]->toTensor(), tensor(*changing[1]), tensor(*changing[2]));
                  });
}

// q, k, v, mask, causal, scale, softcap, wo, bo, n, post_w, post_eps, post_offset, residual
std::unique_ptr<Prepared> prepare_attention(const Values& a) {
  const Tensor &q = a[0].toTensor(), &k = a[1].toTensor(), &v = a[2].toTensor();
  if (!packed(a[7])) return nullptr;
  check_attention(q, k, v);
  return prepared(
      AttentionRegion(q.size(1) * row_width(v), a[4].toBool(), a[5].toDouble(), a[6].toDouble(), a[7].toTensorVector(),
                      tensor(a[8]), a[9].toInt(), tensor(a[10]), number(a[11]), a[12].toDouble()),
      [](const AttentionRegion& region, const IValue* const* changing, IValue* results) {
        results[0] = region(changing[0]->toTensor(), changing[1]->toTensor(), changing[2]->toTensor(),
                            tensor(*changing[3]), tensor(*changing[4]));
      });
}

// x, norm_w, norm_eps, norm_offset, wg, wu, wd, bias, act, f, n, post_w, post_eps, post_offset, residual[, cutoff]
std::unique_ptr<Prepared> prepare_ffn(const Values& a) {
  if (!packed(a[4]) || !packed(a[5]) || !packed(a[6])) return nullptr;
  return prepared(FfnRegion(a[0].toTensor().size(-1), tensor(a[1]), number(a[2]), a[3].toDouble(),
                            a[4].toTensorVector(), a[5].toTensorVector(), a[6].toTensorVector(), a[7].toTensorVector(),
                            activation_of(a[8].toStringRef()), a[9].toInt(), a[10].toInt(), tensor(a[11]),
                            number(a[12]), a[13].toDouble(), a.size() > 15 ? number(a[15]) : OptionalFloat{}),
                  [](const FfnRegion& region, const IValue* const* changing, IValue* results) {
                    results[0] = region(changing[0]->toTensor(), tensor(*changing[1]));
                  });
}

// Nothing of these stays; they are called without the dispatcher, some hundred times per token.
class PreparedCall final : public Prepared {
 public:
  using Call = void (*)(const IValue* const* changing, IValue* results);
  explicit PreparedCall(Call call) : call_(call) {}
  void run(const IValue* const* changing, IValue* results) const override { call_(changing, results); }

 private:
  Call call_;
};

// past, rows, filled, keep
std::unique_ptr<Prepared> prepare_append_rows(const Values&) {
  return std::make_unique<PreparedCall>([](const IValue* const* a, IValue* results) {
    results[0] = append_rows(a[0]->toTensor(), a[1]->toTensor(), a[2]->toInt(), a[3]->toInt());
  });
}

// x, count
std::unique_ptr<Prepared> prepare_last_rows(const Values&) {
  return std::make_unique<PreparedCall>(
      [](const IValue* const* a, IValue* results) { results[0] = last_rows(a[0]->toTensor(), a[1]->toInt()); });
}

}  // namespace

const Preparation* preparation_of(const std::string& op) {
  static const Preparation known[] = {
      {"unicorn::linear", {0}, &prepare_linear},
      {"unicorn::int8_qkv", {0, 12, 13}, &prepare_qkv},
      {"unicorn::int8_attention", {0, 1, 2, 3, 13}, &prepare_attention},
      {"unicorn::int4_ffn", {0, 14}, &prepare_ffn},
      {"unicorn::sparse_ffn", {0, 14}, &prepare_ffn},
      {"unicorn::append_rows", {0, 1, 2, 3}, &prepare_append_rows},
      {"unicorn::last_rows", {0, 1}, &prepare_last_rows},
  };
  for (const Preparation& one : known) {
    if (one.op == op) return &one;
  }
  return nullptr;
}

}  // namespace unicorn
