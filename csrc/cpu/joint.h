// Joint update of one block: with S the kept and Q the pruned weights, minimise ½ δᵀFδ subject to δ_Q = -w_Q:
//
//   r = G_Q w_Q
//   |S| > m     δ_S = G_Sᵀ y,              y = (mλ I + G_S G_Sᵀ)⁻¹ r      Gδ = -mλ y
//   |S| <= m    δ_S = (mλ I + G_SᵀG_S)⁻¹ G_Sᵀ r                           Gδ = G_S δ_S - r
//   loss        ½ (λ ‖δ‖² + ‖Gδ‖² / m)
//
// (block inverse of F and the push-through identity). G is read from memory once: as a row is read for r, its kept
// columns are packed, and later passes use the packed copy, in the cache. So the cost falls with the density: m |S|
// min(m, |S|) flops. Weights pruned earlier are zero and drop out. If mλ I + G Gᵀ is held for a superset of S
// (HeldGram), the other columns of the superset are packed too, and their products are subtracted.
//
// If A = mλ I + GᵀG is held for all columns whose weights are not zero, G is not read at all:
//
//   |S| <= m    δ_S = A_SS⁻¹ A_SQ w_Q      loss = δᵀAδ / 2m
#pragma once

#include "diagonal.h"
#include "held_gram.h"

