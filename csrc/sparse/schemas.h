// The schemas of the inference ops; bindings.h registers the kernels, mfac/sparse/compiled.py has the Python functions,
// the fakes and the docstrings. Nothing is written but the result.
//
//   N  output features or channels        x           float32 or bfloat16; so are values, bias and the result
//   K  inputs of an output: features, or   bias        [N]
//      channels · kernel height · width    activation  "none", "relu" or "relu6", applied last
//
// A sparse W of `shape` [N, K] is given in slices of 4 rows, S = ceil(N/4), the entries of a slice side by side:
//
//   values   [steps, 4]             entry s of each row of the slice; 0 where a row has fewer
//   columns  [steps, 4] or [steps]  int16, their columns in [0, K], K for no weight: one per row, or one for the four
//                                   rows (blocks of 4 x 1, as pattern [4, 1] leaves them)
//   pointers [S + 1]                int32, first step of each slice
//   order    [4 S]                  int32, the row of W that each row of a slice is, -1 for none. A permutation within
//                                   windows of 128 rows: rows of like numbers of weights are together.
#pragma once

#include <torch/library.h>

TORCH_LIBRARY(mfac_sparse, m) {
  // x [..., K] Wᵀ + bias: [..., N].
  m.def(
      "linear(Tensor x, Tensor values, Tensor columns, Tensor pointers, Tensor order, Tensor? bias, int[2] shape, str "
      "activation='none') -> Tensor");
  // Convolution of x [n, channels, height, width] by W: [n, N, ...], contiguous. Column
  // (c · kernel[0] + i) · kernel[1] + j of W is channel c at position (i, j) of the kernel.
  m.def(
      "conv2d(Tensor x, Tensor values, Tensor columns, Tensor pointers, Tensor order, Tensor? bias, int[2] shape, "
      "int[2] kernel, int[2] stride, int[2] padding, str activation='none') -> Tensor");
  // Convolution of each channel of x [n, channels, height, width] by its own 3 x 3 kernel, weight [channels, 1, 3, 3],
  // dense, with a border of one zero and stride 1 or 2: [n, channels, ...], contiguous.
  m.def("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, str activation='none') -> Tensor");
}
