// Softmax attention over a KV cache: raw-pointer interface, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unicorn {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // i8: of K and V only
enum class MaskKind : int { none = 0, boolean = 1, f32 = 2, bf16 = 3, f16 = 4 };

// out[b, t, h, :] = softmax(softcap(scale * q k^T) + mask) v, fp32 inside.
// Strides are in elements; the last dimension of q, k and v is dense. With i8 a row of k or v is D int8 and then their
// scale in fp32 (not aligned), and q is fp32.
struct AttentionArgs {
  const void* q;        // [B, H, T, D]
  const void* k;        // [B, Hkv, S, D]
  const void* v;        // [B, Hkv, S, Dv]
  DType dtype;          // of q, k and v
  int64_t q_stride[3];  // over b, h, t
  int64_t k_stride[3];  // over b, h, s
  int64_t v_stride[3];  // over b, h, s
  const void* mask;     // broadcast to [B, H, T, S]; boolean: true = attend; float: added
  MaskKind mask_kind;
  int64_t mask_stride[4];  // over b, h, t, s; 0 where it broadcasts
  bool causal;             // query t sees keys s <= t + (S - T)
  float scale;
  float softcap;  // 0 = off
  int64_t B, H, Hkv, T, S, D, Dv;
  float* out;       // [B, T, H, Dv], contiguous
  void* workspace;  // at least attention_workspace_bytes(args), 64-byte aligned
  int threads;
};

size_t attention_workspace_bytes(const AttentionArgs& args);
void attention(const AttentionArgs& args);

}  // namespace unicorn
