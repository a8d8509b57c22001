// The torch side of the ops: checks, shapes, allocation of results. The schemas are in unicorn_backend/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "quantize.h"
#include "regions.h"

namespace unicorn {
bool attention_set_isa(const char* name);
}

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using unicorn::DType;
using unicorn::Floats;

unicorn::Arena& fresh_arena() {
  static thread_local unicorn::Arena arena;
  arena.reset();
  return arena;
}

DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default:
      TORCH_CHECK(false, what, ": got dtype ", t.scalar_type(), ", allowed are float32, bfloat16 and float16");
  }
}

// Dense memory of `t` for the duration of the op; `keep` owns a copy where one was needed.
Floats floats(const Tensor& t, const char* what, std::vector<Tensor>& keep) {
  TORCH_CHECK(t.device().is_cpu(), what, ": got a tensor on ", t.device(), ", allowed is cpu");
  keep.push_back(t.contiguous());
  return {keep.back().const_data_ptr(), dtype_of(t, what)};
}

Floats floats(const OptTensor& t, const char* what, int64_t size, std::vector<Tensor>& keep) {
  if (!t) return {};
  TORCH_CHECK(t->numel() == size, what, ": got ", t->numel(), " values, needs ", size);
  return floats(*t, what, keep);
}

bool is_float(at::TensorList w) { return w.size() == 1; }

unicorn::Weight weight(at::TensorList w, int64_t n, int64_t k, const char* what) {
  using unicorn::Scheme;
  TORCH_CHECK(w.size() == 2 || w.size() == 3, what, ": got a weight of ", w.size(), " tensors, allowed are 1 to 3");
  const int64_t n16 = (n + 15) / 16, k32 = (k + 31) / 32;
  const Tensor &q = w[0], &s = w[1];
  TORCH_CHECK(q.dim() == 5 && q.scalar_type() == at::kByte && q.is_contiguous(), what,
              ": the packed weight must be a contiguous uint8 tensor [N16, K32, 4 or 8, 16, 4], got ", q.scalar_type(),
              " ", q.sizes());
  TORCH_CHECK(q.size(0) == n16 && q.size(1) == k32 && q.size(3) == 16 && q.size(4) == 4, what,
              ": a packed weight for ", n, " x ", k, " has ", n16, " x ", k32, " tiles, got ", q.sizes());
  const bool w4 = q.size(2) == 4;
  TORCH_CHECK(w4 ? w.size() == 2 : q.size(2) == 8, what, ": got ", q.sizes(), " and ", w.size(), " tensors");
  TORCH_CHECK(s.is_contiguous() && s.scalar_type() == (w4 ? at::kHalf : at::kFloat) &&
                  s.numel() == (w4 ? n16 * k32 * 16 : n16 * 16),
              what, ": scales must be ", w4 ? "float16 [N16, K32, 16]" : "float32 [N16, 16]", ", got ",
              s.scalar_type(), " ", s.sizes());
  const uint8_t* zero = nullptr;
  if (w.size() == 3) {
    TORCH_CHECK(w[2].is_contiguous() && w[2].scalar_type() == at::kByte && w[2].numel() == n16 * 16, what,
                ": zero points must be uint8 [N16, 16], got ", w[2].scalar_type(), " ", w[2].sizes());
    zero = w[2].const_data_ptr<uint8_t>();
  }
  return {w4 ? Scheme::w4g32 : zero ? Scheme::w8a : Scheme::w8c, q.const_data_ptr<uint8_t>(), s.const_data_ptr(), zero,
          n, n16, k32};
}

