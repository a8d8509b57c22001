// One launch of a design on the host model: the loops of the cores one after another, natively. The compiled
// library stands behind the pyxrt stand-in and behind the fake kernel driver; what it computes is compared with the
// design's own execution and with NumPy.
#include <cstdio>
#include <vector>

#ifdef UNICORN_M
#include "../aie/gemm_i8.cc"
#else
#include "../aie/attention_i8.cc"
#endif

namespace {

int refuse(char* error, size_t size, const char* what) {
  std::snprintf(error, size, "%s", what);
  return 1;
}

#ifdef UNICORN_M

// a [rows][K / tile_k][tile], b [columns][rounds][K / tile_k][tile], c [columns][rounds][rows][tile]
int launch(const uint32_t* in, void* const* buffers, const uint64_t* bytes, char* error, size_t size) {
  const uint64_t k = in[1], n = in[2], rows = in[6], columns = in[7];
  if (in[0] != 1 || in[3] != UNICORN_M || in[4] != UNICORN_K || in[5] != UNICORN_N)
    return refuse(error, size, "the control code is of another design");
  const uint64_t steps = k / UNICORN_K, rounds = n / (UNICORN_N * columns);
  if (bytes[0] < rows * UNICORN_M * k || bytes[1] < k * n || bytes[2] < 4 * rows * UNICORN_M * n)
    return refuse(error, size, "a buffer is too small: the DMA would run past it");
  const auto* a = static_cast<const int8*>(buffers[0]);
  const auto* b = static_cast<const int8*>(buffers[1]);
  auto* c = static_cast<int32*>(buffers[2]);
  for (uint64_t column = 0; column < columns; ++column) {
    for (uint64_t round = 0; round < rounds; ++round) {
      for (uint64_t row = 0; row < rows; ++row, c += UNICORN_M * UNICORN_N) {
        unicorn_gemm_i8_zero(c);
        for (uint64_t step = 0; step < steps; ++step) {
          unicorn_gemm_i8(a + (row * steps + step) * UNICORN_M * UNICORN_K,
                          b + ((column * rounds + round) * steps + step) * UNICORN_K * UNICORN_N, c);
        }
      }
    }
  }
  return 0;
}

#else

// query blocks [cores], key blocks [blocks], states [cores]
int launch(const uint32_t* in, void* const* buffers, const uint64_t* bytes, char* error, size_t size) {
  const uint64_t blocks = in[4], cores = uint64_t(in[5]) * in[6];
  if (in[0] != 2 || in[1] != UNICORN_HEAD_DIM || in[2] != UNICORN_ROWS || in[3] != UNICORN_KEYS)
    return refuse(error, size, "the control code is of another design");
  const uint64_t query = (UNICORN_ROWS * (UNICORN_HEAD_DIM + 10) + 32 + 63) / 64 * 64;
  const uint64_t keys = 2 * UNICORN_KEYS * UNICORN_HEAD_DIM + 64, state = UNICORN_ROWS * (2 + UNICORN_HEAD_DIM);
  if (bytes[0] < cores * query || bytes[1] < blocks * keys || bytes[2] < 4 * cores * state)
    return refuse(error, size, "a buffer is too small: the DMA would run past it");
  for (uint64_t core = 0; core < cores; ++core) {
    auto* o = static_cast<int32*>(buffers[2]) + core * state;
    unicorn_attention_i8_init(o);
    for (uint64_t block = 0; block < blocks; ++block) {
      unicorn_attention_i8(static_cast<const int8*>(buffers[0]) + core * query,
                           static_cast<const int8*>(buffers[1]) + block * keys, o);
    }
  }
  return 0;
}

#endif

}  // namespace

// Runs the launch that `instructions` describe on three buffers in the order of the kernel's arguments.
// 0, or nonzero with a message.
extern "C" int unicorn_launch(const uint32_t* instructions, uint32_t words, void* const* buffers, const uint64_t* bytes,
                              uint32_t count, char* error, uint64_t size) {
  if (words < 8 || count != 3) return refuse(error, size, "expected 8 words of control code and 3 buffers");
  // A core starts from the state of its power-up, whatever ran on this thread before.
  aie::set_rounding(aie::rounding_mode::floor);
  aie::set_saturation(aie::saturation_mode::none);
  // Device memory is aligned to pages; a caller's need not be.
  for (uint32_t i = 0; i < count; ++i)
    if (reinterpret_cast<uintptr_t>(buffers[i]) % 64) return refuse(error, size, "a buffer is not aligned to 64 bytes");
  return launch(instructions, buffers, bytes, error, size);
}
