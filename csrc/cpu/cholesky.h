// Cholesky factorisation of the small matrix of a block and solves with the factor, in float64, with the kernels of
// microkernels.h.
#pragma once

#include <cmath>

#include "microkernels.h"

namespace mfac::cpu {

// Columns per step of the factorisation, a multiple of every kRows. Larger steps mean fewer passes over A, smaller ones
// less work in the diagonal blocks, which are slower; these are factored in steps of kDiagonal.
constexpr int64_t kCholesky = 48, kDiagonal = round_up(12, kRows);

// A = L Lᵀ in place: the lower triangle of A[n, n] (row stride lda) becomes L; the rest is not touched. Returns the
// smallest pivot min L_ii², or the first pivot that is not positive (<= 0 or NaN); A is then undefined. Right-looking,
// kStep columns at a time; their diagonal block is factored the same way in smaller steps. The rows below it are solved
// and multiplied in T, and the products are accumulated in float64.
template <typename T = double, int64_t kStep = kCholesky>
double cholesky(double* a, int64_t n, int64_t lda) {
  constexpr int64_t width = kPanel<T>;
  double smallest = INFINITY;
  if constexpr (kStep == 1) {
    for (int64_t j = 0; j < n; ++j) {
      double* column = a + j;
      const double pivot = column[j * lda];
      if (!(pivot > 0)) return pivot;
      smallest = std::min(smallest, pivot);
      column[j * lda] = std::sqrt(pivot);
      const double inverse = 1 / column[j * lda];
      for (int64_t i = j + 1; i < n; ++i) column[i * lda] *= inverse;
      for (int64_t i = j + 1; i < n; ++i)
        for (int64_t s = j + 1; s <= i; ++s) a[i * lda + s] -= column[i * lda] * column[s * lda];
    }
    return smallest;
  } else {
    static_assert(kStep % kRows == 0);
    Buffer<T> panels(round_up(n, width) * kStep);
    Triangle<T> diagonal(kStep);
    for (int64_t k = 0; k < n; k += kStep) {
      const int64_t end = std::min(n, k + kStep), depth = end - k, below = n - end;
      const double pivot = cholesky<double, kStep == kCholesky ? kDiagonal : 1>(a + k * lda + k, depth, lda);
      if (!(pivot > 0)) return pivot;
      smallest = std::min(smallest, pivot);
      if (below == 0) break;  // from here on depth is kStep
      diagonal.pack(a + k * lda + k, depth, lda);
      // Rows below the diagonal block, transposed into panels, are solved there and are then the operand of the update.
      parallel_for(ceil_div(below, width), width * depth * depth, [&](int64_t j) {
        T* panel = panels + j * depth * width;
        double* rows = a + (end + j * width) * lda + k;
        const int64_t columns = std::min(width, below - j * width);
        if (columns < width) std::fill_n(panel, depth * width, T(0));
        if constexpr (std::is_same_v<T, double>) {
          transpose_copy(rows, lda, columns, depth, panel, width);
          solve<T>(diagonal, panel, static_cast<T*>(nullptr));
          transpose_copy(panel, width, depth, columns, rows, lda);
        } else {
          alignas(64) T square[width * kStep];
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < depth; ++r) square[c * kStep + r] = static_cast<T>(rows[c * lda + r]);
          transpose_copy<T>(square, kStep, columns, depth, panel, width);
          solve<T>(diagonal, panel, static_cast<T*>(nullptr));
          transpose_copy<T>(panel, width, depth, columns, square, kStep);
          for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < depth; ++r) rows[c * lda + r] = square[c * kStep + r];
        }
      });
      gram<T>(panels, below, depth, -1.0, a + end * lda + end, lda);
    }
    return smallest;
  }
}

// x <- (L Lᵀ)⁻¹ x for one vector, L[n, n] of row stride ldl. Four rows at a time, for four independent sums.
inline void cholesky_solve(const double* l, int64_t n, int64_t ldl, double* x) {
  constexpr int64_t rows = 4, lanes = kLanes<double>;
  for (int64_t i = 0; i < n; i += rows) {
    const double* row = l + i * ldl;
    const int64_t count = std::min(rows, n - i);
    Vector<double> sums[rows] = {};
    int64_t known = 0;
    for (; count == rows && known + lanes <= i; known += lanes) {
      const Vector<double> part = load<double>(x + known);
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) sums[r] += load<double>(row + r * ldl + known) * part;
    }
    for (int64_t r = 0; r < count; ++r) {
      double value = x[i + r];
      for (int64_t v = 0; v < lanes; ++v) value -= sums[r][v];
      for (int64_t j = known; j < i + r; ++j) value -= row[r * ldl + j] * x[j];
      x[i + r] = value / row[r * ldl + i + r];
    }
  }
  for (int64_t i = (n - 1) / rows * rows; i >= 0; i -= rows) {
    const double* row = l + i * ldl;
    const int64_t count = std::min(rows, n - i);
    Vector<double> step[rows] = {};
    for (int64_t r = count - 1; r >= 0; --r) {
      x[i + r] /= row[r * ldl + i + r];
      for (int64_t s = 0; s < r; ++s) x[i + s] -= row[r * ldl + i + s] * x[i + r];
      step[r] += x[i + r];
    }
    int64_t j = 0;
    for (; count == rows && j + lanes <= i; j += lanes) {
      Vector<double> value = load<double>(x + j);
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) value -= load<double>(row + r * ldl + j) * step[r];
      std::memcpy(x + j, &value, sizeof value);
    }
    for (; j < i; ++j)
      for (int64_t r = 0; r < count; ++r) x[j] -= row[r * ldl + j] * x[i + r];
  }
}

// An upper estimate of the smallest eigenvalue of L Lᵀ, by inverse iteration: four solves, n² flops each, nearly always
// come within a factor of two. (The smallest pivot of L may be n times too large.)
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
