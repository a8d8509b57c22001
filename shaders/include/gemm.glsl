// A product of 64 rows x 64 tokens by 256 threads, 4 x 4 each, one group of 32 columns at a time through shared
// memory. Before it: WEIGHTS (how many weights share the tokens), `a` and `a_scale`.
const uint ROWS = 64, TOKENS = 64, STRIDE = 9;  // words between rows of a group: eight, and one against bank conflicts

// Row r lies at place(r): thread t of 16 reads 16 places apart and so has rows 4 t .. 4 t + 3.
shared int rows[WEIGHTS * ROWS * STRIDE];
shared int columns[TOKENS * STRIDE];
shared float column_scales[TOKENS];

uint place(uint row) { return (row >> 2) + 16u * (row & 3u); }

struct Column {  // what a thread loads of the activations
  uint x0, x1;
  float scale;
};

Column load_column(uint m0, uint tid, uint groups, uint g) {
  const uint m = m0 + (tid >> 3), k = tid & 7u;
  return Column(a[(m * groups + g) * 8u + k], a[((m + 32u) * groups + g) * 8u + k],
                a_scale[(m0 + (tid & 63u)) * groups + g]);
}

void store_column(uint tid, Column c) {
  columns[(tid >> 3) * STRIDE + (tid & 7u)] = int(c.x0);
  columns[((tid >> 3) + 32u) * STRIDE + (tid & 7u)] = int(c.x1);
  if (tid < TOKENS) column_scales[tid] = c.scale;
}

// Sums of one group: dots[weight][token][row].
void products(uint tn, uint tm, out ivec4 dots[WEIGHTS][4]) {
  [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
    [[unroll]] for (uint i = 0u; i < 4u; ++i) dots[w][i] = ivec4(0);
  }
  [[unroll]] for (uint k = 0u; k < 8u; ++k) {
    ivec4 x;
    [[unroll]] for (uint i = 0u; i < 4u; ++i) x[i] = columns[(4u * tm + i) * STRIDE + k];
    [[unroll]] for (uint j = 0u; j < 4u; ++j) {
      [[unroll]] for (uint w = 0u; w < WEIGHTS; ++w) {
        const int v = rows[(w * ROWS + tn + 16u * j) * STRIDE + k];
        [[unroll]] for (uint i = 0u; i < 4u; ++i) dots[w][i][j] += dot4(v, x[i]);
      }
    }
  }
}
