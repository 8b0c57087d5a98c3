// Order of work of quadratic_form, ½ xᵀFx = ½ Σ over blocks of (λ ‖x‖² + ‖G x‖² / m); the kernel is rows_kernel of
// inverse_product.cu.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include "batches.h"

namespace mfac::cuda {

// Σ ‖G x‖² over some blocks, each by itself.
inline Tensor squared_rows(const Blocks& blocks, const Tensor& ids, const Tensor& x) {
  const int64_t step = std::max<int64_t>(1, blocks.limit / (16 * blocks.m * row_splits(blocks.block_size)));
  Tensor sum = at::zeros({}, x.options());
  for (const Tensor& some : ids.split(step)) {
    const Tensor t = blocks.rows({some.const_data_ptr<int32_t>(), some.numel(), 0, 0}, x).flatten();
    sum += t.dot(t);
  }
  return sum;
}

inline Tensor quadratic_form_op(const Tensor& grads, const Tensor& x, double damping, int64_t block_size) {
  check_quadratic_form(grads, x, damping, block_size);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, std::nullopt);
  if (blocks.d == 0) return at::zeros({}, blocks.options(at::kDouble));
  const Tensor step = x.to(at::kDouble), ids = at::arange(blocks.count, blocks.options(at::kInt));
  return step.square().sum() * (0.5 * damping) + squared_rows(blocks, ids, step) / (2 * static_cast<double>(blocks.m));
}

}  // namespace mfac::cuda
