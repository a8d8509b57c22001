// w4g32, tile "T16" (docs/formats.md). Row 16 i + r, group g of 32 columns, four chunks c of 8 columns:
//   word [i][g][c][r]: byte j has column 8 c + j in its low nibble and 8 c + 4 + j in its high one; value nibble - 8
//   scale [i][g][r], fp16
// Activations (a8g32): word [token][g][2 c + h], byte j: column 8 c + 4 h + j; scale [token][g], fp32.

int low(uint w) { return int(w & 0x0F0F0F0Fu); }
int high(uint w) { return int((w >> 4) & 0x0F0F0F0Fu); }

// nibble -> nibble - 8, in four bytes at once
int centred(uint nibbles) { return int(((nibbles | 0x80808080u) - 0x08080808u) ^ 0x80808080u); }
