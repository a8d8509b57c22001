// w8c and w8a (docs/formats.md). Row 16 i + r, group g of 32 columns, eight chunks c of 4 columns:
//   word [i][g][c][r]: byte j has column 4 c + j; value byte - zero point, which is 128 in w8c
//   scale [i][r], fp32; zero point [i][r], one byte
// A byte without its highest bit's weight is signed: byte - 128. What is missing of the zero point, 128 - z, is
// multiplied by the sum of the activations, so that the sum of a group is an exact integer.

int signed_bytes_of(uint w) { return int(w ^ 0x80808080u); }
int missing(uint zeros, uint i) { return 128 - int((zeros >> (8u * i)) & 255u); }
const int ONES = 0x01010101;
