// ½ xᵀFx = ½ sum over blocks of (λ ‖x‖² + ‖G x‖² / m): the loss increase that the quadratic model predicts for a step
// x. One pass over G, two flops per element; blocks in which x is zero are not read.
#include "kernels.h"

namespace mfac::cpu {

template <typename G>
double quadratic_form(const Gradients<G>& grads, const float* x) {
  std::vector<double> values(grads.blocks(), 0.0);
  for_each_block(grads, [&](int64_t index) {
    const Block<G> block(grads, index);
    Buffer<double> vector(block.width), t(grads.m);
    std::copy_n(x + block.begin, block.width, static_cast<double*>(vector));
    double square = 0, rows = 0;
    for (int64_t c = 0; c < block.width; ++c) square += vector[c] * vector[c];
    if (square == 0) return;
    multiply_rows(block, vector, 1, t);
    for (int64_t r = 0; r < grads.m; ++r) rows += t[r] * t[r];
    values[index] = 0.5 * (grads.damping * square + rows / static_cast<double>(grads.m));
  });
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

template double quadratic_form<float>(const Gradients<float>&, const float*);
template double quadratic_form<BFloat16>(const Gradients<BFloat16>&, const float*);

}  // namespace mfac::cpu
