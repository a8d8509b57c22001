// The unicorn:: ops for torch: checks, memory, and the way of weights that are not quantized.
#include <ATen/core/dispatch/Dispatcher.h>
#include <omp.h>
#include <torch/library.h>

#include <cmath>

#include "torch_regions.h"

namespace unicorn {

namespace {

bool is_float(TensorList w) { return w.size() == 1; }

// A float weight: torch's own linear in the weight's dtype, as eager does it.
Tensor float_linear(const Tensor& x, TensorList w, const OptionalTensor& bias, int64_t n, const char* op,
                    const char* name) {
  dtype_of(w[0], op, name);
  TORCH_CHECK(w[0].dim() == 2 && w[0].size(0) == n && w[0].size(1) == x.size(-1), "unicorn::", op, ": ", name,
              ": got shape ", w[0].sizes(), ", expected [", n, ", ", x.size(-1), "]");
  const auto type = w[0].scalar_type();
  return at::linear(x.to(type), w[0], bias ? bias->to(type) : OptionalTensor{});
}

// x [..., K] (the input of a projection, already normed) -> fp32 [..., n]; `eager` is the dtype that a float
// weight reads.
Tensor project(const Tensor& x, TensorList w, const OptionalTensor& bias, int64_t n, at::ScalarType eager,
               const char* op, const char* name) {
  Arguments arguments(op);
  if (is_float(w)) {
    return float_linear(x.to(eager), w, bias, n, op, name).to(at::kFloat);
  }
  Tensor y = at::empty(with_last(x, n), x.options().dtype(at::kFloat));
  const Rows rows = arguments.rows(x);
  run_linear(rows, {}, arguments.weight(w, n, rows.width, name), arguments.array(bias, "bias", n), {}, out_of(y),
             workspace(), threads());
  return y;
}

// fp32 rows under a norm; x itself without one.
Tensor normed(const Tensor& x, const OptionalTensor& w, const OptionalFloat& eps, double offset, const char* op) {
  if (!eps) return x;
  Arguments arguments(op);
  Tensor y = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const Rows rows = arguments.rows(x);
  run_norm(rows, {arguments.norm(w, eps, offset, rows.width, "norm_w"), {}}, out_of(y), threads());
  return y;
}

// fp32 y -> post-norm, residual, rounding to `type`.
Tensor finish(const Tensor& y, const OptionalTensor& w, const OptionalFloat& eps, double offset,
              const OptionalTensor& residual, at::ScalarType type, const char* op) {
  Arguments arguments(op);
  Tensor out = at::empty(y.sizes(), y.options().dtype(type));
  const Rows rows = arguments.rows(y);
  run_norm(rows, arguments.post(w, eps, offset, residual, rows.rows, rows.width), out_of(out), threads());
  return out;
}

Tensor linear(const Tensor& x, TensorList w, const OptionalTensor& bias, int64_t n) {
  const int64_t width = Arguments("linear").width(x);
  if (is_float(w)) return float_linear(x, w, bias, n, "linear", "w").to(x.scalar_type());
  return LinearRegion(width, w, bias, n)(x);
}

// experts [M, k] -> the slots in the order of their experts, the experts hit, and where each one's slots begin.
struct Routed {
  std::vector<int64_t> slots, hit, first;

