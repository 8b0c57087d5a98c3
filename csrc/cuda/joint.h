// The joint update and the diagonal of F⁻¹, in terms of the kernels and of ATen's matrix products.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "tiles.h"

namespace mfac::cuda {

// out[d] <- diag F⁻¹ in the columns in use of a batch's blocks, from L⁻¹.
inline void write_diagonal(const Blocks& blocks, const Batch& batch, const Precision& precision, double damping,
                           const Tensor& inverse, Tensor& out) {
  const auto store = [&](const Tile& tile, const Tensor& solved, bool capacitance) {
    dispatch(blocks.grads, [&](const auto& g) {
      const auto run = [&](const auto* values) {
        inverse_diagonal(g, blocks.layout, tile, values, solved.size(1), damping, capacitance,
                         out.mutable_data_ptr<float>(), current_stream());
      };
      if (solved.scalar_type() == at::kDouble)
        run(solved.const_data_ptr<double>());
      else
        run(solved.const_data_ptr<float>());
    });
  };
  if (!batch.capacitance) return store(batch.tile, inverse, false);
  const Terms terms = split(inverse, precision);
  blocks.for_each_chunk(batch, [&](const Tile& chunk) {
    store(chunk, multiply(terms, blocks.packed(blocks.layout, chunk, precision)), true);
  });
}

// Which blocks have an element of x [d] that is not zero.
inline std::vector<bool> blocks_with(const Blocks& blocks, const Tensor& x) {
  const Tensor padded = at::constant_pad_nd(x != 0, {0, blocks.count * blocks.block_size - blocks.d});
  const Tensor any = padded.view({blocks.count, -1}).any(1).cpu();
  const bool* values = any.const_data_ptr<bool>();
  return std::vector<bool>(values, values + blocks.count);
}

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

// The equations and names are those of csrc/cpu/joint.h; the columns in use of `blocks` are those that are kept. diagonal [d],
// unless null: diag F⁻¹ there, for which blocks with nothing to prune are worked on too.
inline Tensor joint_update(const Blocks& blocks, const Precision& precision, Tensor& weights, const Tensor& kept,
                           double damping, Tensor* diagonal) {
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
    const Factor factor = blocks.factor(batch, precision, diagonal != nullptr);
    if (diagonal) write_diagonal(blocks, batch, precision, damping, factor.inverse, *diagonal);
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
  weights.copy_(at::where(kept, w + step, 0.0));
  return (step.square().sum() + x.square().sum()) * (0.5 * damping) +
         gradient_term / (2 * static_cast<double>(blocks.m));
}

}  // namespace mfac::cuda
