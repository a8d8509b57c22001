// A product of 64 rows x 64 tokens by 256 threads with cooperative matrices, one group of 32 columns at a time through
// shared memory. Each subgroup has two matrices of MT tokens x NT rows. Before it: WEIGHTS (how many weights share the
// tokens), `a` and `a_scale`.
// The layout of a matrix over the threads is the driver's secret, so that a scale that depends on the row or the token is
// a matrix, too: loaded with stride 0, each of its columns or rows is the same. Elements are multiplied pair by pair.
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_shader_explicit_arithmetic_types_int8 : require

layout(constant_id = 9) const uint MT = 16;   // tokens
layout(constant_id = 10) const uint NT = 16;  // rows
layout(constant_id = 11) const uint KT = 16;  // columns
const uint ROWS = 64, TOKENS = 64, THREADS = 256, COLUMNS = 32;
const uint STRIDE = 12;  // words between rows of a group: matrices begin at 16 bytes, 8 rows lie in different banks
const uint RESULTS = 68;  // floats between tokens of the results, likewise

#define X coopmat<int8_t, gl_ScopeSubgroup, MT, KT, gl_MatrixUseA>
#define W coopmat<int8_t, gl_ScopeSubgroup, KT, NT, gl_MatrixUseB>
#define DOTS coopmat<int, gl_ScopeSubgroup, MT, NT, gl_MatrixUseAccumulator>
#define SUMS coopmat<float, gl_ScopeSubgroup, MT, NT, gl_MatrixUseAccumulator>
const int BY_ROW = gl_CooperativeMatrixLayoutRowMajor, BY_COLUMN = gl_CooperativeMatrixLayoutColumnMajor;

shared uint rows[WEIGHTS * ROWS * STRIDE];
shared uint columns[TOKENS * STRIDE];
shared float column_scales[TOKENS];
shared float results[TOKENS * RESULTS];

// Where this subgroup's matrices begin.
uint first_row() { return gl_SubgroupID % (ROWS / NT) * NT; }
uint first_token() { return gl_SubgroupID / (ROWS / NT) * 2u * MT; }

struct Column {  // what a thread loads of the activations: two words of a token
  uint x[2];
  float scale;
};

Column load_column(uint m0, uint tid, uint groups, uint g) {
  const uint from = ((m0 + (tid >> 2)) * groups + g) * 8u + 2u * (tid & 3u);
  return Column(uint[2](a[from], a[from + 1u]), a_scale[(m0 + (tid & (TOKENS - 1u))) * groups + g]);
}

void store_column(uint tid, Column c) {
  const uint to = (tid >> 2) * STRIDE + 2u * (tid & 3u);
  columns[to] = c.x[0];
  columns[to + 1u] = c.x[1];
  if (tid < TOKENS) column_scales[tid] = c.scale;
}

// Sums of one group.
void products(out DOTS dots[WEIGHTS][2]) {
  [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
    [[unroll]] for (uint i = 0u; i < 2u; ++i) dots[w][i] = DOTS(0);
  }
  [[unroll]] for (uint k = 0u; k < COLUMNS; k += KT) {
    X x[2];
    [[unroll]] for (uint i = 0u; i < 2u; ++i) {
      coopMatLoad(x[i], columns, (first_token() + i * MT) * STRIDE + k / 4u, STRIDE, BY_ROW);
    }
    [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
      W v;
      coopMatLoad(v, rows, (w * ROWS + first_row()) * STRIDE + k / 4u, STRIDE, BY_COLUMN);
      [[unroll]] for (uint i = 0u; i < 2u; ++i) dots[w][i] = coopMatMulAdd(x[i], v, dots[w][i]);
    }
  }
}

#define LOAD_OF_TOKENS(to, from, i) coopMatLoad(to, from, first_token() + (i)*MT, 0u, BY_COLUMN)
#define LOAD_OF_ROWS(to, from, w) coopMatLoad(to, from, (w)*ROWS + first_row(), 0u, BY_ROW)

void store_results(SUMS sum, uint i) {
  coopMatStore(sum, results, (first_token() + i * MT) * RESULTS + first_row(), RESULTS, BY_ROW);
}
