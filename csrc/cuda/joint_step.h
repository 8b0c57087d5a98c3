// Order of work of joint_step and joint_update, in terms of the kernels and of ATen's matrix products. The equations
// and names are those of csrc/cpu/joint.h.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "batches.h"
#include "inverse_diagonal.h"
#include "quadratic_form.h"

namespace mfac::cuda {

// The columns in use of `blocks` are those that are kept. diagonal [d], unless null: diag F⁻¹ there, which is computed
// for blocks with nothing to prune too.
inline Tensor joint_update(const Blocks& blocks, Tensor& weights, const Tensor& kept, double damping,
                           Tensor* diagonal) {
  const auto float64 = blocks.options(at::kDouble);
  if (blocks.d == 0) return at::zeros({}, float64);
  const Tensor w = weights.to(at::kDouble), x = at::where(kept, 0.0, w).unsqueeze(0);
  Tensor step = at::zeros_like(x), scratch = at::empty_like(x), gradient_term = at::zeros({}, float64);
  const std::vector<bool> pruned = blocks_with(blocks, x[0]);
  std::vector<int32_t> emptied;  // blocks of which no weight is kept
  for (int64_t b = 0; b < blocks.count; ++b)
    if (pruned[b] && blocks.in_use[b] == 0) emptied.push_back(static_cast<int32_t>(b));
  if (!emptied.empty()) gradient_term += squared_rows(blocks, blocks.to_device(emptied), x);
  blocks.for_each_batch(diagonal ? std::vector<bool>() : pruned, [&](const Batch& batch) {
    Tensor r = blocks.rows(batch.tile, x);
    const Factor factor = blocks.factor(batch, diagonal != nullptr);
    if (diagonal) write_diagonal(blocks, batch, damping, factor.inverse, *diagonal);
    if (batch.capacitance) {
      blocks.solve(factor.l, r);
      blocks.add_columns(batch.tile, r, step);
      gradient_term += r.square().sum() * (blocks.ridge * blocks.ridge);
      return;
    }
    Tensor z = at::empty({1, batch.tile.count, batch.order}, float64);
    blocks.add_columns(batch.tile, r, scratch);
    gather(blocks.layout, batch.tile, scratch.const_data_ptr<double>(), 1, z.mutable_data_ptr<double>(),
           current_stream());
    blocks.solve(factor.l, z);
    scatter(blocks.layout, batch.tile, z.const_data_ptr<double>(), 1, 1.0, step.mutable_data_ptr<double>(),
            current_stream());
    gradient_term += (blocks.rows(batch.tile, step) - r).square().sum();
  });
  blocks.check_factors();
  step = at::where(kept, step[0], 0.0);
  const Tensor removed = x.square().sum();
  const Tensor loss =
      (step.square().sum() + removed) * (0.5 * damping) + gradient_term / (2 * static_cast<double>(blocks.m));
  const Tensor wrong = at::isfinite(removed).logical_and(at::isfinite(loss).logical_not());
  TORCH_CHECK(!wrong.item<bool>(),
              "grads: expected finite numbers in the columns that are pruned, got NaN or infinity");
  weights.copy_(at::where(kept, w + step, 0.0));
  return loss;
}

// Nothing is kept from one call to the next.
inline std::tuple<Tensor, Tensor> joint_step_op(const Tensor& grads, Tensor& weights, const Tensor& kept,
                                                double damping, int64_t block_size, c10::string_view name,
                                                const OptionalTensor& gram, const OptionalTensor& held, bool wanted) {
  check_joint_step(grads, weights, kept, damping, block_size, name, gram, held);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, kept, name);
  Tensor diagonal = at::full({wanted ? blocks.d : 0}, 1 / damping, blocks.options(at::kFloat));
  const Tensor loss = joint_update(blocks, weights, kept, damping, wanted ? &diagonal : nullptr);
  return {loss, diagonal};
}

inline Tensor joint_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, double damping,
                              int64_t block_size, c10::string_view name) {
  return std::get<0>(joint_step_op(grads, weights, kept, damping, block_size, name, std::nullopt, std::nullopt, false));
}

}  // namespace mfac::cuda
