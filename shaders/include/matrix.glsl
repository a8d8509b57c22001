// A product of ROWS rows x TOKENS tokens by 256 threads with cooperative matrices, one group of 32 columns at a time
// through shared memory, where the next group is written while one is multiplied. Before it: WEIGHTS (how many weights
// share the tokens), `a` and `a_scale`.
//   LARGE: 128 tokens x 128 rows (64 of each of two weights); else 64 x 64: few tokens, or too few rows for all cores
// A subgroup has TM matrices of MT tokens x WN of NT rows; matrix i of all subgroups has the tokens of slice i.
// The layout of a matrix over the threads is the driver's secret, so that a scale that depends on the row or the token is
// a matrix, too: loaded with stride 0, each of its columns or rows is the same. Elements are multiplied pair by pair.
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require

layout(constant_id = 9) const uint MT = 16;   // tokens
layout(constant_id = 10) const uint NT = 16;  // rows
layout(constant_id = 11) const uint KT = 16;  // columns
#ifdef LARGE
const uint TOKENS = 128, TM = 4, ROWS = 128 / WEIGHTS, TN = 2 / WEIGHTS;
#else
const uint TOKENS = 64, TM = 2, ROWS = 64, TN = 1;
#endif
const uint WN = WEIGHTS * TN, THREADS = 256, COLUMNS = 32, SLICE = TOKENS / TM;
const uint STRIDE = 12;  // words between rows of a group: matrices begin at 16 bytes, 8 rows lie in different banks
const uint COLUMN_WORDS = TOKENS * 8 / THREADS;  // of a group, that a thread loads
const uint TOKENS_AT = WEIGHTS * ROWS * STRIDE, STAGE = TOKENS_AT + TOKENS * STRIDE;
const uint RESULTS = ROWS + 4;  // floats between tokens of the results, likewise

#define X coopmat<int8_t, gl_ScopeSubgroup, MT, KT, gl_MatrixUseA>
#define W coopmat<int8_t, gl_ScopeSubgroup, KT, NT, gl_MatrixUseB>
#define DOTS coopmat<int, gl_ScopeSubgroup, MT, NT, gl_MatrixUseAccumulator>
#define SUMS coopmat<float, gl_ScopeSubgroup, MT, NT, gl_MatrixUseAccumulator>
const int BY_ROW = gl_CooperativeMatrixLayoutRowMajor, BY_COLUMN = gl_CooperativeMatrixLayoutColumnMajor;

shared uint pool[2 * STAGE];  // rows and tokens of two groups; at the end floats, [SLICE][RESULTS]
shared float column_scales[2 * TOKENS];

// Where this subgroup's matrices begin: of rows number n (in one weight), of tokens in a slice.
uint first_row(uint n) { return (gl_SubgroupID % (ROWS / (TN * NT)) * TN + n) * NT; }
uint first_token() { return gl_SubgroupID / (ROWS / (TN * NT)) * MT; }

struct Column {  // what a thread loads of the activations: words of one token
  uint x[COLUMN_WORDS];
  float scale;
};

Column load_column(uint m0, uint tid, uint groups, uint g) {
  Column c;
  const uint word = tid * COLUMN_WORDS, from = ((m0 + word / 8u) * groups + g) * 8u + (word & 7u);
  [[unroll]] for (uint i = 0u; i < COLUMN_WORDS; ++i) c.x[i] = a[from + i];
  c.scale = a_scale[(m0 + tid % TOKENS) * groups + g];
  return c;
}

// `stage`: 0 or STAGE.
void store_column(uint stage, uint tid, Column c) {
  const uint word = tid * COLUMN_WORDS, to = stage + TOKENS_AT + word / 8u * STRIDE + (word & 7u);
  [[unroll]] for (uint i = 0u; i < COLUMN_WORDS; ++i) pool[to + i] = c.x[i];
  if (tid < TOKENS) column_scales[stage / STAGE * TOKENS + tid] = c.scale;
}

// Sums of one group, of the tokens of slices `slice` and `slice` + 1.
void products(uint stage, uint slice, out DOTS dots[2][WN]) {
  [[unroll]] for (uint n = 0u; n < WN; ++n) {
    [[unroll]] for (uint i = 0u; i < 2u; ++i) dots[i][n] = DOTS(0);
  }
  [[unroll]] for (uint k = 0u; k < COLUMNS; k += KT) {
    X x[2];
    [[unroll]] for (uint i = 0u; i < 2u; ++i) {
      const uint token = (slice + i) * SLICE + first_token();
      coopMatLoad(x[i], pool, stage + TOKENS_AT + token * STRIDE + k / 4u, STRIDE, BY_ROW);
    }
    [[unroll]] for (uint n = 0u; n < WN; ++n) {
      W v;
      coopMatLoad(v, pool, stage + (n / TN * ROWS + first_row(n % TN)) * STRIDE + k / 4u, STRIDE, BY_COLUMN);
      [[unroll]] for (uint i = 0u; i < 2u; ++i) dots[i][n] = coopMatMulAdd(x[i], v, dots[i][n]);
    }
  }
}

#define LOAD_OF_TOKENS(to, from, stage, slice) \
  coopMatLoad(to, from, (stage) / STAGE * TOKENS + (slice)*SLICE + first_token(), 0u, BY_COLUMN)

void store_results(SUMS sum, uint n) {
  coopMatStore(sum, pool, first_token() * RESULTS + first_row(n), RESULTS, BY_ROW);
}
float result(uint i) { return uintBitsToFloat(pool[i]); }