  Routed(const Tensor& experts, int64_t count) : slots(experts.numel()), first{0} {
    const Tensor dense = experts.contiguous();
    const int64_t* id = dense.const_data_ptr<int64_t>();
    std::vector<int64_t> next(count + 1);
    for (int64_t i = 0; i < dense.numel(); ++i) {
      TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < count, "unicorn::experts_linear: got expert ", id[i],
                        ", allowed are 0 to ", count - 1);
      ++next[id[i] + 1];
    }
    for (int64_t e = 0; e < count; ++e) {
      if (next[e + 1] > 0) hit.push_back(e), first.push_back(first.back() + next[e + 1]);
      next[e + 1] += next[e];
    }
    for (int64_t i = 0; i < dense.numel(); ++i) slots[next[id[i]]++] = i;
  }
};

Tensor experts_linear(const Tensor& x, const Tensor& experts, TensorList w, const OptionalTensor& bias, int64_t n) {
  const char* op = "unicorn::experts_linear: ";
  TORCH_CHECK(experts.scalar_type() == at::kLong && experts.dim() == 2 && experts.device().is_cpu(), op,
              "experts: got ", experts.scalar_type(), " ", experts.sizes(), ", expected int64 [M, k]");
  const int64_t m = experts.size(0), k = experts.size(1);
  TORCH_CHECK((x.dim() == 2 || (x.dim() == 3 && x.size(1) == k)) && x.size(0) == m, op, "x: got shape ", x.sizes(),
              ", expected [", m, ", K] or [", m, ", ", k, ", K]");
  TORCH_CHECK(!is_float(w) && w[0].dim() > 0 && n > 0 && n % kRows == 0 && w[0].size(0) * kRows % n == 0, op,
              "w: expected packed weights of experts with n a multiple of 16 one under another, got n = ", n);
  const int64_t count = w[0].size(0) * kRows / n;
  const Routed routed(experts, count);
  const Tensor slots = at::from_blob(const_cast<int64_t*>(routed.slots.data()), {m * k}, at::kLong);
  const Tensor rows = x.dim() == 2 ? x.index_select(0, slots.div(k, "floor")) : x.flatten(0, 1).index_select(0, slots);
  Arguments arguments("experts_linear");
  ExpertsArgs args;
  args.x = arguments.rows(rows);
  args.w = arguments.weight(w, count * n, args.x.width, "w");
  args.bias = arguments.array(bias, "bias", count * n);
  Tensor sorted = at::empty({m * k, n}, x.options()), out = at::empty({m * k, n}, x.options());
  args.out = out_of(sorted);
  args.n = n;
  args.hit = routed.hit.data();
  args.first = routed.first.data();
  args.hits = static_cast<int64_t>(routed.hit.size());
  run_experts(args, workspace(), threads());
  return out.index_copy_(0, slots, sorted).view({m, k, n});
}

Tensor embedding(const Tensor& ids, TensorList w, int64_t num_rows, int64_t k, at::ScalarType dtype) {
  TORCH_CHECK(ids.scalar_type() == at::kLong, "unicorn::embedding: ids: got dtype ", ids.scalar_type(),
              ", expected int64");
  const Tensor dense = ids.contiguous();
  const int64_t* id = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < num_rows, "unicorn::embedding: got id ", id[i], ", allowed are 0 to ",
                      num_rows - 1);
  }
  if (is_float(w)) return at::embedding(w[0], dense).to(dtype);
  Arguments arguments("embedding");
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(k);
  Tensor out = at::empty(shape, ids.options().dtype(dtype));
  run_embedding({id, dense.numel(), arguments.weight(w, num_rows, k, "w"), out_of(out)}, threads());
  return out;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& w, double eps, double offset) {
  return finish(x, w, eps, offset, {}, x.scalar_type(), "rms_norm");
}

