// What the attention translation units share: block sizes and the layout of the workspace.
// Anonymous namespace: each unit is compiled for its own instruction set, and the linker must not
// replace one unit's copy of a function by another's.
#pragma once

#include "attention.h"

namespace unicorn {
void attention_run_avx512bf16(const AttentionArgs& args);
void attention_run_avx512(const AttentionArgs& args);
void attention_run_avx2(const AttentionArgs& args);
void attention_run_portable(const AttentionArgs& args);
}  // namespace unicorn

namespace {

using unicorn::AttentionArgs;
using unicorn::DType;
using unicorn::MaskKind;

constexpr int64_t kAlign = 16;      // floats: every buffer starts on a cache line
constexpr int64_t kPanel = 64;      // widest panel of any instruction set, in floats
constexpr int64_t kTileRows = 6;    // query rows per prefill tile
constexpr int64_t kKeyBlock = 128;  // keys per prefill block: packed K and V stay in L2
constexpr int64_t kRowBlock = 120;  // query rows per prefill task: packing K and V is ~3 % of its work
constexpr int64_t kMinRows = 24;
constexpr int64_t kDecodeT = 8;     // up to this many queries, and
constexpr int64_t kDecodeMax = 32;  // this many rows per K/V head, K and V are split over blocks of keys
constexpr int64_t kDecodeBlock = 256;
constexpr int64_t kDecodeMinBlock = 64;
constexpr int64_t kDecodeBlocks = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How a call is cut up. Only `rows` depends on the number of threads: no sum crosses query rows.
struct Plan {
  int64_t group, rows_total;  // query heads per K/V head; rows r = t * group + head in group
  int64_t dq, dv;             // padded widths
  bool decode;
  int64_t rows, blocks, block;  // rows per task; decode: number and length of blocks of keys
  int64_t most_blocks;          // decode: of any sequence of the batch; fewer keys may be cut into more blocks
  int64_t shared, scratch;      // floats: decode partial results; per thread
};

// Keys per block of a decode call that sees so many.
int64_t decode_block(int64_t keys) {
  const int64_t block = round_up(ceil_div(keys, kDecodeBlocks), kDecodeMinBlock);
  return block > kDecodeBlock ? kDecodeBlock : block < kDecodeMinBlock ? kDecodeMinBlock : block;
}

Plan make_plan(const AttentionArgs& a) {
  Plan p{};
  p.group = a.H / (a.Hkv ? a.Hkv : 1);
  p.rows_total = a.T * p.group;
  p.dq = round_up(a.D, kAlign);
  p.dv = round_up(a.Dv, kPanel);
  p.decode = a.T <= kDecodeT && p.rows_total <= kDecodeMax;
  if (p.decode) {
    p.rows = p.rows_total;
    p.block = decode_block(a.S);
    p.blocks = ceil_div(a.S, p.block);
    const int64_t shortest = ceil_div(a.S, kDecodeMinBlock);
    p.most_blocks = shortest < kDecodeBlocks ? shortest : p.blocks > kDecodeBlocks ? p.blocks : kDecodeBlocks;
    p.shared = a.B * a.Hkv * p.most_blocks * p.rows * (p.dv + kAlign);
    p.scratch = p.rows * (p.dq + p.block + 6 * kAlign) + p.block;
  } else {
    // About four tasks per thread, so that causal rows balance.
    p.rows = ceil_div(a.B * a.Hkv * p.rows_total, 4 * (a.threads > 0 ? a.threads : 1));
    p.rows = p.rows < kMinRows ? kMinRows : p.rows > kRowBlock ? kRowBlock : round_up(p.rows, kTileRows);
    const int64_t state = 10 * round_up(p.rows, kAlign);
    p.scratch = p.rows * (p.dq + p.dv + kKeyBlock) + kKeyBlock * (p.dq + p.dv) + state + kKeyBlock;
  }
  p.scratch = round_up(p.scratch, kAlign);
  return p;
}

}  // namespace
