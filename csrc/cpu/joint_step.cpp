// Joint update and, if asked for, from the same factor, the diagonal of F⁻¹ of the kept columns (joint.h, diagonal.h):
// one pass over G, one Gram matrix and one factor per block. With a Gram matrix held from the last call (held_gram.h)
// the pass and the products are saved. Without the diagonal a block with nothing to prune is not read at all.
#include "joint.h"
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
double joint_step(const Gradients<G>& given, const bool* kept, float* weights, float* inverse_diagonal,
                  const Held& held) {
  const Gradients<G> grads = prefer_fisher_side(given);
  std::vector<double> losses(grads.blocks(), 0.0);
  for_each_block(grads, [&](int64_t index) {
    HeldGram gram(held, grads, index);
    losses[index] = joint_block(grads, index, kept, weights, inverse_diagonal, gram);
  });
  double loss = 0;
  for (const double value : losses) loss += value;
  return loss;
}

template double joint_step<float>(const Gradients<float>&, const bool*, float*, float*, const Held&);
template double joint_step<BFloat16>(const Gradients<BFloat16>&, const bool*, float*, float*, const Held&);

}  // namespace mfac::cpu
