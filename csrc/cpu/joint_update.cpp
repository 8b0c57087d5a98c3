// Joint update (joint.h), one visit of G per block; a block with nothing to prune is not read at all.
#include "joint.h"
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
double joint_update(const Gradients<G>& given, const bool* kept, float* weights) {
  const Gradients<G> grads = wider_fisher(given);
  std::vector<double> losses(grads.blocks(), 0.0);
  for_each_block(grads, [&](int64_t index) {
    HeldGram none;
    losses[index] = joint_block(grads, index, kept, weights, nullptr, none);
  });
  double loss = 0;
  for (const double value : losses) loss += value;
  return loss;
}

template double joint_update<float>(const Gradients<float>&, const bool*, float*);
template double joint_update<BFloat16>(const Gradients<BFloat16>&, const bool*, float*);

}  // namespace mfac::cpu