unicorn::Norm norm(const OptTensor& w, std::optional<double> eps, double offset, int64_t k, const char* what,
                   std::vector<Tensor>& keep) {
  if (!eps) return {};
  return {true, floats(w, what, k, keep), float(*eps), float(offset)};
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

int64_t tokens_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

// --- float weights: the model's own arithmetic, rounding where eager rounds ------------------------

Tensor float_norm(const Tensor& x, const OptTensor& w, std::optional<double> eps, double offset) {
  if (!eps) return x;
  Tensor out = at::empty(x.sizes(), x.options());
  std::vector<Tensor> keep;
  const int64_t k = x.size(-1);
  const Floats in = floats(x, "rms_norm", keep);
  unicorn::rms_norm(in, tokens_of(x), k, norm(w, eps, offset, k, "rms_norm", keep), out.mutable_data_ptr(),
                    fresh_arena(), threads());
  return out;
}

Tensor linear(const Tensor& x, at::TensorList w, const OptTensor& bias, int64_t n);

Tensor project(const Tensor& x, at::TensorList w, const OptTensor& bias, int64_t n) {
  return is_float(w) ? at::linear(x.to(w[0].scalar_type()), w[0], bias).to(x.scalar_type()) : linear(x, w, bias, n);
}

Tensor activate(const Tensor& x, const std::string& act) {
  if (act == "gelu_tanh") return at::gelu(x, "tanh");
  if (act == "gelu") return at::gelu(x);
  return act == "silu" ? at::silu(x) : at::relu(x);
}

Tensor float_finish(const Tensor& y, const OptTensor& w, std::optional<double> eps, double offset,
                    const OptTensor& residual) {
  const Tensor out = float_norm(y, w, eps, offset);
  return residual ? at::add(*residual, out) : out;
}

// --- ops -------------------------------------------------------------------------------------------

Tensor linear(const Tensor& x, at::TensorList w, const OptTensor& bias, int64_t n) {
  if (is_float(w)) return project(x, w, bias, n);
  std::vector<Tensor> keep;
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor out = at::empty(sizes, x.options());
  const int64_t k = x.size(-1), tokens = tokens_of(x);
  if (tokens == 0) return out;
  unicorn::LinearArgs args{};
  args.x = floats(x, "linear", keep), args.tokens = tokens, args.k = k;
  args.w = weight(w, n, k, "linear");
  args.finish.bias = floats(bias, "linear: bias", n, keep);
  args.finish.out = out.mutable_data_ptr(), args.finish.type = args.x.type;
  unicorn::linear(args, fresh_arena(), threads());
  return out;
}

Tensor rms_norm(const Tensor& x, const OptTensor& w, double eps, double offset) {
  return float_norm(x, w, eps, offset);
}

Tensor embedding(const Tensor& ids, at::TensorList w, int64_t num_rows, int64_t k, at::ScalarType dtype) {
  TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, "embedding: ids must be int64 or int32, got ",
              ids.scalar_type());
  const Tensor rows = ids.to(at::kLong).contiguous();
  const int64_t* id = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < num_rows, "embedding: got token id ", id[i], ", allowed are 0 to ",
                      num_rows - 1);
  if (is_float(w)) return at::embedding(w[0], rows).to(dtype);
  auto sizes = ids.sizes().vec();
  sizes.push_back(k);
  Tensor out = at::empty(sizes, ids.options().dtype(dtype));
  const unicorn::Weight table = weight(w, num_rows, k, "embedding");
  TORCH_CHECK(table.scheme != unicorn::Scheme::w4g32, "embedding: got scheme w4g32, allowed are w8a, w8c and float");
  unicorn::embedding(id, rows.numel(), table, k, dtype_of(out, "embedding"), out.mutable_data_ptr(), fresh_arena(),
                     threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> int8_qkv(const Tensor& x, const OptTensor& norm_w, std::optional<double> norm_eps,
                                            double norm_offset, at::TensorList wq, at::TensorList wk,
                                            at::TensorList wv, at::TensorList bias, const OptTensor& q_norm_w,
                                            const OptTensor& k_norm_w, std::optional<double> qk_norm_eps,
                                            double qk_norm_offset, const OptTensor& cos, const OptTensor& sin,
                                            int64_t heads, int64_t kv_heads, int64_t head_dim) {
  TORCH_CHECK(x.dim() == 3, "int8_qkv: x must be [B, T, K], got ", x.sizes());
  TORCH_CHECK(bias.empty() || bias.size() == 3, "int8_qkv: got ", bias.size(), " biases, allowed are 0 and 3");
  const int64_t B = x.size(0), T = x.size(1), k = x.size(2), count[3] = {heads, kv_heads, kv_heads};
  const at::TensorList lists[3] = {wq, wk, wv};
  const OptTensor* norms[2] = {&q_norm_w, &k_norm_w};
  Tensor out[3], h = x;
  std::vector<Tensor> keep;
  const bool plain = is_float(wq) || is_float(wk) || is_float(wv);
  unicorn::QkvArgs args{};
  args.B = B, args.T = T, args.head_dim = head_dim;
  if (plain) h = float_norm(x, norm_w, norm_eps, norm_offset);
  for (int i = 0; i < 3; ++i) out[i] = at::empty({B, count[i], T, head_dim}, x.options());
  if (B * T == 0) return {out[0], out[1], out[2]};
  if (cos) {
    TORCH_CHECK(sin && cos->dim() == 3 && cos->sizes() == sin->sizes() && cos->size(1) == T && cos->size(2) == head_dim &&
                    (cos->size(0) == 1 || cos->size(0) == B),
                "int8_qkv: cos and sin must be [", B, " or 1, ", T, ", ", head_dim, "], got ", cos->sizes());
    args.cos = floats(*cos, "int8_qkv: cos", keep), args.sin = floats(*sin, "int8_qkv: sin", keep);
    args.cos_shared = cos->size(0) == 1;
  }
  if (plain) {  // project with torch, then norm and rotate as eager does
    for (int i = 0; i < 3; ++i) {
      const OptTensor b = bias.empty() ? OptTensor() : OptTensor(bias[i]);
      Tensor y = project(h, lists[i], b, count[i] * head_dim).view({B, T, count[i], head_dim}).transpose(1, 2);
      if (i < 2) y = float_norm(y.contiguous(), *norms[i], qk_norm_eps, qk_norm_offset);
      if (i < 2 && cos) {
        const Tensor c = cos->unsqueeze(1), s = sin->unsqueeze(1);
        const auto halves = y.chunk(2, -1);
        y = at::add(at::mul(y, c), at::mul(at::cat({at::neg(halves[1]), halves[0]}, -1), s));
      }
      out[i] = y.contiguous();
    }
    return {out[0], out[1], out[2]};
  }
  args.x = floats(x, "int8_qkv", keep), args.k = k;
  args.norm = norm(norm_w, norm_eps, norm_offset, k, "int8_qkv: norm", keep);
  for (int i = 0; i < 3; ++i) {
    args.heads[i] = count[i];
    args.w[i] = weight(lists[i], count[i] * head_dim, k, "int8_qkv");
    if (!bias.empty()) args.bias[i] = floats(OptTensor(bias[i]), "int8_qkv: bias", count[i] * head_dim, keep);
    if (i < 2) args.head_norm[i] = norm(*norms[i], qk_norm_eps, qk_norm_offset, head_dim, "int8_qkv: q/k norm", keep);
    args.out[i] = out[i].mutable_data_ptr();
  }
  unicorn::qkv(args, fresh_arena(), threads());
  return {out[0], out[1], out[2]};
}

unicorn::MaskKind mask_kind(const Tensor& mask) {
  using unicorn::MaskKind;
  switch (mask.scalar_type()) {
    case at::kBool: return MaskKind::boolean;
    case at::kFloat: return MaskKind::f32;
    case at::kBFloat16: return MaskKind::bf16;
    case at::kHalf: return MaskKind::f16;
    default: TORCH_CHECK(false, "int8_attention: got a mask of ", mask.scalar_type(), ", allowed are bool and floats");
  }
}

void fill_attention(unicorn::AttentionArgs& args, const Tensor& q, const Tensor& k, const Tensor& v,
                    const OptTensor& mask, std::vector<Tensor>& keep) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "int8_attention: q, k and v must be [B, H, T, D]");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "int8_attention: q, k and v must have one dtype, got ", q.scalar_type(), ", ", k.scalar_type(), ", ",
              v.scalar_type());
  args.B = q.size(0), args.H = q.size(1), args.T = q.size(2), args.D = q.size(3);
  args.Hkv = k.size(1), args.S = k.size(2), args.Dv = v.size(3);
  TORCH_CHECK(k.size(0) == args.B && k.size(3) == args.D && v.size(0) == args.B && v.size(1) == args.Hkv &&
                  v.size(2) == args.S && args.Hkv > 0 && args.H % args.Hkv == 0,
              "int8_attention: shapes do not fit: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  const Tensor* given[3] = {&q, &k, &v};
  const void** data[3] = {&args.q, &args.k, &args.v};
  int64_t* strides[3] = {args.q_stride, args.k_stride, args.v_stride};
  for (int i = 0; i < 3; ++i) {
    keep.push_back(given[i]->stride(3) == 1 ? *given[i] : given[i]->contiguous());
    *data[i] = keep.back().const_data_ptr();
    for (int d = 0; d < 3; ++d) strides[i][d] = keep.back().stride(d);
  }
  args.dtype = dtype_of(q, "int8_attention");
  args.mask_kind = unicorn::MaskKind::none;
  if (!mask) return;
  keep.push_back(mask->expand({args.B, args.H, args.T, args.S}));
  args.mask = keep.back().const_data_ptr();
  args.mask_kind = mask_kind(*mask);
  for (int d = 0; d < 4; ++d) args.mask_stride[d] = keep.back().stride(d);
}

Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask, bool causal,
                      double scale, double softcap, at::TensorList wo, const OptTensor& bo, int64_t n,
                      const OptTensor& post_w, std::optional<double> post_eps, double post_offset,
                      const OptTensor& residual) {
  std::vector<Tensor> keep;
  unicorn::AttentionArgs args{};
  fill_attention(args, q, k, v, mask, keep);
  args.causal = causal, args.scale = float(scale), args.softcap = float(softcap), args.threads = threads();
  const int64_t tokens = args.B * args.T, width = args.H * args.Dv;
  Tensor out = at::empty({args.B, args.T, n}, q.options());
  if (tokens == 0) return out;
  unicorn::Arena& arena = fresh_arena();
  args.workspace = arena.bytes(unicorn::attention_workspace_bytes(args));
  if (is_float(wo)) {
    Tensor joined = at::empty({args.B, args.T, width}, q.options().dtype(at::kFloat));
    args.out = joined.mutable_data_ptr<float>();
    unicorn::attention(args);
    return float_finish(project(joined.to(q.scalar_type()), wo, bo, n), post_w, post_eps, post_offset, residual);
  }
  args.out = arena.take<float>(tokens * width);
  unicorn::attention(args);
  unicorn::LinearArgs end{};
  end.x = {args.out, DType::f32}, end.tokens = tokens, end.k = width;
  end.w = weight(wo, n, width, "int8_attention: wo");
  end.finish.bias = floats(bo, "int8_attention: bo", n, keep);
  end.finish.norm = norm(post_w, post_eps, post_offset, n, "int8_attention: post norm", keep);
  end.finish.residual = floats(residual, "int8_attention: residual", tokens * n, keep);
  end.finish.out = out.mutable_data_ptr(), end.finish.type = args.dtype;
  unicorn::linear(end, arena, args.threads);
  return out;
}

