// Cholesky factorisation of the small matrix of a block, which is stored in float64 whatever its rows are solved in,
// and float64 solves with the factor; with the kernels of microkernels.h.
#pragma once

#include <cmath>

#include "microkernels.h"

namespace mfac::cpu {

// Columns per step of the factorisation: all of them are known when the rows below are solved, so larger steps mean
// fewer passes over A, and smaller ones less work in the diagonal blocks, which one thread factors.
constexpr int64_t kCholeskyColumns = 128;

// A = L Lᵀ in place, as cholesky, for n <= kPanel<double>. Column by column; the rows of Lᵀ are vectors.
inline double cholesky_of_panel(double* a, int64_t n, int64_t lda) {
  constexpr int64_t width = kPanel<double>;
  double smallest = INFINITY;
  alignas(64) double rows[width][width] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) rows[j][i] = a[i * lda + j];
  for (int64_t j = 0; j < n; ++j) {
    const double pivot = rows[j][j];
    if (!(pivot > 0)) return pivot;
    if (pivot == INFINITY) return NAN;
    smallest = std::min(smallest, pivot);
    const double root = std::sqrt(pivot), inverse = 1 / root;
    Vector<double> row[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) row[v] = load<double>(rows[j] + v * kLanes<double>) * inverse;
    std::memcpy(rows[j], row, sizeof row);
    rows[j][j] = root;
    for (int64_t i = j + 1; i < n; ++i) {
      const double scale = rows[j][i];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        Vector<double>& out = reinterpret_cast<Vector<double>*>(rows[i])[v];
        out -= scale * row[v];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * lda + j] = rows[j][i];
  return smallest;
}

// The same for n <= kCholeskyColumns, a panel of rows after the other: L is solved for in the columns that are known,
// and what is left on the diagonal is factored. `l` becomes L too.
inline double cholesky_by_rows(double* a, int64_t n, int64_t lda, Triangle<double>& l) {
  constexpr int64_t width = kPanel<double>;
  double smallest = INFINITY;
  alignas(64) double panel[kCholeskyColumns * width];
  for (int64_t i = 0; i < n; i += width) {
    const int64_t count = std::min(width, n - i);
    double* rows = a + i * lda;
    if (i > 0) {
      if (count < width) std::fill_n(panel, i * width, 0.0);
      transpose_copy(rows, lda, count, i, panel, width);
      solve<double>(l, panel, nullptr);
      transpose_copy(static_cast<const double*>(panel), width, i, count, rows, lda);
      gram<double>(panel, count, i, -1.0, rows + i, lda);
    }
    const double pivot = cholesky_of_panel(rows + i, count, lda);
    if (!(pivot > 0)) return pivot;
    smallest = std::min(smallest, pivot);
    l.pack(a, i + count, lda, i);
  }
  return smallest;
}

// A = L Lᵀ in place: the lower triangle of A[n, n] (row stride lda) becomes L; the rest is not touched. Returns the
// smallest pivot min L_ii², or the first pivot that is not positive (<= 0 or NaN); A is then undefined. Right-looking,
// kCholeskyColumns columns at a time. The rows below a diagonal block are solved and multiplied in T, and the products
// are accumulated in float64.
template <typename T = double>
double cholesky(double* a, int64_t n, int64_t lda) {
  constexpr int64_t width = kPanel<T>;
  static_assert(kCholeskyColumns <= kDepth);
  double smallest = INFINITY;
  Buffer<T> panels(n > kCholeskyColumns ? round_up(n - kCholeskyColumns, width) * kCholeskyColumns : 0);
  Triangle<double> exact(std::min(n, kCholeskyColumns));
  Triangle<T> rounded(std::is_same_v<T, double> || n <= kCholeskyColumns ? 0 : kCholeskyColumns);
  for (int64_t k = 0; k < n; k += kCholeskyColumns) {
    const int64_t end = std::min(n, k + kCholeskyColumns), depth = end - k, below = n - end;
    const double pivot = cholesky_by_rows(a + k * lda + k, depth, lda, exact);
    if (!(pivot > 0)) return pivot;
    smallest = std::min(smallest, pivot);
    if (below == 0) break;  // from here on depth is kCholeskyColumns
    if constexpr (!std::is_same_v<T, double>) rounded.pack(a + k * lda + k, depth, lda);
    // Rows below the diagonal block, transposed into panels, are solved there and are then the operand of the update.
    parallel_for(ceil_div(below, width), width * depth * depth, [&](int64_t j) {
      T* panel = panels + j * depth * width;
      double* rows = a + (end + j * width) * lda + k;
      const int64_t columns = std::min(width, below - j * width);
      if (columns < width) std::fill_n(panel, depth * width, T(0));
      if constexpr (std::is_same_v<T, double>) {
        transpose_copy(rows, lda, columns, depth, panel, width);
        solve<T>(exact, panel, nullptr);
        transpose_copy(panel, width, depth, columns, rows, lda);
      } else {
        alignas(64) T square[width * kCholeskyColumns];
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < depth; ++r) square[c * kCholeskyColumns + r] = static_cast<T>(rows[c * lda + r]);
        transpose_copy<T>(square, kCholeskyColumns, columns, depth, panel, width);
        solve<T>(rounded, panel, nullptr);
        transpose_copy<T>(panel, width, depth, columns, square, kCholeskyColumns);
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < depth; ++r) rows[c * lda + r] = square[c * kCholeskyColumns + r];
      }
    });
    gram<T>(panels, below, depth, -1.0, a + end * lda + end, lda);
  }
  return smallest;
}

