// Dot products of four bytes.
#ifdef DOT8
#extension GL_EXT_spirv_intrinsics : require
// OpSDot on packed bytes: glslang 12 has no GL_EXT_integer_dot_product.
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6018, 6019], id = 4450)
int packed_dot(int a, int b, spirv_literal int signed_bytes);
int dot4(int a, int b) { return packed_dot(a, b, 0); }
#else
int byte_of(int x, int i) { return bitfieldExtract(x, 8 * i, 8); }
int dot4(int a, int b) {
  return byte_of(a, 0) * byte_of(b, 0) + byte_of(a, 1) * byte_of(b, 1) + byte_of(a, 2) * byte_of(b, 2) +
         byte_of(a, 3) * byte_of(b, 3);
}
#endif
