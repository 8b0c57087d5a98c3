// Diagonal of F⁻¹ of one block, from its factor.
//
//   capacitance side   [F⁻¹]_ii = (1 - ‖L⁻¹ g_i‖²) / λ      g_i = column i of G
//   Fisher side        [F⁻¹]_ii = m ‖L⁻¹ e_i‖²              e_i = column i of the identity
//
// m² flops per weight (m < B). Columns are solved kPanel at a time in a panel that stays in L1 or L2, so that L⁻¹ G is
// never stored; or L⁻¹ G is a bfloat16 product (bf16_products.h).
//
// 1 - ‖.‖² loses digits where the data constrain a weight far more than λ does: a panel in which it falls below
// kCancellation is solved again in float64, from a float64 factor, with 1/F_ii <= [F⁻¹]_ii as a lower bound. On the
// Fisher side, where nothing cancels, 1/λ is the upper bound.
#pragma once

#include "block.h"

namespace mfac::cpu {

// out[c] = [F⁻¹]_cc for columns [c0, c0 + kPanel) of the block. Returns the smallest 1 - ‖L⁻¹ g_c‖² met, 1 on the
// Fisher side, where nothing cancels.
template <typename T, typename G>
double solve_panel(const Block<G>& block, const Triangle<T>& l, int64_t c0, double* out) {
  constexpr int64_t width = kPanel<T>;
  const int64_t n = block.order(), padded = round_up(n, kRows), columns = std::min(width, block.size() - c0);
  const double damping = block.grads.damping, m = static_cast<double>(block.grads.m);
  Buffer<T> panel(padded * width);
  T norms[width];
  if (!block.capacitance()) {
    std::fill_n(static_cast<T*>(panel), padded * width, T(0));
    for (int64_t c = 0; c < columns; ++c) panel[(c0 + c) * width + c] = T(1);
    solve(l, static_cast<T*>(panel), norms, c0 / kRows);
    for (int64_t c = 0; c < columns; ++c) out[c] = std::min(m * norms[c], 1 / damping);
    return 1;
  }
  const bool ahead = block.dense && c0 + 2 * width <= block.width;
  pack_rows<T>(block, 0, n, c0, width, ahead ? width : 0, panel);
  double squares[width] = {};
  if constexpr (std::is_same_v<T, double>)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < width; ++c) squares[c] += panel[r * width + c] * panel[r * width + c];
  std::fill(panel + n * width, panel + padded * width, T(0));
  solve(l, static_cast<T*>(panel), norms);
  double smallest = 1;
  for (int64_t c = 0; c < columns; ++c) {
    const double rest = 1 - static_cast<double>(norms[c]);
    if (!(rest >= smallest)) smallest = rest;  // NaN too, from gradients that overflow float32
    out[c] = rest / damping;
    if constexpr (std::is_same_v<T, double>) out[c] = std::max(out[c], 1 / (damping + squares[c] / m));
  }
  return smallest;
}

// The same for kSolveColumns columns by bfloat16 products. done[j]: nothing cancelled in panel j of float32.
template <typename G>
void solve_columns(const Block<G>& block, const InverseTiles& l, int64_t c0, int terms, double* out, char* done) {
  float norms[kSolveColumns];
  solve_terms(block, l, c0, terms, norms);
  for (int64_t c = 0; c < std::min(kSolveColumns, block.size() - c0); ++c) {
    const double rest = 1 - static_cast<double>(norms[c]);
    char& good = done[c / kPanel<float>];
    good = (c % kPanel<float> == 0 || good) && rest >= kCancellation;
    out[c] = rest / block.grads.damping;
  }
}

// diagonal[c] for the columns in use of `block`; others are not written. `packed` has the same columns, packed or not.
// `factor` [n, n] is from factor_block; it is overwritten if a float64 factor is needed.
template <typename G>
void block_diagonal(const Block<G>& block, const Block<G>& packed, const Precision& precision, double* factor,
                    float* diagonal) {
  const int64_t n = packed.order(), size = packed.size();
  if (n == 0) return;

  // First all panels in float32, if the factor is good enough for that; then in float64 those that cancelled, or all.
  constexpr int64_t width = kPanel<float>, half = kPanel<double>;
  const int64_t panels = ceil_div(size, width);
  std::vector<char> done(panels, 0);
  const auto store = [&](int64_t c0, int64_t columns, const double* values) {
    using Limits = std::numeric_limits<float>;
    for (int64_t c = 0; c < columns; ++c)
      diagonal[block.column(c0 + c)] = static_cast<float>(std::clamp<double>(values[c], Limits::min(), Limits::max()));
  };
  if (precision.float_solve && precision.terms > 0 && inverse_by_products(packed)) {
    Triangle<float> triangle(n);
    triangle.pack(factor, n, n);
    const InverseTiles l(triangle, n, std::is_same_v<G, BFloat16> ? kMaxTerms : 2, precision.smallest);
    parallel_for(ceil_div(size, kSolveColumns), n * n * kSolveColumns, [&](int64_t j) {
      double values[kSolveColumns];
      solve_columns(packed, l, j * kSolveColumns, precision.terms, values, &done[j * kSolveColumns / width]);
      store(j * kSolveColumns, std::min(kSolveColumns, size - j * kSolveColumns), values);
    });
  } else if (precision.float_solve) {
    Triangle<float> l(n);
    l.pack(factor, n, n);
    parallel_for(panels, n * n * width, [&](int64_t j) {
      double values[width];
      done[j] = solve_panel(packed, l, j * width, values) >= kCancellation;
      store(j * width, std::min(width, size - j * width), values);
    });
  }
  if (std::count(done.begin(), done.end(), 1) == panels) return;
  if (!precision.exact_factor) factor_double(packed, factor);
  Triangle<double> l(n);
  l.pack(factor, n, n);
  parallel_for(2 * panels, n * n * half, [&](int64_t j) {
    double values[half];
    if (done[j / 2] || j * half >= size) return;
    solve_panel(packed, l, j * half, values);
    store(j * half, std::min(half, size - j * half), values);
  });
}

}  // namespace mfac::cpu
