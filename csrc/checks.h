// Argument checks of the ops, shared by all devices. Each says what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

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

}  // namespace mfac
