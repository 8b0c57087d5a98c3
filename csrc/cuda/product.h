// Products of bfloat16 matrices with float32 sums, which ATen has for CUDA only: tests/emulation replaces this header.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>

namespace mfac::cuda {

// a[count, n, k] b[count, k, p], float32
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) { return at::bmm(a, b, at::kFloat); }

}  // namespace mfac::cuda
