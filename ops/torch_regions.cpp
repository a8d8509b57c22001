// The regions with packed weights: from tensors to the structures of kernels.h, and memory for results.
#include "torch_regions.h"

#include <ATen/Parallel.h>

namespace unicorn {

namespace {

// K and V as int8 rows (quantize_rows), which carry their scale.
bool packed_rows(const Tensor& t) { return t.scalar_type() == at::kChar; }

Workspace& attention_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

void set_mask(AttentionArgs& args, Tensor& mask) {
  if (mask.scalar_type() == at::kDouble) mask = mask.to(at::kFloat);
  TORCH_CHECK(mask.device().is_cpu(), "unicorn::int8_attention: mask: got device ", mask.device());
  if (mask.scalar_type() == at::kBool) {
    args.mask_kind = MaskKind::boolean;
  } else {
    const DType type = dtype_of(mask, "int8_attention", "mask (or bool)");
    args.mask_kind = type == DType::f32 ? MaskKind::f32 : type == DType::bf16 ? MaskKind::bf16 : MaskKind::f16;
  }
  const int64_t sizes[4] = {args.B, args.H, args.T, args.S};
  const int64_t missing = 4 - mask.dim();
  TORCH_CHECK(missing >= 0, "unicorn::int8_attention: mask: got shape ", mask.sizes(), ", expected at most four dims");
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = i < missing ? 1 : mask.size(i - missing);
    TORCH_CHECK(size == sizes[i] || size == 1, "unicorn::int8_attention: mask: got shape ", mask.sizes(),
                ", expected one that broadcasts to ", at::IntArrayRef(sizes));
    args.mask_stride[i] = size == 1 ? 0 : mask.stride(i - missing);
  }
  args.mask = mask.const_data_ptr();
}

void attend(Tensor q, Tensor k, Tensor v, OptionalTensor mask, bool causal, double scale, double softcap, Tensor& out) {
  AttentionArgs args{};
  args.dtype = packed_rows(k) ? DType::i8 : dtype_of(q, "int8_attention", "q");
  if (packed_rows(k)) q = q.to(at::kFloat);
  int64_t* strides[3] = {args.q_stride, args.k_stride, args.v_stride};
  Tensor* tensors[3] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    Tensor& t = *tensors[i];
    if (t.stride(3) != 1) t = t.contiguous();
    for (int d = 0; d < 3; ++d) strides[i][d] = t.stride(d);
  }
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.B = q.size(0), args.H = q.size(1), args.T = q.size(2), args.D = q.size(3);
  args.Hkv = k.size(1), args.S = k.size(2), args.Dv = row_width(v);
  if (mask) set_mask(args, *mask);
  args.causal = causal;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.out = out.mutable_data_ptr<float>();
  args.threads = threads();
  args.workspace = attention_workspace().reserve(attention_workspace_bytes(args));
  attention(args);
}

void check_rotary(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin, int64_t head_dim) {
  const char* op = "unicorn::int8_qkv: ";
  TORCH_CHECK(x.dim() == 3, op, "x: got shape ", x.sizes(), ", expected [B, T, K]");
  TORCH_CHECK(cos.has_value() == sin.has_value(), op, "cos and sin: give both or none");
  if (!cos) return;
  for (const Tensor& t : {*cos, *sin}) {
    TORCH_CHECK(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == x.size(0)) && t.size(1) == x.size(1) &&
                    t.size(2) <= head_dim && t.size(2) % 2 == 0 && t.sizes() == cos->sizes(),
                op, "cos/sin: got shape ", t.sizes(), ", expected [1 or ", x.size(0), ", ", x.size(1),
                ", an even number up to ", head_dim, "]");
  }
}

}  // namespace

Workspace& workspace() {
  thread_local Workspace workspace;
  return workspace;
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

std::vector<int64_t> with_last(const Tensor& x, int64_t n) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  return shape;
}

