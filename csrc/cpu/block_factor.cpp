// Cholesky factors of all blocks; the equation and the choice of side are in block.h. Per block with n = min(m, columns
// in use): m * columns * n flops for the Gram matrix (its lower triangle), n³/3 for the factor. G is read once.
// Products are always float64: F⁻¹ x, which these factors are for, may cancel to any degree, depending on x.
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
void block_factor(const Gradients<G>& grads, const bool* active, double* factor) {
  const int64_t s = grads.order();
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index, active);
    const int64_t n = block.order();
    double* out = factor + index * s * s;
    std::fill_n(out, s * s, 0.0);
    if (n == s) {
      factor_double(block, out);
    } else if (n > 0) {
      Buffer<double> l(n * n);
      factor_double(block, l);
      for (int64_t i = 0; i < n; ++i) std::copy_n(l + i * n, n, out + i * s);
    }
  });
}

template void block_factor<float>(const Gradients<float>&, const bool*, double*);
template void block_factor<BFloat16>(const Gradients<BFloat16>&, const bool*, double*);

}  // namespace mfac::cpu
