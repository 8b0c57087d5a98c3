// Register-tiled matrix kernels that every op on the CPU is built from. No torch in here, no intrinsics: GCC/Clang vector
// types compile to SSE, AVX2, AVX-512 or NEON, whichever the -march flag allows.
//
// Everything runs on one data layout, the *panel*: kPanel<T> columns side by side, stored as [depth][kPanel<T>], 64-byte
// aligned. One microkernel multiplies a kRows x kPanel tile; its accumulators fill the register file and stay there for
// the whole depth, so that a step of the depth, 3 kRows fused multiply-adds, costs 3 vector loads and kRows broadcasts, all
// from L1.
//
//   gram      C  += sign * PᵀP           lower triangle only: half the flops of a plain product
//   solve     P  <- L⁻¹ P, column norms   forward substitution in place, a group of kRows rows at a time
//   cholesky  A  =  L Lᵀ                 right-looking, from the two kernels above
//
// Work is cut into tasks by the shape of the problem alone, and each sum has one fixed order, so results do not depend on
// the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

#if defined(__x86_64__)
#define MFAC_KEEP_IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define MFAC_KEEP_IN_REGISTER(x) asm("" : "+w"(x))
#else
#define MFAC_KEEP_IN_REGISTER(x)
#endif

namespace mfac::cpu {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;  // 8 x 3 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 4;  // 4 x 3 accumulators of 16 registers, 3 for the panel, 1 for the broadcast
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRows = 6;  // 6 x 3 accumulators of 32 registers
#else
constexpr int kVectorBytes = 16, kRows = 2;  // SSE: kRows must divide the panel width, which is 6 in double
#endif
constexpr int kVectors = 3;  // vectors per panel row

template <typename T>
using Vector __attribute__((vector_size(kVectorBytes), may_alias)) = T;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kPanel = kVectors * kLanes<T>;

// Terms summed in registers before they are added to the float64 Gram matrix: a panel of them takes 24 KiB of L1.
constexpr int64_t kDepth = 24 * 1024 / (kVectors * kVectorBytes);
constexpr int64_t kCholesky = 48;  // columns per step of the Cholesky factorisation: a multiple of every kRows

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised, 64-byte aligned scratch memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// out[r][:] = sum_p a[p * kRows + r] * panel[p][:], p < depth. The sums are local so that the compiler can keep them in
// registers: `out` might alias the panel.
template <typename T>
inline void multiply(const T* a, const T* panel, int64_t depth, Vector<T> (&out)[kRows][kVectors]) {
  Vector<T> acc[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p, a += kRows, panel += kPanel<T>) {
    Vector<T> b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      b[v] = reinterpret_cast<const Vector<T>*>(panel)[v];
      MFAC_KEEP_IN_REGISTER(
          b[v]);  // else the compiler loads it anew for every r, and loads bound the loop: a third slower
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[r][v] += a[r] * b[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) out[r][v] = acc[r][v];
}

// row[v] += sign * values[v], v < count, which is a multiple of `step`: a constant, for the compiler to vectorise.
template <typename T, int64_t step>
inline void add_row(double* __restrict row, const T* __restrict values, double sign, int64_t count) {
  for (int64_t v = 0; v < count; v += step)
    for (int64_t s = 0; s < step; ++s) row[v + s] += sign * static_cast<double>(values[v + s]);
}

// Lower triangle of C[n, n] (float64, row stride ldc) += sign * PᵀP, with P[depth, n] cut into panels:
// panel j = `panels + j * depth * kPanel`, columns past n zero; depth <= kDepth, so that a panel stays in L1.
template <typename T>
void gram(const T* panels, int64_t n, int64_t depth, double sign, double* c, int64_t ldc) {
  constexpr int64_t width = kPanel<T>;
  const int64_t count = ceil_div(n, width);
  auto row_of_panels = [&](int64_t i) {
    // The left operand, read kRows columns at a time: the same panel, cut into groups of contiguous [depth][kRows].
    Buffer<T> groups(depth * width);
    const T* panel = panels + i * depth * width;
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t g = 0; g < width / kRows; ++g)
        for (int64_t r = 0; r < kRows; ++r) groups[(g * depth + p) * kRows + r] = panel[p * width + g * kRows + r];
    for (int64_t j = 0; j <= i; ++j)
      for (int64_t g = 0; g < width / kRows && i * width + g * kRows < n; ++g) {
        Vector<T> acc[kRows][kVectors];
        multiply<T>(groups + g * depth * kRows, panels + j * depth * width, depth, acc);
        const T* tile = reinterpret_cast<const T*>(acc);
        const int64_t i0 = i * width + g * kRows;
        for (int64_t r = 0; r < std::min<int64_t>(kRows, n - i0); ++r) {
          double* row = c + (i0 + r) * ldc + j * width;
          if (j < i)
            add_row<T, width>(row, tile + r * width, sign, width);
          else
            add_row<T, 1>(row, tile + r * width, sign, i0 + r + 1 - j * width);
        }
      }
  };
  // The last rows are the longest: each task takes one from either end, so tasks are alike.
  parallel_for(ceil_div(count, 2), n * width * depth, [&](int64_t task) {
    row_of_panels(task);
    if (count - 1 - task != task) row_of_panels(count - 1 - task);
  });
}

// A lower triangular matrix in the order in which `solve` reads it: groups of kRows rows, each [columns][kRows] up to and
// including its diagonal, which holds the reciprocals. Rows past n are those of the identity.
template <typename T>
class Triangle {
 public:
  explicit Triangle(int64_t capacity) : data_(offset(ceil_div(capacity, kRows))) {}

