// Argument checks of the ops, shared by all devices: check_<op> takes all arguments of an op. Messages have the form
// `name: expected ..., got ...`.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

namespace mfac {

inline void check_grads(const at::Tensor& grads, double damping, int64_t block_size) {
  TORCH_CHECK_VALUE(grads.dim() == 2 && grads.size(0) > 0, "grads: expected [m, d] with m >= 1 gradients, got shape ",
                    grads.sizes());
  TORCH_CHECK_TYPE(grads.scalar_type() == at::kFloat || grads.scalar_type() == at::kBFloat16,
                   "grads: expected float32 or bfloat16, got ", grads.scalar_type());
  TORCH_CHECK_VALUE(damping >= 1e-30 && damping <= 1e30, "damping: expected a number in [1e-30, 1e30], got ", damping);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size: expected >= 1, got ", block_size);
  TORCH_CHECK_VALUE(std::min(block_size, grads.size(1)) <= INT32_MAX,
                    "block_size: expected blocks below 2^31 columns, got ", std::min(block_size, grads.size(1)));
}

// A vector of d elements of the given type, on the device of grads.
inline void check_vector(const at::Tensor& x, const char* name, at::ScalarType type, const at::Tensor& grads) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == grads.size(1), name, ": expected shape [", grads.size(1), "], got ",
                    x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, ": expected ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == grads.device(), name, ": expected on ", grads.device(), " like grads, got ",
                    x.device());
}

inline void check_active(const std::optional<at::Tensor>& active, const at::Tensor& grads) {
  if (active) check_vector(*active, "active", at::kBool, grads);
}

inline void check_precision(c10::string_view precision) {
  TORCH_CHECK_VALUE(precision == "highest" || precision == "high" || precision == "medium",
                    "precision: expected 'highest', 'high' or 'medium', got '", precision, "'");
}

// The arguments that say what F is, and the precision.
inline void check_fisher(const at::Tensor& grads, double damping, int64_t block_size,
                         const std::optional<at::Tensor>& active, c10::string_view precision = "highest") {
  check_grads(grads, damping, block_size);
  check_active(active, grads);
  check_precision(precision);
}

// The small matrices that are kept from one call to the next.
inline void check_memory(const at::Tensor& grads, int64_t block_size, const std::optional<at::Tensor>& gram,
                         const std::optional<at::Tensor>& held) {
  TORCH_CHECK_VALUE(gram.has_value() == held.has_value(), "gram, held: expected both or none, got one");
  if (!gram) return;
  const int64_t width = std::min(block_size, std::max<int64_t>(grads.size(1), 1));
  const int64_t blocks = (grads.size(1) + width - 1) / width;
  check_vector(*held, "held", at::kBool, grads);
  TORCH_CHECK_VALUE(gram->dim() == 2 && gram->size(0) == blocks && gram->size(1) >= 2, "gram: expected shape [", blocks,
                    ", n] with n >= 2, got ", gram->sizes());
  TORCH_CHECK_TYPE(gram->scalar_type() == at::kDouble, "gram: expected float64, got ", gram->scalar_type());
  TORCH_CHECK_VALUE(gram->device() == grads.device(), "gram: expected on ", grads.device(), " like grads, got ",
                    gram->device());
  TORCH_CHECK_VALUE(gram->is_contiguous() && held->is_contiguous(), "gram, held: expected contiguous tensors");
}

inline void check_inverse_product(const at::Tensor& grads, const at::Tensor& factor, const at::Tensor& x,
                                  double damping, int64_t block_size, const std::optional<at::Tensor>& active) {
  check_fisher(grads, damping, block_size, active);
  const int64_t m = grads.size(0), d = grads.size(1), width = std::min(block_size, std::max<int64_t>(d, 1));
  const int64_t s = std::min(m, width), blocks = (d + width - 1) / width;
  TORCH_CHECK_VALUE((x.dim() == 1 || x.dim() == 2) && x.size(-1) == d, "x: expected shape [", d, "] or [k, ", d,
                    "], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x: expected float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(factor.scalar_type() == at::kDouble && factor.dim() == 3 && factor.size(0) == blocks &&
                        factor.size(1) == s && factor.size(2) == s,
                    "factor: expected float64 of shape [", blocks, ", ", s, ", ", s, "], got ", factor.scalar_type(),
                    " of shape ", factor.sizes());
  for (const auto& [name, tensor] : {std::pair("x", x), std::pair("factor", factor)})
    TORCH_CHECK_VALUE(tensor.device() == grads.device(), name, ": expected on ", grads.device(), " like grads, got ",
                      tensor.device());
}

