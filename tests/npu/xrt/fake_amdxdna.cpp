// A kernel driver in user space, for tests: LD_PRELOAD it under the real XRT and its XDNA driver library. It answers
// the ioctls of the amdxdna accel node far enough to enumerate an NPU, load an xclbin, run commands and chains of
// commands, and to fail in chosen ways. Written from the UAPI description of the Linux kernel (amdxdna_accel.h).
//
// The node is a plain file that also backs the memory. A command names a compute unit; its PDI, as the test puts it
// into the xclbin, is "UNICORN\0" and the path of a library with `unicorn_launch` (kernels/host/launch.cc).
//
// Environment: FAKE_HANG=1 commands never end; FAKE_STATE=n they end in state n; FAKE_AFTER=n the first n commands do
// well; FAKE_CONTEXTS=n contexts there are; FAKE_USED=n of these are held by others; FAKE_POWER=n power mode; FAKE_MEMORY=
// bytes of lockable memory; FAKE_NO_FIRMWARE=1 the device does not come up; FAKE_DELAY_US=n; FAKE_DEBUG=1.
#include <dlfcn.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

// --- the UAPI: structures as the kernel lays them out ---

struct CreateContext {
  uint64_t ext, ext_flags, qos;
  uint32_t umq_bo, log_bo, max_ops, tiles, memory, doorbell, handle, syncobj;
};
struct DestroyContext {
  uint32_t handle, pad;
};
struct ComputeUnit {
  uint32_t bo;
  uint8_t function, pad[3];
};
struct ComputeUnits {
  uint16_t count, pad[3];
  ComputeUnit unit[];
};
struct ConfigureContext {
  uint32_t handle, type;
  uint64_t value;
  uint32_t size, pad;
};
struct CreateBo {
  uint64_t flags, table, size;
  uint32_t type, handle;
};
struct UserMemory {
  int32_t dmabuf;
  uint32_t count;
  uint64_t address, size;
};
struct BoInfo {
  uint64_t ext, ext_flags;
  uint32_t handle, pad;
  uint64_t map_offset, address, device_address;
};
struct Execute {
  uint64_t ext, ext_flags;
  uint32_t context, type;
  uint64_t commands, arguments;
  uint32_t command_count, argument_count;
  uint64_t sequence;
};
struct Wait {
  uint32_t context, timeout_ms;
  uint64_t sequence;
};
struct GetInfo {
  uint32_t what, size;
  uint64_t buffer;
};
struct GetArray {
  uint32_t what, element_size, count, pad;
  uint64_t buffer;
};
struct ContextEntry {
  uint32_t handle, first_column, columns, hardware_id;
  int64_t pid;
  uint64_t submissions, completions, migrations, preemptions, errors, priority, heap, suspensions;
  uint32_t state, rest[13];
};
struct TileInfo {
  uint16_t rows, first_row, channels, locks, events, pad[3];
};
struct ArrayInfo {
  uint32_t column_bytes;
  uint16_t columns, rows;
  uint32_t major, minor;
  TileInfo core, memory, shim;
};

enum Ioctl { kCreateContext, kDestroyContext, kConfigure, kCreateBo, kBoInfo, kSyncBo, kExecute, kGetInfo, kWait = 9, kGetArray };
enum BoType { kShared = 1, kHeap = 2, kDevice = 3, kCommand = 4 };
enum State { kCompleted = 4, kError = 5, kAbort = 6 };
enum Opcode { kStartCu = 0, kStartDpu = 18, kChain = 19, kStartNpu = 20 };

constexpr uint64_t kNone = ~0ull;
constexpr uint64_t kHeapBase = 0x4000000;  // device address of the heap on the first generation
constexpr unsigned kDrmCommand = 0x40, kGemClose = 0x09;

// --- state, never destroyed: the worker outlives main ---

struct Bo {
  uint32_t type;
  uint64_t size, offset, device_address, user;
  uint8_t* host;
};
struct Context {
  std::vector<std::string> libraries;  // per compute unit
  uint64_t next = 0, done = 0;         // sequence numbers
};
struct Job {
  uint32_t context;
  uint64_t sequence;
  uint32_t command;
};
struct Driver {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint32_t, Bo> bos;
  std::map<uint32_t, Context> contexts;
  std::deque<Job> jobs;
  uint32_t next_bo = 1, next_context = 1;
  uint64_t file_end = 1 << 20, heap_size = 0, heap_used = 0, locked = 0;
  uint8_t* heap = nullptr;
  int fd = -1;
  bool worker = false;
};
Driver& driver = *new Driver;

