// The CPU kernels as torch ops: checks, allocation of results, dispatch on the type of the gradients, and torch's
// thread pool. A header, which mfac.cpp compiles together with the schemas: torch's headers are most of the build time.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "torch_parallel.h"

namespace mfac::cpu {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const bool* mask_pointer(const OptionalTensor& mask) { return mask ? mask->const_data_ptr<bool>() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& mask) {
  return mask ? OptionalTensor(mask->contiguous()) : std::nullopt;
}

// Calls f with the gradients as the kernels see them. Rows may have any stride (a slice of a larger matrix); the
// elements of a row are contiguous.
template <typename F>
auto dispatch(const Tensor& given, double damping, int64_t block_size, const F& f,
              c10::string_view precision = "highest") {
  const int terms = precision == "highest" ? 0 : precision == "high" ? 2 : 1;
  const Tensor grads = given.stride(1) == 1 || given.size(1) <= 1 ? given : given.contiguous();
  const int64_t m = grads.size(0), d = grads.size(1);
  block_size = std::min(block_size, std::max<int64_t>(d, 1));
  if (grads.scalar_type() == at::kBFloat16)
    return f(Gradients<BFloat16>{static_cast<const BFloat16*>(grads.const_data_ptr()), m, d, grads.stride(0), damping,
                                 block_size, terms});
  return f(Gradients<float>{grads.const_data_ptr<float>(), m, d, grads.stride(0), damping, block_size, terms});
}

Tensor block_factor_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active) {
  check_fisher(grads, damping, block_size, active);
  const OptionalTensor mask = contiguous(active);
  return dispatch(grads, damping, block_size, [&](const auto& g) {
    const int64_t s = g.order();
    Tensor factor = at::empty({g.blocks(), s, s}, grads.options().dtype(at::kDouble));
    block_factor(g, mask_pointer(mask), factor.mutable_data_ptr<double>());
    return factor;
  });
}

Tensor inverse_diagonal_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active,
                           c10::string_view precision) {
  check_fisher(grads, damping, block_size, active, precision);
  const OptionalTensor mask = contiguous(active);
  Tensor out = at::empty({grads.size(1)}, grads.options().dtype(at::kFloat));
  dispatch(
      grads, damping, block_size,
      [&](const auto& g) { inverse_diagonal(g, mask_pointer(mask), out.mutable_data_ptr<float>()); }, precision);
  return out;
}

Tensor inverse_product_op(const Tensor& grads, const Tensor& factor, const Tensor& x, double damping,
                          int64_t block_size, const OptionalTensor& active) {
  check_inverse_product(grads, factor, x, damping, block_size, active);
  const OptionalTensor mask = contiguous(active);
  const Tensor vectors = x.contiguous(), l = factor.contiguous();
  Tensor out = at::empty_like(vectors);
  dispatch(grads, damping, block_size, [&](const auto& g) {
    inverse_product(g, mask_pointer(mask), l.const_data_ptr<double>(), vectors.const_data_ptr<float>(),
                    x.dim() == 1 ? 1 : x.size(0), out.mutable_data_ptr<float>());
  });
  return out;
}

Held memory(const OptionalTensor& gram, const OptionalTensor& held) {
  if (!gram) return {nullptr, 0, nullptr};
  return {gram->mutable_data_ptr<double>(), gram->size(1), held->mutable_data_ptr<bool>()};
}

std::tuple<Tensor, Tensor> joint_step_op(const Tensor& grads, Tensor& weights, const Tensor& kept, double damping,
                                         int64_t block_size, c10::string_view precision, const OptionalTensor& gram,
                                         const OptionalTensor& held, bool diagonal) {
  check_joint_step(grads, weights, kept, damping, block_size, precision, gram, held);
  const Tensor mask = kept.contiguous();
  Tensor w = weights.contiguous(), out = at::empty({diagonal ? grads.size(1) : 0}, grads.options().dtype(at::kFloat));
  const double loss = dispatch(
      grads, damping, block_size,
      [&](const auto& g) {
        return joint_step(g, mask.const_data_ptr<bool>(), w.mutable_data_ptr<float>(),
                          diagonal ? out.mutable_data_ptr<float>() : nullptr, memory(gram, held));
      },
      precision);
  if (!w.is_same(weights)) weights.copy_(w);
  return {at::scalar_tensor(loss, grads.options().dtype(at::kDouble)), out};
}

