// c[M, N] += a[M, K] b[K, N] of one tile on one core: int8 products, int32 sums (exact below 2^31 / 127^2 columns).
//
// Tiled so that every product reads and writes whole vectors, R = UNICORN_MMUL_ROWS:
//   a [M/R][K/8][R][8] int8    b [K/8][N/8][8][8] int8    c [M/R][N/8][R][8] int32
// Two by two products at a time: each vector that is read is used twice, four accumulators hide the latency.
#include <aie_api/aie.hpp>

#include "arch.h"

#if !defined(UNICORN_M) || !defined(UNICORN_K) || !defined(UNICORN_N)
#error "compile with -DUNICORN_M= -DUNICORN_K= -DUNICORN_N= (the tile of one core)"
#endif

namespace {

using Product = aie::mmul<UNICORN_MMUL_ROWS, 8, 8, int8, int8, acc32>;

constexpr unsigned kTilesM = UNICORN_M / UNICORN_MMUL_ROWS, kTilesK = UNICORN_K / 8, kTilesN = UNICORN_N / 8;
static_assert(UNICORN_M % (2 * UNICORN_MMUL_ROWS) == 0 && UNICORN_K % 8 == 0 && UNICORN_N % 16 == 0,
              "M must be a multiple of two products, K of 8, N of 16");

}  // namespace

extern "C" void unicorn_gemm_i8_zero(int32* __restrict c) {
  for (unsigned i = 0; i < UNICORN_M * UNICORN_N; i += 16) aie::store_v(c + i, aie::zeros<int32, 16>());
}

extern "C" void unicorn_gemm_i8(const int8* __restrict a, const int8* __restrict b, int32* __restrict c) {
  UNICORN_SET_ARITHMETIC();
  for (unsigned i = 0; i < kTilesM; i += 2) {
    for (unsigned j = 0; j < kTilesN; j += 2) {
      const int8* a0 = a + i * kTilesK * Product::size_A;
      const int8* a1 = a0 + kTilesK * Product::size_A;
      const int8* b0 = b + j * Product::size_B;
      int32* c0 = c + (i * kTilesN + j) * Product::size_C;
      int32* c1 = c0 + kTilesN * Product::size_C;
      Product c00(aie::load_v<Product::size_C>(c0)), c01(aie::load_v<Product::size_C>(c0 + Product::size_C));
      Product c10(aie::load_v<Product::size_C>(c1)), c11(aie::load_v<Product::size_C>(c1 + Product::size_C));
      for (unsigned k = 0; k < kTilesK; ++k) {
        const auto x0 = aie::load_v<Product::size_A>(a0 + k * Product::size_A);
        const auto x1 = aie::load_v<Product::size_A>(a1 + k * Product::size_A);
        const auto y0 = aie::load_v<Product::size_B>(b0 + k * kTilesN * Product::size_B);
        const auto y1 = aie::load_v<Product::size_B>(b0 + (k * kTilesN + 1) * Product::size_B);
        c00.mac(x0, y0);
        c01.mac(x0, y1);
        c10.mac(x1, y0);
        c11.mac(x1, y1);
      }
      aie::store_v(c0, c00.to_vector<int32>());
      aie::store_v(c0 + Product::size_C, c01.to_vector<int32>());
      aie::store_v(c1, c10.to_vector<int32>());
      aie::store_v(c1 + Product::size_C, c11.to_vector<int32>());
    }
  }
}
