// Diagonal of F⁻¹ (diagonal.h), in one pass over G: the factor of a block is scratch memory. m² flops per weight for
// the factor and as many for the solve (m < B).
#include "diagonal.h"
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void inverse_diagonal(const Gradients<G>& given, const bool* active, float* out) {
  const Gradients<G> grads = prefer_fisher_side(given);
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index, active);
    float* diagonal = out + block.begin;
    std::fill_n(diagonal, block.width, static_cast<float>(1 / grads.damping));
    if (block.order() == 0) return;
    const PackedColumns<G> packed(block);
    if (packed.copied()) parallel_for(grads.m, block.size(), [&](int64_t r) { packed.copy_row(r); });
    Buffer<double> factor(block.order() * block.order());
    const Precision precision = factor_block(packed.block(), factor);
    block_diagonal(block, packed.block(), precision, factor, diagonal);
  });
}

template void inverse_diagonal<float>(const Gradients<float>&, const bool*, float*);
template void inverse_diagonal<BFloat16>(const Gradients<BFloat16>&, const bool*, float*);

}  // namespace mfac::cpu