long setting(const char* name, long otherwise = 0) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

int fail(int code) {
  errno = code;
  return -1;
}

uint64_t pages(uint64_t size) { return (size + 4095) & ~4095ull; }

// --- commands ---

void* host_address(uint64_t device) {
  if (device >= kHeapBase && device < kHeapBase + driver.heap_size) return driver.heap + (device - kHeapBase);
  return reinterpret_cast<void*>(device);  // shared virtual memory: the process' own address
}

uint8_t* bytes_of(const Bo& bo) {
  if (bo.type == kDevice) return driver.heap + (bo.device_address - kHeapBase);
  return bo.user ? reinterpret_cast<uint8_t*>(bo.user) : bo.host;
}

uint64_t read64(const uint32_t* words, unsigned offset) {
  uint64_t value;
  memcpy(&value, reinterpret_cast<const char*>(words) + offset, 8);
  return value;
}

// Arguments lie where the xclbin says: opcode 0x00, control code 0x08, words 0x10, buffers from 0x14.
uint32_t run_kernel(const std::string& path, const uint32_t* arguments) {
  using Launch = int (*)(const uint32_t*, uint32_t, void* const*, const uint64_t*, uint32_t, char*, uint64_t);
  static long commands = 0;  // there is one worker
  if (++commands > setting("FAKE_AFTER")) {
    if (const long state = setting("FAKE_STATE")) return uint32_t(state);
    while (setting("FAKE_HANG")) pause();
  }
  void* library = dlopen(path.c_str(), RTLD_NOW);
  auto launch = library ? reinterpret_cast<Launch>(dlsym(library, "unicorn_launch")) : nullptr;
  if (!launch || read64(arguments, 0) != 3) {
    fprintf(stderr, "[fake amdxdna] %s\n", launch ? "opcode is not 3" : dlerror());
    return kError;
  }
  void* buffers[3];
  const uint64_t sizes[3] = {kNone, kNone, kNone};  // an address is all that a command has
  for (int i = 0; i < 3; ++i) buffers[i] = host_address(read64(arguments, 0x14 + 8 * i));
  char error[256] = "";
  const auto* control = static_cast<const uint32_t*>(host_address(read64(arguments, 8)));
  if (!launch(control, arguments[4], buffers, sizes, 3, error, sizeof error)) return kCompleted;
  fprintf(stderr, "[fake amdxdna] %s\n", error);
  return kError;
}

uint32_t run_command(const Context& context, uint32_t* packet);

uint32_t run_chain(const Context& context, uint32_t* packet) {
  const uint32_t count = packet[1];
  const auto* handles = reinterpret_cast<const uint64_t*>(packet + 7);
  for (uint32_t i = 0; i < count; ++i) {
    const auto found = driver.bos.find(uint32_t(handles[i]));
    if (found == driver.bos.end()) return packet[3] = i, uint32_t(kError);
    auto* part = reinterpret_cast<uint32_t*>(bytes_of(found->second));
    const uint32_t state = run_command(context, part);
    part[0] = (part[0] & ~0xfu) | state;
    packet[2] = i;
    if (state != kCompleted) return packet[3] = i, state;
  }
  return kCompleted;
}

uint32_t run_command(const Context& context, uint32_t* packet) {
  const uint32_t opcode = (packet[0] >> 23) & 0x1f, extra_masks = (packet[0] >> 10) & 3;
  if (opcode == kChain) return run_chain(context, packet);
  if (opcode != kStartCu && opcode != kStartDpu && opcode != kStartNpu) return kError;
  const uint32_t unit = packet[1] ? uint32_t(__builtin_ctz(packet[1])) : 0;
  if (unit >= context.libraries.size()) return kError;
  return run_kernel(context.libraries[unit], packet + 2 + extra_masks);
}

