// Order of work of block_factor; kernels and equation: block_factor.cu.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include "batches.h"

namespace mfac::cuda {

inline Tensor block_factor_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active) {
  check_fisher(grads, damping, block_size, active);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  const int64_t s = blocks.order();
  Tensor out = at::zeros({blocks.count, s, s}, blocks.options(at::kDouble));
  blocks.for_each_batch({}, [&](const Batch& batch) {
    const int64_t n = batch.order;
    Tensor padded = at::zeros({batch.tile.count, s, s}, out.options());
    Tensor l = blocks.factor(batch, false).l;
    if (!batch.capacitance) {  // blocks with fewer columns in use than the widest
      std::vector<int32_t> used;
      const Tensor host = batch.ids.cpu();
      for (int64_t i = 0; i < batch.tile.count; ++i) used.push_back(blocks.in_use[host.const_data_ptr<int32_t>()[i]]);
      l = l * (at::arange(n, batch.ids.options()) < blocks.to_device(used).unsqueeze(1)).unsqueeze(2);
    }
    padded.narrow(1, 0, n).narrow(2, 0, n).copy_(l);
    out.index_copy_(0, batch.ids.to(at::kLong), padded);
  });
  blocks.check_factors();
  return out;
}

}  // namespace mfac::cuda
