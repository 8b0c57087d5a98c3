// Order of work of inverse_diagonal; kernel and equation: inverse_diagonal.cu.
#pragma once

#include <ATen/ops/full.h>

#include "batches.h"

namespace mfac::cuda {

// out[d] <- diag F⁻¹ in the columns in use of a batch's blocks, from L⁻¹.
inline void write_diagonal(const Blocks& blocks, const Batch& batch, double damping, const Tensor& inverse,
                           Tensor& out) {
  const auto store = [&](const Tile& tile, const Tensor& solved, bool capacitance) {
    dispatch(blocks.grads, [&](const auto& g) {
      const auto run = [&](const auto* values) {
        diagonal_of_solved(g, blocks.layout, tile, values, solved.size(1), damping, capacitance,
                           out.mutable_data_ptr<float>(), current_stream());
      };
      if (solved.scalar_type() == at::kDouble)
        run(solved.const_data_ptr<double>());
      else
        run(solved.const_data_ptr<float>());
    });
  };
  if (!batch.capacitance) return store(batch.tile, inverse, false);
  if (blocks.precision.exact)
    return dispatch(blocks.grads, [&](const auto& g) {
      capacitance_diagonal(g, blocks.layout, batch.tile, inverse.const_data_ptr<double>(), damping,
                           out.mutable_data_ptr<float>(), current_stream());
    });
  const Terms terms = split(inverse, blocks.precision);
  blocks.for_each_chunk(
      batch, [&](const Tile& chunk) { store(chunk, multiply(terms, blocks.packed(blocks.layout, chunk)), true); });
}

inline Tensor inverse_diagonal_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active,
                                  c10::string_view name) {
  check_fisher(grads, damping, block_size, active, name);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active, name);
  Tensor out = at::full({blocks.d}, 1 / damping, blocks.options(at::kFloat));
  blocks.for_each_batch(
      {}, [&](const Batch& batch) { write_diagonal(blocks, batch, damping, blocks.factor(batch, true).inverse, out); });
  blocks.check_factors();
  return out;
}

}  // namespace mfac::cuda