void work() {
  for (;;) {
    std::unique_lock<std::mutex> lock(driver.mutex);
    driver.changed.wait(lock, [] { return !driver.jobs.empty(); });
    const Job job = driver.jobs.front();
    driver.jobs.pop_front();
    const Context context = driver.contexts[job.context];
    auto* packet = reinterpret_cast<uint32_t*>(bytes_of(driver.bos[job.command]));
    lock.unlock();
    if (const long delay = setting("FAKE_DELAY_US")) usleep(unsigned(delay));
    const uint32_t state = run_command(context, packet);
    __atomic_store_n(&packet[0], (packet[0] & ~0xfu) | state, __ATOMIC_RELEASE);
    lock.lock();
    driver.contexts[job.context].done = job.sequence + 1;
    driver.changed.notify_all();
  }
}

// --- ioctls ---

int create_context(CreateContext& a) {
  if (long(driver.contexts.size()) + setting("FAKE_USED") >= setting("FAKE_CONTEXTS", 6)) return fail(ENOENT);
  a.handle = driver.next_context++;
  a.syncobj = 0;
  a.doorbell = ~0u;
  driver.contexts[a.handle] = Context{};
  return 0;
}

int configure(const ConfigureContext& a) {
  const auto found = driver.contexts.find(a.handle);
  if (found == driver.contexts.end()) return fail(EINVAL);
  if (a.type != 0) return 0;
  const auto* units = reinterpret_cast<const ComputeUnits*>(a.value);
  for (int i = 0; i < units->count; ++i) {
    const Bo& bo = driver.bos[units->unit[i].bo];
    const auto* pdi = reinterpret_cast<const char*>(bytes_of(bo));
    const bool ours = bo.size > 8 && !memcmp(pdi, "UNICORN", 8);
    found->second.libraries.push_back(ours ? std::string(pdi + 8, strnlen(pdi + 8, bo.size - 8)) : "");
  }
  return 0;
}

int create_bo(CreateBo& a) {
  Bo bo{a.type, a.size, kNone, kNone, 0, nullptr};
  if (a.type != kCommand && driver.locked + a.size > uint64_t(setting("FAKE_MEMORY", 1l << 40))) return fail(EAGAIN);
  if (a.table) {
    const auto* memory = reinterpret_cast<const UserMemory*>(a.table);
    bo.user = bo.device_address = memory->address;
    bo.size = memory->size;
  } else if (a.type == kDevice) {
    if (driver.heap_used + pages(a.size) > driver.heap_size) return fail(ENOMEM);
    bo.device_address = kHeapBase + driver.heap_used;
    driver.heap_used += pages(a.size);
  } else {
    bo.offset = driver.file_end;
    driver.file_end += pages(a.size);
    struct stat info;
    if (fstat(driver.fd, &info)) return -1;
    if (uint64_t(info.st_size) < driver.file_end && ftruncate(driver.fd, off_t(driver.file_end))) return -1;
    void* mapped = mmap(nullptr, pages(a.size), PROT_READ | PROT_WRITE, MAP_SHARED, driver.fd, off_t(bo.offset));
    if (mapped == MAP_FAILED) return fail(ENOMEM);
    bo.host = static_cast<uint8_t*>(mapped);
    memset(bo.host, a.type == kShared ? 0xA5 : 0, pages(a.size));  // memory is never clean
    if (a.type == kHeap) {
      if (!driver.heap_size) driver.heap = bo.host;
      driver.heap_size += pages(a.size);
      bo.device_address = kHeapBase;
    }
  }
  if (a.type == kShared || a.type == kHeap) driver.locked += bo.size;
  a.handle = driver.next_bo++;
  driver.bos[a.handle] = bo;
  return 0;
}

int close_bo(uint32_t handle) {
  const auto found = driver.bos.find(handle);
  if (found == driver.bos.end()) return fail(EINVAL);
  if (found->second.type == kShared || found->second.type == kHeap) driver.locked -= found->second.size;
  if (found->second.type == kHeap) driver.heap = nullptr, driver.heap_size = driver.heap_used = 0;
  if (found->second.host) munmap(found->second.host, pages(found->second.size));
  driver.bos.erase(found);
  return 0;
}

int bo_info(BoInfo& a) {
  const auto found = driver.bos.find(a.handle);
  if (found == driver.bos.end()) return fail(EINVAL);
  a.map_offset = found->second.offset;
  a.address = 0;
  a.device_address = found->second.device_address;
  return 0;
}

int execute(Execute& a) {
  const auto found = driver.contexts.find(a.context);
  const uint32_t command = uint32_t(a.commands);
  if (found == driver.contexts.end() || a.command_count != 1) return fail(EINVAL);
  if (!driver.bos.count(command)) return fail(ENOENT);
  a.sequence = found->second.next++;
  driver.jobs.push_back({a.context, a.sequence, command});
  if (!driver.worker) {
    driver.worker = true;
    std::thread(work).detach();
  }
  driver.changed.notify_all();
  return 0;
}