inline void check_joint_step(const at::Tensor& grads, const at::Tensor& weights, const at::Tensor& kept, double damping,
                             int64_t block_size, c10::string_view precision, const std::optional<at::Tensor>& gram,
                             const std::optional<at::Tensor>& held) {
  check_fisher(grads, damping, block_size, std::nullopt, precision);
  check_vector(weights, "weights", at::kFloat, grads);
  check_vector(kept, "kept", at::kBool, grads);
  check_memory(grads, block_size, gram, held);
}

inline void check_independent_update(const at::Tensor& grads, const at::Tensor& weights, const at::Tensor& kept,
                                     const at::Tensor& inverse_diagonal, double damping, int64_t block_size,
                                     const std::optional<at::Tensor>& active, c10::string_view precision) {
  check_fisher(grads, damping, block_size, active, precision);
  check_vector(weights, "weights", at::kFloat, grads);
  check_vector(kept, "kept", at::kBool, grads);
  check_vector(inverse_diagonal, "inverse_diagonal", at::kFloat, grads);
}

inline void check_quadratic_form(const at::Tensor& grads, const at::Tensor& x, double damping, int64_t block_size) {
  check_grads(grads, damping, block_size);
  check_vector(x, "x", at::kFloat, grads);
}

inline void check_groups(const at::Tensor& groups, const at::Tensor& subsets, const at::Tensor& grads) {
  const auto check = [&](const at::Tensor& x, const char* name, int64_t least, int64_t end) {
    TORCH_CHECK_VALUE(x.dim() == 2, name, ": expected two dimensions, got shape ", x.sizes());
    TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, name, ": expected int64, got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.device() == grads.device(), name, ": expected on ", grads.device(), " like grads, got ",
                      x.device());
    if (x.numel() == 0) return;
    const int64_t low = x.min().item<int64_t>(), high = x.max().item<int64_t>();
    TORCH_CHECK_VALUE(least <= low && high < end, name, ": expected numbers in [", least, ", ", end, "), got ", low,
                      " to ", high);
  };
  check(groups, "groups", -1, grads.size(1));
  check(subsets, "subsets", 0, groups.size(1));
}

inline void check_group_saliency(const at::Tensor& grads, const at::Tensor& weights, const at::Tensor& groups,
                                 const at::Tensor& subsets, double damping, int64_t block_size,
                                 const std::optional<at::Tensor>& active, c10::string_view precision,
                                 const std::optional<at::Tensor>& gram, const std::optional<at::Tensor>& held) {
  check_fisher(grads, damping, block_size, active, precision);
  check_vector(weights, "weights", at::kFloat, grads);
  check_groups(groups, subsets, grads);
  check_memory(grads, block_size, gram, held);
}

inline void check_select_smallest(const at::Tensor& scores, at::IntArrayRef k, const at::OptionalIntArrayRef& sizes,
                                  const std::optional<at::Tensor>& weights) {
  TORCH_CHECK_VALUE(scores.dim() == 1, "scores: expected one dimension, got shape ", scores.sizes());
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat, "scores: expected float32, got ", scores.scalar_type());
  const int64_t n = scores.size(0);
  const at::IntArrayRef segments = sizes ? *sizes : at::IntArrayRef(n);
  TORCH_CHECK_VALUE(k.size() == segments.size(), "k: expected one number for each of the ", segments.size(),
                    " segments, got ", k);
  int64_t total = 0;
  for (size_t i = 0; i < k.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= segments[i] && segments[i] <= n - total, "sizes: expected numbers >= 0 that sum to ", n,
                      ", got ", segments);
    TORCH_CHECK_VALUE(0 <= k[i] && k[i] <= segments[i], "k: expected 0 to ", segments[i], ", got ", k[i]);
    total += segments[i];
  }
  TORCH_CHECK_VALUE(total == n, "sizes: expected numbers >= 0 that sum to ", n, ", got ", segments);
  if (!weights) return;
  TORCH_CHECK_VALUE(weights->sizes() == scores.sizes(), "weights: expected shape ", scores.sizes(), ", got ",
                    weights->sizes());
  TORCH_CHECK_TYPE(weights->scalar_type() == at::kFloat, "weights: expected float32, got ", weights->scalar_type());
  TORCH_CHECK_VALUE(weights->device() == scores.device(), "weights: expected on ", scores.device(),
                    " like scores, got ", weights->device());
}

}  // namespace mfac
