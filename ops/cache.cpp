// Rows of a KV cache that grow in place, and the updates of sliding windows.
//
// A cache tensor [B, H, S, D] made here is a view of a buffer with room for more rows, so that appending a token
// copies a token, not the cache. To torch it is an ordinary tensor with a storage of its own that starts at its
// first row. Nothing is ever written to a row that some tensor shows, so the ops are pure functions: appending
// twice to the same past gives two independent results (the second one copies).
#include "cache.h"

#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>

#include "layouts.h"
#include "pages.h"

namespace unicorn {

namespace {

// Huge pages are cleared when they are touched first: below this size that costs more than it brings.
constexpr int64_t kHugeFrom = int64_t(8) << 20;

struct Buffer {
  Buffer(int64_t rows, int64_t lanes, int64_t row_bytes) : capacity(rows) {
    const int64_t bytes = (rows * lanes * row_bytes + 63) / 64 * 64;
    if (bytes >= kHugeFrom) {
      pages.emplace(bytes);
      data = pages->data();
    } else {
      small.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      if (bytes > 0 && small == nullptr) throw std::bad_alloc();
      data = small.get();
    }
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  std::optional<Pages> pages;
  std::unique_ptr<char, Free> small;
  char* data;
  int64_t capacity;             // rows per head
  std::atomic<int64_t> end{0};  // rows written so far
};

// What keeps the memory of one tensor alive.
struct View {
  std::shared_ptr<Buffer> buffer;
  int64_t first;  // row of the buffer
};

void drop_view(void* view) { delete static_cast<View*>(view); }

struct Shape {
  int64_t batch, heads, width, row_bytes;

  explicit Shape(const Tensor& t)
      : batch(t.size(0)), heads(t.size(1)), width(t.size(3)), row_bytes(t.size(3) * t.element_size()) {}
  int64_t lanes() const { return batch * heads; }
};

// Rows [first, first + count) of a buffer as a tensor.
Tensor show(const std::shared_ptr<Buffer>& buffer, const Shape& shape, int64_t first, int64_t count,
            caffe2::TypeMeta dtype) {
  char* start = buffer->data + first * shape.row_bytes;
  const int64_t bytes = (shape.lanes() * buffer->capacity - first) * shape.row_bytes;
  c10::DataPtr memory(start, new View{buffer, first}, &drop_view, at::kCPU);
  const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(memory), nullptr, false);
  // One head of one sequence is dense: then its strides follow from its shape, and are nothing to guard on.
  const int64_t head = (shape.lanes() == 1 ? count : buffer->capacity) * shape.width;
  // Made directly: through the dispatcher (empty, then set_) it costs 3 us, four times per layer and token.
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  const int64_t sizes[4] = {shape.batch, shape.heads, count, shape.width};
  const int64_t strides[4] = {shape.heads * head, head, shape.width, 1};
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(sizes), at::IntArrayRef(strides));
  return tensor;
}

// The buffer behind a tensor that `show` made (or a slice of rows of one), and its first row there.
struct Place {
  std::shared_ptr<Buffer> buffer;
  int64_t first = 0;

  explicit Place(const Tensor& t) {
    const c10::DataPtr& memory = t.storage().data_ptr();
    if (memory.get_deleter() != &drop_view) return;
    const auto* view = static_cast<const View*>(memory.get_context());
    const int64_t head = view->buffer->capacity * t.size(3);
    const bool same = t.stride(3) == 1 && t.stride(2) == t.size(3) && (t.size(1) == 1 || t.stride(1) == head) &&
                      (t.size(0) == 1 || t.stride(0) == head * t.size(1)) && t.storage_offset() % t.size(3) == 0;
    if (!same) return;
    first = view->first + t.storage_offset() / t.size(3);
    if (first + t.size(2) <= view->buffer->capacity) buffer = view->buffer;  // else it begins in another lane
  }
};

// Copies rows [from, from + count) of t to row `to` of the buffer.
void copy_rows(const Tensor& t, int64_t from, int64_t count, Buffer& buffer, int64_t to) {
  const Shape shape(t);
  if (count == 0) return;
  const int64_t size = t.element_size();
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const auto* source = static_cast<const char*>(t.const_data_ptr()) +
                           (b * t.stride(0) + h * t.stride(1) + from * t.stride(2)) * size;
      char* target = buffer.data + ((b * shape.heads + h) * buffer.capacity + to) * shape.row_bytes;
      if (t.stride(2) == shape.width) {
        std::memcpy(target, source, count * shape.row_bytes);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(target + i * shape.row_bytes, source + i * t.stride(2) * size, shape.row_bytes);
      }
    }
  }
}

