// The end of a product of many tokens with a w8c or w8a weight. Before it: N, TYPE, BIAS, FIRST, TOTAL and their buffers.

struct Finish {  // of four rows
  vec4 scales, add;
};

Finish finish_of(uint row) {
  Finish f = Finish(vec4(0.0), vec4(0.0));
  [[unroll]] for (uint j = 0u; j < 4u; ++j) {
    f.scales[j] = w_scale[row + j];
    if (BIAS != 0u && row + j < N) f.add[j] = bias[FIRST + row + j];
  }
  return f;
}

// Rows row .. row + 3 of a token.
void write_rows(uint token, uint row, vec4 sum, Finish f) {
  const vec4 finished = sum * f.scales + f.add;
  const uint at = token * TOTAL + FIRST + row;
  if (TYPE == F32) {
    [[unroll]] for (uint j = 0u; j < 4u; ++j) {
      if (row + j < N) y[at + j] = floatBitsToUint(finished[j]);
    }
  } else {  // FIRST, N and TOTAL are even: a word belongs to one token
    if (row < N) y[at / 2u] = write_pair(TYPE, finished.xy);
    if (row + 2u < N) y[at / 2u + 1u] = write_pair(TYPE, finished.zw);
  }
}