// The triangle of L in the rows i .. i + kLanes, one vector per row, and the reciprocals of its diagonal.
inline Vector<double> load_triangle(const double* l, int64_t i, int64_t ldl, Vector<double> (&rows)[kLanes<double>]) {
  constexpr int64_t lanes = kLanes<double>;
  Vector<double> diagonal;
#pragma GCC unroll 8
  for (int64_t r = 0; r < lanes; ++r) {
    rows[r] = load<double>(l + (i + r) * ldl + i);
    diagonal[r] = rows[r][r];
  }
  return 1 / diagonal;
}

// x <- L⁻¹ x for one vector, L[n, n] of row stride ldl. As many rows at a time as a vector has elements: their sums are
// transposed and added as vectors, and their triangle is solved in one vector, an element of it final at each step.
inline void forward_substitution(const double* l, int64_t n, int64_t ldl, double* x) {
  constexpr int64_t lanes = kLanes<double>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Vector<double> sums[lanes] = {}, columns[lanes];
    for (int64_t j = 0; j < i; j += lanes) {
      const Vector<double> known = load<double>(x + j);
#pragma GCC unroll 8
      for (int64_t r = 0; r < lanes; ++r) sums[r] += load<double>(l + (i + r) * ldl + j) * known;
    }
    const Vector<double> inverse = load_triangle(l, i, ldl, columns);
    transpose<double>(columns);
    transpose<double>(sums);
    Vector<double> rest = load<double>(x + i), sum = {}, solved;
#pragma GCC unroll 8
    for (int64_t r = 0; r < lanes; ++r) sum += sums[r];
    rest -= sum;
#pragma GCC unroll 8
    for (int64_t r = 0; r < lanes; ++r) {
      const Vector<double> value = rest * inverse;
      solved[r] = value[r];
      rest -= columns[r] * value[r];
    }
    std::memcpy(x + i, &solved, sizeof solved);
  }
  for (; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) x[i] -= l[i * ldl + j] * x[j];
    x[i] /= l[i * ldl + i];
  }
}

// x <- L⁻ᵀ x, in the same way from the last rows on.
inline void backward_substitution(const double* l, int64_t n, int64_t ldl, double* x) {
  constexpr int64_t lanes = kLanes<double>;
  int64_t i = n;
  for (; i % lanes != 0; --i) {
    const double *row = l + (i - 1) * ldl, value = x[i - 1] /= row[i - 1];
    for (int64_t j = 0; j < i - 1; ++j) x[j] -= row[j] * value;
  }
  for (i -= lanes; i >= 0; i -= lanes) {
    Vector<double> rows[lanes], solved[lanes];  // solved: each element in all places
    const Vector<double> inverse = load_triangle(l, i, ldl, rows);
    Vector<double> rest = load<double>(x + i), own;
#pragma GCC unroll 8
    for (int64_t r = lanes - 1; r >= 0; --r) {
      const Vector<double> value = rest * inverse;
      own[r] = value[r];
      solved[r] = Vector<double>{} + value[r];
      rest -= rows[r] * solved[r];
    }
    std::memcpy(x + i, &own, sizeof own);
    for (int64_t j = 0; j < i; j += lanes) {
      Vector<double> value = load<double>(x + j);
#pragma GCC unroll 8
      for (int64_t r = 0; r < lanes; ++r) value -= load<double>(l + (i + r) * ldl + j) * solved[r];
      std::memcpy(x + j, &value, sizeof value);
    }
  }
}

// x <- (L Lᵀ)⁻¹ x for one vector.
inline void cholesky_solve(const double* l, int64_t n, int64_t ldl, double* x) {
  forward_substitution(l, n, ldl, x);
  backward_substitution(l, n, ldl, x);
}

// An upper estimate of the smallest eigenvalue of L Lᵀ, by inverse iteration: four solves, 2 n² flops each, nearly
// always come within a factor of two. (The smallest pivot of L may be n times too large.)
inline double smallest_eigenvalue(const double* l, int64_t n) {
  Buffer<double> x(n);
  double norm = 0;
  for (int64_t i = 0; i < n; ++i)
    x[i] = 1 + 0.1 * static_cast<double>(i * 7919 % 17 - 8);  // fixed, in no special direction
  for (int iteration = 0; iteration < 5; ++iteration) {       // the first only gives a unit vector
    if (iteration > 0) cholesky_solve(l, n, n, x);
    double square = 0;
    for (int64_t i = 0; i < n; ++i) square += x[i] * x[i];
    norm = std::sqrt(square);
    for (int64_t i = 0; i < n; ++i) x[i] /= norm;
  }
  return 1 / norm;
}

}  // namespace mfac::cpu
