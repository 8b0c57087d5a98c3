// Independent update (M-FAC, equation 4, summed over the pruned weights): w <- w - F⁻¹ u with u_i = w_i / [F⁻¹]_ii on
// the pruned set, then w = 0 there. Factor and product of a block in one visit; the factor is scratch memory.
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void independent_update(const Gradients<G>& grads, const bool* active, const bool* kept, const float* inverse_diagonal,
                        float* weights) {
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index, active);
    float* w = weights + block.begin;
    const bool* keep = kept + block.begin;
    Buffer<double> u(block.width), step(block.width);
    bool any = false, cancels = false;
    for (int64_t c = 0; c < block.width; ++c) {
      const double inverse = inverse_diagonal[block.begin + c];
      u[c] = keep[c] ? 0.0 : w[c] / inverse;
      any = any || u[c] != 0;
      cancels = cancels || (u[c] != 0 && inverse * grads.damping < kCancellation);
    }
    if (!any) return;
    const int64_t n = block.order();
    Buffer<double> l(n * n);
    if (cancels) {
      factor_double(block, l);
    } else if (n > 0) {
      factor_block(block, l);
    }
    apply_inverse(block, l, n, u, 1, step);
    for (int64_t c = 0; c < block.width; ++c) w[c] = keep[c] ? static_cast<float>(w[c] - step[c]) : 0.0f;
  });
}

template void independent_update<float>(const Gradients<float>&, const bool*, const bool*, const float*, float*);
template void independent_update<BFloat16>(const Gradients<BFloat16>&, const bool*, const bool*, const float*, float*);

}  // namespace mfac::cpu
