// The rows of a KV cache, [B, H, S, D]: see unicorn_backend/ops.py.
#pragma once

#include <ATen/ATen.h>

namespace unicorn {

using at::Tensor;

Tensor append_rows(const Tensor& past, const Tensor& rows, int64_t filled, int64_t keep);
Tensor last_rows(const Tensor& x, int64_t count);

}  // namespace unicorn
