// Sizes of the packed layouts (byte diagrams: unicorn_backend/ops.py). Constants only: this file is
// compiled for several instruction sets, and a shared inline function could be linked from the wrong one.
#pragma once

#include <cstdint>

namespace unicorn {

constexpr int64_t kRows = 16;           // rows of a weight tile, one int32 lane each
constexpr int64_t kGroup = 32;          // k per group: one scale of activations
constexpr int64_t kRowScale = 4;        // bytes of the scale after an int8 row of K or V
constexpr int64_t kBlock = 16;          // tokens of an activation block
constexpr int64_t kW4GroupBytes = 256;  // 16 rows x 32 nibbles
constexpr int64_t kW8GroupBytes = 512;
constexpr int64_t kFiveBytes = 320;  // 5 and 1 bits of such a group
constexpr int64_t kSixthBytes = 64;
constexpr int64_t kSuper = 8;  // groups that share the fp16 scales of a k-quant

}  // namespace unicorn