Tensor Result::take(at::IntArrayRef sizes, const at::TensorOptions& options, int64_t rows) const {
  constexpr int64_t kFewRows = 8;
  if (rows > kFewRows) return at::empty(sizes, options);
  const caffe2::TypeMeta dtype = options.dtype();
  const size_t bytes = c10::multiply_integers(sizes) * dtype.itemsize();
  // Whoever moved or resized the storage may have given it away.
  if (storage_ && storage_.use_count() == 1 && storage_.nbytes() == bytes && storage_.data() == data_) {
    Tensor again = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage_),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
    again.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    return again;
  }
  Tensor result = at::empty(sizes, options);
  storage_ = result.storage();
  data_ = storage_.data();
  return result;
}

LinearRegion::LinearRegion(int64_t width, TensorList w, const OptionalTensor& bias, int64_t n)
    : arguments_("linear"),
      w_(arguments_.weight(w, n, width, "w")),
      bias_(arguments_.array(bias, "bias", n)),
      width_(width),
      n_(n) {}

Tensor LinearRegion::operator()(const Tensor& x) const {
  Arguments kept("linear");
  const Rows rows = kept.rows(x, width_);
  Tensor y = result_.take(with_last(x, n_), x.options(), rows.rows);
  run_linear(rows, {}, w_, bias_, {}, out_of(y), workspace(), threads());
  return y;
}

QkvRegion::QkvRegion(int64_t width, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
                     TensorList wq, TensorList wk, TensorList wv, TensorList bias, const OptionalTensor& q_norm_w,
                     const OptionalTensor& k_norm_w, const OptionalFloat& qk_norm_eps, double qk_norm_offset,
                     int64_t heads, int64_t kv_heads, int64_t head_dim, bool interleaved, bool v_norm)
    : arguments_("int8_qkv"), width_(width) {
  TORCH_CHECK(heads > 0 && kv_heads > 0 && head_dim > 0,
              "unicorn::int8_qkv: heads, kv_heads and head_dim must be positive, got ", heads, ", ", kv_heads, ", ",
              head_dim);
  args_.head_dim = head_dim;
  args_.interleaved = interleaved;
  const auto b = arguments_.biases(bias);
  const TensorList weights[3] = {wq, wk, wv};
  const OptionalTensor norms[3] = {q_norm_w, k_norm_w, {}};
  const OptionalFloat eps[3] = {qk_norm_eps, qk_norm_eps, v_norm ? qk_norm_eps : OptionalFloat{}};
  const char* const weight_names[3] = {"wq", "wk", "wv"};
  const char* const norm_names[3] = {"q_norm_w", "k_norm_w", ""};
  args_.norm = arguments_.norm(norm_w, norm_eps, norm_offset, width, "norm_w");
  for (int i = 0; i < 3; ++i) {
    Projection& p = args_.part[i];
    p.heads = i == 0 ? heads : kv_heads;
    p.rotate = i < 2;
    p.norm = arguments_.norm(norms[i], eps[i], qk_norm_offset, head_dim, norm_names[i]);
    if (wq.empty()) continue;
    p.w = arguments_.weight(weights[i], p.heads * head_dim, width, weight_names[i]);
    p.bias = arguments_.array(b[i], "bias", p.heads * head_dim);
  }
}

QkvArgs QkvRegion::begin(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin, Tensor (&out)[3],
                         Arguments& kept) const {
  check_rotary(x, cos, sin, args_.head_dim);
  QkvArgs args = args_;
  args.x = kept.rows(x, width_);
  args.B = x.size(0);
  args.T = x.size(1);
  args.shared_cos = cos && cos->size(0) == 1;
  if (cos) {
    args.rotary_dim = cos->size(2);
    args.cos = kept.array(*cos, "cos");
    args.sin = kept.array(*sin, "sin");
  }
  for (int i = 0; i < 3; ++i) {
    out[i] = results_[i].take({args.B, args.part[i].heads, args.T, args.head_dim}, x.options(), args.x.rows);
    args.part[i].out = out_of(out[i]);
  }
  return args;
}

std::tuple<Tensor, Tensor, Tensor> QkvRegion::operator()(const Tensor& x, const OptionalTensor& cos,
                                                         const OptionalTensor& sin) const {
  Arguments kept("int8_qkv");
  Tensor out[3];
  run_qkv(begin(x, cos, sin, out, kept), workspace(), threads());
  return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
}

