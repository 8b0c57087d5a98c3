// Register-tiled matrix kernels that every CPU op is built from. No torch in here.
//
// All of them use one data layout, the *panel*: kPanel<T> columns, packed as [depth][kPanel<T>], 64-byte aligned. One
// microkernel multiplies a kRows x kPanel tile; its accumulators fill the register file and stay there for the whole
// depth, so that a step of the depth, 3 kRows fused multiply-adds, costs 3 vector loads and kRows broadcasts, all from
// L1.
//
//   multiply   A Bᵀ                       the microkernel
//   gram       C += sign * PᵀP            lower triangle only: half the flops of a plain product
//   solve      P <- L⁻¹ P, column norms   forward substitution in place, a group of kRows rows at a time
//
// Work is cut into tasks by the shape of the problem alone, and each sum has one fixed order, so results do not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "scratch.h"
#include "vector.h"

#if defined(__x86_64__) && !defined(MFAC_VECTOR_BYTES)
#define MFAC_KEEP_IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define MFAC_KEEP_IN_REGISTER(x) asm("" : "+w"(x))
#else
#define MFAC_KEEP_IN_REGISTER(x)
#endif

namespace mfac::cpu {

// Rows of a tile, which divide the width of a panel: with 3 accumulators each they nearly fill the registers, of which
// AVX-512 and aarch64 have 32 and AVX2 16.
#if defined(__aarch64__)
constexpr int kRows = 6;
#else
constexpr int kRows = kVectorBytes / 8;
#endif
constexpr int kVectors = 3;  // per panel row: with 3, a broadcast serves three multiply-adds
template <typename T>
constexpr int kPanel = kVectors * kLanes<T>;
static_assert(kPanel<float> % kRows == 0 && kPanel<double> % kRows == 0);

// Depth of a panel that is multiplied at once. With AVX-512 two panels take 48 KiB: all of an Intel's L1, and more than
// an AMD's, where the one that changes less stays there; adding a product to C then costs half as much as at 64.
constexpr int64_t kDepth = 128;
constexpr int64_t kPartial = 32;  // terms of a partial sum, for smaller rounding errors (see multiply)

// The first `rows` rows of out[r][v] = sum_p a[p * stride + r] * panel[p][v], p < depth, for the first kUsed vectors v
// of a panel of `width` columns. In partial sums of kPartial terms: the rounding error of a sum of 128 terms is a third
// of that of a sequential sum. Not inlined: it uses all registers, and inlining would cause spills.
template <typename T, int kUsed = kVectors, int rows = kRows>
[[gnu::noinline]] void multiply(const T* a, int64_t stride, const T* panel, int64_t width, int64_t depth,
                                Vector<T>* out) {
  Vector<T> total[rows][kUsed] = {};
  while (depth > 0) {
    Vector<T> acc[rows][kUsed] = {};
    for (int64_t p = std::min(depth, kPartial); p > 0; --p, a += stride, panel += width) {
      Vector<T> b[kUsed];
#pragma GCC unroll 3
      for (int v = 0; v < kUsed; ++v) {
        b[v] = reinterpret_cast<const Vector<T>*>(panel)[v];
        MFAC_KEEP_IN_REGISTER(b[v]);  // otherwise loaded again for every r, and loads bound the loop: a third slower
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kUsed; ++v) acc[r][v] += a[r] * b[v];
    }
    depth -= kPartial;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kUsed; ++v) total[r][v] += acc[r][v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kUsed; ++v) out[r * kUsed + v] = total[r][v];
}

// Adds sign * tile[kRows][kUsed vectors] to C, of which row r takes the first columns(r) values.
template <typename T, int kUsed, typename F>
inline void add_tile(const Vector<T>* tile, double sign, double* c, int64_t ldc, int64_t rows, const F& columns) {
  const T* value = reinterpret_cast<const T*>(tile);
  constexpr int64_t width = kUsed * kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, value += width, c += ldc) {
    const int64_t count = columns(r);
    if (count >= width)
      for (int64_t v = 0; v < width; ++v) c[v] += sign * static_cast<double>(value[v]);
    else
      for (int64_t v = 0; v < count; ++v) c[v] += sign * static_cast<double>(value[v]);
  }
}

// Calls f with the constant kUsed = `count`, from 1 to kVectors.
template <typename F>
inline void with_vectors(int64_t count, const F& f) {
  if (count == 1) f(std::integral_constant<int, 1>());
  if (count == 2) f(std::integral_constant<int, 2>());
  if (count == 3) f(std::integral_constant<int, 3>());
}

// The width that panel j of n columns needs: the last one may do with fewer vectors than the others.
template <typename T>
constexpr int64_t panel_width(int64_t n, int64_t j) {
  return std::min<int64_t>(kPanel<T>, round_up(round_up(n - j * kPanel<T>, kRows), kLanes<T>));
}

