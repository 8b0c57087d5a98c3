// Argument checks of the ops, shared by all devices. Each says what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

namespace mfac {

inline void check_grads(const at::Tensor& grads, double damping, int64_t block_size) {
  TORCH_CHECK_VALUE(grads.dim() == 2 && grads.size(0) > 0, "grads: expected [m, d] with m >= 1 gradients, got shape ",
                    grads.sizes());
  TORCH_CHECK_TYPE(grads.scalar_type() == at::kFloat || grads.scalar_type() == at::kBFloat16,
                   "grads: expected float32 or bfloat16, got ", grads.scalar_type());
  TORCH_CHECK_VALUE(damping > 0 && std::isfinite(damping), "damping: expected a finite number > 0, got ", damping);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size: expected >= 1, got ", block_size);
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