std::tuple<Tensor, Tensor, Tensor> int8_qkv(const Tensor& x, const OptionalTensor& norm_w,
                                            const OptionalFloat& norm_eps, double norm_offset, TensorList wq,
                                            TensorList wk, TensorList wv, TensorList bias,
                                            const OptionalTensor& q_norm_w, const OptionalTensor& k_norm_w,
                                            const OptionalFloat& qk_norm_eps, double qk_norm_offset,
                                            const OptionalTensor& cos, const OptionalTensor& sin, int64_t heads,
                                            int64_t kv_heads, int64_t head_dim, bool interleaved, bool v_norm) {
  const bool packed = !is_float(wq) && !is_float(wk) && !is_float(wv);
  const TensorList none;
  const QkvRegion region(Arguments("int8_qkv").width(x), norm_w, norm_eps, norm_offset, packed ? wq : none,
                         packed ? wk : none, packed ? wv : none, bias, q_norm_w, k_norm_w, qk_norm_eps, qk_norm_offset,
                         heads, kv_heads, head_dim, interleaved, v_norm);
  if (packed) return region(x, cos, sin);
  Arguments arguments("int8_qkv");
  Tensor out[3];
  const QkvArgs args = region.begin(x, cos, sin, out, arguments);
  const Tensor h = normed(x, norm_w, norm_eps, norm_offset, "int8_qkv");
  const auto b = arguments.biases(bias);
  const TensorList weights[3] = {wq, wk, wv};
  const char* const names[3] = {"wq", "wk", "wv"};
  for (int i = 0; i < 3; ++i) {
    const Projection& p = args.part[i];
    const int64_t n = p.heads * head_dim;
    const Tensor y = project(h, weights[i], b[i], n, x.scalar_type(), "int8_qkv", names[i]).contiguous();
    run_rotary({p.norm, y.const_data_ptr<float>(), n, args.B, args.T, p.heads, head_dim, p.rotate ? args.cos : Array{},
                p.rotate ? args.sin : Array{}, args.rotary_dim, args.interleaved, args.shared_cos, p.out},
               threads());
  }
  return {out[0], out[1], out[2]};
}

Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                      double scale, double softcap, TensorList wo, const OptionalTensor& bo, int64_t n,
                      const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
                      const OptionalTensor& residual) {
  check_attention(q, k, v);
  if (!is_float(wo)) {
    const AttentionRegion region(q.size(1) * row_width(v), causal, scale, softcap, wo, bo, n, post_w, post_eps,
                                 post_offset);
    return region(q, k, v, mask, residual);
  }
  const Tensor joined = attended(q, k, v, mask, causal, scale, softcap);
  const Tensor y = project(joined, wo, bo, n, q.scalar_type(), "int8_attention", "wo");
  return finish(y, post_w, post_eps, post_offset, residual, q.scalar_type(), "int8_attention");
}

Tensor product_of(Act act, const Tensor& gate, const Tensor& up) {
  if (act == Act::silu) return at::silu(gate) * up;
  if (act == Act::relu) return at::relu(gate) * up;
  return at::gelu(gate, act == Act::gelu ? "none" : "tanh") * up;
}

Tensor ffn(const char* op, const Tensor& x, const OptionalTensor& norm_w, const OptionalFloat& norm_eps,
           double norm_offset, TensorList wg, TensorList wu, TensorList wd, TensorList bias, c10::string_view act,
           int64_t f, int64_t n, const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
           const OptionalTensor& residual, const OptionalFloat& cutoff) {
  const Act activation = activation_of(act);
  if (!is_float(wg) && !is_float(wu) && !is_float(wd)) {
    const FfnRegion region(Arguments(op).width(x), norm_w, norm_eps, norm_offset, wg, wu, wd, bias, activation, f, n,
                           post_w, post_eps, post_offset, cutoff);
    return region(x, residual);
  }
  Arguments arguments(op);
  const auto b = arguments.biases(bias);
  const auto type = x.scalar_type();
  const Tensor h = normed(x, norm_w, norm_eps, norm_offset, op);
  Tensor gate = project(h, wg, b[0], f, type, op, "wg");
  if (cutoff) gate = at::relu(gate - (gate.mean(-1, true) + gate.std(-1, false, true) * *cutoff));
  const Tensor up = project(h, wu, b[1], f, type, op, "wu");
  const Tensor y = project(product_of(activation, gate, up), wd, b[2], n, type, op, "wd");
  return finish(y, post_w, post_eps, post_offset, residual, type, op);
}