namespace mfac::cpu {

inline double norm_squared(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// The update from a held A: x [width] is w on Q and zero elsewhere, and becomes δ_S on S. False, with x as before, if A
// is not held or not precise enough. diagonal[width], unless null: diag F⁻¹ on S.
template <typename G>
bool update_held(const Block<G>& survivors, HeldGram& gram, double* x, double& loss, float* diagonal) {
  std::vector<int32_t> where;
  if (survivors.capacitance() || survivors.size() == 0 || !gram.find(survivors, where)) return false;
  const int64_t n = survivors.size(), held = gram.size();
  Buffer<double> l(n * n), step(held), product(held), solved(n);
  double all = 0;
  for (int64_t c = 0; c < survivors.width; ++c) all += x[c] != 0;
  for (int64_t i = 0; i < held; ++i) all -= (step[i] = x[gram.columns()[i]]) != 0;
  if (all != 0) return false;  // a weight of a column that is not held
  Precision precision;
  if (!factor_held(survivors, where, /*removed=*/survivors, gram, l, precision)) return false;
  gram.multiply(step, product);
  for (int64_t i = 0; i < n; ++i) solved[i] = product[where[i]];
  cholesky_solve(l, n, n, solved);
  for (int64_t i = 0; i < held; ++i) step[i] = -step[i];
  for (int64_t i = 0; i < n; ++i) x[survivors.column(i)] = step[where[i]] = solved[i];
  gram.multiply(step, product);
  double form = 0;
  for (int64_t i = 0; i < held; ++i) form += step[i] * product[i];
  loss = 0.5 * form / static_cast<double>(survivors.grads.m);
  gram.shrink(where);
  if (diagonal) block_diagonal(survivors, survivors, precision, l, diagonal);
  return true;
}

// y <- A⁻¹ r for the A of a block on the capacitance side, by one step of iterative refinement: y + A⁻¹ (r - A y), with
// the residual from G itself in float64. It squares the error of the factor, and takes two more passes over a block in
// the cache.
template <typename G>
void refine(const Block<G>& block, const double* l, const double* r, double* y) {
  const int64_t m = block.grads.m, size = block.size();
  Buffer<double> step(block.width), used(block.width), residual(m);
  multiply_columns(block, y, 1, step);
  std::fill_n(static_cast<double*>(used), block.width, 0.0);
  for (int64_t c = 0; c < size; ++c) used[block.column(c)] = step[block.column(c)];
  multiply_rows(block, used, 1, residual);
  for (int64_t i = 0; i < m; ++i) residual[i] = r[i] - block.ridge() * y[i] - residual[i];
  cholesky_solve(l, m, m, residual);
  for (int64_t i = 0; i < m; ++i) y[i] += residual[i];
}

// The same from G, and on the capacitance side from a held A if there is one; stores A in `gram` if there is room. With
// nothing to prune only the diagonal is computed.
template <typename G>
void update_from_gradients(const Block<G>& block, int64_t index, HeldGram& gram, double* x, double& loss,
                           float* diagonal) {
  const int64_t m = block.grads.m, width = block.width, n = block.order(), size = block.size();
  const double removed = norm_squared(x, width);
  std::vector<int32_t> where;
  const bool found = block.capacitance() && gram.find(block, where);
  const Gradients<G> rows = capacitance_only(block.grads);
  const Block<G> rest(rows, index, found ? gram.others(where) : std::vector<int32_t>());
  const PackedColumns<G> packed(block), packed_rest(rest);
  Buffer<double> r(m);
  parallel_for(m, width, [&](int64_t i) {
    if (i + 3 < m) prefetch(block.row(i + 3), width);
    r[i] = 0;
    if (removed != 0) dot_rows<1>(block, i, 0, width, x, 0, r + i);
    if (packed.copied()) packed.copy_row(i);
    if (packed_rest.copied()) packed_rest.copy_row(i);
  });
  const Block<G>& survivors = packed.block();

  double gradient_term = norm_squared(r, m), moved = 0;
  if (n > 0) {
    Buffer<double> l(n * n), step(survivors.width), z(size);
    Precision precision;
    if (!found || !factor_held(block, where, packed_rest.block(), gram, l, precision))
      precision = factor_block(survivors, l, [&](const double* a, Products products, double rounding) {
        gram.store(block, a, products, rounding);
      });
    if (diagonal && removed == 0) return block_diagonal(block, survivors, precision, l, diagonal);
    if (survivors.capacitance()) {
      Buffer<double> given(m);
      std::copy_n(static_cast<double*>(r), m, static_cast<double*>(given));
      cholesky_solve(l, n, n, r);
      if (precision.refine) refine<G>(survivors, l, given, r);
    }
    multiply_columns(survivors, r, 1, step);
    for (int64_t c = 0; c < size; ++c) z[c] = step[survivors.column(c)];
    if (survivors.capacitance()) {
      gradient_term = survivors.ridge() * survivors.ridge() * norm_squared(r, m);
    } else {
      cholesky_solve(l, n, n, z);
      std::fill_n(static_cast<double*>(step), survivors.width, 0.0);
      for (int64_t c = 0; c < size; ++c) step[survivors.column(c)] = z[c];
      Buffer<double> moved_rows(m);
      multiply_rows(survivors, step, 1, moved_rows);
      for (int64_t i = 0; i < m; ++i) moved_rows[i] -= r[i];
      gradient_term = norm_squared(moved_rows, m);
    }
    moved = norm_squared(z, size);
    for (int64_t c = 0; c < size; ++c) x[block.column(c)] = z[c];
    if (diagonal) block_diagonal(block, survivors, precision, l, diagonal);
  }
  loss = 0.5 * (block.grads.damping * (removed + moved) + gradient_term / static_cast<double>(m));
}

// Updates the weights [d] in a block, and returns the loss. `diagonal` [d], unless null, becomes diag F⁻¹ of the kept
// columns, 1/λ elsewhere; without it a block with nothing to prune is not read at all.
template <typename G>
double joint_block(const Gradients<G>& grads, int64_t index, const bool* kept, float* weights, float* diagonal,
                   HeldGram& gram) {
  const Block<G> block(grads, index, kept);
  const int64_t width = block.width;
  float* w = weights + block.begin;
  const bool* keep = kept + block.begin;
  if (diagonal) {
    diagonal += block.begin;
    std::fill_n(diagonal, width, static_cast<float>(1 / grads.damping));
  }
  Buffer<double> x(width);
  for (int64_t c = 0; c < width; ++c) x[c] = keep[c] ? 0.0 : w[c];
  const double removed = norm_squared(x, width);
  const bool pruned = removed != 0;
  if (!pruned && !diagonal) return 0;
  double loss = 0;
  if (!update_held(block, gram, x, loss, diagonal)) update_from_gradients(block, index, gram, x, loss, diagonal);
  if (!pruned) return 0;                                                 // all bits stay as they are
  if (std::isfinite(removed) && !std::isfinite(loss)) throw NoFactor();  // NaN or infinity in a pruned column
  for (int64_t c = 0; c < width; ++c) w[c] = keep[c] ? static_cast<float>(w[c] + x[c]) : 0.0f;
  return loss;
}

}  // namespace mfac::cpu
