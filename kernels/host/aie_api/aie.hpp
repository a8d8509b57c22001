// Host model of the part of aie_api that the kernels use: the same source compiles under g++ and computes the
// same integers. Accumulators wrap at their own width; moving a value out of one shifts, rounds and saturates
// in the modes that are set; a misaligned vector access traps (on a core it reads other bytes without a word);
// a vector, product shape or conversion that the core does not have does not compile.
//
// Semantics from AMD's public documentation of aie_api. No code of aie_api is in here.
#pragma once

#define UNICORN_HOST_MODEL 1

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if __AIE_ARCH__ != 20 && __AIE_ARCH__ != 21
#error "compile with -D__AIE_ARCH__=20 (AIE2) or 21 (AIE2P)"
#endif

using int8 = int8_t;
using uint8 = uint8_t;
using int16 = int16_t;
using uint16 = uint16_t;
using int32 = int32_t;
using uint32 = uint32_t;

struct acc32 {
  using type = int32_t;
};
struct acc64 {
  using type = int64_t;
};

namespace aie {

enum class rounding_mode : unsigned {
  floor,
  ceil,
  positive_inf,
  negative_inf,
  symmetric_inf,
  symmetric_zero,
  conv_even,
  conv_odd,
  symmetric_floor,
  symmetric_ceil
};
enum class saturation_mode : unsigned { none, saturate, symmetric };

namespace model {

// The state of a core after power-up. One per thread: every host thread stands for a core.
inline thread_local rounding_mode rounding = rounding_mode::floor;
inline thread_local saturation_mode saturation = saturation_mode::none;

constexpr unsigned kAlign = __AIE_ARCH__ == 20 ? 32 : 64;  // bytes of one load or store

// v / 2^shift, rounded in the current mode.
inline int64_t round_shift(int64_t v, unsigned shift) {
  if (shift == 0) return v;
  if (shift > 62) __builtin_trap();  // undefined on a core
  const int64_t whole = v >> shift, rest = v - (whole << shift), half = int64_t(1) << (shift - 1);
  const bool above = rest > half, tie = rest == half, odd = whole & 1;
  switch (rounding) {
    case rounding_mode::floor:
      return whole;
    case rounding_mode::ceil:
      return whole + (rest != 0);
    case rounding_mode::positive_inf:
      return whole + (above || tie);
    case rounding_mode::negative_inf:
      return whole + above;
    case rounding_mode::symmetric_inf:
      return whole + (above || (tie && v >= 0));
    case rounding_mode::symmetric_zero:
      return whole + (above || (tie && v < 0));
    case rounding_mode::conv_even:
      return whole + (above || (tie && odd));
    case rounding_mode::conv_odd:
      return whole + (above || (tie && !odd));
    case rounding_mode::symmetric_floor:
      return whole + (v < 0 && rest != 0);
    case rounding_mode::symmetric_ceil:
      return whole + (v >= 0 && rest != 0);
  }
  __builtin_trap();
}

template <class T>
T saturate(int64_t v) {
  if (saturation == saturation_mode::none) return T(v);
  const int64_t hi = std::numeric_limits<T>::max();
  const int64_t lo =
      saturation == saturation_mode::symmetric && std::is_signed_v<T> ? -hi : std::numeric_limits<T>::min();
  return T(v < lo ? lo : v > hi ? hi : v);
}

template <class T>
T wrap_add(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return T(U(U(a) + U(b)));
}

template <class T>
T wrap_sub(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return T(U(U(a) - U(b)));
}

inline void check_aligned(const void* p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % (bytes < kAlign ? bytes : kAlign)) __builtin_trap();
}

}  // namespace model

inline void set_rounding(rounding_mode mode) { model::rounding = mode; }
inline void set_saturation(saturation_mode mode) { model::saturation = mode; }

template <unsigned N>
struct mask {
  bool on[N];
};

template <class T, unsigned N>
struct vector {
  static constexpr unsigned kBytes = sizeof(T) * N;
  // 2048 bits: what a product of 8 x 8 int32 comes out as.
  static_assert(kBytes == 16 || kBytes == 32 || kBytes == 64 || kBytes == 128 || (kBytes == 256 && sizeof(T) == 4),
                "no such vector register");
  T d[N];

  T operator[](unsigned i) const { return d[i]; }
  template <unsigned M>
  vector<T, M> extract(unsigned part) const {
    vector<T, M> r;
    std::memcpy(r.d, d + part * M, sizeof r.d);
    return r;
  }
  template <unsigned M>
  void insert(unsigned part, const vector<T, M>& v) {
    std::memcpy(d + part * M, v.d, sizeof v.d);
  }
};

template <class A, unsigned N>
struct accum {
  using Lane = typename A::type;
  static_assert(sizeof(Lane) * N <= 256, "no such accumulator register");
  Lane d[N];

  accum() { std::memset(d, 0, sizeof d); }
  template <class T>
  vector<T, N> to_vector(unsigned shift = 0) const {
    vector<T, N> r;
    for (unsigned i = 0; i < N; ++i) r.d[i] = model::saturate<T>(model::round_shift(d[i], shift));
    return r;
  }
  template <class T>
  void from_vector(const vector<T, N>& v, unsigned shift = 0) {
    for (unsigned i = 0; i < N; ++i) d[i] = Lane(int64_t(v.d[i]) << shift);
  }
};

template <unsigned N, class T>
vector<T, N> load_v(const T* p) {
  model::check_aligned(p, sizeof(T) * N);
  vector<T, N> r;
  std::memcpy(r.d, p, sizeof r.d);
  return r;
}