unicorn::Activation activation(const std::string& act) {
  if (act == "gelu_tanh") return unicorn::Activation::gelu_tanh;
  if (act == "gelu") return unicorn::Activation::gelu;
  if (act == "silu") return unicorn::Activation::silu;
  TORCH_CHECK_VALUE(act == "relu", "int4_ffn: act must be gelu_tanh, gelu, silu or relu, got '", act, "'");
  return unicorn::Activation::relu;
}

Tensor int4_ffn(const Tensor& x, const OptTensor& norm_w, std::optional<double> norm_eps, double norm_offset,
                at::TensorList wg, at::TensorList wu, at::TensorList wd, at::TensorList bias, const std::string act,
                int64_t f, int64_t n, const OptTensor& post_w, std::optional<double> post_eps, double post_offset,
                const OptTensor& residual) {
  TORCH_CHECK(bias.empty() || bias.size() == 3, "int4_ffn: got ", bias.size(), " biases, allowed are 0 and 3");
  const OptTensor b[3] = {bias.empty() ? OptTensor() : OptTensor(bias[0]), bias.empty() ? OptTensor() : OptTensor(bias[1]),
                          bias.empty() ? OptTensor() : OptTensor(bias[2])};
  const unicorn::Activation kind = activation(act);
  if (is_float(wg) || is_float(wu) || is_float(wd)) {
    const Tensor h = float_norm(x, norm_w, norm_eps, norm_offset);
    const Tensor product = at::mul(activate(project(h, wg, b[0], f), act), project(h, wu, b[1], f));
    return float_finish(project(product, wd, b[2], n), post_w, post_eps, post_offset, residual);
  }
  std::vector<Tensor> keep;
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor out = at::empty(sizes, x.options());
  const int64_t k = x.size(-1), tokens = tokens_of(x);
  if (tokens == 0) return out;
  unicorn::FfnArgs args{};
  args.x = floats(x, "int4_ffn", keep), args.tokens = tokens, args.k = k, args.act = kind;
  args.norm = norm(norm_w, norm_eps, norm_offset, k, "int4_ffn: norm", keep);
  args.gate = weight(wg, f, k, "int4_ffn: gate"), args.up = weight(wu, f, k, "int4_ffn: up");
  args.down = weight(wd, n, f, "int4_ffn: down");
  args.gate_bias = floats(b[0], "int4_ffn: gate bias", f, keep), args.up_bias = floats(b[1], "int4_ffn: up bias", f, keep);
  args.finish.bias = floats(b[2], "int4_ffn: down bias", n, keep);
  args.finish.norm = norm(post_w, post_eps, post_offset, n, "int4_ffn: post norm", keep);
  args.finish.residual = floats(residual, "int4_ffn: residual", tokens * n, keep);
  args.finish.out = out.mutable_data_ptr(), args.finish.type = args.x.type;
  unicorn::ffn(args, fresh_arena(), threads());
  return out;
}