Tensor int4_ffn(const Tensor& x, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
                TensorList wg, TensorList wu, TensorList wd, TensorList bias, c10::string_view act, int64_t f,
                int64_t n, const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
                const OptionalTensor& residual) {
  return ffn("int4_ffn", x, norm_w, norm_eps, norm_offset, wg, wu, wd, bias, act, f, n, post_w, post_eps, post_offset,
             residual, {});
}

Tensor sparse_ffn(const Tensor& x, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
                  TensorList wg, TensorList wu, TensorList wd, TensorList bias, c10::string_view act, int64_t f,
                  int64_t n, const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
                  const OptionalTensor& residual, double cutoff) {
  return ffn("sparse_ffn", x, norm_w, norm_eps, norm_offset, wg, wu, wd, bias, act, f, n, post_w, post_eps, post_offset,
             residual, cutoff);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const char* const* isa = isas(); *isa != nullptr; ++isa) names.emplace_back(*isa);
  return names;
}

std::string set_isa_by_name(c10::string_view name) {
  TORCH_CHECK_VALUE(set_isa(std::string(name).c_str()), "instruction set '", name,
                    "' is not one this CPU runs: ", isa_names());
  return kernels().name;
}

Tensor activate_all(const Tensor& x, c10::string_view act) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "unicorn::activate: x: got dtype ", x.scalar_type(), ", expected float32");
  const Tensor dense = x.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  kernels().activations(dense.const_data_ptr<float>(), x.numel(), activation_of(act), out.mutable_data_ptr<float>());
  return out;
}

int64_t read_bytes(const Tensor& data, bool two_levels) {
  TORCH_CHECK(data.is_contiguous() && data.device().is_cpu(), "unicorn::read_bytes: needs a contiguous CPU tensor");
  return static_cast<int64_t>(run_read(static_cast<const uint64_t*>(data.const_data_ptr()),
                                       static_cast<int64_t>(data.nbytes()) / 8, two_levels, threads()));
}

int64_t dot_peak(int64_t steps) { return run_dots(steps, threads()); }

// Ends the threads that wait for work of the calling thread. libgomp keeps them per caller, and lets nobody's threads
// spin once there are more of them than CPUs: every region of another caller then waits for the system to wake them.
void release_threads() { omp_pause_resource_all(omp_pause_soft); }

// Gradients: an error where they would be lost silently, else on to the kernel.
void inference_only(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    const auto refuse = [](const Tensor& t) {
      TORCH_CHECK(!t.requires_grad(),
                  "unicorn ops are inference only, and an input requires grad: call under torch.inference_mode() or "
                  "torch.no_grad(), or model.requires_grad_(False)");
    };
    for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (value.isTensor() && value.toTensor().defined()) refuse(value.toTensor());
      if (!value.isTensorList()) continue;
      for (const Tensor& t : value.toTensorVector()) refuse(t);
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

}  // namespace unicorn

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) {
  m.impl("set_isa", &unicorn::set_isa_by_name);
  m.impl("isas", &unicorn::isa_names);
  m.impl("dot_peak", &unicorn::dot_peak);
  m.impl("release_threads", &unicorn::release_threads);
}

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("linear", &unicorn::linear);
  m.impl("experts_linear", &unicorn::experts_linear);
  m.impl("embedding", &unicorn::embedding);
  m.impl("rms_norm", &unicorn::rms_norm);
  m.impl("int8_qkv", &unicorn::int8_qkv);
  m.impl("int8_attention", &unicorn::int8_attention);
  m.impl("int4_ffn", &unicorn::int4_ffn);
  m.impl("sparse_ffn", &unicorn::sparse_ffn);
  m.impl("activate", &unicorn::activate_all);
  m.impl("read_bytes", &unicorn::read_bytes);
}

TORCH_LIBRARY_IMPL(unicorn, Autograd, m) {
  for (const char* op :
       {"linear", "experts_linear", "embedding", "rms_norm", "int8_qkv", "int8_attention", "int4_ffn", "sparse_ffn"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&unicorn::inference_only>());
  }
}
