// The CUDA ops, kernels and all, as ops for CPU tensors: loaded after the extension, they take the place of the CPU
// kernels.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../csrc/checks.h"

#define CUDA \
  CPU  // the dispatch key for which bindings.cpp registers its ops; torch's own headers have been read by now
#include "../../csrc/cuda/bindings.cpp"
