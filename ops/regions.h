// The fused ops without torch: which thread does what in which order, on raw pointers.
// Work is split over rows of the weight or over tokens, never over K: the bits do not depend on the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "matmul.h"

namespace unicorn {

// Grow-only scratch memory of one calling thread: no allocation once it has seen the largest call.
class Arena {
 public:
  void reset() { block_ = used_ = 0; }
  void* bytes(size_t count);  // 64-byte aligned, valid until reset
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(size_t(count) * sizeof(T)));
  }
  ~Arena();

 private:
  static constexpr int kBlocks = 64;
  struct Block {
    char* data;
    size_t size;
  } blocks_[kBlocks] = {};
  int block_ = 0;
  size_t used_ = 0;
};

// A dense run of floats of any type; data may be null.
struct Floats {
  const void* data = nullptr;
  DType type = DType::f32;
};

// RMS norm; off by default. weight [k] may be null.
struct Norm {
  bool on = false;
  Floats weight;
  float eps = 0, offset = 0;
};

// What ends a block: + bias, norm, + residual, rounded once into `out` [tokens, n].
struct Finish {
  Floats bias;
  Norm norm;
  Floats residual;
  void* out;
  DType type;
};

struct LinearArgs {
  Floats x;  // [tokens, k]
  int64_t tokens, k;
  Norm norm;  // of x
  Weight w;
  Finish finish;
};
void linear(const LinearArgs& args, Arena& arena, int threads);

struct FfnArgs {
  Floats x;  // [tokens, k]
  int64_t tokens, k;
  Norm norm;
  Weight gate, up, down;
  Floats gate_bias, up_bias;
  Activation act;
  Finish finish;
};
void ffn(const FfnArgs& args, Arena& arena, int threads);

struct QkvArgs {
  Floats x;  // [B, T, k]
  int64_t B, T, k;
  Norm norm;
  Weight w[3];
  Floats bias[3];
  Norm head_norm[3];  // of q and k
  int64_t heads[3], head_dim;
  Floats cos, sin;       // [B or 1, T, head_dim] or null
  bool cos_shared;       // one table for all of the batch
  void* out[3];          // [B, heads, T, head_dim]
};
void qkv(const QkvArgs& args, Arena& arena, int threads);

void rms_norm(Floats x, int64_t tokens, int64_t k, const Norm& norm, void* out, Arena& arena, int threads);
void embedding(const int64_t* ids, int64_t count, const Weight& table, int64_t k, DType type, void* out, Arena& arena,
               int threads);

}  // namespace unicorn
