// F⁻¹ x for the k rows of x, from the factors of block_factor. Equation: block.h. On the capacitance side two passes over
// the block's G, the second from the cache where the block fits; float64 sums.
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void inverse_product(const Gradients<G>& grads, const bool* active, const double* factor, const float* x, int64_t k,
                     float* out) {
  const int64_t s = grads.order();
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index, active);
    Buffer<double> vector(block.width), product(block.width);
    for (int64_t row = 0; row < k; ++row) {
      const int64_t offset = row * grads.d + block.begin;
      std::copy_n(x + offset, block.width, static_cast<double*>(vector));
      apply_inverse(block, factor + index * s * s, s, vector, product);
      for (int64_t c = 0; c < block.width; ++c) out[offset + c] = static_cast<float>(product[c]);
    }
  });
}

template void inverse_product<float>(const Gradients<float>&, const bool*, const double*, const float*, int64_t,
                                     float*);
template void inverse_product<BFloat16>(const Gradients<BFloat16>&, const bool*, const double*, const float*, int64_t,
                                        float*);

}  // namespace mfac::cpu