Tensor joint_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, double damping, int64_t block_size,
                       c10::string_view precision) {
  return std::get<0>(
      joint_step_op(grads, weights, kept, damping, block_size, precision, std::nullopt, std::nullopt, false));
}

void independent_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, const Tensor& diagonal,
                           double damping, int64_t block_size, const OptionalTensor& active,
                           c10::string_view precision) {
  check_independent_update(grads, weights, kept, diagonal, damping, block_size, active, precision);
  const Tensor keep = kept.contiguous(), inverse = diagonal.contiguous();
  const OptionalTensor mask = contiguous(active);
  Tensor w = weights.contiguous();
  dispatch(
      grads, damping, block_size,
      [&](const auto& g) {
        independent_update(g, mask_pointer(mask), keep.const_data_ptr<bool>(), inverse.const_data_ptr<float>(),
                           w.mutable_data_ptr<float>());
      },
      precision);
  if (!w.is_same(weights)) weights.copy_(w);
}

Tensor quadratic_form_op(const Tensor& grads, const Tensor& x, double damping, int64_t block_size) {
  check_quadratic_form(grads, x, damping, block_size);
  const Tensor step = x.contiguous();
  const double value = dispatch(grads, damping, block_size,
                                [&](const auto& g) { return quadratic_form(g, step.const_data_ptr<float>()); });
  return at::scalar_tensor(value, grads.options().dtype(at::kDouble));
}

Tensor group_saliency_op(const Tensor& grads, const Tensor& weights, const Tensor& groups, const Tensor& subsets,
                         double damping, int64_t block_size, const OptionalTensor& active, c10::string_view precision,
                         const OptionalTensor& gram, const OptionalTensor& held) {
  check_group_saliency(grads, weights, groups, subsets, damping, block_size, active, precision, gram, held);
  const Tensor w = weights.contiguous(), positions = groups.contiguous(), members = subsets.contiguous();
  const OptionalTensor mask = contiguous(active);
  Tensor out = at::empty({groups.size(0), subsets.size(0)}, grads.options().dtype(at::kFloat));
  const Groups described{positions.const_data_ptr<int64_t>(), groups.size(0),  groups.size(1),
                         members.const_data_ptr<int64_t>(),   subsets.size(0), subsets.size(1)};
  dispatch(
      grads, damping, block_size,
      [&](const auto& g) {
        group_saliency(g, mask_pointer(mask), w.const_data_ptr<float>(), described, memory(gram, held),
                       out.mutable_data_ptr<float>());
      },
      precision);
  return out;
}

Tensor select_smallest_op(const Tensor& scores, at::IntArrayRef k, at::OptionalIntArrayRef sizes,
                          const std::optional<Tensor>& weights) {
  check_select_smallest(scores, k, sizes, weights);
  const Tensor values = scores.contiguous();
  Tensor kept = at::empty({scores.size(0)}, scores.options().dtype(at::kBool));
  std::optional<Tensor> w;
  if (weights) w = weights->contiguous();
  const int64_t n = scores.size(0), *segments = sizes ? sizes->data() : &n;
  const int64_t nan =
      select_smallest(values.const_data_ptr<float>(), segments, k.data(), static_cast<int64_t>(k.size()),
                      kept.mutable_data_ptr<bool>(), w ? w->mutable_data_ptr<float>() : nullptr);
  TORCH_CHECK_VALUE(nan < 0, "scores: expected no NaN, got one at index ", nan);
  if (weights && !w->is_same(*weights)) weights->copy_(*w);
  return kept;
}

TORCH_LIBRARY_IMPL(mfac, CPU, m) {
  m.impl("block_factor", block_factor_op);
  m.impl("inverse_diagonal", inverse_diagonal_op);
  m.impl("inverse_product", inverse_product_op);
  m.impl("joint_update", joint_update_op);
  m.impl("joint_step", joint_step_op);
  m.impl("independent_update", independent_update_op);
  m.impl("quadratic_form", quadratic_form_op);
  m.impl("group_saliency", group_saliency_op);
  m.impl("select_smallest", select_smallest_op);
}

}  // namespace
}  // namespace mfac::cpu