// Room for a quarter more rows: copying then costs four rows per appended one, at most.
int64_t roomy(int64_t rows) { return rows + (rows / 4 > 64 ? rows / 4 : 64); }

Tensor dense_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous(); }

// True if rows [end, end + more) may be written: nobody has appended to this past before, or nobody else holds
// what was appended.
bool claim(Buffer& buffer, int64_t end, int64_t more, bool only_holder) {
  if (end + more > buffer.capacity) return false;
  int64_t expected = end;
  if (buffer.end.compare_exchange_strong(expected, end + more)) return true;
  if (!only_holder) return false;
  buffer.end = end + more;
  return true;
}

void check(const char* op, const Tensor& t) {
  TORCH_CHECK(t.dim() == 4 && t.device().is_cpu(), "unicorn::", op, ": got shape ", t.sizes(), " on ", t.device(),
              ", expected [B, H, S, D] on the CPU");
}

}  // namespace

Tensor append_rows(const Tensor& past, const Tensor& rows, int64_t filled, int64_t keep) {
  check("append_rows", past);
  check("append_rows", rows);
  TORCH_CHECK(past.scalar_type() == rows.scalar_type() && past.size(0) == rows.size(0) &&
                  past.size(1) == rows.size(1) && past.size(3) == rows.size(3),
              "unicorn::append_rows: got ", past.sizes(), " ", past.scalar_type(), " and ", rows.sizes(), " ",
              rows.scalar_type(), ", they must agree but for the number of rows");
  TORCH_CHECK(filled >= 0 && filled <= past.size(2) && keep >= 0, "unicorn::append_rows: got filled ", filled,
              " and keep ", keep, " for ", past.size(2), " rows");
  const Shape shape(past);
  const int64_t more = rows.size(2), kept = filled < keep ? filled : keep;
  const Tensor source = dense_rows(rows);
  if (Place place(past); place.buffer != nullptr && more > 0) {
    const bool only_holder = place.buffer.use_count() == 2;  // the storage of `past`, and `place`
    const int64_t end = place.first + filled;
    if (claim(*place.buffer, end, more, only_holder)) {
      copy_rows(source, 0, more, *place.buffer, end);
      return show(place.buffer, shape, end - kept, kept + more, past.dtype());
    }
  }
  const auto buffer = std::make_shared<Buffer>(roomy(kept + more), shape.lanes(), shape.row_bytes);
  copy_rows(dense_rows(past), filled - kept, kept, *buffer, 0);
  copy_rows(source, 0, more, *buffer, kept);
  buffer->end = kept + more;
  return show(buffer, shape, 0, kept + more, past.dtype());
}

Tensor last_rows(const Tensor& x, int64_t count) {
  check("last_rows", x);
  const Shape shape(x);
  const int64_t kept = x.size(2) < count ? x.size(2) : count, skipped = x.size(2) - kept;
  if (const Place place(x); place.buffer != nullptr) {
    return show(place.buffer, shape, place.first + skipped, kept, x.dtype());
  }
  const auto buffer = std::make_shared<Buffer>(roomy(kept), shape.lanes(), shape.row_bytes);
  copy_rows(dense_rows(x), skipped, kept, *buffer, 0);
  buffer->end = kept;
  return show(buffer, shape, 0, kept, x.dtype());
}