int wait_for(const Wait& a, std::unique_lock<std::mutex>& lock) {
  const auto done = [&] { return driver.contexts[a.context].done > a.sequence; };
  if (a.timeout_ms == 0) return driver.changed.wait(lock, done), 0;
  return driver.changed.wait_for(lock, std::chrono::milliseconds(a.timeout_ms), done) ? 0 : fail(ETIME);
}

int get_info(const GetInfo& a) {
  auto* out = reinterpret_cast<void*>(a.buffer);
  memset(out, 0, a.size);
  const ArrayInfo array{1 << 25, 5, 6, 1, 1, {4, 2, 2, 16, 27, {}}, {1, 1, 6, 64, 0, {}}, {1, 0, 2, 16, 0, {}}};
  const uint32_t version[2] = {1, 1}, firmware[4] = {1, 5, 5, 391};
  const uint8_t power[8] = {uint8_t(setting("FAKE_POWER"))};
  const auto give = [&](const void* from, size_t size) { memcpy(out, from, size < a.size ? size : a.size); };
  switch (a.what) {
    case 1:
      give(&array, sizeof array);
      break;
    case 2:
      give(version, sizeof version);
      break;
    case 8:
      give(firmware, sizeof firmware);
      break;
    case 9:
      give(power, sizeof power);
      break;
  }
  return 0;
}

// All contexts of the device. Those of other programs are four columns wide and idle.
int get_array(GetArray& a) {
  if (a.what != 0) return fail(EOPNOTSUPP);
  const auto used = uint32_t(setting("FAKE_USED"));
  if (used > a.count) return fail(ENOSPC);
  a.element_size = std::min<uint32_t>(a.element_size, sizeof(ContextEntry));
  for (uint32_t i = 0; i < used; ++i) {
    ContextEntry entry{};
    entry.handle = entry.hardware_id = i + 1;
    entry.columns = 4;
    entry.pid = 1000 + i;
    memcpy(reinterpret_cast<char*>(a.buffer) + i * a.element_size, &entry, a.element_size);
  }
  a.count = used;
  return 0;
}

int answer(unsigned number, void* argument) {
  if (setting("FAKE_DEBUG")) fprintf(stderr, "[fake amdxdna] ioctl 0x%x\n", number);
  std::unique_lock<std::mutex> lock(driver.mutex);
  if (setting("FAKE_NO_FIRMWARE")) return fail(ENODEV);
  if (number == kGemClose) return close_bo(*static_cast<uint32_t*>(argument));
  switch (number - kDrmCommand) {
    case kCreateContext:
      return create_context(*static_cast<CreateContext*>(argument));
    case kDestroyContext:
      return driver.contexts.erase(static_cast<DestroyContext*>(argument)->handle), 0;
    case kConfigure:
      return configure(*static_cast<ConfigureContext*>(argument));
    case kCreateBo:
      return create_bo(*static_cast<CreateBo*>(argument));
    case kBoInfo:
      return bo_info(*static_cast<BoInfo*>(argument));
    case kSyncBo:
      return 0;
    case kExecute:
      return execute(*static_cast<Execute*>(argument));
    case kGetInfo:
      return get_info(*static_cast<GetInfo*>(argument));
    case kGetArray:
      return get_array(*static_cast<GetArray*>(argument));
    case kWait:
      return wait_for(*static_cast<Wait*>(argument), lock);
    default:
      return fail(EOPNOTSUPP);
  }
}

bool is_node(int fd) {
  if (fd == driver.fd) return true;
  struct stat node, given;
  if (stat("/dev/accel/accel0", &node) || fstat(fd, &given)) return false;
  return node.st_ino == given.st_ino && node.st_dev == given.st_dev;
}

}  // namespace

extern "C" int ioctl(int fd, unsigned long request, ...) {
  va_list list;
  va_start(list, request);
  void* argument = va_arg(list, void*);
  va_end(list);
  if (_IOC_TYPE(request) != 'd' || !is_node(fd)) return int(syscall(SYS_ioctl, fd, request, argument));
  driver.fd = fd;
  return answer(_IOC_NR(request), argument);
}