template <class T, unsigned N>
void store_v(T* p, const vector<T, N>& v) {
  model::check_aligned(p, sizeof(T) * N);
  std::memcpy(p, v.d, sizeof v.d);
}

template <class T, unsigned N>
vector<T, N> broadcast(T x) {
  vector<T, N> r;
  for (unsigned i = 0; i < N; ++i) r.d[i] = x;
  return r;
}

template <class T, unsigned N>
vector<T, N> zeros() {
  return broadcast<T, N>(T(0));
}

namespace model {

// Element by element. Vectors of 2048 bits only come out of products and go into them.
template <class T, unsigned N, class F>
vector<T, N> map(const vector<T, N>& a, const vector<T, N>& b, F f) {
  static_assert(sizeof(T) * N <= 128, "element by element works on at most 1024 bits");
  vector<T, N> r;
  for (unsigned i = 0; i < N; ++i) r.d[i] = f(a.d[i], b.d[i]);
  return r;
}

}  // namespace model

template <class T, unsigned N>
vector<T, N> add(const vector<T, N>& a, const vector<T, N>& b) {
  return model::map(a, b, [](T x, T y) { return model::wrap_add(x, y); });
}

template <class T, unsigned N>
vector<T, N> sub(const vector<T, N>& a, const vector<T, N>& b) {
  return model::map(a, b, [](T x, T y) { return model::wrap_sub(x, y); });
}

template <class T, unsigned N>
vector<T, N> max(const vector<T, N>& a, const vector<T, N>& b) {
  return model::map(a, b, [](T x, T y) { return x > y ? x : y; });
}

template <class T, unsigned N>
vector<T, N> min(const vector<T, N>& a, const vector<T, N>& b) {
  return model::map(a, b, [](T x, T y) { return x < y ? x : y; });
}

template <class T, unsigned N>
vector<T, N> bit_and(const vector<T, N>& a, const vector<T, N>& b) {
  return model::map(a, b, [](T x, T y) { return T(x & y); });
}

// Arithmetic, rounds down in every mode.
template <class T, unsigned N>
vector<T, N> downshift(const vector<T, N>& a, unsigned shift) {
  return model::map(a, a, [shift](T x, T) { return T(x >> shift); });
}

template <class T, unsigned N>
mask<N> lt(const vector<T, N>& a, const vector<T, N>& b) {
  mask<N> m;
  for (unsigned i = 0; i < N; ++i) m.on[i] = a.d[i] < b.d[i];
  return m;
}

template <class T, unsigned N>
mask<N> ge(const vector<T, N>& a, const vector<T, N>& b) {
  mask<N> m;
  for (unsigned i = 0; i < N; ++i) m.on[i] = a.d[i] >= b.d[i];
  return m;
}

// b where the mask is set, else a.
template <class T, unsigned N>
vector<T, N> select(const vector<T, N>& a, const vector<T, N>& b, const mask<N>& m) {
  vector<T, N> r;
  for (unsigned i = 0; i < N; ++i) r.d[i] = m.on[i] ? b.d[i] : a.d[i];
  return r;
}

template <class T, unsigned N>
T reduce_max(const vector<T, N>& a) {
  T m = a.d[0];
  for (unsigned i = 1; i < N; ++i) m = a.d[i] > m ? a.d[i] : m;
  return m;
}

template <class T, unsigned N>
T reduce_add(const vector<T, N>& a) {
  T s = 0;
  for (unsigned i = 0; i < N; ++i) s = model::wrap_add(s, a.d[i]);
  return s;
}

template <class A, class T, class U, unsigned N>
accum<A, N> mac(const accum<A, N>& c, const vector<T, N>& a, const vector<U, N>& b) {
  static_assert(sizeof(T) + sizeof(U) <= 6 && (sizeof(T) + sizeof(U) <= 4 || sizeof(typename A::type) == 8),
                "products of 16 x 16 bits in acc32 or acc64, of 32 x 16 bits in acc64");
  using Lane = typename A::type;
  accum<A, N> r;
  for (unsigned i = 0; i < N; ++i) r.d[i] = model::wrap_add(c.d[i], Lane(int64_t(a.d[i]) * int64_t(b.d[i])));
  return r;
}

template <class A, class T, class U, unsigned N>
accum<A, N> mul(const vector<T, N>& a, const vector<U, N>& b) {
  return mac(accum<A, N>(), a, b);
}

// C[M, N] += A[M, K] B[K, N], row-major. Only the shapes that both generations have in one instruction or two.
template <unsigned M, unsigned K, unsigned N, class TA, class TB, class A>
struct mmul {
  static_assert(sizeof(TA) == 1 && sizeof(TB) == 1 && std::is_same_v<A, acc32>, "8 x 8 bits with acc32");
  static_assert(K == 8 && N == 8 && (M == 2 || M == 4 || M == 8), "no such product: 2x8x8, 4x8x8, 8x8x8");
  static constexpr unsigned size_A = M * K, size_B = K * N, size_C = M * N;
  accum<A, size_C> c;

  mmul() = default;
  explicit mmul(const vector<int32, size_C>& v) { c.from_vector(v); }
  void mac(const vector<TA, size_A>& a, const vector<TB, size_B>& b) {
    for (unsigned i = 0; i < M; ++i) {
      for (unsigned k = 0; k < K; ++k) {
        const int32 x = a.d[i * K + k];
        for (unsigned j = 0; j < N; ++j) {
          c.d[i * N + j] = model::wrap_add(c.d[i * N + j], x * int32(b.d[k * N + j]));
        }
      }
    }
  }
  template <class T>
  vector<T, size_C> to_vector(unsigned shift = 0) const {
    return c.template to_vector<T>(shift);
  }
};

}  // namespace aie
