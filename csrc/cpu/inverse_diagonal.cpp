// Diagonal of F⁻¹ (diagonal.h), one visit of G per block: the factor lives in scratch memory and is gone afterwards. m² flops
// per weight for the factor and as many for the solve (m < B).
#include "diagonal.h"
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void inverse_diagonal(const Gradients<G>& given, const bool* active, float* out) {
  const Gradients<G> grads = prefer_fisher_side(given);
  for_each_block(grads, [&](int64_t index) {
    const Block<G> whole(grads, index, active);
    float* diagonal = out + whole.begin;
    std::fill_n(diagonal, whole.width, static_cast<float>(1 / grads.damping));
    if (whole.order() == 0) return;
    const PackedColumns<G> packed(whole);
    if (packed.copied()) parallel_for(grads.m, whole.size(), [&](int64_t r) { packed.copy_row(r); });
    Buffer<double> factor(whole.order() * whole.order());
    const Precision precision = factor_block(packed.block(), factor);
    block_diagonal(whole, packed.block(), precision, factor, diagonal);
  });
}

template void inverse_diagonal<float>(const Gradients<float>&, const bool*, float*);
template void inverse_diagonal<BFloat16>(const Gradients<BFloat16>&, const bool*, float*);

}  // namespace mfac::cpu