// --- for tests and benchmarks ------------------------------------------------------------------------

// Force an instruction set everywhere ("" = the best); returns the one in use.
std::string set_isa(const std::string& name) {
  TORCH_CHECK_VALUE(unicorn::matmul_set_isa(name.c_str()) && unicorn::attention_set_isa(name.c_str()), "instruction set '",
                    name, "' is not one this CPU runs; allowed are '', 'avx512vnni', 'avx2' and 'portable'");
  const std::string quantizer = name == "avx512vnni" ? "avx512" : name;
  TORCH_CHECK_VALUE(unicorn::quantizer_set_isa(quantizer.c_str()), "the quantizer has no '", quantizer, "'");
  return unicorn::matmul_table().isa;
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  const std::string current = unicorn::matmul_table().isa;
  for (const char* name : {"avx512vnni", "avx2", "portable"})
    if (unicorn::matmul_set_isa(name)) found.emplace_back(name);
  unicorn::matmul_set_isa(current.c_str());
  return found;
}

Tensor activate_op(const Tensor& x, const std::string act) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() % 16 == 0, "activate: fp32, multiple of 16");
  Tensor out = at::empty_like(x);
  unicorn::matmul_table().activate(x.const_data_ptr<float>(), x.numel(), activation(act), out.mutable_data_ptr<float>());
  return out;
}