  void pack(const double* l, int64_t n, int64_t ldl) {
    n_ = n;
    for (int64_t g = 0; g < groups(); ++g) {
      T* out = data_ + offset(g);
      for (int64_t j = 0; j < (g + 1) * kRows; ++j)
        for (int64_t r = 0; r < kRows; ++r, ++out) {
          const int64_t i = g * kRows + r;
          if (i == j)
            *out = i < n ? static_cast<T>(1 / l[i * ldl + i]) : T(1);
          else
            *out = j < i && i < n ? static_cast<T>(l[i * ldl + j]) : T(0);
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
// result. The panel has round_up(n, kRows) rows, those past n zero, and stays in L1 or L2 while L streams past once.
template <typename T>
void solve(const Triangle<T>& l, T* panel, T* norms, int64_t first = 0) {
  Vector<T> sums[kVectors] = {};
  for (int64_t g = first; g < l.groups(); ++g) {
    const int64_t row = g * kRows, start = first * kRows;
    const T* a = l.group(g) + start * kRows;
    Vector<T> acc[kRows][kVectors];
    multiply<T>(a, panel + start * kPanel<T>, row - start, acc);
    a = l.group(g) + row * kRows;  // the kRows x kRows triangle on the diagonal
    Vector<T>* x = reinterpret_cast<Vector<T>*>(panel + row * kPanel<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> value = x[r * kVectors + v] - acc[r][v];
        for (int s = 0; s < r; ++s) value -= a[s * kRows + r] * x[s * kVectors + v];
        value *= a[r * kRows + r];
        x[r * kVectors + v] = value;
        sums[v] += value * value;
      }
  }
  if (norms) std::copy_n(reinterpret_cast<const T*>(sums), kPanel<T>, norms);
}

// A = L Lᵀ in place: the lower triangle of A[n, n] (row stride n) becomes L; the rest is not touched. Returns the smallest
// pivot min L_ii², or a value <= 0 (or NaN) at the first pivot that is not positive, with A then in no useful state.
inline double cholesky(double* a, int64_t n) {
  constexpr int64_t width = kPanel<double>;
  const int64_t most = ceil_div(n, width) * width;
  Buffer<double> panels(most * kCholesky);
  Triangle<double> diagonal(kCholesky);
  double smallest = INFINITY;
  for (int64_t k = 0; k < n; k += kCholesky) {
    const int64_t end = std::min(n, k + kCholesky), depth = end - k, padded = round_up(depth, kRows), below = n - end;
    for (int64_t j = k; j < end; ++j) {
      const double pivot = a[j * n + j];
      if (!(pivot > 0)) return pivot;
      smallest = std::min(smallest, pivot);
      a[j * n + j] = std::sqrt(pivot);
      double column[kCholesky];
      for (int64_t i = j + 1; i < end; ++i) column[i - k] = a[i * n + j] /= a[j * n + j];
      for (int64_t i = j + 1; i < end; ++i)
        for (int64_t s = j + 1; s <= i; ++s) a[i * n + s] -= column[i - k] * column[s - k];
    }
    if (below == 0) break;
    diagonal.pack(a + k * n + k, depth, n);
    // Rows below the diagonal block, transposed into panels, are solved there and are then the operand of the update.
    parallel_for(ceil_div(below, width), width * depth * depth, [&](int64_t j) {
      double* panel = panels + j * padded * width;
      const int64_t columns = std::min(width, below - j * width);
      std::fill_n(panel, padded * width, 0.0);
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t p = 0; p < depth; ++p) panel[p * width + c] = a[(end + j * width + c) * n + k + p];
      solve<double>(diagonal, panel, nullptr);
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t p = 0; p < depth; ++p) a[(end + j * width + c) * n + k + p] = panel[p * width + c];
    });
    gram<double>(panels, below, padded, -1.0, a + end * n + end, n);
  }
  return smallest;
}

// x <- (L Lᵀ)⁻¹ x for one vector, L[n, n] of row stride ldl.
inline void cholesky_solve(const double* l, int64_t n, int64_t ldl, double* x) {
  constexpr int64_t lanes = 8;  // sums side by side, for the compiler to vectorise
  for (int64_t i = 0; i < n; ++i) {
    const double* row = l + i * ldl;
    double sums[lanes] = {}, value = x[i];
    int64_t j = 0;
    for (; j + lanes <= i; j += lanes)
      for (int64_t v = 0; v < lanes; ++v) sums[v] += row[j + v] * x[j + v];
    for (; j < i; ++j) value -= row[j] * x[j];
    for (int64_t v = 0; v < lanes; ++v) value -= sums[v];
    x[i] = value / row[i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    x[i] /= l[i * ldl + i];
    for (int64_t j = 0; j < i; ++j) x[j] -= l[i * ldl + j] * x[i];
  }
}

// Smallest eigenvalue of L Lᵀ, from above, by inverse iteration: four solves, n² flops each, nearly always come within a
// factor of two. (The smallest pivot of L may be n times too large.)
inline double smallest_eigenvalue(const double* l, int64_t n) {
  Buffer<double> x(n);
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) x[i] = 1 + 0.1 * static_cast<double>(i * 7919 % 17 - 8);  // no special direction
  for (int iteration = 0; iteration < 5; ++iteration) {  // the first only gives a unit vector
    if (iteration > 0) cholesky_solve(l, n, n, x);
    double square = 0;
    for (int64_t i = 0; i < n; ++i) square += x[i] * x[i];
    norm = std::sqrt(square);
    for (int64_t i = 0; i < n; ++i) x[i] /= norm;
  }
  return 1 / norm;
}

}  // namespace mfac::cpu
