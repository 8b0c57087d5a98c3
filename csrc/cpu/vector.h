// SIMD vectors of float32 and float64 for the kernels: GCC/Clang vector types compile to SSE, AVX2, AVX-512 or NEON,
// whichever the -march flag allows. Loads that convert, prefetching, and transposition in registers.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace mfac::cpu {

// The width of the vector registers.
#if defined(MFAC_VECTOR_BYTES)  // tests: the shapes of another machine
constexpr int kVectorBytes = MFAC_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
using Vector __attribute__((vector_size(kVectorBytes), may_alias)) = T;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// A vector of `count` elements, a power of two.
template <typename E, int count>
using VectorN __attribute__((vector_size(count * sizeof(E)))) = E;

inline Vector<double> widen(VectorN<float, kLanes<double>> x) {
#if defined(MFAC_VECTOR_BYTES)
  return __builtin_convertvector(x, Vector<double>);
#elif defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(-1, x);  // _mm512_cvtps_pd draws a false warning from GCC 12
#elif defined(__AVX__)
  return _mm256_cvtps_pd(x);  // GCC makes four instructions of __builtin_convertvector
#else
  return __builtin_convertvector(x, Vector<double>);
#endif
}

// kLanes<T> elements as numbers of type T, from any address.
template <typename T, typename G>
inline Vector<T> load(const G* p) {
  if constexpr (std::is_same_v<G, T>) {
    Vector<T> values;
    std::memcpy(&values, p, sizeof values);
    return values;
  } else {
    VectorN<float, kLanes<T>> values;
    if constexpr (std::is_same_v<G, BFloat16>) {
      VectorN<uint16_t, kLanes<T>> bits;
      std::memcpy(&bits, p, sizeof bits);
      const auto wide = __builtin_convertvector(bits, VectorN<uint32_t, kLanes<T>>) << 16;
      std::memcpy(&values, &wide, sizeof values);
    } else {
      std::memcpy(&values, p, sizeof values);
    }
    if constexpr (std::is_same_v<T, double>)
      return widen(values);
    else
      return values;
  }
}
template <typename T, typename G>
inline T convert(G g) {
  return static_cast<T>(static_cast<float>(g));
}

// The first `count` elements of x, zeros after them.
template <typename T>
inline Vector<T> first_of(Vector<T> x, int64_t count) {
  constexpr int lanes = kLanes<T>;
  if (count >= lanes) return x;
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Integers = VectorN<Integer, lanes>;
  Integers index, bits;
  for (int i = 0; i < lanes; ++i) index[i] = i;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= index < Integers{} + static_cast<Integer>(count);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// Prefetches the lines of p[0 .. count) into L2.
template <typename G>
inline void prefetch(const G* p, int64_t count) {
  constexpr int64_t line = 64 / sizeof(G);  // elements of a cache line
  for (int64_t c = 0; c < count; c += line) __builtin_prefetch(p + c, 0, 2);
}

// x[i][j] <- x[j][i] for a square of vectors: every round interleaves row i with row i + half.
template <typename T>
inline void transpose(Vector<T> (&x)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  const auto interleave = []<int... i>(std::integer_sequence<int, i...>, Vector<T> a, Vector<T> b, auto high) {
    constexpr int from = high() ? lanes / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (from + i / 2 + (i % 2 ? lanes : 0))...);
#else  // GCC 11
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    return __builtin_shuffle(a, b, VectorN<Index, lanes>{(from + i / 2 + (i % 2 ? lanes : 0))...});
#endif
  };
  for (int round = 1; round < lanes; round *= 2) {
    Vector<T> y[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      constexpr auto all = std::make_integer_sequence<int, lanes>();
      y[2 * i] = interleave(all, x[i], x[i + lanes / 2], std::false_type());
      y[2 * i + 1] = interleave(all, x[i], x[i + lanes / 2], std::true_type());
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = y[i];
  }
}

// out[c][r] = in[r][c], r < rows, c < columns; row strides ldi and ldo.
template <typename T>
inline void transpose_copy(const T* in, int64_t ldi, int64_t rows, int64_t columns, T* out, int64_t ldo) {
  constexpr int lanes = kLanes<T>;
  for (int64_t r = 0; r < rows; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes)
      if (r + lanes <= rows && c + lanes <= columns) {
        Vector<T> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) std::memcpy(&square[i], in + (r + i) * ldi + c, sizeof square[i]);
        transpose<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) std::memcpy(out + (c + i) * ldo + r, &square[i], sizeof square[i]);
      } else {
        for (int64_t i = r; i < std::min(r + lanes, rows); ++i)
          for (int64_t j = c; j < std::min(c + lanes, columns); ++j) out[j * ldo + i] = in[i * ldi + j];
      }
}

}  // namespace mfac::cpu