// Reads all bytes of `data` with all threads; the result is meaningless.
int64_t read_bytes(const Tensor& data) {
  const int64_t step = 1 << 20, blocks = int64_t(data.nbytes()) / step;
  const uint8_t* p = static_cast<const uint8_t*>(data.const_data_ptr());
  const int count = threads();
  uint64_t all = 0;
#pragma omp parallel for num_threads(count) reduction(^ : all) schedule(static)
  for (int64_t i = 0; i < blocks; ++i) all ^= unicorn::matmul_table().read(p + i * step, step);
  return int64_t(all);
}

// int8 multiply-adds from registers on all threads; returns how many were done.
int64_t dot_peak(int64_t steps) {
  const int count = threads();
  int64_t done = 0;
#pragma omp parallel num_threads(count) reduction(+ : done)
  {
    alignas(64) int32_t sink[16];
    done += unicorn::matmul_table().dot_peak(steps, sink);
  }
  return done;
}

// Autograd key: inference only. Anything that wants a gradient is told so; all else goes on to the kernel.
void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (c10::GradMode::is_enabled()) {
    for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
      const bool wants = (value.isTensor() && value.toTensor().requires_grad()) ||
                         (value.isTensorList() && [&] {
                           for (const Tensor& t : value.toTensorVector())
                             if (t.requires_grad()) return true;
                           return false;
                         }());
      TORCH_CHECK(!wants, op.schema().name(),
                  ": unicorn ops are inference only, and an input requires grad; call under torch.inference_mode() or "
                  "torch.no_grad(), or model.requires_grad_(False)");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("linear", linear);
  m.impl("embedding", embedding);
  m.impl("rms_norm", rms_norm);
  m.impl("int8_qkv", int8_qkv);
  m.impl("int8_attention", int8_attention);
  m.impl("int4_ffn", int4_ffn);
  m.impl("activate", activate_op);
  m.impl("read_bytes", read_bytes);
}

TORCH_LIBRARY_IMPL(unicorn, CompositeExplicitAutograd, m) {
  m.impl("set_isa", set_isa);
  m.impl("isas", isas);
  m.impl("dot_peak", dot_peak);
}

TORCH_LIBRARY_IMPL(unicorn, Autograd, m) {
  for (const char* name : {"linear", "embedding", "rms_norm", "int8_qkv", "int8_attention", "int4_ffn"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
}
