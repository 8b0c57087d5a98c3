// Order of work of independent_update; the product is that of inverse_product.h.
#pragma once

#include <ATen/ops/where.h>

#include "batches.h"
#include "inverse_product.h"

namespace mfac::cuda {

// w <- w - F⁻¹ u with u_i = w_i / [F⁻¹]_ii where not kept (M-FAC, equation 4), then zero there.
inline void independent_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, const Tensor& diagonal,
                                  double damping, int64_t block_size, const OptionalTensor& active,
                                  c10::string_view name) {
  check_independent_update(grads, weights, kept, diagonal, damping, block_size, active, name);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active, name);
  if (blocks.d == 0) return;
  const Tensor w = weights.to(at::kDouble), u = at::where(kept, 0.0, w / diagonal.to(at::kDouble));
  const auto factor_of = [&](const Batch& batch) { return blocks.factor(batch, false).l; };
  const Tensor step =
      apply_inverse(blocks, damping, u.unsqueeze(0), blocks_with(blocks, u), factor_of, /*factors=*/true);
  blocks.check_factors();
  weights.copy_(at::where(kept, w - step[0], 0.0));
}

}  // namespace mfac::cuda