AttentionRegion::AttentionRegion(int64_t width, bool causal, double scale, double softcap, TensorList wo,
                                 const OptionalTensor& bo, int64_t n, const OptionalTensor& post_w,
                                 const OptionalFloat& post_eps, double post_offset)
    : arguments_("int8_attention"),
      w_(arguments_.weight(wo, n, width, "wo")),
      bias_(arguments_.array(bo, "bo", n)),
      post_(arguments_.norm(post_w, post_eps, post_offset, n, "post_w")),
      causal_(causal),
      scale_(scale),
      softcap_(softcap),
      width_(width),
      n_(n) {}

Tensor AttentionRegion::operator()(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                   const OptionalTensor& residual) const {
  const Tensor joined = attended(q, k, v, mask, causal_, scale_, softcap_, joined_);
  Arguments kept("int8_attention");
  const Rows rows = kept.rows(joined, width_);
  Tensor out = result_.take({q.size(0), q.size(2), n_}, q.options(), rows.rows);
  run_linear(rows, {}, w_, bias_, {post_, kept.array(residual, "residual", rows.rows * n_)}, out_of(out), workspace(),
             threads());
  return out;
}

FfnRegion::FfnRegion(int64_t width, const OptionalTensor& norm_w, const OptionalFloat& norm_eps, double norm_offset,
                     TensorList wg, TensorList wu, TensorList wd, TensorList bias, Act act, int64_t f, int64_t n,
                     const OptionalTensor& post_w, const OptionalFloat& post_eps, double post_offset,
                     const OptionalFloat& cutoff)
    : arguments_("int4_ffn"), width_(width) {
  TORCH_CHECK(!cutoff || f % kRows == 0, "unicorn::sparse_ffn: f: got ", f, ", expected a multiple of ", kRows);
  const auto b = arguments_.biases(bias);
  args_.norm = arguments_.norm(norm_w, norm_eps, norm_offset, width, "norm_w");
  args_.gate = arguments_.weight(wg, f, width, "wg");
  args_.up = arguments_.weight(wu, f, width, "wu");
  args_.down = arguments_.weight(wd, n, f, "wd");
  args_.gate_bias = arguments_.array(b[0], "bias[0]", f);
  args_.up_bias = arguments_.array(b[1], "bias[1]", f);
  args_.down_bias = arguments_.array(b[2], "bias[2]", n);
  args_.act = act;
  args_.post.norm = arguments_.norm(post_w, post_eps, post_offset, n, "post_w");
  args_.cut = cutoff.has_value();
  args_.cutoff = static_cast<float>(cutoff.value_or(0.0));
}

Tensor FfnRegion::operator()(const Tensor& x, const OptionalTensor& residual) const {
  Arguments kept("int4_ffn");
  FfnArgs args = args_;
  args.x = kept.rows(x, width_);
  args.post.residual = kept.array(residual, "residual", args.x.rows * args.down.n);
  Tensor out = result_.take(with_last(x, args.down.n), x.options(), args.x.rows);
  args.out = out_of(out);
  run_ffn(args, workspace(), threads());
  return out;
}

int64_t row_width(const Tensor& t) { return t.size(3) - (packed_rows(t) ? kRowScale : 0); }

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  const char* op = "unicorn::int8_attention: ";
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, "q, k, v: got shapes ", q.sizes(), ", ", k.sizes(),
              ", ", v.sizes(), ", expected four dims each");
  dtype_of(q, "int8_attention", "q");
  TORCH_CHECK(v.scalar_type() == k.scalar_type() && (packed_rows(k) || k.scalar_type() == q.scalar_type()), op,
              "q, k, v: got dtypes ", q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type(),
              ", expected three equal ones, or k and v from unicorn::quantize_rows");
  TORCH_CHECK(k.device().is_cpu() && v.device().is_cpu(), op, "k and v must be on the CPU");
  TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && row_width(k) == q.size(3) && v.size(1) == k.size(1) &&
                  v.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              op, "q, k, v: shapes do not match: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
}

Tensor attended(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                double scale, double softcap, const Result& memory) {
  check_attention(q, k, v);
  Tensor joined = memory.take({q.size(0), q.size(2), q.size(1) * row_width(v)}, q.options().dtype(at::kFloat),
                              q.size(0) * q.size(2));
  attend(q, k, v, mask, causal, scale, softcap, joined);
  return joined;
}

}  // namespace unicorn
