// One block of the Fisher: columns `begin .. begin + width` of the gradient matrix G[m, d], and what all ops do with it.
//
//   capacitance side (m <= n)   A = mλ I + G Gᵀ, [m, m]      F⁻¹ x = (x - Gᵀ A⁻¹ G x) / λ
//   Fisher side      (n <  m)   A = mλ I + GᵀG,  [n, n]      F⁻¹ x = m A⁻¹ x
//
// with n the number of columns in use. A = L Lᵀ is float64 whatever the gradients are. G is read in pieces that fit in L2,
// converted and laid out as panels while they are read; no second [m, width] matrix ever exists.
#pragma once

#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "tiles.h"

namespace mfac::cpu {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// The gradients as the ops receive them, row-major.
template <typename G>
struct Gradients {
  const G* data;  // [m, d], rows `stride` elements apart
  int64_t m, d, stride;
  double damping;      // λ
  int64_t block_size;  // B columns per block, the last block may have fewer

  int64_t blocks() const { return ceil_div(d, block_size); }
  int64_t order() const { return std::min({m, block_size, d}); }  // of the largest factor
};

// The columns of one block that are in use: all of them, or those where mask[i] == keep.
template <typename G>
struct Block {
  const Gradients<G>& grads;
  int64_t begin, width;
  bool dense = true;
  std::vector<int32_t> columns;  // positions within the block, ascending; empty if dense

