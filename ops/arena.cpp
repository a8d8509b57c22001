// One block of huge pages for the packed weights of a model, in the order in which they are read; and a mark for those
// that stay where they are.
#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <memory>

#include "mapped.h"
#include "pages.h"

namespace unicorn {

class Arena : public torch::CustomClassHolder {
 public:
  // Room for tensors of these sizes in bytes, together. Memory is taken as tensors are placed.
  explicit Arena(const std::vector<int64_t>& sizes) {
    for (const int64_t size : sizes) bytes_ += aligned(size);
    pages_ = std::make_shared<Pages>(bytes_);
  }

  // A copy of t, contiguous, with a storage of its own; the block lives as long as any of its tensors.
  at::Tensor place(const at::Tensor& t) {
    TORCH_CHECK(t.device().is_cpu(), "arena: got a tensor on ", t.device(), ", expected one on the CPU");
    const int64_t size = static_cast<int64_t>(t.nbytes());
    TORCH_CHECK(used_ + aligned(size) <= bytes_, "arena: no room for ", size, " bytes");
    c10::DataPtr memory(pages_->data() + used_, new std::shared_ptr<Pages>(pages_), &release, at::kCPU);
    used_ += aligned(size);
    const c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(memory), nullptr, false);
    at::Tensor copy = at::empty({0}, t.options()).set_(storage, 0, t.sizes());
    copy.copy_(t);
    return copy;
  }

  static bool holds(const at::Tensor& t) { return t.storage().data_ptr().get_deleter() == &release; }

  // The memory of t, a part of a mapped file, under a mark. It lives as long as the result. passing: RAM has no room to
  // keep it cached from one use to the next.
  static at::Tensor leave(const at::Tensor& t, bool passing) {
    TORCH_CHECK(t.device().is_cpu() && t.is_contiguous(), "arena: got a tensor that is not dense on the CPU");
    c10::DataPtr memory(t.mutable_data_ptr(), new Left{t, passing}, &let_go, at::kCPU);
    const auto size = static_cast<int64_t>(t.nbytes());
    const c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(memory), nullptr, false);
    return at::empty({0}, t.options()).set_(storage, 0, t.sizes());
  }

  static bool left(const at::Tensor& t) { return t.storage().data_ptr().get_deleter() == &let_go; }

  static InFile in_file(const at::Tensor& t) {
    if (!left(t)) return InFile::no;
    return static_cast<const Left*>(t.storage().data_ptr().get_context())->passing ? InFile::passing : InFile::cached;
  }

 private:
  struct Left {
    at::Tensor tensor;
    bool passing;
  };
  static void let_go(void* left) { delete static_cast<Left*>(left); }
  static int64_t aligned(int64_t size) { return (size + 4095) / 4096 * 4096; }  // no two tensors in one page
  static void release(void* pages) { delete static_cast<std::shared_ptr<Pages>*>(pages); }

  int64_t bytes_ = 0, used_ = 0;
  std::shared_ptr<Pages> pages_;
};

InFile in_file(const at::Tensor& t) { return Arena::in_file(t); }

}  // namespace unicorn

TORCH_LIBRARY_FRAGMENT(unicorn, m) {
  m.class_<unicorn::Arena>("Arena")
      .def(torch::init<std::vector<int64_t>>())
      .def("place", &unicorn::Arena::place)
      .def_static("holds", &unicorn::Arena::holds)
      .def_static("leave", &unicorn::Arena::leave)
      .def_static("left", &unicorn::Arena::left);
}
