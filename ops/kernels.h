// Raw-pointer interface of the kernels: structures, the table of one instruction set, and the regions.
// No torch here. Nothing below allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "layouts.h"

namespace unicorn {

// A dense array of floats of some type, or none (null).
struct Array {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

enum class Scheme : int { w4g32 = 0, w8c = 1, w8a = 2, w4n32 = 3, w8g32 = 4, w4m32 = 5, q4k = 6, q5k = 7, q6k = 8 };

// Bytes of a group's 16 rows, by scheme.
constexpr int64_t kGroupBytes[] = {
    kW4GroupBytes, kW8GroupBytes, kW8GroupBytes, kW4GroupBytes, kW8GroupBytes, kW4GroupBytes, kW4GroupBytes, 320, 384};
constexpr int64_t group_bytes(Scheme scheme) { return kGroupBytes[static_cast<int>(scheme)]; }
// True if every group of a row has a scale, false if every row has one.
constexpr bool scaled(Scheme scheme) { return scheme != Scheme::w8c && scheme != Scheme::w8a; }

struct Weight {
  Scheme scheme = Scheme::w4g32;
  const uint8_t* q = nullptr;
  const void* scale = nullptr;       // fp32 [N16, 16] for w8c and w8a, else fp16 [N16, K32, 16]
  const uint8_t* zero = nullptr;     // w8a only, [N16, 16]
  const int8_t* codebook = nullptr;  // w4n32 only, [16]
  // w4m32: minima fp16 [N16, K32, 16]; q4k, q5k: fp16 [N16, K256, 2, 16]; q6k: fp16 [N16, K256, 16].
  const uint16_t* extra = nullptr;
  int64_t n = 0, k = 0;
};

// y = x * rsqrt(mean(x^2) + eps) * (w + offset); `on` false means y = x.
struct Norm {
  bool on = false;
  Array w;
  float eps = 0, offset = 0;
};

// What happens to a finished row: norm, then residual, then one rounding.
struct Post {
  Norm norm;
  Array residual;  // [rows, width]
};

struct Rows {
  Array x;
  int64_t rows = 0, width = 0;
};

struct Out {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// Quantized activations. Tokens come in blocks of 16 (the last one shorter, b tokens):
// q [block][group][b][32], scale and sum8 [block][group][b]; sum8 is -8 * (sum of the group's q).
struct Activations {
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* sum8 = nullptr;
  int64_t rows = 0, groups = 0;
};

enum class Act : int { gelu_tanh = 0, gelu = 1, silu = 2, relu = 3 };

struct Range {
  int64_t begin, end;
};

struct LinearArgs {
  Weight w;
  Array bias;
  Activations a;
  Out out;         // [rows, stride]
  int64_t stride;  // elements between rows of out
};

struct GateArgs {
  Weight gate, up;
  Array gate_bias, up_bias;
  Act act;
  Activations a, out;  // out: the product, quantized along its width
};

// The same where only a few gates are open. threshold: of each token, with which `gate` [rows, n] is compared.
struct OpenGateArgs {
  const float *gate, *threshold;
  Weight up;
  Array up_bias;
  Act act;
  Activations a, out;
};

struct RotaryArgs {
  Norm norm;
  const float* x;  // row (b, t) at x + (b * T + t) * stride, heads side by side
  int64_t stride, B, T, heads, head_dim;
  Array cos, sin;      // [B or 1, T, rotary_dim] or none
  int64_t rotary_dim;  // of each head the first so many elements are rotated
  bool interleaved;    // pairs are neighbours, else half the rotary_dim apart
  bool shared_cos;     // one cos/sin for all of the batch
  Out out;             // [B, heads, T, head_dim]
};

struct EmbeddingArgs {
  const int64_t* ids;
  int64_t count;
  Weight w;
  Out out;  // [count, k]
};

// The high bits of an 8-bit weight (w8c, w8a), to tell which rows cannot have one of the largest scores
// (impl/screen.inl). five [N16, K32, 320]: bits 3 to 7 as in q5k; sixth [N16, K32, 64]: bit 2, of chunk c at bit c;
// error [N16, 2, 16]: bounds of |scale * (what the bits below add, minus its middle)|, the norm over a row.
struct Planes {
  uint8_t *five = nullptr, *sixth = nullptr;
  float* error = nullptr;
};

struct ScreenArgs {
  Weight w;
  Planes planes;
  Activations a;                         // one token
  Out out;                               // [n]
  float *bound, *most;                   // [16 * N16] of the rows; [N16], the largest of each tile
  float total = 0, norm = 0, slack = 0;  // of the activations: begin_screen
};

// Everything that is compiled once per instruction set. All of them give the same bits.
struct Kernels {
  const char* name;
  void (*quantize)(const Rows& x, const Norm& norm, const Activations& a, Range rows);
  void (*linear)(const LinearArgs& args, Range tiles);  // tiles of 16 rows of the weight
  void (*gate)(const GateArgs& args, Range groups);     // groups of 32 rows of the weights
  // threshold[row] = mean + cutoff * standard deviation of x [rows, width], width a multiple of 16.
  void (*thresholds)(const float* x, int64_t width, float cutoff, float* threshold, Range rows);
  // act(max(gate - threshold, 0)) * up. Tiles of `up` that only meet zeros are not read.
  void (*open_gate)(const OpenGateArgs& args, Range groups);
  void (*norm)(const Rows& x, const Post& post, const Out& out, Range rows);
  void (*rotary)(const RotaryArgs& args, Range items);  // items (b, t, head), head fastest
  void (*embedding)(const EmbeddingArgs& args, Range ids);
  void (*activations)(const float* x, int64_t n, Act act, float* out);  // for tests
  // Screening of the rows of a weight: see impl/screen.inl.
  void (*split)(const Weight& w, const Planes& planes, Range tiles);
  void (*begin_screen)(ScreenArgs& args);
  void (*screen)(const ScreenArgs& args, bool six, Range tiles);
  float (*refine)(const ScreenArgs& args, int64_t tile);
  void (*score)(const ScreenArgs& args, int64_t tile, float* scores);
  void (*leave_out)(const ScreenArgs& args, int64_t tile);
  // For benchmarks: reads memory (the result means nothing); int8 dot products, returns the multiply-adds.
  uint64_t (*read)(const uint64_t* data, int64_t words, bool two_levels);
  int64_t (*dots)(int64_t steps);
};

// How weights are prefetched: depends on the CPU, see impl/matmul.inl.
struct Prefetch {
  int64_t near, near8, far;  // bytes ahead: into L1, into L1 for groups of 8 bits, into L2
};
extern const Prefetch prefetch;

// The table in use: the best that the CPU runs, unless set_isa chose another.
const Kernels& kernels();
// Names of the tables that this CPU runs, best first, ended by null.
const char* const* isas();
// Of these kernels, attention and the quantizer. "" is the best one. False for a name that is not in isas().
bool set_isa(const char* name);

class Workspace;  // threads.h

struct FfnArgs {
  Rows x;
  Norm norm;
  Weight gate, up, down;
  Array gate_bias, up_bias, down_bias;
  Act act;
  Post post;
  Out out;
  // Of each token's gates those above mean + cutoff * standard deviation count, by what they are above it.
  bool cut = false;
  float cutoff = 0;
};

// Slots in the order of their experts: `hit[i]` has the slots from `first[i]` to `first[i + 1]`.
struct ExpertsArgs {
  Rows x;      // one row per slot
  Weight w;    // the experts' weights [n, K] one under another
  Array bias;  // the same
  Out out;     // [slots, n]
  int64_t n;   // a multiple of 16
  const int64_t *hit, *first;
  int64_t hits;
};

struct Projection {
  Weight w;
  Array bias;
  Norm norm;
  bool rotate;
  int64_t heads;
  Out out;
};

struct QkvArgs {
  Rows x;
  Norm norm;
  Projection part[3];
  int64_t B, T, head_dim, rotary_dim = 0;
  Array cos, sin;
  bool interleaved, shared_cos;
};

// Regions: one parallel region each. `norm` is applied to x before it is quantized.
void run_linear(const Rows& x, const Norm& norm, const Weight& w, Array bias, const Post& post, Out out,
                Workspace& workspace, int threads);
void run_ffn(const FfnArgs& args, Workspace& workspace, int threads);
// What run_screened did: bytes of weights read (0: the activations are not finite or huge, and nothing is written), and
// how many tiles five bits left open.
struct Screened {
  int64_t read, open;
};

// The scores of a linear for one token, those that may be among the `best` largest; the others become -inf.
// six: take six bits at once.
Screened run_screened(const Rows& x, const Weight& w, const Planes& planes, Out out, int64_t best, bool six,
                      Workspace& workspace, int threads);
void run_split(const Weight& w, const Planes& planes, int threads);
void run_experts(const ExpertsArgs& args, Workspace& workspace, int threads);
void run_qkv(const QkvArgs& args, Workspace& workspace, int threads);
void run_rotary(const RotaryArgs& args, int threads);
void run_norm(const Rows& x, const Post& post, Out out, int threads);
void run_embedding(const EmbeddingArgs& args, int threads);
uint64_t run_read(const uint64_t* data, int64_t words, bool two_levels, int threads);
int64_t run_dots(int64_t steps, int threads);

}  // namespace unicorn