namespace {

// Rows as int8 and one fp32 scale, which stands in the last four bytes of a row.

Tensor quantize_rows(const Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.dim() == 4 && x.device().is_cpu() && x.size(3) > 0 &&
                  (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "unicorn::quantize_rows: got ", x.sizes(), " ", type, " on ", x.device(),
              ", expected [B, H, T, D] of bfloat16, float16 or float32 on the CPU");
  const Tensor rows = x.to(at::kFloat).contiguous();
  const int64_t width = x.size(3), count = rows.numel() / width;
  Tensor out = at::empty({x.size(0), x.size(1), x.size(2), width + kRowScale}, x.options().dtype(at::kChar));
  const float* from = rows.const_data_ptr<float>();
  int8_t* to = out.mutable_data_ptr<int8_t>();
  for (int64_t row = 0; row < count; ++row, from += width, to += width + kRowScale) {
    uint32_t most = 0;  // of the bits without their sign: a NaN counts as largest
    for (int64_t i = 0; i < width; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    const bool finite = most < 0x7f800000, some = largest >= 1e-36f;  // below, 127 / largest would overflow
    const float scale = finite && !some ? 0.0f : largest / 127.0f, inverse = finite && some ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < width; ++i) {
      const float y = from[i] * inverse;
      to[i] = finite ? static_cast<int8_t>(static_cast<int32_t>((y + 12582912.0f) - 12582912.0f)) : int8_t(0);
    }
    std::memcpy(to + width, &scale, sizeof(scale));
  }
  return out;
}

Tensor dequantize_rows(const Tensor& rows, at::ScalarType dtype) {
  TORCH_CHECK(rows.dim() == 4 && rows.scalar_type() == at::kChar && rows.size(3) > kRowScale && rows.device().is_cpu(),
              "unicorn::dequantize_rows: got ", rows.sizes(), " ", rows.scalar_type(), " on ", rows.device(),
              ", expected what unicorn::quantize_rows gave");
  const Tensor values = rows.narrow(3, 0, rows.size(3) - kRowScale).to(at::kFloat);
  const Tensor scales = rows.narrow(3, rows.size(3) - kRowScale, kRowScale).contiguous().view(at::kFloat);
  return (values * scales).to(dtype);
}

// The windows of static caches: [B, H, L, D], contiguous, rows in the order of the tokens.

void check_window(const char* op, const Tensor& cache, const Tensor& rows) {
  check(op, cache);
  check(op, rows);
  TORCH_CHECK(cache.is_contiguous() && cache.scalar_type() == rows.scalar_type() && cache.size(0) == rows.size(0) &&
                  cache.size(1) == rows.size(1) && cache.size(3) == rows.size(3),
              "unicorn::", op, ": got a cache ", cache.sizes(), " and rows ", rows.sizes());
}

void push_window_(Tensor& cache, const Tensor& row, int64_t seen) {
  check_window("push_window_", cache, row);
  const Shape shape(cache);
  const int64_t length = cache.size(2), at = seen < length - 1 ? seen : length - 1;
  const Tensor source = row.contiguous();
  auto* data = static_cast<char*>(cache.mutable_data_ptr());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  for (int64_t lane = 0; lane < shape.lanes(); ++lane, data += length * shape.row_bytes, from += shape.row_bytes) {
    if (seen >= length) std::memmove(data, data + shape.row_bytes, (length - 1) * shape.row_bytes);
    std::memcpy(data + at * shape.row_bytes, from, shape.row_bytes);
  }
}

void set_window_(Tensor& cache, const Tensor& full) {
  check_window("set_window_", cache, full);
  const int64_t rows = full.size(2) < cache.size(2) ? full.size(2) : cache.size(2);
  cache.narrow(2, 0, rows).copy_(full.narrow(2, full.size(2) - rows, rows));
}

}  // namespace

}  // namespace unicorn

TORCH_LIBRARY_IMPL(unicorn, CPU, m) {
  m.impl("append_rows", &unicorn::append_rows);
  m.impl("quantize_rows", &unicorn::quantize_rows);
  m.impl("dequantize_rows", &unicorn::dequantize_rows);
  m.impl("last_rows", &unicorn::last_rows);
  m.impl("push_window_", &unicorn::push_window_);
  m.impl("set_window_", &unicorn::set_window_);
}
