// Order of work of inverse_product; kernels and equation: inverse_product.cu.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "batches.h"

namespace mfac::cuda {

// out[k, d] = F⁻¹ x for x [k, d] float64 that is zero outside the chosen blocks. factor_of(batch) returns L; `factors`
// says whether it factors.
template <typename F>
Tensor apply_inverse(const Blocks& blocks, double damping, const Tensor& x, const std::vector<bool>& chosen,
                     const F& factor_of, bool factors) {
  const int64_t k = x.size(0);
  const double m = static_cast<double>(blocks.m);
  Tensor out = x / damping, products = at::zeros_like(x);
  const Tensor used = blocks.mask.defined() ? x * blocks.mask : x;
  blocks.for_each_batch(
      chosen,
      [&](const Batch& batch) {
        const Tensor l = factor_of(batch);
        if (batch.capacitance) {
          bool done = false;
          dispatch(blocks.grads, [&](const auto& g) {
            done = inverse_product(g, blocks.layout, batch.tile, l.const_data_ptr<double>(), x.const_data_ptr<double>(),
                                   k, damping, out.mutable_data_ptr<double>(), current_stream());
          });
          if (done) return;
          Tensor t = blocks.rows(batch.tile, used);
          blocks.solve(l, t);
          blocks.add_columns(batch.tile, t, products);
        } else {
          Tensor t = at::empty({k, batch.tile.count, batch.order}, x.options());
          gather(blocks.layout, batch.tile, x.const_data_ptr<double>(), k, t.mutable_data_ptr<double>(),
                 current_stream());
          blocks.solve(l, t);
          scatter(blocks.layout, batch.tile, t.const_data_ptr<double>(), k, m, out.mutable_data_ptr<double>(),
                  current_stream());
        }
      },
      factors);
  if (blocks.mask.defined()) products.mul_(blocks.mask);
  return out.sub_(products, 1 / damping);
}

inline Tensor inverse_product_op(const Tensor& grads, const Tensor& factor, const Tensor& x, double damping,
                                 int64_t block_size, const OptionalTensor& active) {
  constexpr int64_t kVectorsAtOnce = 16;  // their float64 copies take memory: 128 bytes per weight
  check_inverse_product(grads, factor, x, damping, block_size, active);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const Tensor vectors = x.reshape({-1, blocks.d}), all = factor.contiguous();
  Tensor flat = out.view({-1, blocks.d});
  for (int64_t v = 0; v < vectors.size(0); v += kVectorsAtOnce) {
    const int64_t end = std::min(vectors.size(0), v + kVectorsAtOnce);
    const Tensor some = vectors.slice(0, v, end).to(at::kDouble).contiguous();
    const auto factor_of = [&](const Batch& batch) {
      const Tensor l = batch.tile.count == blocks.count ? all : all.index_select(0, batch.ids);
      return l.narrow(1, 0, batch.order).narrow(2, 0, batch.order).contiguous();
    };
    flat.slice(0, v, end).copy_(apply_inverse(blocks, damping, some, {}, factor_of, /*factors=*/false));
  }
  return out;
}

}  // namespace mfac::cuda