  Block(const Gradients<G>& g, int64_t index, const bool* mask = nullptr, bool keep = true)
      : grads(g), begin(index * g.block_size), width(std::min(g.block_size, g.d - begin)) {
    if (!mask) return;
    const int64_t used = std::count(mask + begin, mask + begin + width, keep);
    if (used == width) return;
    dense = false;
    columns.reserve(used);
    for (int64_t c = 0; c < width; ++c)
      if (mask[begin + c] == keep) columns.push_back(static_cast<int32_t>(c));
  }
  int64_t size() const { return dense ? width : static_cast<int64_t>(columns.size()); }
  int64_t column(int64_t c) const { return dense ? c : columns[c]; }
  const G* row(int64_t r) const { return grads.data + r * grads.stride + begin; }
  bool capacitance() const { return grads.m <= size(); }
  int64_t order() const { return std::min(grads.m, size()); }  // of A
  double ridge() const { return static_cast<double>(grads.m) * grads.damping; }
};

// Rows [r0, r0 + rows) of columns [c0, c0 + kPanel) as one panel: out[r][c] = G[r0 + r, c0 + c], 0 past the last column.
template <typename T, typename G>
void pack_rows(const Block<G>& block, int64_t r0, int64_t rows, int64_t c0, T* out) {
  constexpr int64_t width = kPanel<T>;
  const int64_t columns = std::min(width, block.size() - c0);
  for (int64_t r = 0; r < rows; ++r, out += width) {
    const G* row = block.row(r0 + r);
    if (block.dense)
      for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<T>(static_cast<float>(row[c0 + c]));
    else
      for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<T>(static_cast<float>(row[block.columns[c0 + c]]));
    std::fill(out + columns, out + width, T(0));
  }
}

// The transpose: rows [r0, r0 + kPanel) of columns [c0, c0 + depth): out[c][r] = G[r0 + r, c0 + c], 0 past the last row.
template <typename T, typename G>
void pack_columns(const Block<G>& block, int64_t r0, int64_t c0, int64_t depth, T* out) {
  constexpr int64_t width = kPanel<T>;
  const int64_t rows = std::min(width, block.grads.m - r0);
  if (rows < width) std::fill_n(out, depth * width, T(0));
  for (int64_t r = 0; r < rows; ++r) {
    const G* row = block.row(r0 + r);
    if (block.dense)
      for (int64_t c = 0; c < depth; ++c) out[c * width + r] = static_cast<T>(static_cast<float>(row[c0 + c]));
    else
      for (int64_t c = 0; c < depth; ++c)
        out[c * width + r] = static_cast<T>(static_cast<float>(row[block.columns[c0 + c]]));
  }
}

// Lower triangle of a[n, n] = ridge I + Gram matrix of the smaller side; products in T, sums over more than kDepth of them
// in float64. Returns the trace, an upper bound of the largest eigenvalue.
template <typename T, typename G>
double gram_block(const Block<G>& block, double ridge, double* a) {
  const bool capacitance = block.capacitance();
  const int64_t n = block.order(), long_side = capacitance ? block.size() : block.grads.m;
  const int64_t panels = ceil_div(n, kPanel<T>);
  Buffer<T> packed(panels * kPanel<T> * std::min(kDepth, long_side));
  std::fill_n(a, n * n, 0.0);
  for (int64_t k = 0; k < long_side; k += kDepth) {
    const int64_t depth = std::min(kDepth, long_side - k);
    parallel_for(panels, depth * kPanel<T>, [&](int64_t j) {
      T* out = packed + j * depth * kPanel<T>;
      if (capacitance)
        pack_columns(block, j * kPanel<T>, k, depth, out);
      else
        pack_rows(block, k, depth, j * kPanel<T>, out);
    });
    gram<T>(packed, n, depth, 1.0, a, n);
  }
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += a[i * n + i] += ridge;
  return trace;
}

// λ [F⁻¹]_ii = 1 - ‖L⁻¹ g_i‖² of a weight that the data constrain far more than λ does: below this, float32 leaves too few
// digits of the difference.
constexpr double kCancellation = 0.2;

// How far a condition number may go before float32 costs the fourth digit. Rounding errors of float32 products are some
// 6e-8 of A's mean diagonal in each element and independent of each other, hence 6e-8 trace(A)/√n in norm, and move
// ‖L⁻¹ g‖² by up to that norm over the smallest eigenvalue μ. Those of a float32 substitution move it by 6e-8 √(trace(A)/μ).
// Both bounds, over kCancellation, are 1e-4.
constexpr double kProductRange = 320, kSolveRange = 1e5;

// Factor by float64 products. Should rounding make A indefinite all the same (a condition number past 1e15), the ridge is
// raised to the rounding error of A, the least change that can be told from none. Returns the trace of A.
template <typename G>
double factor_double(const Block<G>& block, double* l) {
  double raise = 0;
  for (int attempt = 0; attempt < 10; ++attempt) {
    const double trace = gram_block<double>(block, block.ridge() + raise, l);
    if (cholesky(l, block.order()) > 0) return trace;
    raise = std::max(raise * 10, std::numeric_limits<double>::epsilon() * trace);
  }
  throw std::runtime_error("mfac: the gradients of a block have no Cholesky factor; expected finite numbers");
}

// Cholesky factor of A into l[n, n] (row-major, lower triangle; above it zero), from float32 products if those are
// good enough, else from float64 ones. Returns whether float32 is good enough for substitutions with it, too.
template <typename G>
bool factor_block(const Block<G>& block, double* l) {
  const int64_t n = block.order();
  double trace = gram_block<float>(block, block.ridge(), l), smallest = 0;
  if (cholesky(l, n) > 0) smallest = smallest_eigenvalue(l, n);
  if (!(smallest * kProductRange * std::sqrt(static_cast<double>(n)) >= trace)) {
    trace = factor_double(block, l);
    smallest = smallest_eigenvalue(l, n);
  }
  return smallest * kSolveRange >= trace;
}

// t[r] = sum_c G[r, c] x[c] over all columns of the block, in float64.
template <typename G>
void multiply_rows(const Block<G>& block, const double* x, double* t) {
  parallel_for(block.grads.m, block.width, [&](int64_t r) {
    constexpr int64_t lanes = 16;
    const G* row = block.row(r);
    double sums[lanes] = {};
    int64_t c = 0;
    for (; c + lanes <= block.width; c += lanes)
      for (int64_t v = 0; v < lanes; ++v) sums[v] += static_cast<double>(static_cast<float>(row[c + v])) * x[c + v];
    double total = 0;
    for (; c < block.width; ++c) total += static_cast<double>(static_cast<float>(row[c])) * x[c];
    for (int64_t v = 0; v < lanes; ++v) total += sums[v];
    t[r] = total;
  });
}

// x[c] = sum_r G[r, c] t[r] for all columns of the block, in float64.
template <typename G>
void multiply_columns(const Block<G>& block, const double* t, double* x) {
  constexpr int64_t strip = 1024;  // doubles that stay in L1 while every row passes
  parallel_for(ceil_div(block.width, strip), strip * block.grads.m, [&](int64_t s) {
    const int64_t c0 = s * strip, columns = std::min(strip, block.width - c0);
    double* out = x + c0;
    std::fill_n(out, columns, 0.0);
    for (int64_t r = 0; r < block.grads.m; ++r) {
      const G* row = block.row(r) + c0;
      const double scale = t[r];
      for (int64_t c = 0; c < columns; ++c) out[c] += scale * static_cast<double>(static_cast<float>(row[c]));
    }
  });
}

// out = F⁻¹ x for one block, both [width], with L of the block's A in l (row stride ldl). Columns not in use are those of
// F = λ I. Two passes over G on the capacitance side, which stays in the cache between them; none on the Fisher side.
template <typename G>
void apply_inverse(const Block<G>& block, const double* l, int64_t ldl, const double* x, double* out) {
  const double damping = block.grads.damping;
  const int64_t m = block.grads.m, n = block.order(), size = block.size();
  for (int64_t c = 0; c < block.width; ++c) out[c] = x[c] / damping;
  if (n == 0) return;
  if (block.capacitance()) {
    Buffer<double> used(block.width), t(m);
    std::fill_n(static_cast<double*>(used), block.width, 0.0);
    for (int64_t c = 0; c < size; ++c) used[block.column(c)] = x[block.column(c)];
    multiply_rows(block, used, t);
    cholesky_solve(l, n, ldl, t);
    multiply_columns(block, t, used);
    for (int64_t c = 0; c < size; ++c) out[block.column(c)] -= used[block.column(c)] / damping;
  } else {
    Buffer<double> t(n);
    for (int64_t c = 0; c < size; ++c) t[c] = x[block.column(c)];
    cholesky_solve(l, n, ldl, t);
    for (int64_t c = 0; c < size; ++c) out[block.column(c)] = t[c] * static_cast<double>(m);
  }
}

// Runs f(block index) for every block: whole blocks side by side when there are enough of them to keep the threads busy,
// else one after another with the threads inside. Either way each block does the same arithmetic in the same order.
template <typename G, typename F>
void for_each_block(const Gradients<G>& grads, const F& f) {
  const int64_t count = grads.blocks();
  if (count >= 4 * num_threads())
    parallel_for(count, grads.m * grads.block_size * std::min(grads.m, grads.block_size), f);
  else
    for (int64_t b = 0; b < count; ++b) f(b);
}

}  // namespace mfac::cpu
