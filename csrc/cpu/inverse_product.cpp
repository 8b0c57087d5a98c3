// F⁻¹ x for the k rows of x, from the factors of block_factor. Equation: block.h. On the capacitance side G is read
// from memory once for all vectors: the second pass over a block finds it in the cache, if it fits. Float64 sums; 4 m
// flops per weight and vector.
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void inverse_product(const Gradients<G>& grads, const bool* active, const double* factor, const float* x, int64_t k,
                     float* out) {
  constexpr int64_t kVectorsAtOnce = 16;  // their elements in a block stay in L2: 128 bytes per column
  const int64_t s = grads.order();
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index, active);
    const int64_t width = block.width;
    for (int64_t v = 0; v < k; v += kVectorsAtOnce) {
      const int64_t count = std::min(kVectorsAtOnce, k - v);
      Buffer<double> vectors(count * width), products(count * width);
      for (int64_t i = 0; i < count; ++i) std::copy_n(x + (v + i) * grads.d + block.begin, width, vectors + i * width);
      apply_inverse(block, factor + index * s * s, s, vectors, count, products);
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(products + i * width, width, out + (v + i) * grads.d + block.begin);
    }
  });
}

template void inverse_product<float>(const Gradients<float>&, const bool*, const double*, const float*, int64_t,
                                     float*);
template void inverse_product<BFloat16>(const Gradients<BFloat16>&, const bool*, const double*, const float*, int64_t,
                                        float*);

}  // namespace mfac::cpu
