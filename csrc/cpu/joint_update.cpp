// Joint update: with S the kept and Q the pruned weights of a block, minimise ½ δᵀFδ subject to δ_Q = -w_Q:
//
//   r = G_Q w_Q
//   |S| > m     δ_S = G_Sᵀ y,              y = (mλ I + G_S G_Sᵀ)⁻¹ r      Gδ = -mλ y
//   |S| <= m    δ_S = (mλ I + G_SᵀG_S)⁻¹ G_Sᵀ r                           Gδ = G_S δ_S - r
//   loss        ½ (λ ‖δ‖² + ‖Gδ‖² / m)
//
// (block inverse of F and the push-through identity). G comes from memory once: as a row is read for r, its surviving columns
// are copied side by side, and the rest is done with the copy, in the cache. So the cost falls with the density: m |S|
// min(m, |S|) flops. Weights pruned earlier are zero and drop out. A block with nothing to prune is not read at all.
#include "kernels.h"

namespace mfac::cpu {
namespace {

double norm_squared(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

}  // namespace

template <typename G>
double joint_update(const Gradients<G>& grads, const bool* kept, float* weights) {
  const int64_t m = grads.m;
  const double damping = grads.damping;
  std::vector<double> losses(grads.blocks(), 0.0);
  for_each_block(grads, [&](int64_t index) {
    const Block<G> whole(grads, index, kept);
    const int64_t width = whole.width, n = whole.order(), size = whole.size();
    float* w = weights + whole.begin;
    const bool* keep = kept + whole.begin;
    Buffer<double> x(width), r(m);
    for (int64_t c = 0; c < width; ++c) x[c] = keep[c] ? 0.0 : w[c];
    const double removed = norm_squared(x, width);
    if (removed == 0) return;

    const SideBySide<G> packed(whole);
    parallel_for(m, width, [&](int64_t i) {
      r[i] = dot(whole.row(i), static_cast<const double*>(x), width);
      if (packed.copied()) packed.copy_row(i);
    });
    const Block<G>& survivors = packed.block();

    double gradient_term = norm_squared(r, m), moved = 0;
    if (n > 0) {
      Buffer<double> l(n * n), step(survivors.width);
      factor_block(survivors, l);
      if (survivors.capacitance()) cholesky_solve(l, n, n, r);
      multiply_columns(survivors, r, 1, step);
      for (int64_t c = 0; c < size; ++c) x[c] = step[survivors.column(c)];
      if (survivors.capacitance()) {
        gradient_term = survivors.ridge() * survivors.ridge() * norm_squared(r, m);
      } else {
        cholesky_solve(l, n, n, x);
        std::fill_n(static_cast<double*>(step), survivors.width, 0.0);
        for (int64_t c = 0; c < size; ++c) step[survivors.column(c)] = x[c];
        Buffer<double> moved_rows(m);
        multiply_rows(survivors, step, 1, moved_rows);
        for (int64_t i = 0; i < m; ++i) moved_rows[i] -= r[i];
        gradient_term = norm_squared(moved_rows, m);
      }
      moved = norm_squared(x, size);
      for (int64_t c = 0; c < size; ++c) {
        float& weight = w[whole.column(c)];
        weight = static_cast<float>(weight + x[c]);
      }
    }
    for (int64_t c = 0; c < width; ++c)
      if (!keep[c]) w[c] = 0;
    losses[index] = 0.5 * (damping * (removed + moved) + gradient_term / static_cast<double>(m));
  });
  double loss = 0;
  for (const double value : losses) loss += value;
  return loss;
}

template double joint_update<float>(const Gradients<float>&, const bool*, float*);
template double joint_update<BFloat16>(const Gradients<BFloat16>&, const bool*, float*);

}  // namespace mfac::cpu
