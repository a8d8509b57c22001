// C interface over libxrt for ctypes: no Python headers, so one build serves every interpreter, and every call
// releases its lock. Pointers are owned by the caller; a null pointer or nonzero code comes with a message.
//
//   g++ -std=c++17 -O2 -shared -fPIC kernels/xrt/wrapper.cpp -lxrt_coreutil -o libunicorn_xrt.so
#include <xrt/experimental/xrt_kernel.h>
#include <xrt/experimental/xrt_xclbin.h>
#include <xrt/xrt_bo.h>
#include <xrt/xrt_device.h>
#include <xrt/xrt_hw_context.h>
#include <xrt/xrt_kernel.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

constexpr int kFirstBuffer = 3;      // after opcode, control code and its number of words
constexpr uint64_t kRunControl = 3;  // opcode

thread_local std::string message;

template <class F>
auto guarded(F f, decltype(f()) failed) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& error) {
    message = error.what();
    return failed;
  }
}

struct Device {
  xrt::device device;
  std::string name;
};

struct Context {
  xrt::device device;
  xrt::hw_context context;
  xrt::kernel kernel;
  xrt::bo control;
  uint32_t words;
  int arguments;
};

struct Launch {
  xrt::run run;
  int arguments;
};

xrt::xclbin::kernel find_kernel(const xrt::xclbin& image) {
  for (const auto& kernel : image.get_kernels())
    if (kernel.get_name().rfind("MLIR_AIE", 0) == 0) return kernel;
  throw std::runtime_error("the xclbin has no kernel MLIR_AIE");
}

}  // namespace

extern "C" {

const char* unicorn_xrt_error() { return message.c_str(); }

Device* unicorn_xrt_open(int index) {
  return guarded(
      [&] {
        xrt::device device(static_cast<unsigned>(index));
        return new Device{device, device.get_info<xrt::info::device::name>()};
      },
      nullptr);
}
void unicorn_xrt_close(Device* device) { delete device; }
const char* unicorn_xrt_name(const Device* device) { return device->name.c_str(); }

Context* unicorn_xrt_context(Device* device, const char* path, const char* control, size_t bytes) {
  return guarded(
      [&] {
        const xrt::xclbin image{std::string(path)};
        const auto found = find_kernel(image);
        const auto id = device->device.register_xclbin(image);
        const xrt::hw_context context(device->device, id);
        const xrt::kernel kernel(context, found.get_name());
        xrt::bo code(device->device, bytes, xrt::bo::flags::cacheable, kernel.group_id(1));
        std::memcpy(code.map<void*>(), control, bytes);
        code.sync(XCL_BO_SYNC_BO_TO_DEVICE);
        return new Context{device->device, context, kernel, code, uint32_t(bytes / 4), int(found.get_num_args())};
      },
      nullptr);
}
void unicorn_xrt_context_free(Context* context) { delete context; }

xrt::bo* unicorn_xrt_buffer(Context* context, int index, size_t bytes) {
  return guarded(
      [&] {
        const auto group = context->kernel.group_id(kFirstBuffer + index);
        return new xrt::bo(context->device, bytes, xrt::bo::flags::host_only, group);
      },
      nullptr);
}
void unicorn_xrt_buffer_free(xrt::bo* buffer) { delete buffer; }
void* unicorn_xrt_map(xrt::bo* buffer) {
  return guarded([&] { return buffer->map<void*>(); }, nullptr);
}
int unicorn_xrt_sync(xrt::bo* buffer, int to_device) {
  return guarded(
      [&] {
        buffer->sync(to_device ? XCL_BO_SYNC_BO_TO_DEVICE : XCL_BO_SYNC_BO_FROM_DEVICE);
        return 0;
      },
      1);
}

Launch* unicorn_xrt_launch(Context* context, int buffers) {
  return guarded(
      [&] {
        if (kFirstBuffer + buffers > context->arguments)
          throw std::runtime_error("the kernel takes " + std::to_string(context->arguments - kFirstBuffer) +
                                   " buffers, the design has " + std::to_string(buffers));
        xrt::run run(context->kernel);
        run.set_arg(0, kRunControl);
        run.set_arg(1, context->control);
        run.set_arg(2, context->words);
        return new Launch{run, context->arguments};
      },
      nullptr);
}
void unicorn_xrt_launch_free(Launch* launch) { delete launch; }
int unicorn_xrt_set(Launch* launch, int index, xrt::bo* buffer) {
  return guarded(
      [&] {
        if (index < 0 || kFirstBuffer + index >= launch->arguments) throw std::runtime_error("no such argument");
        launch->run.set_arg(kFirstBuffer + index, *buffer);
        return 0;
      },
      1);
}
int unicorn_xrt_start(Launch* launch) {
  return guarded(
      [&] {
        launch->run.start();
        return 0;
      },
      1);
}
// The state of the command; 8 if it did not end in time.
int unicorn_xrt_wait(Launch* launch, unsigned timeout_ms) {
  return guarded([&] { return int(launch->run.wait(std::chrono::milliseconds(timeout_ms))); }, 5);
}

// Several launches of a context as one command, started. They must not be started on their own while it exists.
xrt::runlist* unicorn_xrt_chain(Context* context, Launch* const* launches, int count) {
  return guarded(
      [&] {
        auto list = std::make_unique<xrt::runlist>(context->context);
        for (int i = 0; i < count; ++i) list->add(launches[i]->run);
        list->execute();
        return list.release();
      },
      nullptr);
}
void unicorn_xrt_chain_free(xrt::runlist* chain) { delete chain; }
// 4 if all of them completed, the state of the first that did not; 8 if they did not end in time.
int unicorn_xrt_chain_wait(xrt::runlist* chain, unsigned timeout_ms) {
  return guarded(
      [&] {
        try {
          const auto status = chain->wait(std::chrono::milliseconds(timeout_ms));
          return int(status == std::cv_status::timeout ? ERT_CMD_STATE_TIMEOUT : ERT_CMD_STATE_COMPLETED);
        } catch (const xrt::runlist::command_error& error) {
          return int(error.get_command_state());
        }
      },
      5);
}

}  // extern "C"