// Lower triangle of C[n, n] (float64, row stride ldc) += sign * PᵀP, with P[depth, n] cut into panels:
// panel j = `panels + j * depth * kPanel`, columns past n zero; the last one has `last_width` columns. depth <= kDepth:
// the two panels that meet stay in L1.
template <typename T>
void gram(const T* panels, int64_t n, int64_t depth, double sign, double* c, int64_t ldc,
          int64_t last_width = kPanel<T>) {
  constexpr int64_t width = kPanel<T>;
  const int64_t count = ceil_div(n, width);
  const auto row_of_panels = [&](int64_t i) {
    const int64_t stride = i + 1 < count ? width : last_width;
    for (int64_t j = 0; j <= i; ++j)
      for (int64_t g = 0; g < width / kRows && i * width + g * kRows < n; ++g) {
        const T *a = panels + i * depth * width + g * kRows, *b = panels + j * depth * width;
        const int64_t i0 = i * width + g * kRows, rows = std::min<int64_t>(kRows, n - i0);
        double* out = c + i0 * ldc + j * width;
        Vector<T> tile[kRows * kVectors];
        // On the diagonal only the vectors that reach below it.
        const int64_t used = j < i ? kVectors : ceil_div(g * kRows + rows, kLanes<T>);
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(out + r * ldc, 1);
        with_vectors(used, [&]<int kUsed>(std::integral_constant<int, kUsed>) {
          const int64_t columns = j < i ? width : stride;
          if (rows > kRows / 2)
            multiply<T, kUsed>(a, stride, b, columns, depth, tile);
          else
            multiply<T, kUsed, kRows / 2>(a, stride, b, columns, depth, tile);
          add_tile<T, kUsed>(tile, sign, out, ldc, rows, [&](int64_t r) { return i0 + r + 1 - j * width; });
        });
      }
  };
  // The last rows are the longest: each task takes one from either end, for equal work.
  parallel_for(ceil_div(count, 2), n * width * depth, [&](int64_t task) {
    row_of_panels(task);
    if (count - 1 - task != task) row_of_panels(count - 1 - task);
  });
}

// A lower triangular matrix packed in the order in which `solve` reads it: groups of kRows rows, each [columns][kRows]
// up to and including its diagonal, which has the reciprocals. Rows past n are those of the identity.
template <typename T>
class Triangle {
 public:
  explicit Triangle(int64_t capacity) : data_(offset(ceil_div(capacity, kRows))) {}

  // L[n, n], row stride ldl. Rows before `first`, a multiple of kRows, are packed already.
  void pack(const double* l, int64_t n, int64_t ldl, int64_t first = 0) {
    constexpr int64_t lanes = kLanes<double>;
    n_ = n;
    for (int64_t g = first / kRows; g < groups(); ++g) {
      T* out = data_ + offset(g);
      const int64_t i0 = g * kRows, rows = std::min<int64_t>(kRows, n - i0);
      int64_t transposed = 0;
      if constexpr (kRows == lanes)
        for (; rows == kRows && transposed + lanes <= i0; transposed += lanes) {
          Vector<double> square[lanes];
#pragma GCC unroll 8
          for (int r = 0; r < lanes; ++r) square[r] = load<double>(l + (i0 + r) * ldl + transposed);
          transpose<double>(square);
#pragma GCC unroll 8
          for (int r = 0; r < lanes; ++r) {
            const auto values = __builtin_convertvector(square[r], VectorN<T, lanes>);
            std::memcpy(out + (transposed + r) * kRows, &values, sizeof values);
          }
        }
      for (int64_t r = 0; r < kRows; ++r) {
        const double* row = l + (i0 + r) * ldl;
        const int64_t count = r < rows ? i0 + r : 0;
        for (int64_t j = transposed; j < count; ++j) out[j * kRows + r] = static_cast<T>(row[j]);
        for (int64_t j = count; j < i0 + kRows; ++j) out[j * kRows + r] = T(0);
        out[(i0 + r) * kRows + r] = r < rows ? static_cast<T>(1 / row[i0 + r]) : T(1);
      }
    }
  }
  int64_t groups() const { return ceil_div(n_, kRows); }
  const T* group(int64_t g) const { return data_ + offset(g); }

 private:
  static int64_t offset(int64_t g) { return g * (g + 1) / 2 * kRows * kRows; }
  Buffer<T> data_;
  int64_t n_ = 0;
};

// panel <- L⁻¹ panel, from row group `first` on (rows before it are known to be zero); norms[c] = ‖column c‖² of the
// result. The panel has round_up(n, kRows) rows, those past n zero. Blocked substitution, in steps of at most kDepth
// rows: the known rows are subtracted from all rows of a step before the step is solved, so that two pieces of the
// panel stay near while L is streamed once.
template <typename T>
void solve(const Triangle<T>& l, T* panel, T* norms, int64_t first = 0) {
  constexpr int64_t step = kDepth / kRows;
  Vector<T> sums[kVectors] = {}, acc[kRows * kVectors];
  const auto rows = [&](int64_t group) { return reinterpret_cast<Vector<T>*>(panel + group * kRows * kPanel<T>); };
  const auto product = [&](int64_t g, int64_t from, int64_t to) {  // L[group g, groups from .. to] times those rows
    multiply<T>(l.group(g) + from * kRows * kRows, kRows, panel + from * kRows * kPanel<T>, kPanel<T>,
                (to - from) * kRows, acc);
  };
  for (int64_t begin = first; begin < l.groups(); begin += step) {
    const int64_t end = std::min(begin + step, l.groups());
    for (int64_t known = first; known < begin; known += step)
      for (int64_t g = begin; g < end; ++g) {
        product(g, known, known + step);
        Vector<T>* x = rows(g);
#pragma GCC unroll 24
        for (int i = 0; i < kRows * kVectors; ++i) x[i] -= acc[i];
      }
    for (int64_t g = begin; g < end; ++g) {
      product(g, begin, g);
      const T* a = l.group(g) + g * kRows * kRows;  // the kRows x kRows triangle on the diagonal
      Vector<T>* x = rows(g);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> value = x[r * kVectors + v] - acc[r * kVectors + v];
          for (int s = 0; s < r; ++s) value -= a[s * kRows + r] * x[s * kVectors + v];
          value *= a[r * kRows + r];
          x[r * kVectors + v] = value;
          sums[v] += value * value;
        }
    }
  }
  if (norms) std::copy_n(reinterpret_cast<const T*>(sums), kPanel<T>, norms);
}

}  // namespace mfac::cpu
